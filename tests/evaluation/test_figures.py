from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.evaluation.figures import Figures, compute_figures
from polar_ft.evaluation.pairs import REWARDBENCH_2, Categories, PairTable, Ranking
from polar_ft.evaluation.statistics.comparison import paired_difference


def test_everything_that_the_data_allows():
    rng = np.random.default_rng(0)
    n = 120
    ints = lambda high: rng.integers(0, high, n)  # noqa: E731
    table = PairTable(
        rng.normal(0.5, 1, n),
        rng.normal(0, 1, n),
        ids=[str(i) for i in range(n)],
        subsets={
            "subset": Categories(["x", "y"], ints(2).astype(np.int32)),
            "language": Categories(["en", "zh", "fr"], ints(3).astype(np.int32)),
        },
        prompts=ints(30),
        chosen_chars=ints(90),
        rejected_chars=ints(90),
        reference_is_chosen=rng.random(n) < 0.1,
        chosen_rouge=rng.random(n),
        rejected_rouge=rng.random(n),
        shuffled_chosen=rng.normal(size=n),
        shuffled_rejected=rng.normal(size=n),
        empty_chosen=rng.normal(size=n),
        empty_rejected=rng.normal(size=n),
    )
    rows = [
        Ranking("r", "Math", 0, np.array([2.0, 1]), np.array([1.0, 0]), [{}, {}], benchmark=REWARDBENCH_2)
    ]
    figures = compute_figures(table, rows, samples=300, seed=7)
    assert all(value is not None for value in figures.model_dump().values())
    assert list(figures.subsets) == ["subset", "language"]
    assert figures.macro == figures.subsets["subset"].macro
    assert sum(row.n_pairs for row in figures.subsets["language"].subsets.values()) == n
    assert figures.overall.accuracy_ci95_by_prompt is not None
    assert (figures.bootstrap_samples, figures.bootstrap_seed) == (300, 7)
    assert figures.benchmarks.rewardbench_2.score == figures.ranking.overall.best_of_n == 1
    use = figures.reference_use
    assert use.shuffled.against_own == paired_difference(
        table.margins, table.shuffled_chosen - table.shuffled_rejected, table.prompts, samples=300, seed=7
    )
    assert use.shuffled.overall.accuracy == use.shuffled.against_own.accuracy_b
    assert use.shuffled.subsets.keys() == {"subset", "language"}
    assert use.n_reference_is_chosen == use.reference_is_chosen.n_pairs
    assert use.reference_is_chosen.n_pairs + use.reference_is_not_chosen.n_pairs == n
    # metrics.json gives back what was written.
    assert Figures.model_validate_json(figures.model_dump_json()) == figures
    assert compute_figures(table, rows, samples=300, seed=7) == figures


@pytest.mark.parametrize("scores", [[], [math.nan, math.inf]])
def test_no_scored_pair(scores):
    column = np.array(scores, float)
    same = np.zeros(len(scores), int)
    table = PairTable(
        column,
        column,
        subsets={"subset": Categories(["x"], same.astype(np.int32))},
        prompts=same,
        chosen_chars=same,
        rejected_chars=same,
        reference_is_chosen=same > 0,
        shuffled_chosen=column,
        shuffled_rejected=column,
    )
    figures = compute_figures(table)
    assert figures.overall.n_nonfinite == len(scores)
    assert figures.overall.accuracy is figures.calibration is figures.length is figures.macro.accuracy is None
    assert figures.reference_use.shuffled.against_own.n_pairs == 0
    assert "NaN" not in figures.model_dump_json()


def test_scores_alone():
    figures = compute_figures(PairTable(np.array([1.0, 0.0]), np.array([0.0, 2.0])))
    assert figures.overall.accuracy == 0.5
    assert figures.overall.n_prompts is None
    assert (
        figures.macro
        is figures.length
        is figures.reference_use
        is figures.ranking
        is figures.benchmarks
        is None
    )
    assert figures.subsets == {}


finite = st.floats(-50, 50).map(lambda x: round(x, 2))


@given(
    st.lists(st.tuples(finite, finite, st.integers(0, 4), st.integers(1, 9), st.integers(1, 9)), min_size=1)
)
def test_label_swap(rows):
    """Chosen and rejected exchanged: 1 − accuracy − ties, and every symmetric figure as it was."""
    chosen, rejected, prompts, chosen_chars, rejected_chars = map(np.array, zip(*rows, strict=True))
    one = compute_figures(
        PairTable(
            chosen, rejected, prompts=prompts, chosen_chars=chosen_chars, rejected_chars=rejected_chars
        ),
        samples=50,
    )
    other = compute_figures(
        PairTable(
            rejected, chosen, prompts=prompts, chosen_chars=rejected_chars, rejected_chars=chosen_chars
        ),
        samples=50,
    )
    ties = one.overall.n_ties / one.overall.n_scored
    assert other.overall.accuracy == pytest.approx(1 - one.overall.accuracy - ties)
    assert other.baselines.longer_wins.overall == pytest.approx(1 - one.baselines.longer_wins.overall)
    assert other.length.chosen_longer.n_pairs == one.length.rejected_longer.n_pairs
    assert other.length.score_and_length.pearson == (
        None
        if one.length.score_and_length.pearson is None
        else pytest.approx(one.length.score_and_length.pearson, abs=1e-6)
    )
    assert [b.n_pairs for b in other.calibration.bins] == [b.n_pairs for b in one.calibration.bins]
