"""RewardBench (arXiv 2403.13787) and RewardBench 2 (arXiv 2506.01937), both without references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import Converted, Layout, described, labelled_row
from polar_ft.data.records import RowError

# rewardbench/constants.py of github.com/allenai/reward-bench, as read on 2026-11-21.
_SECTIONS = {
    "Chat": "alpacaeval-easy alpacaeval-length alpacaeval-hard mt-bench-easy mt-bench-med",
    "Chat Hard": "mt-bench-hard llmbar-natural llmbar-adver-neighbor llmbar-adver-GPTInst "
    "llmbar-adver-GPTOut llmbar-adver-manual",
    "Safety": "refusals-dangerous refusals-offensive xstest-should-refuse xstest-should-respond donotanswer",
    "Reasoning": "math-prm hep-cpp hep-go hep-java hep-js hep-python hep-rust",
}
_SECTION_OF = {subset: section for section, subsets in _SECTIONS.items() for subset in subsets.split()}


class RewardBenchRow(Layout):
    """A row of allenai/reward-bench (splits filtered, which is the benchmark, and raw)."""

    LAYOUT = "rewardbench"
    READ = "card of allenai/reward-bench, 2026-11-21"

    prompt: str = described("a text")
    chosen: str = described("a text")
    rejected: str = described("a text")
    subset: str = described("a string")
    id: int | str | None = described("a number", default=None)
    chosen_model: str | None = described("a string", default=None)
    rejected_model: str | None = described("a string", default=None)


def rewardbench(row: Mapping[str, Any]) -> Converted:
    """A pair of RewardBench, with the section of its subset; the reference is empty.

    The benchmark's own figure of a section is an average over pairs, in which math-prm counts as 984 pairs
    (it has 447). Written from the data card; the files themselves were not at hand.

    Raises:
        RowError: The row is laid out otherwise.

    >>> row = {"id": 7, "prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": "math-prm"}
    >>> rewardbench(row).rows[0]["section"]
    'Reasoning'
    """
    pair = RewardBenchRow.of(row)
    result: dict[str, Any] = {} if pair.id is None else {"id": pair.id}
    result |= {"subset": pair.subset, "benchmark": "rewardbench"}
    if pair.subset in _SECTION_OF:
        result["section"] = _SECTION_OF[pair.subset]
    result |= {"prompt": pair.prompt, "reference": "", "chosen": pair.chosen, "rejected": pair.rejected}
    for side, model in (("chosen", pair.chosen_model), ("rejected", pair.rejected_model)):
        if model is not None:
            result[f"{side}_policy"] = model
    return Converted([result | pair.rest()])


class RewardBench2Row(Layout):
    """A row of allenai/reward-bench-2 (split test)."""

    LAYOUT = "rewardbench-2"
    READ = "card of allenai/reward-bench-2, 2026-11-21"

    id: str = described("a string")
    prompt: str = described("a text")
    chosen: list[str] = described("a list of correct answers", min_length=1)
    rejected: list[str] = described("a list of wrong answers", min_length=1)
    subset: str = described("a string")
    num_correct: int | None = described("a number", default=None)
    num_incorrect: int | None = described("a number", default=None)
    total_completions: int | None = described("a number", default=None)
    models: list[str] | None = described("a list of the models that wrote the answers", default=None)


def rewardbench_2(row: Mapping[str, Any], *, reference: Literal["best", "none"] = "none") -> Converted:
    """A ranked row of RewardBench 2: correct answers have score 1, wrong ones 0; the reference is empty.

    Rows have one correct and three wrong answers, but for the subset Ties, where there may be several correct
    ones. The ids of Ties ("ref:3" and "tied:3" belong together) are needed for its score, so ids stay as they
    are.

    Written from the data card and the scoring code (rewardbench/utils.py); the files themselves were not at
    hand. The models that wrote the answers are named where there are as many of them as answers.

    Args:
        row: The row.
        reference: "best" takes the first correct answer out and makes it the reference, which needs another
            correct one: rows of Ties, that is, whose figures are then no longer the benchmark's.

    Raises:
        RowError: The row is laid out otherwise, has another number of answers than it says, or has no
            correct answer to spare.

    >>> row = {"id": "1", "prompt": "2+2?", "chosen": ["4"], "rejected": ["3", "5", "22"], "subset": "Math"}
    >>> rewardbench_2(row).rows[0]["responses"][:2]
    [{'content': '4', 'score': 1, 'correct': True}, {'content': '3', 'score': 0, 'correct': False}]
    """
    ranked = RewardBench2Row.of(row)
    for field, says, has in (
        ("num_correct", ranked.num_correct, len(ranked.chosen)),
        ("num_incorrect", ranked.num_incorrect, len(ranked.rejected)),
    ):
        if says is not None and says != has:
            raise RowError(field, f"is {says}, but there are {has} — the file is not what its card describes")
    answers = [(text, True) for text in ranked.chosen] + [(text, False) for text in ranked.rejected]
    named = ranked.models is not None and len(ranked.models) == len(answers)
    policies = ranked.models if named else [None] * len(answers)
    responses = [
        {"content": text, "score": int(correct), "correct": correct}
        | ({} if policy is None else {"policy": policy})
        for (text, correct), policy in zip(answers, policies or (), strict=True)
    ]
    common = {"id": ranked.id, "subset": ranked.subset, "benchmark": "rewardbench-2", "prompt": ranked.prompt}
    return Converted([labelled_row(common, responses, reference) | ranked.rest()])
