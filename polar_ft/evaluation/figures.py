"""Every figure of an evaluation: what stands in `metrics.json` under "metrics"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Bools, Floats, PairTable, Ranking, margins
from polar_ft.evaluation.statistics.accuracy import (
    MacroMetrics,
    PairMetrics,
    macro_metrics,
    margin_metrics,
    subset_metrics,
)
from polar_ft.evaluation.statistics.baselines import Baselines, baselines
from polar_ft.evaluation.statistics.benchmarks import Benchmarks, benchmarks
from polar_ft.evaluation.statistics.calibration import Calibration, calibration
from polar_ft.evaluation.statistics.comparison import PairedDifference, paired_difference
from polar_ft.evaluation.statistics.length import LengthBias, length_bias
from polar_ft.evaluation.statistics.ranking import RankingFigures, ranking_figures
from polar_ft.evaluation.statistics.resampling import SAMPLES, SEED


class Breakdown(BaseModel):
    """The pairs by the values of one field.

    Attributes:
        macro: Unweighted mean over the subsets.
        subsets: Value → figures of its pairs, in the order in which they are shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macro: MacroMetrics
    subsets: dict[str, PairMetrics]


class OtherReference(BaseModel):
    """The same pairs scored with another reference.

    Attributes:
        overall: Figures with that reference.
        against_own: That reference (B) against the row's own (A) on the same pairs: a model that reads the
            reference loses accuracy.
        subsets: Field → value → accuracy with that reference; None where no pair of the subset is scored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: PairMetrics
    against_own: PairedDifference
    subsets: dict[str, dict[str, float | None]]


class ReferenceUse(BaseModel):
    """Is the reference read?

    Attributes:
        shuffled: With another row's reference; None where it was not scored.
        empty: With an empty reference; None where it was not scored.
        n_reference_is_chosen: Pairs whose reference has the text of the chosen candidate; None where that is
            not known, as the two below.
        reference_is_chosen: Figures of those pairs, which likeness to the reference alone gets right.
        reference_is_not_chosen: Figures of the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shuffled: OtherReference | None
    empty: OtherReference | None
    n_reference_is_chosen: int | None
    reference_is_chosen: PairMetrics | None
    reference_is_not_chosen: PairMetrics | None


class Figures(BaseModel):
    """All figures of a run.

    Attributes:
        overall: All pairs.
        macro: Mean over the subsets of the field "subset"; None where the data has none.
        subsets: Field → its breakdown; "subset" first, then the fields that were asked for.
        baselines: What the same pairs give without a model.
        calibration: Of σ(margin); None without a scored pair.
        length: Length bias; None where lengths are not known or no pair is scored.
        reference_use: Whether the reference is read; None where nothing is known of it.
        ranking: Figures of ranked rows; None where the data has none.
        benchmarks: Published summaries; None where the data is of none of the benchmarks.
        bootstrap_samples: Samples behind each bootstrap interval.
        bootstrap_seed: Seed of the bootstraps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: PairMetrics
    macro: MacroMetrics | None
    subsets: dict[str, Breakdown]
    baselines: Baselines
    calibration: Calibration | None
    length: LengthBias | None
    reference_use: ReferenceUse | None
    ranking: RankingFigures | None
    benchmarks: Benchmarks | None
    bootstrap_samples: int
    bootstrap_seed: int


def compute_figures(
    table: PairTable,
    rankings: Sequence[Ranking] = (),
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Figures:
    """Computes every figure that the data allows.

    Args:
        table: The scored pairs.
        rankings: The ranked rows; their pairs are in `table` too.
        samples: Samples of each bootstrap.
        seed: Of the bootstraps; figures of one data set and seed are the same every time.

    >>> table = PairTable(np.array([2.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0]))
    >>> figures = compute_figures(table)
    >>> round(figures.overall.accuracy, 4), round(figures.calibration.brier, 4), figures.ranking
    (0.6667, 0.2264, None)
    """
    subsets = {}
    for name, categories in table.subsets.items():
        rows = subset_metrics(table.margins, categories, table.prompts, samples=samples, seed=seed)
        subsets[name] = Breakdown(macro=macro_metrics(rows), subsets=rows)
    return Figures(
        overall=margin_metrics(table.margins, table.prompts, samples=samples, seed=seed),
        macro=subsets["subset"].macro if "subset" in subsets else None,
        subsets=subsets,
        baselines=baselines(table),
        calibration=calibration(table.margins),
        length=length_bias(table),
        reference_use=_reference_use(table, samples=samples, seed=seed),
        ranking=ranking_figures(rankings, samples=samples, seed=seed) if rankings else None,
        benchmarks=benchmarks(rankings),
        bootstrap_samples=samples,
        bootstrap_seed=seed,
    )


def _reference_use(table: PairTable, **bootstrap: int) -> ReferenceUse | None:
    shuffled = _other_reference(table, table.shuffled_chosen, table.shuffled_rejected, **bootstrap)
    empty = _other_reference(table, table.empty_chosen, table.empty_rejected, **bootstrap)
    same = table.reference_is_chosen
    if shuffled is None and empty is None and same is None:
        return None

    def metrics_of(rows: Bools) -> PairMetrics:
        prompts = None if table.prompts is None else table.prompts[rows]
        return margin_metrics(table.margins[rows], prompts, **bootstrap)

    return ReferenceUse(
        shuffled=shuffled,
        empty=empty,
        n_reference_is_chosen=None if same is None else int(np.count_nonzero(same)),
        reference_is_chosen=None if same is None else metrics_of(same),
        reference_is_not_chosen=None if same is None else metrics_of(~same),
    )


def _other_reference(
    table: PairTable, chosen: Floats | None, rejected: Floats | None, **bootstrap: int
) -> OtherReference | None:
    if chosen is None or rejected is None:
        return None
    other = margins(chosen, rejected)
    return OtherReference(
        overall=margin_metrics(other, table.prompts, **bootstrap),
        against_own=paired_difference(table.margins, other, table.prompts, **bootstrap),
        subsets={
            name: {value: row.accuracy for value, row in subset_metrics(other, categories).items()}
            for name, categories in table.subsets.items()
        },
    )
