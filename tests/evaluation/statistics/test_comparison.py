from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from polar_ft.errors import PolarError
from polar_ft.evaluation.pairs import Categories, PairTable
from polar_ft.evaluation.statistics.accuracy import wilson_interval
from polar_ft.evaluation.statistics.comparison import compare, holm, match, paired_difference


def table(margin, ids=None, **columns):
    margin = np.array(margin, float)
    return PairTable(margin, np.zeros(len(margin)), ids=ids, **columns)


def numbered(margin):
    return table(margin, [str(row) for row in range(len(margin))])


def test_difference_by_hand():
    # both right, only A, only B twice, both wrong, a tie in A that B has right, not finite in one
    margin_a = np.array([1, 1, -1, -1, -1, 0, math.nan, 1])
    margin_b = np.array([2, -1, 1, 1, -1, 3, 1, math.inf])
    result = paired_difference(margin_a, margin_b)
    assert (result.n_pairs, result.n_prompts) == (6, None)
    assert (result.accuracy_a, result.accuracy_b) == (2 / 6, 4 / 6)
    assert result.difference == pytest.approx(2 / 6)
    assert (result.n_only_a, result.n_only_b) == (1, 3)
    # Exact McNemar: 1 or fewer, or 3 or more, of 4 fair coins = 2 · (1 + 4) / 16
    assert result.p_mcnemar == pytest.approx(10 / 16)
    low, high = result.difference_ci95
    assert -1 <= low < 0 < high <= 1
    assert result.p_value > 0.05
    assert result.p_holm is None


def test_clear_difference():
    rng = np.random.default_rng(0)
    margin_a = np.where(rng.random(500) < 0.6, 1.0, -1.0)
    margin_b = np.where(rng.random(500) < 0.8, 1.0, -1.0)
    result = paired_difference(margin_a, margin_b)
    assert result.p_value < 0.001
    assert result.p_mcnemar < 0.001
    low, high = result.difference_ci95
    # The normal interval of independent samples is close: √(.6·.4/500 + .8·.2/500) = 0.028
    assert (low, high) == pytest.approx((result.difference - 0.055, result.difference + 0.055), abs=0.01)


def test_pairs_of_a_prompt_are_no_independent_evidence():
    """B is right on the ten pairs of one prompt more: McNemar is sure, the prompts are not."""
    margin_a, margin_b = np.ones(100), np.ones(100)
    margin_a[:10] = -1
    prompts = np.repeat(np.arange(10), 10)
    result = paired_difference(margin_a, margin_b, prompts)
    assert result.n_prompts == 10
    assert result.p_mcnemar == pytest.approx(2 / 2**10)
    assert result.p_value > 0.2
    assert paired_difference(margin_a, margin_b).p_value < 0.01


def test_interval_covers_95_percent():
    """40 prompts of 3 pairs; runs share the prompt's difficulty, B is 6 points better; 800 data sets."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 3)
    spread = math.sqrt(1 + 0.5 + 1)

    def run(accuracy, shared):
        own = rng.normal(0, math.sqrt(0.5), 40)[prompts]
        return stats.norm.ppf(accuracy) * spread + shared + own + rng.normal(size=len(prompts))

    covered = 0
    for seed in range(800):
        shared = rng.normal(size=40)[prompts]
        result = paired_difference(run(0.7, shared), run(0.76, shared), prompts, samples=1000, seed=seed)
        low, high = result.difference_ci95
        covered += low <= 0.06 <= high
    assert 0.93 <= covered / 800 <= 0.97


@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 5)),
        min_size=1,
        max_size=40,
    )
)
def test_swapping_the_runs_mirrors_the_difference(rows):
    margin_a, margin_b, prompts = np.array(rows).T
    prompts = prompts.astype(int)
    one = paired_difference(margin_a, margin_b, prompts, samples=500)
    other = paired_difference(margin_b, margin_a, prompts, samples=500)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.n_only_a, other.n_only_b) == (one.n_only_b, one.n_only_a)
    assert other.p_mcnemar == pytest.approx(one.p_mcnemar)
    assert one.difference_ci95[0] - 1e-9 <= one.difference <= one.difference_ci95[1] + 1e-9
    assert 0 < one.p_value <= 1
    assert paired_difference(margin_a, margin_a, prompts, samples=500).difference == 0


def test_runs_that_agree_on_all_pairs():
    result = paired_difference(np.ones(20), np.full(20, 3.0))
    unseen = wilson_interval(0, 20)[1]
    assert (result.difference, result.p_value, result.p_mcnemar) == (0, 1, 1)
    assert result.difference_ci95 == (-unseen, unseen)


def test_one_run_right_and_the_other_wrong_everywhere():
    result = paired_difference(-np.ones(20), np.ones(20))
    assert result.difference_ci95 == (1 - wilson_interval(0, 20)[1], 1.0)
    assert result.p_value == pytest.approx(2 / 2**20)


def test_nothing_to_compare():
    result = paired_difference(np.array([math.nan]), np.array([1.0]))
    assert result.n_pairs == 0
    assert result.difference is result.difference_ci95 is result.p_value is result.p_mcnemar is None


def test_holm_by_hand():
    row = paired_difference(np.ones(3), np.ones(3))
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.8, "none": None}
    rows = holm({name: row.model_copy(update={"p_value": p}) for name, p in p_values.items()})
    # in order 0.01 · 4, 0.03 · 3, 0.04 · 2 (below 0.09, so 0.09), 0.8
    assert {name: row.p_holm for name, row in rows.items()} == {
        "a": pytest.approx(0.04),
        "b": pytest.approx(0.09),
        "c": pytest.approx(0.09),
        "d": pytest.approx(0.8),
        "none": None,
    }


def test_compare_by_id():
    a = table(
        [1, -1, 2, 1],
        ["p", "q", "r", "s"],
        subsets={"subset": Categories.from_values(["x", "x", "y", "z"])},
        prompts=np.array([0, 0, 1, 2]),
    )
    b = table([-4, 1, 2, 7], ["r", "q", "p", "t"])
    result = compare(a, b)
    assert (result.n_shared, result.n_only_in_a, result.n_only_in_b, result.n_nonfinite) == (3, 1, 1, 0)
    assert (result.overall.accuracy_a, result.overall.accuracy_b) == (2 / 3, 2 / 3)
    assert result.overall.n_prompts == 2
    assert list(result.subsets["subset"]) == ["x", "y"]  # z is in A alone
    assert result.subsets["subset"]["x"].difference == pytest.approx(1 / 2)
    assert result.subsets["subset"]["y"].difference == -1
    # Margins in units of their root mean square, √(6/3) and √(21/3): r is apart 4/2.65 + 2/1.41, then q, p.
    assert [(pair.id, pair.row_a, pair.row_b) for pair in result.most_different] == [
        ("r", 2, 0),
        ("q", 1, 1),
        ("p", 0, 2),
    ]
    assert (result.most_different[0].margin_a, result.most_different[0].margin_b) == (2, -4)


def test_scale_of_a_run_does_not_matter_for_what_differs_most():
    rng = np.random.default_rng(0)
    margin = rng.normal(size=50)
    other = margin.copy()
    other[7] = -3 * margin[7]
    result = compare(numbered(margin), numbered(1000 * other), n_different=1)
    assert [pair.row_a for pair in result.most_different] == [7]
    assert compare(numbered(margin), numbered(margin)).most_different == []


def test_pairs_that_are_not_finite_are_counted_and_differ_in_nothing():
    result = compare(numbered([1, math.nan, math.inf]), numbered([-1, 1, 1]))
    assert (result.n_shared, result.n_nonfinite, result.overall.n_pairs) == (3, 2, 1)
    assert [pair.row_a for pair in result.most_different] == [0]


def texts(margins, contents, ids=None, of="texts"):
    """A run that knows its texts."""
    found = table(margins, ids)
    return dataclasses.replace(found, contents=np.array(contents, np.uint64), contents_of=of)


def rows(matched):
    return list(zip(matched.rows_a.tolist(), matched.rows_b.tolist(), strict=True))


def test_the_texts_decide_whatever_order_and_ids_say():
    a = texts([1, -1, 2], [10, 11, 12], ["f:1", "f:2", "f:3"])
    b = texts([3, 4, 5, 6], [12, 10, 13, 11], ["f:1", "f:2", "f:3", "f:4"])  # sorted, and one row more
    matched = match(a, b)
    assert (rows(matched), matched.by) == ([(0, 1), (1, 3), (2, 0)], "texts")
    # f:1, f:2 and f:3 are other pairs in B.
    assert matched.n_other_texts == 3


def test_repeated_ids_are_no_obstacle_where_texts_are_known():
    assert rows(match(texts([1, 2], [7, 8], ["x", "x"]), texts([1, 2], [8, 7], ["x", "x"]))) == [
        (0, 1),
        (1, 0),
    ]


def test_copies_of_one_text_are_told_apart_by_id():
    a = texts([1, 2, 3], [7, 7, 8], ["x", "y", "z"])
    b = texts([5, 6, 7], [8, 7, 7], ["z", "y", "x"])
    assert rows(match(a, b)) == [(0, 2), (1, 1), (2, 0)]


def test_copies_that_nothing_tells_apart_count_where_it_does_not_matter_which_is_which():
    same, other = texts([1, 1, 2], [7, 7, 8]), texts([1, 3, 2], [7, 7, 8])
    assert rows(match(same, same)) == [(0, 0), (1, 1), (2, 2)]
    assert rows(match(same, texts([4, 2], [7, 8]))) == [(0, 0), (2, 1)]
    assert rows(match(same, other)) == [(2, 2)]  # 1 or 3 against 1: left out


def test_hashes_of_different_things_are_not_compared():
    a, b = texts([1, 2], [7, 8], ["x", "y"], of="input_hash"), texts([1, 2], [7, 8], ["y", "x"])
    assert (rows(match(a, b)), match(a, b).by) == ([(0, 1), (1, 0)], "ids")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (table([1, 2]), table([1, 2], ["x", "y"]), "run A has no ids.*not matched by their order"),
        (table([1], ["x"]), table([1]), "run B has no ids"),
        (table([1, 2], ["x", "x"]), table([1, 2], ["x", "x"]), "run A has the id 'x' more than once"),
        (table([1, 2], ["x", "y"]), table([1, 2, 3], ["z", "y", "y"]), "run B has the id 'y' more than once"),
        (table([1], ["x"]), table([1], ["y"]), "share no pair"),
        (
            texts([1], [7], ["x"]),
            texts([1], [8], ["x"]),
            "none of their texts are the same, though 1 of the ids are",
        ),
    ],
)
def test_runs_that_cannot_be_matched(a, b, message):
    with pytest.raises(PolarError, match=message):
        match(a, b)
