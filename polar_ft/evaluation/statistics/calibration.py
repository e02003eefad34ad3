"""Does the margin say how sure one may be? Reliability of σ(margin), and the temperature that mends it."""

from __future__ import annotations

import numpy as np
import scipy  # its parts load when they are first used
from pydantic import BaseModel, ConfigDict

from polar_ft.evaluation.pairs import Floats
from polar_ft.evaluation.statistics.accuracy import Interval, wilson_interval

BINS = 10


class ReliabilityBin(BaseModel):
    """Pairs of like confidence: what the model claims, and how often it is right.

    Attributes:
        low: Confidences of the bin lie in [low, high), those of the last one in [low, high].
        high: See `low`.
        n_pairs: Pairs in the bin; the figures below are None where there is none.
        confidence: Mean confidence.
        accuracy: Share of correct pairs, a tie as half.
        accuracy_ci95: 95 % Wilson interval of `accuracy`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    n_pairs: int
    confidence: float | None
    accuracy: float | None
    accuracy_ci95: Interval | None


class Calibration(BaseModel):
    """How far σ(margin) is a probability, over the scored pairs.

    The model says with probability σ(margin) that the chosen candidate is the better one. Which of two
    candidates is called chosen is known to the data alone, so a pair is seen as the model sees it: it prefers
    one side with confidence σ(|margin|), from 0.5 to 1, and is right if that side is the chosen one.

    Attributes:
        n_pairs: Scored pairs.
        bins: The reliability curve: bins of equal width over [0.5, 1].
        ece: Expected calibration error: the mean over pairs of |accuracy − confidence| of their bin.
        brier: Mean squared error of σ(margin) against 1; 0.25 is what knowing nothing gets.
        log_loss: Mean of −log σ(margin), in nats.
        temperature: The T > 0 for which σ(margin / T) has the least log-loss: above 1 the model is too sure,
            below 1 not sure enough. None where there is no such T, see `temperature_note`.
        temperature_note: Why there is no temperature; None where there is one.
        log_loss_at_temperature: Log-loss of σ(margin / temperature).
        ece_at_temperature: `ece` of σ(margin / temperature).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_pairs: int
    bins: list[ReliabilityBin]
    ece: float
    brier: float
    log_loss: float
    temperature: float | None
    temperature_note: str | None
    log_loss_at_temperature: float | None
    ece_at_temperature: float | None


def calibration(margin: Floats, n_bins: int = BINS) -> Calibration | None:
    """Reliability of σ(margin) over the pairs with a finite margin; None where there is none.

    ECE: Guo et al., "On calibration of modern neural networks" (2017), equation 3, with bins over [0.5, 1];
    temperature: the same, section 4.2, here one number fitted to the very pairs that it is reported for. The
    Brier score is the same whichever candidate is called the first.

    Args:
        margin: Chosen − rejected score, `[pairs]`.
        n_bins: Bins of the reliability curve.

    One pair right with margin log 4, so confidence 4/5; one wrong with margin −log 1.5, so 3/5. Two bins,
    [0.5, 0.75) and [0.75, 1]: off by 0.6 and 0.2, so ECE 0.4; Brier ((1 − 4/5)² + (1 − 2/5)²) / 2 = 0.2:

    >>> figures = calibration(np.log([4, 1 / 1.5]), n_bins=2)
    >>> [(b.low, b.high, b.n_pairs, round(b.confidence, 3), b.accuracy) for b in figures.bins]
    [(0.5, 0.75, 1, 0.6, 0.0), (0.75, 1.0, 1, 0.8, 1.0)]
    >>> round(figures.ece, 3), round(figures.brier, 3)
    (0.4, 0.2)
    """
    scored = margin[np.isfinite(margin)]
    if not len(scored):
        return None
    temperature, note = _temperature(scored)
    bins = reliability(scored, n_bins)
    scaled = None if temperature is None else scored / temperature
    return Calibration(
        n_pairs=len(scored),
        bins=bins,
        ece=_ece(bins),
        brier=float(np.mean(scipy.special.expit(-scored) ** 2)),
        log_loss=_log_loss(scored),
        temperature=temperature,
        temperature_note=note,
        log_loss_at_temperature=None if scaled is None else _log_loss(scaled),
        ece_at_temperature=None if scaled is None else _ece(reliability(scaled, n_bins)),
    )


def reliability(margin: Floats, n_bins: int = BINS) -> list[ReliabilityBin]:
    """The reliability curve: pairs in bins of equal width over [0.5, 1] by their confidence σ(|margin|).

    Args:
        margin: Finite margins, `[pairs]`.
        n_bins: Number of bins.
    """
    confidence = scipy.special.expit(np.abs(margin))
    credit = (np.sign(margin) + 1) / 2
    edges = np.linspace(0.5, 1.0, n_bins + 1)
    places = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, n_bins - 1)
    counts = np.bincount(places, minlength=n_bins)
    confidences = np.bincount(places, confidence, n_bins)
    credits = np.bincount(places, credit, n_bins)
    return [
        ReliabilityBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            n_pairs=int(n),
            confidence=float(confidences[i] / n) if n else None,
            accuracy=float(credits[i] / n) if n else None,
            accuracy_ci95=wilson_interval(float(credits[i]), int(n)) if n else None,
        )
        for i, n in enumerate(counts)
    ]


def _ece(bins: list[ReliabilityBin]) -> float:
    off = [
        b.n_pairs * abs(b.accuracy - b.confidence)
        for b in bins
        if b.accuracy is not None and b.confidence is not None
    ]
    return sum(off) / sum(b.n_pairs for b in bins)


def _log_loss(margin: Floats) -> float:
    return float(np.logaddexp(0.0, -margin).mean())


def _temperature(margin: Floats) -> tuple[float | None, str | None]:
    """The temperature of least log-loss, or why there is none.

    With β = 1 / T the loss mean(log(1 + e^(−βm))) is convex, with slope −mean(m · σ(−βm)), so the best β is
    where that is 0. At β = 0 it is −mean(m) / 2, and for large β only the wrong pairs are left in it.
    """
    if margin.min() >= 0:
        return None, "no pair is wrong: the lower the temperature, the lower the loss"
    if margin.mean() <= 0:
        return None, "the mean margin is not above 0: the higher the temperature, the lower the loss"

    # In units of the mean absolute margin, so that the search starts near the answer on any scale.
    scale = float(np.abs(margin).mean())
    units = margin / scale

    def slope(beta: float) -> float:
        return -float(np.mean(units * scipy.special.expit(-beta * units)))

    high = 1.0
    while slope(high) < 0:
        high *= 2
    low = high / 2
    while slope(low) > 0:
        low /= 2
    return scale / scipy.optimize.brentq(slope, low, high, xtol=1e-12 * low), None
