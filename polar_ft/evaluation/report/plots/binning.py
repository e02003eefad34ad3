"""What the plots show: bins, never a mark a pair, so that a report's size does not grow with the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polar_ft.evaluation.pairs import Floats, Ints

# A bin with fewer marks than this shows noise; small data gets fewer bins instead.
MIN_PER_BIN = 10


@dataclass(frozen=True)
class Histogram:
    """Counts of margins; 0 is always an edge, so that right and wrong never share a bar.

    Attributes:
        edges: `[bins + 1]`, ascending.
        counts: `[bins]`.
        n_clipped: Values outside the edges, counted into the first and last bin.
    """

    edges: Floats
    counts: Ints
    n_clipped: int


def margin_histogram(margins: Floats, bins: int = 40) -> Histogram:
    """About `bins` bars over the bulk of the margins; the outermost 0.2 % go into the end bars.

    Args:
        margins: Finite margins, `[pairs]`, at least one.
        bins: How many bars, about.

    >>> histogram = margin_histogram(np.array([-0.5, 0.5, 0.5, 1.5]), bins=4)
    >>> histogram.edges.tolist(), histogram.counts.tolist()
    ([-0.5, 0.0, 0.5, 1.0, 1.5], [1, 0, 2, 1])
    """
    # Of a thousand pairs or fewer, 0.1 % at each end is less than one.
    low, high = np.quantile(margins, [0.001, 0.999] if len(margins) > 1000 else [0.0, 1.0])
    low, high = min(0.0, float(low)), max(0.0, float(high))
    width = _round_width((high - low) / bins) or 1.0
    # A quotient that underflows to 0 still needs a bar on its side of 0.
    first, last = min(int(np.floor(low / width)), -1 if low < 0 else 0), max(int(np.ceil(high / width)), 1)
    edges: Floats = np.arange(first, last + 1, dtype=np.float64) * width
    inside = np.clip(margins, edges[0], edges[-1])
    counts = np.histogram(inside, edges)[0]
    n_clipped = int(np.count_nonzero((margins < edges[0]) | (margins > edges[-1])))
    return Histogram(edges=edges, counts=counts, n_clipped=n_clipped)


@dataclass(frozen=True)
class ScoreBand:
    """Scores of candidates by their length, one entry a bin.

    Attributes:
        length: Median length of the bin's candidates, `[bins]`.
        low: 10th percentile of their scores, `[bins]`; `middle` is the median and `high` the 90th.
        n: Candidates in the bin, `[bins]`.
    """

    length: Floats
    low: Floats
    middle: Floats
    high: Floats
    n: Ints


def score_by_length(lengths: Ints, scores: Floats, bins: int = 12) -> ScoreBand:
    """Median and 10th to 90th percentile of the scores in bins of equally many candidates.

    Args:
        lengths: Of the candidates, `[candidates]`, at least one.
        scores: Finite scores, `[candidates]`.
        bins: How many bins, at most; equal lengths never fall into two.

    >>> band = score_by_length(np.array([1, 1, 1, 9]), np.array([0.0, 1.0, 2.0, 5.0]), bins=2)
    >>> band.length.tolist(), band.middle.tolist()
    ([1.0], [1.5])
    """
    bins = int(np.clip(len(lengths) // MIN_PER_BIN, 1, bins))
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    cuts = ordered[np.arange(1, bins) * len(ordered) // bins]
    starts = np.unique(np.searchsorted(ordered, cuts, side="left"))
    groups = [rows for rows in np.split(order, starts) if len(rows)]
    percentiles = np.array([np.percentile(scores[rows], [10, 50, 90]) for rows in groups])
    return ScoreBand(
        length=np.array([np.median(lengths[rows]) for rows in groups]),
        low=percentiles[:, 0],
        middle=percentiles[:, 1],
        high=percentiles[:, 2],
        n=np.array([len(rows) for rows in groups]),
    )


def _round_width(width: float) -> float:
    """The nearest of 1, 2, 2.5 and 5 times a power of ten, not below `width`; 0 for 0.

    >>> [_round_width(width) for width in (0.0, 0.03, 0.12, 7.0)]
    [0.0, 0.05, 0.2, 10.0]
    """
    if width <= 0:
        return 0.0
    power = 10.0 ** np.floor(np.log10(width))
    steps = [step * power for step in (1, 2, 2.5, 5, 10)]
    return float(next(step for step in steps if step >= width * (1 - 1e-9)))
