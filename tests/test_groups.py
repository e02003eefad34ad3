"""What is done to groups changes neither their sequences nor their pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.groups import (
    TextGroup,
    TokenGroup,
    against,
    merge_texts,
    merge_token_groups,
    select_pairs,
    split_by_tokens,
    windows,
)

# Few different tokens, so that sequences share prefixes and are equal by chance.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=5)


@st.composite
def token_groups(draw):
    group = TokenGroup.of_sequences(draw(sequences))
    candidates = st.integers(0, len(group.branches) - 1)
    pairs = draw(st.lists(st.tuples(candidates, candidates), min_size=1, max_size=4))
    numbers = np.arange(1, len(pairs) + 1, dtype=np.float32)
    return TokenGroup(group.prefix, group.branches, np.array(pairs, dtype=np.int64), numbers, 10 * numbers)


texts = st.text("ab", max_size=2)


@st.composite
def text_groups(draw):
    candidates = draw(st.lists(texts, min_size=1, max_size=4))
    index = st.integers(0, len(candidates) - 1)
    pairs = tuple(draw(st.lists(st.tuples(index, index), max_size=3)))
    weights = tuple(float(number) for number in range(len(pairs)))
    return TextGroup(draw(texts), (draw(texts),), tuple(candidates), pairs=pairs, weights=weights)


def spelled(group):
    """Each pair as (chosen, rejected, margin, weight), the sequences written out."""
    found = [tuple(sequence.tolist()) for sequence in group.sequences]
    return Counter(
        (found[chosen], found[rejected], float(margin), float(weight))
        for (chosen, rejected), margin, weight in zip(group.pairs, group.margins, group.weights, strict=True)
    )


@given(sequences)
def test_sequences_come_back_and_every_branch_has_a_token(given_sequences):
    group = TokenGroup.of_sequences(given_sequences)
    assert [sequence.tolist() for sequence in group.sequences] == given_sequences
    assert all(len(branch) for branch in group.branches)
    assert group.tree_tokens() <= sum(map(len, given_sequences))


@given(st.lists(token_groups(), min_size=1, max_size=3))
@settings(deadline=None)
def test_merging_keeps_every_pair_and_has_each_sequence_once(groups):
    merged = merge_token_groups(groups)
    assert spelled(merged) == sum(map(spelled, groups), Counter())
    written = [sequence.tobytes() for sequence in merged.sequences]
    assert len(written) == len(set(written))


@given(token_groups(), st.data())
@settings(deadline=None)
def test_selected_pairs_are_those_pairs(group, data):
    rows = data.draw(st.lists(st.integers(0, len(group.pairs) - 1), min_size=1, unique=True))
    part = select_pairs(group, np.array(rows))
    kept = TokenGroup(
        group.prefix, group.branches, group.pairs[rows], group.margins[rows], group.weights[rows]
    )
    assert spelled(part) == spelled(kept)
    assert set(part.pairs.ravel().tolist()) == set(range(len(part.branches)))
    assert all(len(branch) for branch in part.branches)


@given(sequences, st.integers(1, 20))
def test_pieces_have_every_sequence_in_order(given_sequences, most):
    group = TokenGroup.of_sequences(given_sequences)
    pieces = list(split_by_tokens(group, most))
    assert [sequence.tolist() for piece in pieces for sequence in piece.sequences] == given_sequences
    # Only a single candidate that does not fit may be larger.
    assert all(piece.tree_tokens() <= most or len(piece.branches) == 1 for piece in pieces)


@given(st.lists(text_groups(), min_size=1, max_size=5))
@settings(deadline=None)
def test_merged_texts_lead_back_to_each_candidate_and_pair(groups):
    merged = merge_texts(groups)
    assert sorted(number for one in merged for number, _ in one.members) == list(range(len(groups)))
    assert len({one.group.key for one in merged}) == len(merged)
    for one in merged:
        assert len(set(one.group.candidates)) == len(one.group.candidates)
        pairs = []
        for number, place in one.members:
            assert tuple(one.group.candidates[index] for index in place) == groups[number].candidates
            pairs += [(place[chosen], place[rejected]) for chosen, rejected in groups[number].pairs]
        assert one.group.pairs == tuple(pairs)
        assert one.group.weights == sum((groups[number].weights for number, _ in one.members), ())


@given(st.lists(text_groups(), max_size=6), st.integers(1, 30))
def test_windows_lose_nothing_and_end_where_they_are_full(groups, characters):
    found = list(windows(groups, characters))
    assert [group for window in found for group in window] == groups
    assert all(window for window in found)
    for window in found[:-1]:
        assert sum(group.characters for group in window) >= characters
    for window in found:
        assert sum(group.characters for group in window[:-1]) < characters


def test_against_another_reference_by_hand():
    group = TextGroup("2 + 2?", ("4", "IV"), ("four",))
    assert (group.reference, group.key) == ("4", ("sft", "2 + 2?", "4"))
    assert against(group, "IV").key == ("sft", "2 + 2?", "IV")
    # The prompt is read twice, the first reference and each candidate once: 2 × 6 + 1 + 4.
    assert group.characters == 17


def test_groups_with_several_references_are_merged_by_the_first():
    """The model reads the first reference, so groups that differ in the others share a prefix."""
    first = TextGroup("p", ("r", "s"), ("a", "b"), pairs=((0, 1),), margins=(0.5,), weights=(2.0,))
    second = TextGroup("p", ("r",), ("b", "c"), pairs=((1, 0),), margins=(None,), weights=(1.0,))
    other = TextGroup("p", ("s", "r"), ("a",))
    [merged, alone] = merge_texts([first, other, second])
    assert merged.group == TextGroup(
        "p",
        ("r",),
        ("a", "b", "c"),
        pairs=((0, 1), (2, 1)),
        margins=(0.5, None),
        weights=(2.0, 1.0),
    )
    assert merged.members == [(0, [0, 1]), (2, [1, 2])]
    assert (alone.group, alone.members) == (against(other, "s"), [(1, [0])])


def test_a_selected_pair_by_hand():
    """Branches 7 8 9 and 7 8 5 of the second pair share 7 8, which goes into the prefix."""
    branches = [np.array([1]), np.array([7, 8, 9]), np.array([7, 8, 5])]
    group = TokenGroup(
        np.array([3]), branches, np.array([[0, 1], [2, 1]]), np.array([0.5, 0.25]), np.array([1.0, 2.0])
    )
    part = select_pairs(group, np.array([1]))
    assert part.prefix.tolist() == [3, 7, 8]
    assert [branch.tolist() for branch in part.branches] == [[5], [9]]
    assert part.pairs.tolist() == [[0, 1]]
    assert (part.margins.tolist(), part.weights.tolist()) == ([0.25], [2.0])
    assert part.tree_tokens() == 3 + 1 + 1


def test_costs_by_hand():
    """Prefix of 2, branches of 3 and 1 token, one pair."""
    group = TokenGroup(np.arange(2), [np.arange(3), np.arange(1)], np.array([[0, 1]]))
    assert group.tree_tokens() == 2 + 3 + 1
    assert group.flat_tokens() == (2 + 3) + (2 + 1)
    assert group.attended("flat") == 5**2 // 2 + 3**2 // 2
    assert group.attended("tree") == 2**2 // 2 + (3 * 2 + 3**2 // 2) + (1 * 2 + 1**2 // 2)
