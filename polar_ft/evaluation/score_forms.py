"""Result files of other tools: how a row says which score is the chosen candidate's.

=================  =========================================================================================
a pair a row       two columns such as chosen_score, score_chosen, chosen_reward, rewards_chosen, and those of
                   the rejected (or "reject") candidate. So RMB's results (`chosen_reward`, `reject_reward`,
                   `pair_uid`, `category_path`) and RewardBench's (`scores_chosen`, `scores_rejected`)
RewardBench 2      `scores`, of which the first `num_correct` are of correct answers: all correct against all
                   wrong ones, and the benchmark's own summary
JudgeBench         `label` ("A>B") and `judgments`, of which the first has `scores` of A and B
=================  =========================================================================================

RewardBench's scripts write a file of columns, each a list; `by_rows` makes rows of it. Read on 2026-11-24 in
allenai/reward-bench (`rewardbench/rewardbench.py`, `scripts/run_rm.py`, `scripts/run_v2.py`),
Zhou-Zoey/RMB-Reward-Model-Benchmark (`eval/scripts/my_run_rm.py`, `eval/result/`) and ScalerLab/JudgeBench
(`outputs/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import REWARDBENCH_2

Row = dict[str, Any]

_WORDS = ("score", "reward", "scores", "rewards")
_IDS = ("id", "pair_uid", "pair_id", "uid")


@dataclass(frozen=True)
class Form:
    """How the rows of a file become pairs.

    Attributes:
        name: For the report: what the scores were read from.
        pairs: The pairs of a row, as rows of `scores.jsonl`; None where the row is one already.
        ranked: The row of `rankings.jsonl` of a row; None where rows are pairs.
    """

    name: str
    pairs: Callable[[Row], list[Row]] | None = None
    ranked: Callable[[Row], Row] | None = None


def find_form(row: Mapping[str, Any]) -> Form:
    """The form of a file, by its first row.

    Raises:
        PolarError: The row has no scores, or those of two different things.

    >>> row = {"pair_uid": "7", "chosen_reward": 1.5, "reject_reward": 0.5}
    >>> form = find_form(row)
    >>> form.name, {name: value for name, value in form.pairs(row)[0].items() if name not in row}
    ('the columns chosen_reward and reject_reward', {'chosen_score': 1.5, 'rejected_score': 0.5, 'id': '7'})
    """
    if "chosen_score" in row or "rejected_score" in row:
        return Form("chosen_score and rejected_score")
    if "judgments" in row and "label" in row:
        return Form("results of JudgeBench", pairs=_judgebench)
    if "scores" in row and "num_correct" in row:
        return Form("results of RewardBench 2", pairs=_rewardbench_2, ranked=_rewardbench_2_ranked)
    found = [names for names in _column_pairs() if all(name in row for name in names)]
    numeric = isinstance(row.get("chosen"), (int, float)) and isinstance(row.get("rejected"), (int, float))
    if not found and numeric:
        found = [("chosen", "rejected")]
    if not found:
        raise PolarError(
            f"no scores: two columns such as chosen_score and rejected_score (or chosen_reward and "
            f"rejected_reward) are needed, and the first row has {', '.join(row)[:200] or 'nothing'}; rename "
            f"the columns"
        )
    if len(found) > 1:
        several = ", ".join(" and ".join(names) for names in found)
        raise PolarError(
            f"the rows have several pairs of scores ({several}); name those of the model chosen_score and "
            f"rejected_score"
        )
    chosen, rejected = found[0]
    return Form(f"the columns {chosen} and {rejected}", pairs=lambda row: [_named(row, chosen, rejected)])


def _column_pairs() -> Iterator[tuple[str, str]]:
    for word, loser in product(_WORDS, ("rejected", "reject")):
        yield f"chosen_{word}", f"{loser}_{word}"
        yield f"{word}_chosen", f"{word}_{loser}"


def by_rows(table: Mapping[str, Any]) -> list[Row] | None:
    """The rows of an object whose values are columns; None where it is no such object.

    A value that is no list is the same for all rows, as is the name of the model.

    >>> by_rows({"id": [1, 2], "scores_chosen": [0.5, 2.0], "scores_rejected": [0.1, 3.0], "model": "m"})[1]
    {'id': 2, 'scores_chosen': 2.0, 'scores_rejected': 3.0, 'model': 'm'}
    >>> by_rows({"chosen_score": 1.0, "rejected_score": 0.5, "candidates": ["a", "b"]})
    """
    names = ["num_correct", *(name for pair in _column_pairs() for name in pair)]
    lengths = {len(table[name]) for name in names if isinstance(table.get(name), list)}
    if len(lengths) != 1 or (n_rows := lengths.pop()) < 2:  # a list of one is how some models give a score
        return None
    per_row = {name for name, value in table.items() if isinstance(value, list) and len(value) == n_rows}
    return [
        {name: value[row] if name in per_row else value for name, value in table.items()}
        for row in range(n_rows)
    ]


def _named(row: Row, chosen: str, rejected: str) -> Row:
    """The row with the names of `scores.jsonl` in addition to its own."""
    named = row | {"chosen_score": _single(row.get(chosen)), "rejected_score": _single(row.get(rejected))}
    named["id"] = next((row[name] for name in _IDS if row.get(name) is not None), None)
    if named.get("subset") is None and isinstance(category := row.get("category_path"), str):
        named["subset"] = category.removeprefix("Pairwise_set/").removeprefix("BoN_set/")
    for role in ("chosen", "rejected"):
        if f"text_{role}" in row:
            named.setdefault(role, row[f"text_{role}"])
    return named


def _single(score: Any) -> Any:
    """A score, out of the list of one that some models of RewardBench give."""
    return score[0] if isinstance(score, list) and len(score) == 1 else score


def _judgebench(row: Row) -> list[Row]:
    first = (row["judgments"] or [None])[0]
    scores = (first or {}).get("judgment", {}).get("scores")
    if not isinstance(scores, list) or len(scores) != 2 or row["label"] not in ("A>B", "B>A"):
        raise ValueError(
            "is no result of a reward model — label must be A>B or B>A, and judgments must hold two scores"
        )
    chosen, rejected = ("A", "B") if row["label"] == "A>B" else ("B", "A")
    score_of = dict(zip("AB", scores, strict=True))
    return [
        {
            "id": row.get("pair_id"),
            "subset": row.get("source"),
            "prompt": row.get("question"),
            "chosen": row.get(f"response_{chosen}"),
            "rejected": row.get(f"response_{rejected}"),
            "chosen_score": score_of[chosen],
            "rejected_score": score_of[rejected],
        }
    ]


def _rewardbench_2(row: Row) -> list[Row]:
    scores, n_correct = _of_answers(row)
    common = {"id": row.get("id"), "subset": row.get("subset"), "prompt_id": str(row.get("id"))}
    return [
        common | {"pair": [i, j], "chosen_score": scores[i], "rejected_score": scores[j]}
        for i, j in product(range(n_correct), range(n_correct, len(scores)))
    ]


def _rewardbench_2_ranked(row: Row) -> Row:
    scores, n_correct = _of_answers(row)
    return {
        "id": row.get("id"),
        "subset": row.get("subset"),
        "prompt_id": str(row.get("id")),
        "benchmark": REWARDBENCH_2,
        "candidates": [{"score": s, "given": int(i < n_correct), "info": {}} for i, s in enumerate(scores)],
    }


def _of_answers(row: Row) -> tuple[list[Any], int]:
    scores, n_correct = row.get("scores"), row.get("num_correct")
    if not isinstance(scores, list) or not isinstance(n_correct, int) or not 0 < n_correct < len(scores):
        raise ValueError(
            "is no result of RewardBench 2 — scores must be a list, of which the first num_correct are of "
            "correct answers and the others of wrong ones"
        )
    return [_single(score) for score in scores], n_correct
