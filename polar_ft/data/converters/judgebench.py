"""JudgeBench (arXiv 2410.12784): pairs of answers of which one is objectively correct, without references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import Converted, Layout, described

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
    READ = "README and data of github.com/ScalerLab/JudgeBench, 2026-11-21"

    pair_id: str = described("a string")
    source: str = described("a string")
    question: str = described("a text")
    response_A: str = described("a text")  # noqa: N815 – the file's own name
    response_B: str = described("a text")  # noqa: N815
    label: Literal["A>B", "B>A"] = described('"A>B" or "B>A"')
    original_id: int | str | None = described("a string", default=None)
    response_model: str | None = described("a string", default=None)


def judgebench(row: Mapping[str, Any]) -> Converted:
    """A pair of JudgeBench: the answer that its label prefers is chosen; the reference is empty.

    ``subset`` is the source of the question, ``category`` one of the four that the paper reports. Of the
    real files two rows were read; none was converted as a whole.

    Raises:
        RowError: The row is laid out otherwise.

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
    return Converted([result | pair.rest()])
