from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.evaluation.pairs import Categories, PairTable
from polar_ft.evaluation.statistics.baselines import baselines, rouge_l


def table(chosen_score, **columns):
    return PairTable(np.array(chosen_score, float), np.zeros(len(chosen_score)), **columns)


def test_length_baselines_by_hand():
    #             longer chosen, equal, shorter chosen, longer chosen but not scored
    figures = baselines(
        table(
            [1.0, 1.0, 1.0, math.nan],
            chosen_chars=np.array([10, 5, 2, 90]),
            rejected_chars=np.array([4, 5, 7, 1]),
            subsets={
                "subset": Categories.from_values(["a", "a", "b", "b"]),
                "language": Categories.from_values(["en", "zh", "zh", "fr"]),
            },
        )
    )
    assert figures.longer_wins.overall == (1 + 0.5 + 0) / 3
    assert figures.longer_wins.subsets["subset"] == {"a": 0.75, "b": 0.0}
    assert figures.longer_wins.macro == (0.75 + 0) / 2
    assert figures.longer_wins.subsets["language"] == {"en": 1.0, "fr": None, "zh": 0.25}
    assert figures.shorter_wins.overall == (0 + 0.5 + 1) / 3
    assert figures.shorter_wins.subsets["subset"] == {"a": 0.25, "b": 1.0}
    assert figures.most_like_reference is None
    assert figures.chance == 0.5


def test_most_like_the_reference():
    # nearer, further, equal; without a reference both are NaN, which counts as half
    figures = baselines(
        table(
            [1.0] * 4,
            chosen_rouge=np.array([0.8, 0.1, 0.5, math.nan]),
            rejected_rouge=np.array([0.2, 0.3, 0.5, math.nan]),
        )
    )
    assert figures.most_like_reference.overall == (1 + 0 + 0.5 + 0.5) / 4
    assert figures.most_like_reference.macro is None
    assert figures.longer_wins is None
    assert figures.shorter_wins is None


def test_without_a_scored_pair_there_is_no_accuracy_of_a_rule():
    figures = baselines(table([math.nan], chosen_chars=np.array([3]), rejected_chars=np.array([1])))
    assert figures.longer_wins.overall is None
    assert figures.shorter_wins.overall is None


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12)


@given(words, words.filter(bool))
def test_rouge_l_is_its_definition(candidate, reference):
    """Longest common subsequence by dynamic programming, then F1 of precision and recall."""
    lcs = np.zeros((len(candidate) + 1, len(reference) + 1), int)
    for i, one in enumerate(candidate):
        for j, other in enumerate(reference):
            lcs[i + 1, j + 1] = lcs[i, j] + 1 if one == other else max(lcs[i, j + 1], lcs[i + 1, j])
    common = lcs[-1, -1]
    expected = 0.0
    if common:
        precision, recall = common / len(candidate), common / len(reference)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(candidate), " ".join(reference)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("Paris.", "paris", 1.0),
        ("", "Paris", 0.0),
        ("don't", "don t", 1.0),
        ("巴黎", "巴黎是首都", 2 * 2 / (2 + 5)),  # each ideograph is a word
        ("GPT4模型", "模型 gpt4", 2 * 2 / (3 + 3)),  # gpt4 模 型 against 模 型 gpt4
        ("한국어 문장", "한국어", 2 * 1 / (2 + 1)),
        ("naïve café", "naïve", 2 * 1 / (2 + 1)),
    ],
)
def test_rouge_l_by_hand(candidate, reference, expected):
    assert rouge_l(candidate, reference) == pytest.approx(expected)


@pytest.mark.parametrize("reference", ["", " \n", "…!?"])
def test_rouge_l_without_a_word_in_the_reference(reference):
    assert math.isnan(rouge_l("Paris", reference))
