"""A small run whose figures can be derived by hand, and one with everything a report can hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from polar_ft.evaluation.figures import compute_figures
from polar_ft.evaluation.gates import GateResult
from polar_ft.evaluation.pairs import RM_BENCH, RMB, Categories, PairTable, Ranking
from polar_ft.evaluation.report.report import DataFile, Report, RunInfo, Truncation

HOSTILE = "<script>alert(1)</script></style>\u202egnp.exe\x1b[31m$x$ & \"'"


def run_info(**fields: object) -> RunInfo:
    values = {
        "model": "work_dirs/polar-tiny",
        "data": [DataFile(path="held_out.jsonl", sha256="ab" * 32)],
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"polar-ft": "0"},
        "dtype": "float32",
        "max_length": 400,
        "max_response_length": 64,
        "n_rows": 4,
    }
    return RunInfo(**{**values, **fields})


@pytest.fixture
def four_pairs() -> PairTable:
    """One right, one tied, one wrong, one that is not finite; no prompt has two of them."""
    return PairTable(
        chosen_score=np.array([2.0, 0.5, 0.0, np.nan]),
        rejected_score=np.array([1.0, 0.5, 3.0, 1.0]),
        ids=["a", "b", "c", "d"],
        subsets={"subset": Categories.from_values(["chat", "chat", "[bold]maths", "code"])},
        prompts=np.arange(4),
        chosen_chars=np.array([6, 4, 4, 1]),
        rejected_chars=np.array([5, 4, 8, 1]),
        chosen_rouge=np.array([0.9, 0.2, 0.1, 0.0]),
        rejected_rouge=np.array([0.1, 0.2, 0.8, 0.0]),
        shuffled_chosen=np.array([1.0, 1.0, 0.0, 0.0]),
        shuffled_rejected=np.array([2.0, 0.0, 3.0, 1.0]),
    )


@pytest.fixture
def four_pairs_report(four_pairs: PairTable) -> Report:
    return Report(
        metrics=compute_figures(four_pairs, samples=50),
        gates=[GateResult(name="label_swap", status="passed", text="1 − accuracy − ties.", n=3)],
        truncation=Truncation(n_pairs=2, prompt=2, reference=1, chosen=1, rejected=0),
        run=run_info(n_ties_in_data=7, shuffle_seed=0, n_same_reference=1),
    )


def make_table(n: int, names: list[str], seed: int = 0) -> PairTable:
    """A table with every column, pairs sharing prompts."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(6.0, 0.8, (2, n))).astype(np.int64)
    chosen, rejected = rng.normal(0.7, 1.5, n), rng.normal(0.0, 1.5, n)
    noise = rng.normal(0.0, 2.0, (4, n))
    return PairTable(
        chosen_score=chosen,
        rejected_score=rejected,
        ids=[f"row-{i}" for i in range(n)],
        subsets={
            "subset": Categories(names, (np.arange(n) % len(names)).astype(np.int32)),
            "language": Categories(["de", "zh"], (np.arange(n) % 2).astype(np.int32)),
        },
        prompts=np.arange(n) // 2,
        chosen_chars=lengths[0],
        rejected_chars=lengths[1],
        cut=rng.random(n) < 0.1,
        reference_is_chosen=rng.random(n) < 0.1,
        chosen_rouge=rng.random(n),
        rejected_rouge=rng.random(n),
        shuffled_chosen=chosen + noise[0],
        shuffled_rejected=rejected + noise[1],
        empty_chosen=chosen + noise[2],
        empty_rejected=rejected + noise[3],
    )


def make_rankings(names: list[str]) -> list[Ranking]:
    rng = np.random.default_rng(1)
    styles = ["concise", "detailed_plain", "detailed_markdown"] * 2
    rows = []
    for i in range(12):
        name = names[i % len(names)]
        given = np.array([1.0, 1, 1, 0, 0, 0])
        info = [{"style": style} for style in styles]
        rows.append(Ranking(f"m{i}", name, i, given + rng.normal(0, 1, 6), given, info, RM_BENCH))
        given = np.array([3.0, 2, 1])
        rows.append(Ranking(f"r{i}", f"{name}/x", i, given + rng.normal(0, 1, 3), given, [{}] * 3, RMB))
    return rows


@pytest.fixture
def make_run() -> Callable[..., tuple[Report, PairTable]]:
    """Makes a run with every section a report can have."""

    def make(names: list[str], n: int = 400, **fields: object) -> tuple[Report, PairTable]:
        table = make_table(n, names)
        report = Report(
            metrics=compute_figures(table, make_rankings(names), samples=100),
            gates=[
                GateResult(name="label_swap", status="passed", text="As it should be.", n=3),
                GateResult(name="batch_and_packing", status="failed", text="It depends on the batch.", n=3),
            ],
            warnings=["A line was torn."],
            truncation=Truncation(n_pairs=40, prompt=10, reference=10, chosen=10, rejected=10),
            run=run_info(n_rows=n, **fields),
        )
        return report, table

    return make
