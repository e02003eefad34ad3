from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.evaluation.pairs import Categories, PairTable, margins


@given(st.lists(st.sampled_from(["", "a", "b", "中文"]), max_size=30))
def test_categories_give_back_the_values(values):
    categories = Categories.from_values(values)
    assert [categories.names[code] for code in categories.codes] == values
    rows = categories.rows()
    assert list(rows) == sorted(set(values))
    for name, group in rows.items():
        assert group.tolist() == [row for row, value in enumerate(values) if value == name]


def test_margins_and_which_pairs_are_scored():
    table = PairTable(np.array([3.0, math.inf, math.inf, 0.0]), np.array([1.0, 1.0, math.inf, math.nan]))
    assert len(table) == 4
    assert table.margins[:2].tolist() == [2.0, math.inf]
    assert table.scored.tolist() == [True, False, False, False]


def test_columns_of_another_length_are_named():
    one, two = np.zeros(1), np.zeros(2)
    with pytest.raises(
        ValueError, match=r"columns of 2 pairs with other lengths: .*'ids': 1, \"subsets\['s'\]\": 1"
    ):
        PairTable(two, two, ids=["x"], subsets={"s": Categories.from_values(["a"])})
    with pytest.raises(ValueError, match="'rejected_score': 1"):
        PairTable(two, one)


@pytest.mark.parametrize(("chosen", "rejected"), [([1.0], [1.0, 2.0]), ([[1.0]], [[2.0]])])
def test_margins_of_shapes_that_do_not_fit(chosen, rejected):
    with pytest.raises(ValueError, match="one shape"):
        margins(chosen, rejected)
