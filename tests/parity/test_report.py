"""Differences by hand."""

from __future__ import annotations

import math

from polar_ft.groups import TokenGroup
from polar_ft.parity.inputs import ParityInput
from polar_ft.parity.report import Deviation, compare


def texts(*lengths: int) -> tuple[ParityInput, TokenGroup]:
    """An input whose candidates have so many tokens."""
    item = ParityInput("short", "p", "r", tuple(f"c{n}" for n in lengths))
    return item, TokenGroup.of_sequences([[0] * n for n in lengths])


def compared(expected, found, tolerance=0.1) -> Deviation:
    pairs = [texts(10, 64, 65), texts(200, 5000)]
    inputs, encoded = zip(*pairs, strict=True)
    return compare("other", inputs, encoded, expected, found, tolerance)


def test_largest_difference_and_order_by_length():
    expected = [[1.0, 2.0, 3.0], [-1.0, -2.0]]
    #  differences: 0.05, 0.25, 0.0           0.5, 1.5; -2 overtakes -1
    found = [[1.05, 1.75, 3.0], [-1.5, -0.5]]
    result = compared(expected, found, tolerance=2.0)
    assert result.ok
    assert result.max_abs_diff == 1.5
    assert (result.n_order_changes, result.n_pairs) == (1, 4)  # 3 pairs of three, 1 of two
    found_classes = [
        (c.up_to, c.n, round(c.max_abs_diff, 9), c.n_order_changes, c.n_pairs) for c in result.lengths
    ]
    assert found_classes == [
        (64, 2, 0.25, 0, 1),  # 10 and 64 tokens
        (256, 2, 0.5, 0, 0),  # 65 of the first input, 200 of the second: no pair
        (16384, 1, 1.5, 0, 0),
    ]
    assert (result.worst.input, result.worst.candidate, result.worst.tokens) == (1, 1, 5000)
    assert (result.worst.expected, result.worst.found) == (-2.0, -0.5)


def test_beyond_the_tolerance():
    expected = [[1.0, 2.0, 3.0], [-1.0, -2.0]]
    found = [[1.0, 2.0, 3.125], [-1.0, -2.0]]
    assert compared(expected, found, tolerance=0.125).ok
    assert not compared(expected, found, tolerance=0.12).ok


def test_what_is_not_finite_is_never_ok():
    expected = [[1.0, 2.0, 3.0], [-1.0, -2.0]]
    for bad in (math.nan, math.inf):
        result = compared(expected, [[1.0, bad, 3.0], [-1.0, -2.0]], tolerance=1e9)
        assert not result.ok
        assert result.max_abs_diff is None
        assert [c.max_abs_diff for c in result.lengths] == [None, 0.0, 0.0]
        assert (result.worst.input, result.worst.candidate) == (0, 1)


def test_ties_have_no_order():
    expected = [[1.0, 1.0, 2.0], [0.0, 0.0]]
    found = [[1.0, 1.5, 1.0], [0.1, 0.0]]  # 1.5 > 1.0 where 1.0 < 2.0: one change; the ties are none
    assert compared(expected, found).n_order_changes == 1


def test_a_way_that_failed_is_not_ok_and_one_for_information_is():
    assert not Deviation(name="x", tolerance=1.0, error="no answer").ok
    assert not Deviation(name="x", tolerance=1.0).ok
    assert Deviation(name="x", tolerance=None, note="not run").ok
