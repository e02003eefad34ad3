from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.evaluation.report.worst import FieldText, lowest_margins, pair_texts, worst_pairs

scores = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0, np.nan, np.inf]), min_size=1, max_size=60)


@given(scores, st.integers(1, 70))
def test_lowest_margins_are_those_of_a_full_sort(margins, limit):
    finite = [row for row, margin in enumerate(margins) if np.isfinite(margin)]
    expected = sorted(finite, key=lambda row: margins[row])[:limit]
    assert lowest_margins(margins, np.zeros(len(margins)), limit).tolist() == expected


def test_worst_pairs_of_a_table(four_pairs):
    worst = worst_pairs(four_pairs)
    assert [(pair.id, pair.subset, pair.margin) for pair in worst] == [
        ("c", "[bold]maths", -3.0),
        ("b", "chat", 0.0),
        ("a", "chat", 1.0),
    ]
    assert worst[0].texts is None


def test_texts_are_asked_for_the_worst_pairs_alone(four_pairs):
    asked = []
    worst_pairs(four_pairs, lambda row: asked.append(row), limit=2)
    assert asked == [2, 1]


def test_what_is_cut_is_what_the_template_cuts(template, make_example):
    # One token a byte and a BOS: of a response 63 bytes are read, and of the prompt, where the limits leave
    # (400 − 4 − reference 64 − 64) // 2 = 134 tokens, 133 bytes.
    example = make_example(
        0,
        prompt="p" * 300,
        references=("r" * 70, "s"),
        candidates=("good", "b" * 100, "other"),
    )
    texts = pair_texts(template, example, 0, 1)
    assert texts.prompt == FieldText("p" * 300, 300 - 133, 300)
    assert texts.references == (FieldText("r" * 70, 0, 63), FieldText("s", 0, 1))
    assert texts.chosen == FieldText("good", 0, 4)
    assert texts.rejected == FieldText("b" * 100, 0, 63)
