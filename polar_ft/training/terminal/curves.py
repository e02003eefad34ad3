"""Curves of characters: a value over the steps of a run, drawn in Braille dots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.text import Text

# Dots of a character, by row and column of its 4 × 2 (Unicode, block Braille Patterns).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BRAILLE = 0x2800
_MARK = "●"

Points = Mapping[int, float]


def draw_curve(curve: Points, marks: Points, width: int, height: int, last: int) -> list[Text]:
    """Lines of characters that show a curve and marks, with the range of values on the left.

    Args:
        curve: Step to value; where there are more steps than columns, they are averaged.
        marks: Step to value, each drawn as ●: validations.
        width: Characters of a line.
        height: Lines of the plot; one more names the steps.
        last: Step at the right edge; 0 or 1 is at the left.

    >>> for line in draw_curve({1: 0.0, 2: 1.0}, {3: 0.5}, width=12, height=2, last=3):
    ...     print(repr(line.plain.rstrip()))
    '    1 ┤ ⡰⠁ ●'
    '    0 ┤⡰⠁'
    '       1   3'
    """
    values = [v for v in (*curve.values(), *marks.values()) if math.isfinite(v)]
    if not values:
        return [Text("(no values yet)".ljust(width), style="dim")] + [Text(" " * width)] * height
    low, high = min(values), max(values)
    labels = (_label(high), _label(low))
    margin = max(5, *map(len, labels))
    columns = max(1, width - margin - 2)
    first = min([1, *curve, *marks])
    span, rise = max(1, last - first), (high - low) or 1.0

    def place(step: int, value: float, across: int, down: int) -> tuple[int, int]:
        x = round((step - first) / span * (across - 1))
        y = round((high - value) / rise * (down - 1))
        return min(x, across - 1), y

    sums: dict[int, list[float]] = {}
    for step, value in curve.items():
        if math.isfinite(value):
            sums.setdefault(place(step, high, 2 * columns, 4 * height)[0], []).append(value)
    cells = [[0] * columns for _ in range(height)]
    dots = [(x, round((high - sum(v) / len(v)) / rise * (4 * height - 1))) for x, v in sorted(sums.items())]
    for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots, strict=False):  # lines from dot to dot
        parts = max(1, x1 - x0, abs(y1 - y0))
        for part in range(parts + 1):
            x, y = (round(a + (b - a) * part / parts) for a, b in ((x0, x1), (y0, y1)))
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    marked = {place(step, v, columns, height) for step, v in marks.items() if math.isfinite(v)}

    lines = []
    for row in range(height):
        label = labels[0] if row == 0 else labels[1] if row == height - 1 else ""
        line = Text(f"{label:>{margin}} ┤", style="dim")
        for mark, places in groupby(range(columns), lambda column: (column, row) in marked):  # noqa: B023
            bits = [cells[row][column] for column in places]
            text = "".join(_MARK if mark else chr(_BRAILLE + one) if one else " " for one in bits)
            line.append(text, style=f"not dim {'magenta' if mark else 'cyan'}")
        lines.append(line)
    steps = f"{first}{last:>{columns - len(str(first))}}"
    return [*lines, Text(" " * (margin + 2) + steps, style="dim")]


def _label(value: float) -> str:
    """
    >>> _label(0.69314718), _label(2e-05), _label(-1234.5), _label(0)
    ('0.693', '2e-05', '-1.23e+03', '0')
    """
    return f"{value:.3g}"


def of_name(rows: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    """Step to value of one name; a step that was computed again has its last value.

    >>> of_name([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}, {"step": 2, "loss": 0.5}], "loss")
    {1: 0.7, 2: 0.5}
    """
    return {int(row["step"]): row[name] for row in rows if name in row}
