"""How figures are written, the same on the screen and in every file."""

from __future__ import annotations

from polar_ft.evaluation.statistics.accuracy import Interval


def percent(share: float | None) -> str:
    """A share in percent with one decimal, "–" for none.

    >>> percent(0.7512), percent(None)
    ('75.1', '–')
    """
    return "–" if share is None else f"{100 * share:.1f}"


def percent_interval(interval: Interval | None) -> str:
    """An interval of shares in percent.

    >>> percent_interval((0.7, 0.8126))
    '70.0–81.3'
    """
    return "–" if interval is None else "–".join(percent(bound) for bound in interval)


def signed_points(difference: float | None) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> signed_points(-0.0312), signed_points(0.5), signed_points(0.0)
    ('−3.1', '+50.0', '0.0')
    """
    if difference is None:
        return "–"
    rounded = f"{100 * difference:+.1f}"
    return "0.0" if float(rounded) == 0 else rounded.replace("-", "−")


def number(value: float | None) -> str:
    """A figure without a unit, short enough for a column.

    >>> [number(value) for value in (0.12345, 1234.5, 2.5e7, None)]
    ['0.123', '1234', '2.5e+07', '–']
    """
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2g}" if abs(value) >= 1e5 else f"{value:.0f}"


def p_value(value: float | None) -> str:
    """A probability of chance; one that small is not written as zero.

    >>> p_value(0.0004), p_value(0.031)
    ('< 0.001', '0.031')
    """
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(n: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "pair"), count(1200, "pair")
    ('1 pair', '1,200 pairs')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
