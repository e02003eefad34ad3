"""The first line of a result: what is worse is called that, and what is not known too."""

from __future__ import annotations

import numpy as np
import pytest

from polar_ft.evaluation.pairs import PairTable
from polar_ft.fit.verdict import Side, headline, needed, rule_credit


def side(name: str, accuracy: float, difference: float, half: float) -> Side:
    return Side(
        name=name,
        accuracy=accuracy,
        difference=difference,
        difference_ci95=(difference - half, difference + half),
        p_value=0.01,
    )


MODEL = Side(name="the new model", accuracy=0.75, interval=(0.7, 0.8))


@pytest.mark.parametrize(
    ("base", "rule", "status", "begins"),
    [
        ((0.6, 0.15, 0.05), (0.5, 0.25, 0.05), "passed", "Better than the base model: 75.0 %"),
        ((0.8, -0.05, 0.02), (0.5, 0.25, 0.05), "failed", "Worse than the base model: 75.0 %"),
        ((0.6, 0.15, 0.05), (0.78, -0.03, 0.05), "failed", "Worse than a rule without a model"),
        ((0.74, 0.01, 0.05), (0.5, 0.25, 0.05), "warning", "Not shown to be better than the base model"),
        ((0.77, -0.02, 0.05), (0.5, 0.25, 0.05), "warning", "Not shown to be better than the base model"),
        ((0.6, 0.15, 0.05), (0.73, 0.02, 0.05), "warning", "Better than the base model, but not shown"),
    ],
)
def test_headline(base, rule, status, begins):
    found, text = headline(MODEL, side("the base model", *base), side("taking the longer one", *rule), 400)
    assert (found, text[: len(begins)]) == (status, begins)


def test_a_worse_rule_does_not_hide_a_worse_base():
    """Both are worse: the base comes first, which is what the user wants to know."""
    text = headline(MODEL, side("the base model", 0.8, -0.05, 0.01), side("a rule", 0.8, -0.05, 0.01), 9)[1]
    assert text.startswith("Worse than the base model")


def test_pairs_that_would_be_needed():
    # Half a width of 6 % has to become 2 %: nine times as many.
    assert needed(100, 40, (0.64, 0.76)) == (900, 360)
    assert needed(100, 40, (0.70, 0.73)) == (None, None)


def test_rules_are_right_half_of_the_time_where_they_do_not_decide():
    zeros = np.zeros(3)
    table = PairTable(zeros, zeros, chosen_chars=np.array([9, 4, 5]), rejected_chars=np.array([3, 8, 5]))
    assert rule_credit(table, "taking the longer candidate").tolist() == [1.0, 0.0, 0.5]
    assert rule_credit(table, "taking the shorter candidate").tolist() == [0.0, 1.0, 0.5]
    assert rule_credit(table, "chance").tolist() == [0.5, 0.5, 0.5]
