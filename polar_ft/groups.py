"""The two forms of one example: all candidates of one (prompt, reference), as texts and as token ids.

Whatever is read (a row, a request, a benchmark item) becomes a `TextGroup`; the template makes a `TokenGroup`
of it (`polar_ft.template.PolarTemplate.encode`); plans, caches, packs, scorers and servers work on that.
There is no third form, and results come in the order of the candidates. Needs only numpy.

A token group is a tree: the prefix that all its sequences share is stored, and computed, once::

    BOS prompt ⏎ reference <|reward|> prompt ⏎ │ candidate 1 [UNUSED_TOKEN_130]      branch 1
    └──────────────── prefix ─────────────────┘ │ candidate 2 [UNUSED_TOKEN_130]      branch 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

Wrapper = Literal["sft", "pretrain"]
Layout = Literal["tree", "flat"]
Pairing = Literal["adjacent", "all"]  # a ranked answer with the next worse one, or with every worse one


@dataclass(frozen=True, slots=True)
class TextGroup:
    """One (prompt, reference) with its candidates, as texts.

    Attributes:
        prompt: The prompt; of a dialogue the contents of its messages, joined with ⏎.
        references: At least one text, which may be empty. The model reads the first; `against` sets another.
        candidates: The texts to score.
        wrapper: How prompt and response are joined: "sft" with ⏎, "pretrain" without.
        pairs: (chosen, rejected) as indices into ``candidates``.
        margins: For each pair how much better chosen is, according to the data; None where it does not say.
        weights: For each pair its weight in the loss, positive.
    """

    prompt: str
    references: tuple[str, ...]
    candidates: tuple[str, ...]
    wrapper: Wrapper = "sft"
    pairs: tuple[tuple[int, int], ...] = ()
    margins: tuple[float | None, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def reference(self) -> str:
        """The reference that the model reads."""
        return self.references[0]

    @property
    def key(self) -> tuple[Wrapper, str, str]:
        """Wrapper, prompt and reference: equal for groups that share a prefix."""
        return self.wrapper, self.prompt, self.reference

    @property
    def characters(self) -> int:
        """Characters that the model reads; it reads the prompt before the reference and before candidates."""
        return 2 * len(self.prompt) + len(self.reference) + sum(map(len, self.candidates))


AnyGroup = TypeVar("AnyGroup", bound=TextGroup)


def against(group: AnyGroup, reference: str) -> AnyGroup:
    """Replaces the references of a group by one text.

    >>> against(TextGroup("2 + 2?", ("4", "IV"), ("four",)), "IV").references
    ('IV',)
    """
    return replace(group, references=(reference,))


@dataclass(frozen=True, slots=True)
class MergedTexts:
    """Text groups of the same wrapper, prompt and reference, merged into one.

    Attributes:
        group: Each distinct candidate once, and the pairs of all members.
        members: For each member its index in the input, and the indices of its candidates in ``group``.
    """

    group: TextGroup
    members: list[tuple[int, list[int]]]


def merge_texts(groups: Sequence[TextGroup]) -> list[MergedTexts]:
    """Merges groups of the same wrapper, prompt and reference; results are ordered by first appearance.

    >>> rows = [TextGroup("p", ("r",), ("a", "b"), pairs=((0, 1),)), TextGroup("q", ("r",), ("a",)),
    ...         TextGroup("p", ("r",), ("c", "a"), pairs=((0, 1),))]
    >>> [(merged.group.candidates, merged.group.pairs, merged.members) for merged in merge_texts(rows)]
    [(('a', 'b', 'c'), ((0, 1), (2, 0)), [(0, [0, 1]), (2, [2, 0])]), (('a',), (), [(1, [0])])]
    """
    members: dict[tuple[Wrapper, str, str], list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group.key, []).append(number)
    return [_merge_texts(groups, numbers) for numbers in members.values()]


def _merge_texts(groups: Sequence[TextGroup], numbers: Sequence[int]) -> MergedTexts:
    candidates: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    places = []
    for number in numbers:
        group = groups[number]
        place = [candidates.setdefault(text, len(candidates)) for text in group.candidates]
        pairs += [(place[chosen], place[rejected]) for chosen, rejected in group.pairs]
        places.append((number, place))
    first = groups[numbers[0]]
    merged = TextGroup(
        prompt=first.prompt,
        references=(first.reference,),
        candidates=tuple(candidates),
        wrapper=first.wrapper,
        pairs=tuple(pairs),
        margins=tuple(margin for number in numbers for margin in groups[number].margins),
        weights=tuple(weight for number in numbers for weight in groups[number].weights),
    )
    return MergedTexts(merged, places)


def windows(groups: Iterable[TextGroup], characters: int) -> Iterator[list[TextGroup]]:
    """Divides a stream of groups into lists of about ``characters`` characters, to bound memory.

    >>> groups = [TextGroup("", ("",), (text,)) for text in ("abc", "de", "f")]
    >>> [[group.candidates[0] for group in window] for window in windows(groups, 4)]
    [['abc', 'de'], ['f']]
    """
    window: list[TextGroup] = []
    size = 0
    for group in groups:
        window.append(group)
        size += group.characters
        if size >= characters:
            yield window
            window, size = [], 0
    if window:
        yield window


@dataclass(frozen=True, slots=True)
class FieldLengths:
    """A number of tokens for each field of a group: its length, or how much of it was cut off.

    >>> bool(FieldLengths(0, 0, (0, 0))), bool(FieldLengths(0, 0, (0, 3)))
    (False, True)
    """

    prompt: int
    reference: int
    candidates: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.prompt or self.reference or any(self.candidates))

    def of(self, candidate: int) -> bool:
        """Whether anything of one candidate's input is counted here.

        >>> [FieldLengths(0, 0, (0, 3)).of(candidate) for candidate in (0, 1)]
        [False, True]
        """
        return bool(self.prompt or self.reference or self.candidates[candidate])


NOTHING = FieldLengths(0, 0, ())


def _no_pairs() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int64)


def _no_numbers() -> np.ndarray:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class TokenGroup:
    """All candidates of one (prompt, reference), tokenized, with the pairs among them.

    Attributes:
        prefix: Token ids that all candidates share, int32 array [prefix].
        branches: Token ids of each candidate after the prefix, int32 arrays; the reward token is the last.
        pairs: (chosen, rejected) indices into ``branches``, int64 array [pairs, 2].
        margins: Margin of each pair given by the data, float32 array [pairs]; 0 where none is given.
        weights: Weight of each pair in the loss, float32 array [pairs].
        cut: Tokens cut off each field; all zero where no template made the group.
        lengths: Tokens of each field before cutting, BOS included as in xtuner 0.2.0; None unless requested.
    """

    prefix: np.ndarray
    branches: list[np.ndarray]
    pairs: np.ndarray = field(default_factory=_no_pairs)
    margins: np.ndarray = field(default_factory=_no_numbers)
    weights: np.ndarray = field(default_factory=_no_numbers)
    cut: FieldLengths = NOTHING
    lengths: FieldLengths | None = None

    @classmethod
    def of_sequences(cls, sequences: Sequence[Sequence[int] | np.ndarray]) -> TokenGroup:
        """Makes a group without pairs from sequences of token ids.

        >>> group = TokenGroup.of_sequences([[1, 7, 8, 9], [1, 7, 5, 9]])
        >>> group.prefix.tolist(), [branch.tolist() for branch in group.branches]
        ([1, 7], [[8, 9], [5, 9]])
        """
        return grow_prefix(
            cls(np.zeros(0, dtype=np.int32), [np.asarray(ids, dtype=np.int32) for ids in sequences])
        )

    @property
    def sequences(self) -> list[np.ndarray]:
        """All token ids of each candidate, from BOS to the reward token, int32 arrays."""
        return [np.concatenate([self.prefix, branch]) for branch in self.branches]

    def tree_tokens(self) -> int:
        """Number of tokens to compute when the prefix is shared."""
        return len(self.prefix) + sum(map(len, self.branches))

    def flat_tokens(self) -> int:
        """Number of tokens to compute when chosen and rejected of every pair are separate sequences."""
        lengths = np.array([len(self.prefix) + len(branch) for branch in self.branches])
        return int(lengths[self.pairs].sum())

    def attended(self, layout: Layout) -> int:
        """Number of query-key pairs of causal attention."""
        prefix = len(self.prefix)
        branches = np.array([len(branch) for branch in self.branches], dtype=np.int64)
        if layout == "tree":
            return int(prefix**2 // 2 + (branches * prefix + branches**2 // 2).sum())
        return int(((prefix + branches[self.pairs]) ** 2 // 2).sum())


def common_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix that leaves at least one token of each sequence.

    >>> common_prefix_length([np.array([1, 7, 8, 9]), np.array([1, 7, 5, 9])])
    2
    >>> common_prefix_length([np.array([1, 7, 9]), np.array([1, 7, 9])])
    2
    """
    first = sequences[0]
    length = min(map(len, sequences)) - 1
    for other in sequences[1:]:
        different = np.flatnonzero(first[:length] != other[:length])
        if len(different):
            length = int(different[0])
    return length


def grow_prefix(group: TokenGroup) -> TokenGroup:
    """Moves the tokens with which all branches begin into the prefix."""
    shared = common_prefix_length(group.branches)
    if not shared:
        return group
    return replace(
        group,
        prefix=np.concatenate([group.prefix, group.branches[0][:shared]]),
        branches=[branch[shared:] for branch in group.branches],
    )


def select_pairs(group: TokenGroup, which: slice | np.ndarray) -> TokenGroup:
    """Selects some pairs of a group, and only the branches that they use, in the order of use.

    >>> group = TokenGroup(np.array([5]), [np.array([1]), np.array([2]), np.array([3])],
    ...                    np.array([[0, 1], [1, 2]]), np.zeros(2), np.ones(2))
    >>> part = select_pairs(group, slice(1, 2))
    >>> [branch.tolist() for branch in part.branches], part.pairs.tolist()
    ([[2], [3]], [[0, 1]])

    Args:
        group: A group with pairs; ``cut`` and ``lengths``, which are of all its candidates, are not kept.
        which: A numpy index of at least one pair. A slice of all pairs returns the group as it is.
    """
    chosen_pairs = group.pairs[which]
    if isinstance(which, slice) and len(chosen_pairs) == len(group.pairs):
        return group
    used = {branch: place for place, branch in enumerate(dict.fromkeys(chosen_pairs.ravel().tolist()))}
    place_of = np.zeros(len(group.branches), dtype=np.int64)
    place_of[list(used)] = list(used.values())
    return grow_prefix(
        TokenGroup(
            prefix=group.prefix,
            branches=[group.branches[branch] for branch in used],
            pairs=place_of[chosen_pairs],
            margins=group.margins[which],
            weights=group.weights[which],
        )
    )


def merge_token_groups(groups: Sequence[TokenGroup]) -> TokenGroup:
    """Merges groups with the same prompt and reference; equal sequences become one branch.

    >>> rest = np.array([[0, 1]]), np.zeros(1), np.ones(1)
    >>> a = TokenGroup(np.array([5]), [np.array([1, 9]), np.array([2, 9])], *rest)
    >>> b = TokenGroup(np.array([5]), [np.array([3, 9]), np.array([1, 9])], *rest)
    >>> merged = merge_token_groups([a, b])
    >>> [branch.tolist() for branch in merged.branches], merged.pairs.tolist()
    ([[1, 9], [2, 9], [3, 9]], [[0, 1], [2, 0]])
    """
    if len(groups) == 1 and len({branch.tobytes() for branch in groups[0].branches}) == len(
        groups[0].branches
    ):
        return groups[0]
    numbers: dict[bytes, int] = {}
    sequences: list[np.ndarray] = []
    pairs = []
    for group in groups:
        place = []
        for sequence in group.sequences:
            number = numbers.setdefault(sequence.tobytes(), len(sequences))
            if number == len(sequences):
                sequences.append(sequence)
            place.append(number)
        pairs.append(np.asarray(place)[group.pairs])
    return replace(
        TokenGroup.of_sequences(sequences),
        pairs=np.concatenate(pairs),
        margins=np.concatenate([group.margins for group in groups]),
        weights=np.concatenate([group.weights for group in groups]),
    )


def split_by_tokens(group: TokenGroup, most: int) -> Iterator[TokenGroup]:
    """Splits a group without pairs into pieces of at most ``most`` tokens, if possible; each has the prefix.

    >>> group = TokenGroup(np.arange(2), [np.arange(3), np.arange(2), np.arange(2)])
    >>> [len(piece.branches) for piece in split_by_tokens(group, 7)]
    [2, 1]
    """
    if group.tree_tokens() <= most:
        yield group
        return
    piece: list[np.ndarray] = []
    tokens = len(group.prefix)
    for branch in group.branches:
        if piece and tokens + len(branch) > most:
            yield TokenGroup(group.prefix, piece)
            piece, tokens = [], len(group.prefix)
        piece.append(branch)
        tokens += len(branch)
    yield TokenGroup(group.prefix, piece)
