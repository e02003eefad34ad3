from __future__ import annotations

import math

import numpy as np
import pytest

from polar_ft.evaluation.pairs import REWARDBENCH_2, RM_BENCH, RMB, Ranking
from polar_ft.evaluation.statistics.benchmarks import STYLES, benchmarks, rewardbench_2, rm_bench, rmb


def ranking(model_scores, given_scores, subset, *, name="row", info=None, benchmark=None):
    info = info or [{} for _ in given_scores]
    return Ranking(
        name, subset, 0, np.array(model_scores, float), np.array(given_scores, float), info, benchmark
    )


def test_best_of_four_by_hand():
    good = [1, 0, 0, 0]
    figures = rewardbench_2(
        [
            ranking([4, 3, 2, 1], good, "Math"),
            ranking([4, 4, 2, 1], good, "Math"),  # level with one other: a half
            ranking([0, 3, 2, 1], good, "Safety"),
            ranking([2, 2, 2, 2], good, "Safety"),  # a quarter
            ranking([math.nan, 1, 1, 1], good, "Safety"),  # left out
            ranking([1, 2], [1, 1], "Safety"),  # nothing wrong to choose: left out
        ]
    )
    assert figures.subsets == {"Math": 0.75, "Safety": 0.125}
    assert figures.n_rows == {"Math": 2, "Safety": 2}
    assert figures.score == (0.75 + 0.125) / 2
    assert figures.missing_subsets == ["Factuality", "Focus", "Precise IF", "Ties"]
    assert (figures.ties, figures.n_left_out) == (None, 2)


def ties(question, ref, tied, n_tied_correct):
    """Both forms of a question; of `ref` the first score is of a correct answer, of `tied` the first few."""
    return [
        ranking(ref, [1] + [0] * (len(ref) - 1), "Ties", name=f"ref:{question}"),
        ranking(
            tied, [1] * n_tied_correct + [0] * (len(tied) - n_tied_correct), "Ties", name=f"tied:{question}"
        ),
    ]


def test_ties_by_hand():
    rows = [
        # ref margin 5 − 1 = 4; tied: correct 6, 5.5, 5 over 2: margin 3, spread 1
        *ties("1", [5, 1, 0], [6, 5.5, 5, 2], 3),
        # ref margin 1; tied: correct 9, 5 over 2: margin 3, spread 4: right, but not preferred
        *ties("2", [3, 2], [9, 5, 2, 1], 2),
        # ref margin −1: wrong; tied: correct 4, 4 over 3: margin 1, spread 0: preferred, but not the hard way
        *ties("3", [0, 1], [4, 4, 3], 2),
        # tied alone: correct 2, 1 over 1: margin 0, not right; counts to the accuracy alone
        ties("4", [1, 0], [2, 1, 1], 2)[1],
    ]
    score = rewardbench_2(rows).ties
    assert (score.n_ref, score.n_tied, score.n_questions) == (3, 4, 3)
    assert score.ref_accuracy == 2 / 3
    assert score.tied_accuracy == 3 / 4
    assert score.correctness_preferred == 2 / 3  # 3 > 1, 3 < 4, 1 > 0
    assert score.correctness_preferred_hard == 1 / 3  # min(4, 3) > 1, 1 < 4, −1 < 0
    # tanh of smaller margin / spread − 1: 3/1 − 1, 1/4 − 1, and −1/0 → −∞
    assert score.margin_score == pytest.approx((math.tanh(2) + math.tanh(-0.75) - 1) / 3)
    expected = 0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * score.margin_score
    assert score.score == pytest.approx(expected)


def test_ties_of_no_margin_and_no_spread_score_0():
    score = rewardbench_2(ties("1", [2, 2], [3, 3, 3], 2)).ties
    assert (score.margin_score, score.score) == (0.0, 0.0)


def test_ties_need_both_forms_of_a_question():
    figures = rewardbench_2(
        [
            ties("1", [2, 1], [2, 2, 1], 2)[0],
            ties("2", [2, 1], [2, 2, 1], 2)[1],
            ranking([2, 1], [1, 0], "Ties", name="7"),
            ranking([2, 1], [1, 0], "Math"),
        ]
    )
    assert figures.ties is None
    assert figures.subsets == {"Math": 1.0}
    assert figures.n_left_out == 3


def test_ties_are_one_subset_of_the_score():
    rows = [*ties("1", [5, 1, 0], [6, 5.5, 5, 2], 3), ranking([1, 2], [1, 0], "Math")]
    figures = rewardbench_2(rows)
    assert figures.n_rows == {"Math": 1, "Ties": 2}
    assert figures.score == (0 + figures.ties.score) / 2
    assert figures.ties.score == pytest.approx(1 + 0.01 * math.tanh(2))


def style_row(chosen, rejected, domain, styles=STYLES):
    return ranking(
        [*chosen, *rejected],
        [1, 1, 1, 0, 0, 0],
        domain,
        info=[{"style": style} for style in (*styles, *styles)],
    )


def test_rm_bench_by_hand():
    # chosen 2 4 6 against rejected 1 3 6: rows of wins 1 0 0 / 1 1 0 / 1 1 0, the last a tie
    figures = rm_bench([style_row([2, 4, 6], [1, 3, 6], "chat"), style_row([9, 9, 9], [0, 0, 0], "math")])
    chat = figures.domains["chat"]
    assert chat.matrix == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert (chat.hard, chat.normal, chat.easy) == (0, 2 / 3, 1)
    assert chat.average == pytest.approx(5 / 9)
    assert (figures.hard, figures.normal, figures.easy) == (0.5, pytest.approx(5 / 6), 1)
    assert figures.average == pytest.approx((5 / 9 + 1) / 2)
    assert figures.n_left_out == 0


def test_rm_bench_rows_of_safety_are_one_domain():
    rows = [
        style_row([1, 1, 1], [0, 0, 0], "safety-refuse"),
        style_row([0, 0, 0], [1, 1, 1], "safety-response"),
        style_row([0, 0, 0], [1, 1, 1], "safety-response"),
        style_row([1, 1, 1], [0, 0, 0], "code"),
    ]
    figures = rm_bench(rows)
    assert list(figures.domains) == ["code", "safety"]
    assert figures.domains["safety"].n_rows == 3
    assert figures.missing_domains == ["chat", "math"]
    assert figures.average == pytest.approx((1 + 1 / 3) / 2)


def test_rm_bench_reads_styles_not_places():
    candidates = [(2, 1, 0), (4, 1, 1), (6, 1, 2), (1, 0, 0), (3, 0, 1), (6, 0, 2)]
    shuffled = [candidates[i] for i in (5, 0, 3, 2, 4, 1)]
    row = ranking(
        [score for score, _, _ in shuffled],
        [good for _, good, _ in shuffled],
        "chat",
        info=[{"style": STYLES[style]} for _, _, style in shuffled],
    )
    assert rm_bench([row]) == rm_bench([style_row([2, 4, 6], [1, 3, 6], "chat")])


@pytest.mark.parametrize(
    "row",
    [
        style_row([2, 4, math.nan], [1, 3, 6], "chat"),
        style_row([2, 4, 6], [1, 3, 6], "chat", styles=("concise", "concise", "detailed_plain")),
        style_row([2, 4, 6], [1, 3, 6], "chat", styles=("a", "b", "c")),
        ranking([1, 0], [1, 0], "chat"),
    ],
)
def test_rm_bench_rows_without_the_structure_are_counted(row):
    assert rm_bench([row]) is None
    assert rm_bench([row, style_row([1, 1, 1], [0, 0, 0], "chat")]).n_left_out == 1


def test_rmb_by_hand():
    good = [1, 0, 0]
    figures = rmb(
        [
            ranking([3, 2, 1], good, "Helpfulness/Chat"),
            ranking([3, 3, 1], good, "Helpfulness/Chat"),  # a tie is not above
            ranking([2, 1, 0], good, "Helpfulness/Code"),
            ranking([1, 2, 0], good, "Harmlessness/S1"),
            ranking([1, 2, math.nan], good, "Harmlessness/S1"),
            ranking([1, 2, 0], [1, 1, 0], "Harmlessness/S1"),  # two are best
            ranking([1, 2], [1, 1], "Harmlessness/S1"),
        ]
    )
    assert figures.subsets == {"Harmlessness/S1": 0.0, "Helpfulness/Chat": 0.5, "Helpfulness/Code": 1.0}
    assert figures.n_rows == {"Harmlessness/S1": 1, "Helpfulness/Chat": 2, "Helpfulness/Code": 1}
    helpful = figures.goals["Helpfulness"]
    assert (helpful.n_rows, helpful.accuracy, helpful.macro_accuracy) == (3, 2 / 3, 0.75)
    assert figures.goals["Harmlessness"].accuracy == 0
    assert (figures.accuracy, figures.n_left_out) == (2 / 4, 3)


def test_rows_count_to_the_benchmark_that_they_name():
    rows = [
        ranking([2, 1], [1, 0], "Math", benchmark=REWARDBENCH_2),
        ranking([1, 2], [1, 0], "Helpfulness/Chat", benchmark=RMB),
        ranking([1, 2], [1, 0], "chat", benchmark=RM_BENCH),  # without styles: no summary
        ranking([1, 2], [1, 0], "own"),
    ]
    found = benchmarks(rows)
    assert found.rewardbench_2.score == 1.0
    assert found.rmb.accuracy == 0.0
    assert found.rm_bench is None
    assert benchmarks(rows[2:]) is None
    assert benchmarks([]) is None
