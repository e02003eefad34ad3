from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ft.evaluation.references import shuffle_references


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(0, 2**32 - 1))
def test_as_few_rows_as_possible_keep_their_text(references, seed):
    sources = shuffle_references(references, seed)
    assert sorted(sources) == list(range(len(references)))
    kept = sum(references[row] == references[source] for row, source in enumerate(sources))
    commonest = max(Counter(references).values(), default=0)
    # The rows of the commonest text can only go to the other rows.
    assert kept == max(0, 2 * commonest - len(references))


def test_a_seed_gives_one_shuffle():
    references = [f"reference {row}" for row in range(100)]
    assert shuffle_references(references, 3) == shuffle_references(references, 3)
    assert shuffle_references(references, 3) != shuffle_references(references, 4)


@pytest.mark.parametrize("references", [[], ["alone"]])
def test_nothing_to_shuffle(references):
    assert shuffle_references(references, 0) == list(range(len(references)))
