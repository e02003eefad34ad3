"""Packs: what one rank computes in one forward.

A pack holds groups laid end to end, without padding. Queries are cut into segments, and each segment
attends to its own keys, causally and aligned to the bottom right (as flash-attention >= 2.1 does it).

Flat layout, every sequence on its own; queries and keys are the same::

    queries  [ chosen 1      ][ rejected 1    ][ chosen 2  ] …      cu_seqlens_q
    keys     [ chosen 1      ][ rejected 1    ][ chosen 2  ] …      cu_seqlens_k = cu_seqlens_q

Tree layout, the prefix that all candidates of a group share is computed once; the keys of a branch are
gathered (``key_index``) from the prefix and from the branch itself, and its positions continue from the
prefix, so causal attention gives every token exactly what it gets in the flat layout::

    queries  [ prefix ][ branch 1 ][ branch 2 ]                     cu_seqlens_q
    keys     [ prefix ][ prefix branch 1 ][ prefix branch 2 ]       cu_seqlens_k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

from polar_ft.groups import Layout, TokenGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Segments:
    """Which queries attend to which keys; the drawings at the top of this module.

    Attributes:
        cu_seqlens_q: [segments + 1] int32, where the queries of each segment begin.
        cu_seqlens_k: [segments + 1] int32, where the keys of each segment begin.
        key_index: [keys] int64, the token that each key is; None where keys are all tokens in order.
        q_lengths: Queries of each segment, on the host.
        k_lengths: Keys of each segment, on the host.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    key_index: torch.Tensor | None
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]

    @classmethod
    def of(cls, q_lengths: Sequence[int], k_lengths: Sequence[int], key_index: np.ndarray | None) -> Segments:
        """The segments of those lengths."""
        return cls(
            _cumulative(q_lengths),
            _cumulative(k_lengths),
            None if key_index is None else torch.from_numpy(key_index),
            tuple(q_lengths),
            tuple(k_lengths),
        )

    def to(self, device: torch.device | str) -> Segments:
        """The same segments on another device."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def cached(self, name: str, compute: Callable[[Segments], T]) -> T:
        """What ``compute`` makes of the segments, made once; for what every layer needs again."""
        values = self.__dict__.setdefault("_cached", {})
        if name not in values:
            values[name] = compute(self)
        return values[name]


@dataclass(frozen=True)
class Pack:
    """Tensors of one forward.

    Attributes:
        input_ids: [tokens] int64.
        position_ids: [tokens] int64, from 0 in every sequence.
        segments: Who attends to whom.
        reward_index: [candidates] int64, position of each candidate's reward token in ``input_ids``.
        reward_segments: The same with the reward tokens as the only queries: what the last layer computes.
        chosen: [pairs] int64, index into the candidates.
        rejected: [pairs] int64, index into the candidates.
        margin: [pairs] float32.
        weight: [pairs] float32.
        flat_tokens: Tokens that the same pairs have as separate sequences.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    reward_index: torch.Tensor
    reward_segments: Segments
    chosen: torch.Tensor
    rejected: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    flat_tokens: int = 0

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on another device; copies from pinned memory do not block the host."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Pack:
        """The same pack in page-locked memory; called by torch's DataLoader."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())


def _map_tensors(record: T, function: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A dataclass with ``function`` applied to every tensor in it."""
    changed: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, Segments):
            changed[field.name] = _map_tensors(value, function)
    return replace(record, **changed)  # type: ignore[type-var]


def build_pack(groups: Sequence[TokenGroup], layout: Layout = "tree", filler_id: int = 0) -> Pack:
    """Lays groups end to end.

    A prefix [5, 6] with branches [7, 9] and [8, 9] as a tree, then flat:

    >>> group = TokenGroup(np.array([5, 6]), [np.array([7, 9]), np.array([8, 9])], np.array([[0, 1]]),
    ...                    np.zeros(1), np.ones(1))
    >>> pack = build_pack([group])
    >>> pack.input_ids.tolist(), pack.position_ids.tolist()
    ([5, 6, 7, 9, 8, 9], [0, 1, 2, 3, 2, 3])
    >>> segments = pack.segments
    >>> segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist(), segments.key_index.tolist()
    ([0, 2, 4, 6], [0, 2, 6, 10], [0, 1, 0, 1, 2, 3, 0, 1, 4, 5])
    >>> pack.reward_index.tolist(), pack.reward_segments.q_lengths, pack.reward_segments.k_lengths
    ([3, 5], (1, 1), (4, 4))
    >>> flat = build_pack([group], "flat")
    >>> flat.input_ids.tolist(), flat.segments.cu_seqlens_q.tolist(), flat.segments.key_index
    ([5, 6, 7, 9, 5, 6, 8, 9], [0, 4, 8], None)

    Args:
        groups: Groups of the pack; none gives an empty pack of one token and no pair, for a rank that has
            nothing to do while others still compute.
        layout: "tree" shares prefixes; "flat" writes the two sequences of every pair out.
        filler_id: The token of an empty pack.
    """
    builder = _PackBuilder()
    for group in groups:
        if layout == "tree":
            builder.add_tree(group)
        else:
            builder.add_flat(group)
    if not groups:
        builder.add_sequence(np.array([filler_id]))
    return builder.build(layout, sum(group.flat_tokens() for group in groups))


class _PackBuilder:
    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.q_lengths: list[int] = []
        self.k_lengths: list[int] = []
        self.rewards: list[int] = []
        self.pairs: list[np.ndarray] = []
        self.margins: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.total = 0

    def add_tree(self, group: TokenGroup) -> None:
        first_candidate = len(self.rewards)
        prefix_length = len(group.prefix)
        prefix_keys = np.arange(self.total, self.total + prefix_length)
        if prefix_length:
            self._add_segment(group.prefix, np.arange(prefix_length), prefix_keys)
        for branch in group.branches:
            own = np.arange(self.total, self.total + len(branch))
            positions = np.arange(prefix_length, prefix_length + len(branch))
            self._add_segment(branch, positions, np.concatenate([prefix_keys, own]))
            self.rewards.append(self.total - 1)
        self._add_pairs(group, first_candidate + group.pairs)

    def add_flat(self, group: TokenGroup) -> None:
        first_candidate = len(self.rewards)
        # Without pairs (scoring) every candidate once; with pairs both sides of each, as flat training does.
        order = group.pairs.reshape(-1) if len(group.pairs) else np.arange(len(group.branches))
        for index in order:
            self.add_sequence(np.concatenate([group.prefix, group.branches[index]]))
        self._add_pairs(group, first_candidate + np.arange(2 * len(group.pairs)).reshape(-1, 2))

    def add_sequence(self, ids: np.ndarray) -> None:
        self._add_segment(ids, np.arange(len(ids)), np.arange(self.total, self.total + len(ids)))
        self.rewards.append(self.total - 1)

    def _add_segment(self, ids: np.ndarray, positions: np.ndarray, keys: np.ndarray) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.keys.append(keys)
        self.q_lengths.append(len(ids))
        self.k_lengths.append(len(keys))
        self.total += len(ids)

    def _add_pairs(self, group: TokenGroup, pairs: np.ndarray) -> None:
        self.pairs.append(pairs)
        self.margins.append(group.margins)
        self.weights.append(group.weights)

    def build(self, layout: Layout, flat_tokens: int) -> Pack:
        pairs = np.concatenate(self.pairs) if self.pairs else np.zeros((0, 2), dtype=np.int64)
        margins = np.concatenate(self.margins) if self.margins else np.zeros(0)
        weights = np.concatenate(self.weights) if self.weights else np.zeros(0)
        # Segments that end in a reward token: all but the prefixes.
        rewarded = np.isin(np.cumsum(self.q_lengths) - 1, self.rewards).nonzero()[0]
        whole_keys = reward_keys = None
        if layout == "tree":
            whole_keys = np.concatenate(self.keys)
            reward_keys = np.concatenate([self.keys[i] for i in rewarded])
        return Pack(
            input_ids=torch.from_numpy(np.concatenate(self.ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate(self.positions)),
            segments=Segments.of(self.q_lengths, self.k_lengths, whole_keys),
            reward_index=torch.tensor(self.rewards, dtype=torch.int64),
            reward_segments=Segments.of(
                [1] * len(rewarded), [self.k_lengths[i] for i in rewarded], reward_keys
            ),
            chosen=torch.from_numpy(np.ascontiguousarray(pairs[:, 0], dtype=np.int64)),
            rejected=torch.from_numpy(np.ascontiguousarray(pairs[:, 1], dtype=np.int64)),
            margin=torch.from_numpy(margins.astype(np.float32)),
            weight=torch.from_numpy(weights.astype(np.float32)),
            flat_tokens=flat_tokens,
        )


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
