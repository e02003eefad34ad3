from __future__ import annotations

import math

import pytest

from polar_ft.evaluation.baselines import length_baselines, rule_baseline


def test_length_baselines_by_hand():
    #             longer chosen, equal, shorter chosen, longer chosen but not scored
    chosen_chars, rejected_chars = [10, 5, 2, 90], [4, 5, 7, 1]
    baselines = length_baselines(
        chosen_chars,
        rejected_chars,
        chosen_scores=[0.0, 0.0, 0.0, math.nan],
        rejected_scores=[1.0, 1.0, 1.0, 1.0],
        subsets=["a", "a", "b", "b"],
    )
    assert baselines.longer_wins.overall == (1 + 0.5 + 0) / 3
    assert baselines.longer_wins.subsets == {"a": 0.75, "b": 0.0}
    assert baselines.longer_wins.macro == (0.75 + 0) / 2
    assert baselines.shorter_wins.overall == (0 + 0.5 + 1) / 3
    assert baselines.shorter_wins.subsets == {"a": 0.25, "b": 1.0}


def test_without_a_scored_pair_there_is_no_baseline():
    baselines = length_baselines([3], [1], chosen_scores=[math.nan], rejected_scores=[0.0])
    assert baselines.longer_wins.overall is None
    assert baselines.shorter_wins.overall is None


def test_rule_of_another_length():
    with pytest.raises(ValueError, match="one shape"):
        rule_baseline([1], [1, 2])
