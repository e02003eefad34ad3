"""Benchmarks without references: RewardBench, RewardBench 2, RM-Bench and JudgeBench.

RewardBench (arXiv 2403.13787) and JudgeBench (arXiv 2410.12784) have pairs of answers; RewardBench 2
(arXiv 2506.01937) has one or more correct answers and several wrong ones, RM-Bench (arXiv 2410.16184) three
styles of a correct and of a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from polar_ft.data.converters.format import Converted, Layout, described, labelled_row, with_extras
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
    """Converts a pair of RewardBench, with the section of its subset; the reference is empty.

    The benchmark's own figure of a section is an average over pairs, in which math-prm counts as 984 pairs
    (it has 447). Written from the data card, without access to the files.

    Raises:
        RowError: The row has another layout.

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
    return Converted([with_extras(result, pair.rest())])


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
    """Converts a row of RewardBench 2: correct answers have score 1, wrong ones 0; the reference is empty.

    Rows have one correct and three wrong answers, except in the subset Ties, where several may be correct.
    The ids of Ties ("ref:3" and "tied:3" belong together) are needed for its score, so ids are kept.

    Written from the data card and the scoring code (rewardbench/utils.py), without access to the files. The
    models that wrote the answers are kept if there are as many of them as answers.

    Args:
        row: The row.
        reference: "best" makes the first correct answer the reference, which requires another correct answer:
            only rows of Ties have one, and their figures are then no longer those of the benchmark.

    Raises:
        RowError: The row has another layout or another number of answers than it says, or only one correct
            answer where one is to become the reference.

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
    return Converted([with_extras(labelled_row(common, responses, reference), ranked.rest())])


# The order of the answers in the file.
STYLES = ("concise", "detailed_plain", "detailed_markdown")


Domain = Literal["chat", "code", "math", "safety-refuse", "safety-response"]


class RMBenchRow(Layout):
    """A row of THU-KEG/RM-Bench; those of its files for one domain do not name it."""

    LAYOUT = "rm-bench"
    READ = "README and data of github.com/THU-KEG/RM-Bench at 73c52d7, 2026-11-24"

    id: int | str = described("a string")
    prompt: str = described("a text")
    chosen: list[str] = described(
        "a list of three texts (concise, detailed, detailed with markdown)", min_length=3, max_length=3
    )
    rejected: list[str] = described(
        "a list of three texts (concise, detailed, detailed with markdown)", min_length=3, max_length=3
    )
    domain: str | None = described("a string", default=None)


def domain_of(path: str) -> dict[str, str]:
    """The domain of RM-Bench's rows in a file whose name begins with it, as an option of `rm_bench`.

    >>> domain_of("data/safety-refuse_filtered.json"), domain_of("data/total_dataset.json")
    ({'domain': 'safety-refuse'}, {})
    """
    name = Path(path).name.partition("_")[0]
    return {"domain": name} if name in get_args(Domain) else {}


def rm_bench(
    row: Mapping[str, Any],
    *,
    reference: Literal["best", "none"] = "none",
    domain: Domain | None = None,
) -> Converted:
    """Converts a row of RM-Bench: correct answers have score 1, wrong ones 0, each with its ``style``.

    The domain is the subset. The reference is empty. All three correct answers against all three wrong ones
    are the nine comparisons whose averages are the easy, normal and hard figures.

    Reads data/total_dataset.json of the repository (one list), the data of the hub, or the repository's files
    of one domain (data/chat_filtered.json and so on), whose rows do not name it.

    Args:
        row: The row.
        domain: Domain of a row that does not name one; `domain_of` takes it from the name of the file.
        reference: "best" makes the concise correct answer the reference: six of the nine comparisons remain,
            and the figures are no longer those of the benchmark.

    Raises:
        RowError: The row has another layout, or its domain is not known.

    >>> row = {"id": 1, "prompt": "2+2?", "chosen": ["4", "It is 4.", "**4**"],
    ...        "rejected": ["5", "It is 5.", "**5**"], "domain": "math"}
    >>> [(r["content"], r["score"], r["style"]) for r in rm_bench(row).rows[0]["responses"]][2:4]
    [('**4**', 1, 'detailed_markdown'), ('5', 0, 'concise')]
    """
    ranked = RMBenchRow.of(row)
    responses = [
        {"content": text, "score": int(correct), "correct": correct, "style": style}
        for correct, texts in ((True, ranked.chosen), (False, ranked.rejected))
        for style, text in zip(STYLES, texts, strict=True)
    ]
    subset = ranked.domain or domain
    if subset is None:
        raise RowError(
            "domain",
            "is missing, and the file's name does not say it, as chat_filtered.json does — give --domain",
        )
    common = {"id": ranked.id, "subset": subset, "benchmark": "rm-bench", "prompt": ranked.prompt}
    return Converted([with_extras(labelled_row(common, responses, reference), ranked.rest())])


# The four figures of the paper, by how the source begins.
_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}


class JudgeBenchRow(Layout):
    """A row of JudgeBench."""

    LAYOUT = "judgebench"
    READ = "README and data of github.com/ScalerLab/JudgeBench at e2c52c2, 2026-11-24"

    pair_id: str = described("a string")
    source: str = described("a string")
    question: str = described("a text")
    response_A: str = described("a text")  # noqa: N815 – the file's own name
    response_B: str = described("a text")  # noqa: N815
    label: Literal["A>B", "B>A"] = described('"A>B" or "B>A"')
    original_id: int | str | None = described("a string", default=None)
    response_model: str | None = described("a string", default=None)


def judgebench(row: Mapping[str, Any]) -> Converted:
    """Converts a pair of JudgeBench: the answer that the label prefers is chosen; the reference is empty.

    ``subset`` is the source of the question, ``category`` one of the four that the paper reports.

    Raises:
        RowError: The row has another layout.

    >>> row = {"pair_id": "p", "source": "livebench-math", "question": "2+2?", "response_A": "5",
    ...        "response_B": "4", "label": "B>A"}
    >>> pair = judgebench(row).rows[0]
    >>> pair["chosen"], pair["rejected"], pair["category"]
    ('4', '5', 'Math')
    """
    pair = JudgeBenchRow.of(row)
    answers = (pair.response_A, pair.response_B)
    chosen, rejected = answers if pair.label == "A>B" else answers[::-1]
    result: dict[str, Any] = {"id": pair.pair_id, "subset": pair.source, "benchmark": "judgebench"}
    for prefix, category in _CATEGORIES.items():
        if pair.source.startswith(prefix):
            result["category"] = category
    result |= {"prompt": pair.question, "reference": "", "chosen": chosen, "rejected": rejected}
    if pair.response_model is not None:
        result |= {"chosen_policy": pair.response_model, "rejected_policy": pair.response_model}
    if pair.original_id is not None:
        result["original_id"] = pair.original_id
    return Converted([with_extras(result, pair.rest())])
