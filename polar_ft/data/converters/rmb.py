"""RMB (arXiv 2410.09893): pairs with scores, and best-of-N lists, of real prompts without references.

The pairwise files have several pairs per prompt and a score for each answer. So the best answer of a prompt
is known and can become the reference of its other pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from polar_ft.data.converters.format import TIED, Converted, Layout, Turn, described, messages
from polar_ft.data.records import RowError

HOLDS_REFERENCE = "with the answer that became the reference"
NO_THIRD = "of prompts with fewer than three answers"


class Answer(BaseModel):
    """An answer and the model that wrote it."""

    model_config = ConfigDict(strict=True)

    llm_name: str
    answer: str


class ScoredAnswer(Answer):
    """An answer of the pairwise files; its score is at most 5."""

    score: float


class RMBPair(Layout):
    """A row of the Pairwise_set of RMB."""

    LAYOUT = "rmb"
    READ = "Pairwise_set of github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark, 2026-11-21"

    pair_uid: str = described("a string")
    conversation_input: list[Turn] = described("a list of messages", min_length=1)
    chosen: ScoredAnswer = described('an object with "llm_name", "answer" and "score"')
    reject: ScoredAnswer = described('an object with "llm_name", "answer" and "score"')
    category_path: str = described("a string")


class RMBBestOfN(Layout):
    """A row of the BoN_set of RMB."""

    LAYOUT = "rmb-bon"
    READ = "BoN_set of github.com/Zhou-Zoey/RMB-Reward-Model-Benchmark, 2026-11-21"

    bon_uid: str = described("a string")
    conversation_input: list[Turn] = described("a list of messages", min_length=1)
    bon_best: Answer = described('an object with "llm_name" and "answer"')
    loser_list: list[Answer] = described('a list of objects with "llm_name" and "answer"', min_length=1)
    category_path: str = described("a string")


def same_prompt(row: Mapping[str, Any]) -> Hashable:
    """Key that is equal for the pairs of one prompt.

    Raises:
        RowError: The row has another layout.
    """
    return tuple((turn.role, turn.content) for turn in RMBPair.of(row).conversation_input)


def rmb(rows: Sequence[Mapping[str, Any]], *, reference: Literal["best", "none"] = "best") -> Converted:
    """Converts the published pairs of one prompt.

    Reads the folder RMB_dataset/Pairwise_set of the repository, or files of it. Excerpts of two real files
    were read, with five complete rows; no complete file was converted.

    Args:
        rows: All rows of the prompt.
        reference: "best" makes the answer with the highest score the reference (of several, the first one in
            the file) and drops the pairs that contain it. "none" keeps all pairs, with an empty reference.

    Raises:
        RowError: The prompt's rows give one answer two scores.

    >>> scores = {"A": 5.0, "B": 4.5, "C": 2.0}
    >>> def pair(uid, chosen, rejected):
    ...     answer = lambda text: {"llm_name": "m", "answer": text, "score": scores[text]}
    ...     return {"pair_uid": uid, "conversation_input": [{"role": "user", "content": "Hi"}],
    ...             "chosen": answer(chosen), "reject": answer(rejected),
    ...             "category_path": "Pairwise_set/Helpfulness/Chat/Discussion"}
    >>> done = rmb([pair("1", "A", "C"), pair("2", "B", "C")])
    >>> [(row["id"], row["reference"][0]["content"], row["subset"]) for row in done.rows]
    [('2', 'A', 'Helpfulness/Chat')]
    >>> done.left_out
    {'with the answer that became the reference': 1}
    """
    pairs = [RMBPair.of(row) for row in rows]
    best = _ranked_answers(pairs)[0] if reference == "best" else None
    done, without = [], 0
    for pair in pairs:
        if best is not None and best.text in (pair.chosen.answer, pair.reject.answer):
            without += 1
            continue
        chosen, rejected = _Scored.of(pair.chosen), _Scored.of(pair.reject)
        done.append(_pair_row(pair, best, chosen, rejected))
    return Converted(done, {HOLDS_REFERENCE: without} if without else {})


def rmb_polar(rows: Sequence[Mapping[str, Any]]) -> Converted:
    """Converts a prompt by the POLAR paper's protocol: the best answer is the reference of the next two.

    One pair per prompt: is the second answer scored above the third (arXiv 2507.05197, section on
    evaluation)? Answers are ordered by score; of several with the same score the first in the file comes
    first, which matters if the best two are tied. A prompt gives no pair if its second and third answers are
    tied, or if it has fewer than three answers. The paper does not say how it breaks ties, and its twelve
    categories are not in the files.

    Args:
        rows: All rows of the prompt.

    Raises:
        RowError: The prompt's rows give one answer two scores.
    """
    pairs = [RMBPair.of(row) for row in rows]
    answers = _ranked_answers(pairs)
    if len(answers) < 3:
        return Converted([], {NO_THIRD: 1})
    best, second, third = answers[:3]
    if second.score == third.score:
        return Converted([], {TIED: 1})
    return Converted([_pair_row(pairs[0], best, second, third)])


def rmb_bon(row: Mapping[str, Any]) -> Converted:
    """Converts a row of RMB's best-of-N set: the best answer has score 1, the others 0; no reference.

    Reads the folder RMB_dataset/BoN_set of the repository, or files of it. Excerpts of two real files were
    read, with seven complete rows; no complete file was converted.

    Raises:
        RowError: The row has another layout.

    >>> answer = lambda text: {"llm_name": "m", "answer": text}
    >>> row = {"bon_uid": "1", "conversation_input": [{"role": "user", "content": "Hi"}],
    ...        "bon_best": answer("A"), "loser_list": [answer("B"), answer("C")],
    ...        "category_path": "BoN_set/Harmlessness/S1"}
    >>> done = rmb_bon(row).rows[0]
    >>> done["subset"], [(r["content"], r["score"]) for r in done["responses"]]
    ('Harmlessness/S1', [('A', 1), ('B', 0), ('C', 0)])
    """
    ranked = RMBBestOfN.of(row)
    answers = [(ranked.bon_best, True), *((loser, False) for loser in ranked.loser_list)]
    return Converted(
        [
            {
                "id": ranked.bon_uid,
                **_category(ranked.category_path),
                "prompt": messages(ranked.conversation_input),
                "reference": "",
                "responses": [
                    {
                        "content": answer.answer,
                        "score": int(correct),
                        "correct": correct,
                        "policy": answer.llm_name,
                    }
                    for answer, correct in answers
                ],
                **ranked.rest(),
            }
        ]
    )


@dataclass(frozen=True)
class _Scored:
    text: str
    policy: str
    score: float

    @classmethod
    def of(cls, answer: ScoredAnswer) -> _Scored:
        return cls(answer.answer, answer.llm_name, answer.score)


def _ranked_answers(pairs: Sequence[RMBPair]) -> list[_Scored]:
    """The distinct answers of a prompt, best first; equally good ones in the order of the file.

    A text that two models wrote (such as a short refusal) counts once, with the higher of its scores.
    """
    scores: dict[tuple[str, str], float] = {}
    answers: dict[str, _Scored] = {}
    for pair in pairs:
        for side, published in (("chosen", pair.chosen), ("reject", pair.reject)):
            answer = _Scored.of(published)
            known = scores.setdefault((answer.policy, answer.text), answer.score)
            if known != answer.score:
                raise RowError(
                    f"{side}.score",
                    f"is {answer.score:g} in pair {pair.pair_uid}, but {known:g} in another pair, for the "
                    "same answer of the same model — which answer of the prompt is the best one?",
                )
            if answer.text not in answers or answers[answer.text].score < answer.score:
                answers[answer.text] = answer
    return sorted(answers.values(), key=lambda answer: -answer.score)


def _pair_row(pair: RMBPair, best: _Scored | None, chosen: _Scored, rejected: _Scored) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": pair.pair_uid,
        **_category(pair.category_path),
        "prompt": messages(pair.conversation_input),
    }
    row["reference"] = "" if best is None else _message(best)
    row |= {"chosen": _message(chosen), "rejected": _message(rejected)}
    for side, answer in (("reference", best), ("chosen", chosen), ("rejected", rejected)):
        if answer is not None:
            row |= {f"{side}_score": answer.score, f"{side}_policy": answer.policy}
    return row | pair.rest()


def _message(answer: _Scored) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer.text}]


def _category(path: str) -> dict[str, str]:
    """The subset of a row (goal and category), and its scenario if the category has several.

    >>> _category("Pairwise_set/Helpfulness/Chat/Discussion")
    {'subset': 'Helpfulness/Chat', 'scenario': 'Discussion', 'benchmark': 'rmb'}
    """
    _, *parts = path.split("/")
    names = {"subset": "/".join(parts[:2]) or path}
    if len(parts) > 2:
        names["scenario"] = "/".join(parts[2:])
    return names | {"benchmark": "rmb"}
