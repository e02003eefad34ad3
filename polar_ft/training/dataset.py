"""The training data as xtuner and mmengine see it: one item is one optimizer step of this rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from mmengine.logging import print_log
from torch.utils.data import Dataset, Sampler
from xtuner.registry import BUILDER

from polar_ft.data.reading import as_sources
from polar_ft.data.step_plan import StepPlan
from polar_ft.data.tokenized import TokenizedGroups, tokenize
from polar_ft.files import resolve_folder
from polar_ft.groups import Layout, select_pairs
from polar_ft.model.packing import build_pack
from polar_ft.template import PolarTemplate
from polar_ft.training.step import StepBatch


class RewardDataset(Dataset):
    """Items are `StepBatch`; item ``epoch * steps_per_epoch + step`` is that step of that epoch.

    Args:
        groups: The tokenized data.
        plan: The step plan.
        rank: Of this process.
        filler_id: Token of an empty pack.
    """

    def __init__(self, groups: TokenizedGroups, plan: StepPlan, rank: int, filler_id: int) -> None:
        self.groups = groups
        self.plan = plan
        self.rank = rank
        self.filler_id = filler_id

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, index: int) -> StepBatch:
        epoch, step = divmod(index, self.plan.steps_per_epoch)
        packs = [
            build_pack(
                [
                    select_pairs(self.groups.group(piece.group), slice(piece.first_pair, piece.last_pair))
                    for piece in pieces
                ],
                self.plan.layout,
                self.filler_id,
            )
            for pieces in self.plan.packs(epoch, step)[self.rank]
        ]
        return StepBatch(packs, self.plan.weight_of_step(epoch, step), epoch, step)


class StepSampler(Sampler):
    """Steps in the order of the plan, on every rank; mmengine calls ``set_epoch`` before each epoch.

    Attributes:
        first: Step that the next pass begins with; a resumed run sets it. Passes after that are whole.
    """

    def __init__(self, dataset: RewardDataset, seed: int | None = None) -> None:
        self.steps = len(dataset)
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose steps come next, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        return iter(range(self.epoch * self.steps + first, (self.epoch + 1) * self.steps))


def collate_step(items: Sequence[StepBatch]) -> StepBatch:
    """The one item of a batch: a step is a batch already."""
    (item,) = items
    return item


def build_reward_dataset(
    data: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    tokenizer: Mapping[str, Any] | PolarTemplate,
    pretrained_model_name_or_path: str,
    *,
    global_batch_pairs: int = 320,
    max_packed_length: int = 32768,
    packs_per_step: int | None = None,
    layout: Layout = "tree",
    reference_dropout: float = 0.0,
    seed: int = 0,
    cache_dir: str = "~/.cache/polar_ft/tokenized",
) -> RewardDataset:
    """Reads, checks and tokenizes the data, and plans the steps.

    Args:
        data: A path or hub id, or ``dict(path=…, weight=…, max_samples=…, …)``, or a list of those; see
            `polar_ft.data.reading.DataSource`.
        tokenizer: ``dict(type=PolarTemplate.from_pretrained, …)``.
        pretrained_model_name_or_path: Of the model; its hidden size weighs attention in the cost of a pack.
        global_batch_pairs: Pairs of an optimizer step, over all ranks.
        max_packed_length: Tokens of a pack: what one forward computes.
        packs_per_step: Packs of each rank in a step; None takes as few as hold the step.
        layout: "tree" computes a shared prefix once; "flat" computes every sequence whole. Same gradients.
        reference_dropout: Share of the groups trained without their reference.
        seed: Of the order of the data.
        cache_dir: Where tokenized data is kept.

    Raises:
        DataError: A row is bad; the message names file and line.
        PolarError: A setting does not fit the data; the message says which and what to set it to.
    """
    template = tokenizer if isinstance(tokenizer, PolarTemplate) else BUILDER.build(dict(tokenizer))
    groups = tokenize(as_sources(data), template, cache_dir, reference_dropout=reference_dropout, seed=seed)
    for line in groups.summary.lines():
        print_log(f"data: {line}", "current")
    distributed = dist.is_available() and dist.is_initialized()
    plan = StepPlan(
        groups,
        global_batch_pairs=global_batch_pairs,
        max_packed_length=max_packed_length,
        ranks=dist.get_world_size() if distributed else 1,
        seed=seed,
        layout=layout,
        packs_per_step=packs_per_step,
        hidden_size=_hidden_size(pretrained_model_name_or_path),
    )
    rank = dist.get_rank() if distributed else 0
    return RewardDataset(groups, plan, rank, template.reward_token_id)


def _hidden_size(folder: str | os.PathLike[str]) -> int:
    return json.loads((resolve_folder(folder) / "config.json").read_text())["hidden_size"]
