"""The step plan: which pairs make up each optimizer step, and in which pack of which rank they are computed.

The pairs of a step depend only on the data, the seed and the epoch, not on the layout, the number of ranks,
the size of a pack or the accumulation; those only decide where a pair is computed. Every rank computes the
same plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.groups import Layout, TokenGroup, select_pairs


class GroupSizes(Protocol):
    """What the plan needs of the groups, such as `polar_ft.data.tokenized.TokenizedGroups`."""

    pairs: np.ndarray  # [groups], number of pairs
    weights: np.ndarray  # [groups], sum of the weights of its pairs
    tokens: dict[str, np.ndarray]  # layout → [groups], tokens to compute
    attended: dict[str, np.ndarray]  # layout → [groups], query-key pairs of attention

    def group(self, index: int) -> TokenGroup: ...

    def source(self, index: int) -> str: ...


@dataclass(frozen=True)
class Piece:
    """A group, or the pairs of it that fit into a pack.

    Attributes:
        group: Index of the group.
        first_pair: Index in the group of the first pair of the piece.
        last_pair: Index after that of the last pair.
        tokens: Number of tokens to compute.
        cost: Time to compute it, in units of the time for one token without attention.
    """

    group: int
    first_pair: int
    last_pair: int
    tokens: int
    cost: float


Packs = list[list[Piece]]


@dataclass(frozen=True)
class Spread:
    """Minimum, mean and maximum of some numbers."""

    least: int
    mean: float
    greatest: int

    def __str__(self) -> str:
        return f"{self.least:,} / {self.mean:,.0f} / {self.greatest:,}"


def _spread(values: Sequence[int]) -> Spread:
    return Spread(min(values), float(np.mean(values)), max(values))


@dataclass(frozen=True)
class PlanSummary:
    """Figures of a plan.

    Attributes:
        steps_per_epoch: Optimizer steps.
        ranks: Data-parallel ranks.
        described_steps: Number of steps that the following figures describe.
        pairs_per_step: Pairs in a step, over all ranks.
        packs_per_rank_and_step: Forwards of a rank in a step.
        tokens_per_rank_and_step: Tokens that a rank computes in a step.
        largest_pack: Tokens of the largest pack.
        fill: Mean size of a pack divided by ``max_packed_length``.
        tokens_saved: Share of the tokens of separate sequences that need not be computed, over all data.
    """

    steps_per_epoch: int
    ranks: int
    described_steps: int
    pairs_per_step: Spread
    packs_per_rank_and_step: Spread
    tokens_per_rank_and_step: Spread
    largest_pack: int
    fill: float
    tokens_saved: float

    def lines(self) -> list[str]:
        """The summary in words."""
        return [
            f"{self.steps_per_epoch:,} steps an epoch; each (least / mean / greatest) of "
            f"{self.pairs_per_step} pairs in {self.packs_per_rank_and_step} packs a rank, "
            f"on {self.ranks} ranks",
            f"tokens a rank and step {self.tokens_per_rank_and_step}; packs filled {self.fill:.0%}; shared "
            f"prefixes save {self.tokens_saved:.0%} of the tokens",
        ]


class StepPlan:
    """Plans optimizer steps of about ``global_batch_pairs`` pairs; no step has a part of a group.

    Args:
        sizes: Sizes of the groups.
        global_batch_pairs: Pairs of an optimizer step over all ranks. As groups are not divided between
            steps, a step has about this number; all steps of an epoch have about the same.
        max_packed_length: Most tokens in a pack.
        ranks: Data-parallel ranks.
        seed: Seed of the order of the groups.
        layout: How packs are laid out.
        packs_per_step: Packs of each rank in a step; None takes the smallest number that suffices.
        hidden_size: Hidden size of the model; weighs attention against the rest in the cost of a group.

    Raises:
        PolarError: There is nothing to train on, or a single pair does not fit into a pack.
    """

    def __init__(
        self,
        sizes: GroupSizes,
        *,
        global_batch_pairs: int,
        max_packed_length: int,
        ranks: int = 1,
        seed: int = 0,
        layout: Layout = "tree",
        packs_per_step: int | None = None,
        hidden_size: int = 4096,
    ) -> None:
        if not len(sizes.pairs):
            raise PolarError("there is no pair to train on; `polar-ft data check` says what is in the data")
        # `StepPlan(sizes, **arguments)` is the same plan.
        self.arguments: dict[str, Any] = dict(
            global_batch_pairs=global_batch_pairs,
            max_packed_length=max_packed_length,
            ranks=ranks,
            seed=seed,
            layout=layout,
            packs_per_step=packs_per_step,
            hidden_size=hidden_size,
        )
        self.sizes = sizes
        self.max_packed_length = max_packed_length
        self.ranks = ranks
        self.seed = seed
        self.layout: Layout = layout
        self.packs_per_step = packs_per_step
        self.tokens = sizes.tokens[layout]
        # A layer costs about 24·hidden² operations a token (its matrices: Kaplan et al., arXiv 2001.08361,
        # table 1) and 4·hidden for each query-key pair.
        self.costs = self.tokens + sizes.attended[layout] / (6 * hidden_size)
        self.steps_per_epoch = max(1, round(int(sizes.pairs.sum()) / global_batch_pairs))
        self.steps_per_epoch = min(self.steps_per_epoch, len(sizes.pairs))
        self._split: dict[int, list[Piece]] = {
            int(index): self._split_group(int(index))
            for index in np.flatnonzero(self.tokens > max_packed_length)
        }
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def groups_of_step(self, epoch: int, step: int) -> np.ndarray:
        """Indices of the groups of a step."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes.pairs))
            self._epoch = (epoch, split_evenly(order, self.sizes.pairs[order], self.steps_per_epoch))
        return self._epoch[1][step]

    def weight_of_step(self, epoch: int, step: int) -> float:
        """Sum of the weights of the step's pairs, by which the sum of their losses is divided."""
        return float(self.sizes.weights[self.groups_of_step(epoch, step)].sum())

    def packs(self, epoch: int, step: int) -> list[Packs]:
        """The packs of a step: the same number for each rank, each a list of pieces.

        If there are fewer pieces than packs, the list of a rank may end with empty packs.
        """
        pieces = [piece for index in self.groups_of_step(epoch, step) for piece in self._pieces(int(index))]
        if self.packs_per_step is None:
            tokens = sum(piece.tokens for piece in pieces)
            rounds = math.ceil(tokens / (self.max_packed_length * self.ranks))
            while (bins := self._fill(pieces, rounds * self.ranks)) is None:
                rounds += 1
        else:
            rounds = self.packs_per_step
            bins = self._fill(pieces, rounds * self.ranks)
            if bins is None:
                self._raise_too_small(pieces, step)
        # Ranks compute packs of about the same cost at the same time.
        bins.sort(key=lambda pack: -sum(piece.cost for piece in pack))
        return [[bins[turn * self.ranks + rank] for turn in range(rounds)] for rank in range(self.ranks)]

    def describe(self, most_steps: int = 200) -> PlanSummary:
        """Figures of the plan over the first steps of the first epoch."""
        steps = min(self.steps_per_epoch, most_steps)
        rank_tokens, pack_tokens, rounds, pairs = [], [], [], []
        for step in range(steps):
            packs = self.packs(0, step)
            sizes = [[sum(piece.tokens for piece in pack) for pack in of_rank] for of_rank in packs]
            rank_tokens += [sum(of_rank) for of_rank in sizes]
            pack_tokens += [tokens for of_rank in sizes for tokens in of_rank]
            rounds.append(len(sizes[0]))
            pairs.append(int(self.sizes.pairs[self.groups_of_step(0, step)].sum()))
        flat = int(self.sizes.tokens["flat"].sum())
        return PlanSummary(
            steps_per_epoch=self.steps_per_epoch,
            ranks=self.ranks,
            described_steps=steps,
            pairs_per_step=_spread(pairs),
            packs_per_rank_and_step=_spread(rounds),
            tokens_per_rank_and_step=_spread(rank_tokens),
            largest_pack=max(pack_tokens),
            fill=float(np.mean(pack_tokens)) / self.max_packed_length,
            tokens_saved=1 - int(self.tokens.sum()) / flat,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which the plan depends, in addition to the data."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "max_packed_length": self.max_packed_length,
            "ranks": self.ranks,
            "seed": self.seed,
            "layout": self.layout,
            "packs_per_step": self.packs_per_step,
        }

    def _pieces(self, index: int) -> list[Piece]:
        split = self._split.get(index)
        if split is not None:
            return split
        pairs = int(self.sizes.pairs[index])
        return [Piece(index, 0, pairs, int(self.tokens[index]), float(self.costs[index]))]

    def _fill(self, pieces: Sequence[Piece], count: int) -> list[list[Piece]] | None:
        """Puts each piece, costliest first, into the cheapest pack with room; None if one fits nowhere."""
        bins: list[list[Piece]] = [[] for _ in range(count)]
        costs = np.zeros(count)
        rooms = np.full(count, self.max_packed_length)
        # Ties are broken by group, so that packs do not depend on the order of the data within a step.
        for piece in sorted(pieces, key=lambda piece: (-piece.cost, piece.group, piece.first_pair)):
            fitting = np.where(rooms >= piece.tokens, costs, np.inf)
            best = int(fitting.argmin())
            if not np.isfinite(fitting[best]):
                return None
            bins[best].append(piece)
            costs[best] += piece.cost
            rooms[best] -= piece.tokens
        return bins

    def _split_group(self, index: int) -> list[Piece]:
        """Splits a group that is longer than a pack into pieces that repeat its prefix."""
        group = self.sizes.group(index)
        pieces: list[Piece] = []
        first = 0
        while first < len(group.pairs):
            last = first + 1
            while (
                last < len(group.pairs)
                and self._piece_tokens(group, first, last + 1) <= self.max_packed_length
            ):
                last += 1
            tokens = self._piece_tokens(group, first, last)
            if tokens > self.max_packed_length:
                raise PolarError(
                    f"{self.sizes.source(index)}: one pair alone takes {tokens} tokens, more than a pack "
                    f"holds; raise max_packed_length from {self.max_packed_length} to at least {tokens}, or "
                    f"lower max_length"
                )
            cost = float(self.costs[index]) * tokens / float(self.tokens[index])
            pieces.append(Piece(index, first, last, tokens, cost))
            first = last
        return pieces

    def _piece_tokens(self, group: TokenGroup, first: int, last: int) -> int:
        piece = select_pairs(group, slice(first, last))
        return piece.tree_tokens() if self.layout == "tree" else piece.flat_tokens()

    def _raise_too_small(self, pieces: Sequence[Piece], step: int) -> NoReturn:
        rounds = self.packs_per_step or 1
        while self._fill(pieces, rounds * self.ranks) is None:
            rounds += 1
        tokens = sum(piece.tokens for piece in pieces)
        raise PolarError(
            f"step {step + 1} of {tokens} tokens does not fit into {self.ranks} ranks × "
            f"{self.packs_per_step} packs of {self.max_packed_length} tokens; raise packs_per_step "
            f"to {rounds} (or leave it None), or raise max_packed_length, or lower global_batch_pairs"
        )


def split_evenly(order: np.ndarray, pairs: np.ndarray, parts: int) -> list[np.ndarray]:
    """Splits an order of groups into parts with about the same number of pairs, none of them empty.

    >>> [part.tolist() for part in split_evenly(np.arange(5), np.array([1, 1, 4, 1, 1]), 2)]
    [[0, 1], [2, 3, 4]]

    Args:
        order: Group indices, [groups].
        pairs: Number of pairs of the groups in that order, [groups].
        parts: Number of parts, at most the number of groups.
    """
    middle = np.cumsum(pairs) - pairs / 2
    part_of = np.floor(middle * parts / pairs.sum()).astype(int)
    # Large groups can leave a part without a group; every part gets at least one.
    lowest = np.maximum.accumulate(np.maximum(part_of, 0))
    count = len(order)
    starts = np.searchsorted(lowest, np.arange(parts))
    starts[0] = 0
    for part in range(1, parts):
        starts[part] = max(starts[part], starts[part - 1] + 1)
    for part in range(parts - 1, 0, -1):
        starts[part] = min(starts[part], count - (parts - part))
    return np.split(order, starts[1:])
