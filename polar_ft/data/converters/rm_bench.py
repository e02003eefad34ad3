"""RM-Bench (arXiv 2410.16184): three styles of a correct and of a wrong answer, without references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from polar_ft.data.converters.format import Converted, Layout, described, labelled_row

# The order of the answers in the file.
STYLES = ("concise", "detailed_plain", "detailed_markdown")


class RMBenchRow(Layout):
    """A row of THU-KEG/RM-Bench."""

    LAYOUT = "rm-bench"
    READ = "README of github.com/THU-KEG/RM-Bench, 2026-11-21"

    id: int | str = described("a string")
    prompt: str = described("a text")
    chosen: list[str] = described(
        "a list of three texts (concise, detailed, detailed with markdown)", min_length=3, max_length=3
    )
    rejected: list[str] = described(
        "a list of three texts (concise, detailed, detailed with markdown)", min_length=3, max_length=3
    )
    domain: str = described("a string")


def rm_bench(row: Mapping[str, Any], *, reference: Literal["best", "none"] = "none") -> Converted:
    """A ranked row of RM-Bench: correct answers have score 1, wrong ones 0, each with its ``style``.

    The domain is the subset. The reference is empty. All three correct answers against all three wrong ones
    are the nine comparisons of which the easy, normal and hard figures are averages.

    Written from the README; the files themselves were not at hand. Read from data/total_dataset.json of the
    repository (one list) or from the hub.

    Args:
        row: The row.
        reference: "best" takes the concise correct answer out and makes it the reference: six of the nine
            comparisons are left, and the figures are no longer the benchmark's.

    Raises:
        RowError: The row is laid out otherwise.

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
    common = {"id": ranked.id, "subset": ranked.domain, "benchmark": "rm-bench", "prompt": ranked.prompt}
    return Converted([labelled_row(common, responses, reference) | ranked.rest()])
