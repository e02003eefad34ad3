"""The step plan: every pair once an epoch, nothing over capacity, the same steps whatever the hardware."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ft.data.step_plan import StepPlan, split_evenly
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup


class Groups:
    """Groups in memory, with the sizes that a plan asks for."""

    def __init__(self, groups: list[TokenGroup]) -> None:
        self.groups = groups
        self.pairs = np.array([len(group.pairs) for group in groups])
        self.weights = np.array([group.weights.sum() for group in groups])
        self.tokens = {
            "tree": np.array([group.tree_tokens() for group in groups]),
            "flat": np.array([group.flat_tokens() for group in groups]),
        }
        self.attended = {layout: tokens**2 // 2 for layout, tokens in self.tokens.items()}

    def group(self, index: int) -> TokenGroup:
        return self.groups[index]

    def source(self, index: int) -> str:
        return f"rows.jsonl:{index + 1}"


def make_groups(count: int, seed: int = 0, most: int = 6) -> Groups:
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        branches = int(rng.integers(2, most + 2))
        pairs = [(i, i + 1) for i in range(branches - 1)]
        groups.append(
            TokenGroup(
                np.zeros(rng.integers(1, 60), dtype=np.int64),
                [np.zeros(rng.integers(1, 40), dtype=np.int64) for _ in range(branches)],
                np.array(pairs),
                np.zeros(len(pairs), dtype=np.float32),
                np.ones(len(pairs), dtype=np.float32),
            )
        )
    return Groups(groups)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 60),
    batch=st.integers(1, 50),
    ranks=st.integers(1, 3),
    capacity=st.integers(200, 2000),
    layout=st.sampled_from(["tree", "flat"]),
    seed=st.integers(0, 5),
)
def test_every_pair_once_and_nothing_over_capacity(count, batch, ranks, capacity, layout, seed):
    groups = make_groups(count, seed)
    plan = StepPlan(
        groups, global_batch_pairs=batch, max_packed_length=capacity, ranks=ranks, seed=seed, layout=layout
    )
    seen = []
    for epoch in (0, 1):
        pairs = []
        for step in range(plan.steps_per_epoch):
            packs = plan.packs(epoch, step)
            assert len(packs) == ranks
            assert len({len(of_rank) for of_rank in packs}) == 1
            weight = 0.0
            for pack in (pack for of_rank in packs for pack in of_rank):
                assert sum(piece.tokens for piece in pack) <= capacity
                for piece in pack:
                    pairs += [(piece.group, pair) for pair in range(piece.first_pair, piece.last_pair)]
                    weight += piece.last_pair - piece.first_pair
            assert weight == plan.weight_of_step(epoch, step) > 0
        assert len(pairs) == len(set(pairs)) == groups.pairs.sum()
        seen.append(pairs)
    assert sorted(seen[0]) == sorted(seen[1])


def test_steps_hold_the_same_pairs_whatever_the_hardware():
    groups = make_groups(80)
    plans = [
        StepPlan(
            groups, global_batch_pairs=30, max_packed_length=capacity, ranks=ranks, layout=layout, seed=3
        )
        for capacity, ranks, layout in ((500, 1, "tree"), (4000, 2, "tree"), (900, 3, "flat"))
    ]
    for step in range(plans[0].steps_per_epoch):
        sets = [set(plan.groups_of_step(1, step).tolist()) for plan in plans]
        assert sets[0] == sets[1] == sets[2]


def test_steps_are_about_as_large_as_asked_for():
    plan = StepPlan(make_groups(1000), global_batch_pairs=64, max_packed_length=4000)
    pairs = [plan.weight_of_step(0, step) for step in range(plan.steps_per_epoch)]
    assert min(pairs) > 64 - 7
    assert max(pairs) < 64 + 7


def test_packs_of_ranks_cost_about_the_same():
    plan = StepPlan(make_groups(2000), global_batch_pairs=320, max_packed_length=4000, ranks=4)
    for step in range(plan.steps_per_epoch):
        costs = [sum(piece.cost for pack in of_rank for piece in pack) for of_rank in plan.packs(0, step)]
        assert max(costs) < 1.05 * np.mean(costs)


def test_a_step_too_large_for_its_packs_says_what_to_raise():
    plan = StepPlan(make_groups(100), global_batch_pairs=100, max_packed_length=500, packs_per_step=2)
    with pytest.raises(
        PolarError, match=r"does not fit into 1 ranks × 2 packs of 500.*raise packs_per_step to"
    ):
        plan.packs(0, 0)


def test_a_pair_too_large_for_a_pack_says_which_row_and_what_to_raise():
    with pytest.raises(
        PolarError, match=r"rows.jsonl:\d+: one pair alone takes \d+ tokens.*raise max_packed_length"
    ):
        StepPlan(make_groups(100), global_batch_pairs=10, max_packed_length=60)


def test_fixed_accumulation_fills_up_with_empty_packs():
    plan = StepPlan(make_groups(2), global_batch_pairs=1, max_packed_length=1000, packs_per_step=4)
    (of_rank,) = plan.packs(0, 0)
    assert [len(pack) for pack in of_rank] == [1, 0, 0, 0]


@given(pairs=st.lists(st.integers(1, 50), min_size=1, max_size=40), data=st.data())
def test_split_evenly_leaves_no_part_empty(pairs, data):
    parts = data.draw(st.integers(1, len(pairs)))
    split = split_evenly(np.arange(len(pairs)), np.array(pairs), parts)
    assert np.concatenate(split).tolist() == list(range(len(pairs)))
    assert len(split) == parts
    assert all(len(part) for part in split)
