"""Sections of the benchmarks: what they say of domains that the data does not have."""

from __future__ import annotations

import numpy as np

from polar_ft.evaluation.pairs import RM_BENCH, Ranking
from polar_ft.evaluation.report.ranked import benchmark_sections
from polar_ft.evaluation.statistics.benchmarks import STYLES, benchmarks


def row(domain: str) -> Ranking:
    info = [{"style": style} for style in (*STYLES, *STYLES)]
    scores, given = np.array([3.0, 2, 1, 0, 0, 0]), np.array([1.0, 1, 1, 0, 0, 0])
    return Ranking(domain, domain, 0, scores, given, info, benchmark=RM_BENCH)


def notes(*domains: str) -> list[str]:
    figures = benchmarks([row(domain) for domain in domains])
    assert figures is not None
    (section,) = benchmark_sections(figures)
    return list(section.tables[0].notes)


def test_rm_bench_says_what_is_missing_and_how_safety_is_counted() -> None:
    first, styles = notes("chat", "safety-refuse", "safety-response")
    assert first == "Not in the data: code, math. The means are not the leaderboard's."
    assert styles.endswith("the rows of safety-refuse and safety-response are pooled as one domain, safety.")
    assert notes("chat", "code", "math", "safety-refuse") == [styles]
