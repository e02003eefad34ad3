"""The data of a run: training steps, item by item, and held-out pairs for validation."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from numpy.typing import NDArray
from torch.utils.data import Dataset
from xtuner.registry import BUILDER

from polar_ft.data.reading import Sources, as_sources, read_examples
from polar_ft.data.records import Example
from polar_ft.data.step_plan import StepPlan
from polar_ft.data.tokenized import TokenizedGroups, tokenize
from polar_ft.errors import PolarError
from polar_ft.evaluation.evaluator import encode_examples
from polar_ft.evaluation.pairs import Categories, PairTable
from polar_ft.evaluation.references import ReferenceSettings, aggregate
from polar_ft.files import read_json, resolve_folder
from polar_ft.groups import Layout, TokenGroup, against, select_pairs
from polar_ft.model.packing import Pack, build_pack
from polar_ft.scoring.scorer import forward_batches
from polar_ft.template import PolarTemplate
from polar_ft.training.step import StepBatch

ENCODED_AT_ONCE = 1024


class RewardDataset(Dataset):
    """Items are `StepBatch`; item ``epoch * steps_per_epoch + step`` is that step of that epoch.

    Args:
        groups: The tokenized data.
        plan: The step plan.
        rank: Of this process.
        template: By which the data was tokenized.
    """

    def __init__(self, groups: TokenizedGroups, plan: StepPlan, rank: int, template: PolarTemplate) -> None:
        self.groups = groups
        self.plan = plan
        self.rank = rank
        self.template = template

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
                filler_id=self.template.reward_token_id,
            )
            for pieces in self.plan.packs(epoch, step)[self.rank]
        ]
        return StepBatch(packs, self.plan.weight_of_step(epoch, step), epoch, step)


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
    cache_dir: str | os.PathLike[str] = "~/.cache/polar_ft/tokenized",
    ranks: int | None = None,
    hidden_size: int | None = None,
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
        layout: "tree" computes a shared prefix once; "flat" once for each candidate. Same gradients.
        reference_dropout: Share of the groups trained without their reference.
        seed: Of the order of the data.
        cache_dir: Where tokenized data is kept.
        ranks: Data-parallel ranks; None takes those of this run.
        hidden_size: Of the model; None reads its ``config.json``.

    Raises:
        DataError: A row is bad; the message names file and line.
        PolarError: A setting does not fit the data; the message says which and what to set it to.
    """
    template = tokenizer if isinstance(tokenizer, PolarTemplate) else BUILDER.build(dict(tokenizer))
    groups = tokenize(as_sources(data), template, cache_dir, reference_dropout=reference_dropout, seed=seed)
    plan = StepPlan(
        groups,
        global_batch_pairs=global_batch_pairs,
        max_packed_length=max_packed_length,
        ranks=ranks or get_world_size(),
        seed=seed,
        layout=layout,
        packs_per_step=packs_per_step,
        hidden_size=hidden_size or _hidden_size(pretrained_model_name_or_path),
    )
    return RewardDataset(groups, plan, get_rank(), template)


def with_defaults(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config with the defaults of the function or class that they are for.

    >>> def build(data, seed=0): ...
    >>> with_defaults(build, {"data": "rows.jsonl"})
    {'seed': 0, 'data': 'rows.jsonl'}
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **settings}


def _hidden_size(folder: str | os.PathLike[str]) -> int:
    return read_json(resolve_folder(folder) / "config.json")["hidden_size"]


class HeldOutPairs:
    """Held-out pairs, read and tokenized once, of which every rank scores its share.

    Args:
        data: What a config may say of data, see `polar_ft.data.reading.DataSource`. Of several sources each
            is a subset where its rows do not name one.
        template: The template of the model that is trained.
        tokens_per_batch: Tokens that one forward computes at most where possible.

    Attributes:
        subsets: The subset of each pair; None where no row has one.
        digest: Of all that is scored: figures are comparable where it is the same.

    Raises:
        DataError: A row is bad; the message names file and line.
        PolarError: A row does not fit the limits, or there is no pair.
    """

    def __init__(self, data: Sources, template: PolarTemplate, tokens_per_batch: int) -> None:
        sources = as_sources(data)
        if len(sources) > 1:
            sources = [s.model_copy(update={"subset": s.subset or s.path}) for s in sources]
        rows = list(read_examples(sources))
        examples = [example for example in rows if example.pairs]
        if not examples:
            paths = ", ".join(source.path for source in sources)
            raise PolarError(
                f"{paths}: {len(rows)} rows gave no pair to validate on; `polar-ft data check` says why"
            )
        first = np.cumsum([0, *(len(example.candidates) for example in examples)])
        pairs = [first[number] + np.array(example.pairs) for number, example in enumerate(examples)]
        self._chosen, self._rejected = np.concatenate(pairs).T
        self._prompts = _prompt_numbers(examples)
        self.subsets = _subsets(examples)

        # Of each example how often it is scored, and how many rewards each time gives.
        self._shapes = [(len(e.references), len(e.candidates)) for e in examples]
        encoded = _encode(template, examples)
        self.digest = _digest(examples, encoded)
        self._batches = _of_this_rank(encoded, tokens_per_batch)
        self._filler_id = template.reward_token_id
        self._summary = _summary(rows, len(self), encoded)

    def __len__(self) -> int:
        return len(self._chosen)

    def __str__(self) -> str:
        return self._summary

    def score(
        self, rewards: Callable[[Pack], torch.Tensor], device: torch.device, on_batch: Callable[[float], None]
    ) -> PairTable:
        """Scores every pair, each rank its share.

        Every rank calls ``rewards`` as often, at the end with empty packs: under ZeRO-3 a forward is
        something that all ranks do together.

        Args:
            rewards: Gives the rewards of a pack on ``device``, [candidates].
            device: Where the model is.
            on_batch: Called after each forward with the share of this rank's tokens that are done.

        Returns:
            All pairs, on every rank, in the order of the data.
        """
        places = sum(references * candidates for references, candidates in self._shapes)
        scores = torch.zeros(places, dtype=torch.float64, device=device)
        total = sum(group.tree_tokens() for groups, _ in self._batches for group in groups)
        done = 0
        for groups, where in self._batches:
            values = rewards(build_pack(groups, filler_id=self._filler_id).to(device))
            if groups:
                scores[torch.from_numpy(where).to(device)] = values.double()
                done += sum(group.tree_tokens() for group in groups)
                on_batch(done / total)
        if get_world_size() > 1:
            dist.all_reduce(scores)  # a score is 0 on every rank but one
        of_candidates = self._of_all_references(scores.cpu().numpy())
        return PairTable(
            chosen_score=of_candidates[self._chosen],
            rejected_score=of_candidates[self._rejected],
            subsets={} if self.subsets is None else {"subset": self.subsets},
            prompts=self._prompts,
        )

    def _of_all_references(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """[references × candidates of each example] to [candidates of each example], as `polar-ft eval`."""
        if all(references == 1 for references, _ in self._shapes):
            return scores
        ends = np.cumsum([references * candidates for references, candidates in self._shapes])
        rewards: list[float] = []
        for part, (references, _) in zip(np.split(scores, ends[:-1]), self._shapes, strict=True):
            rewards += aggregate(part.reshape(references, -1).tolist(), ReferenceSettings.aggregation)
        return np.array(rewards)


def _summary(rows: Sequence[Example], pairs: int, encoded: Iterable[TokenGroup]) -> str:
    ties, cut = sum(row.n_ties for row in rows), sum(bool(item.cut) for item in encoded)
    parts = [f"{len(rows):,} rows, {pairs:,} pairs"]
    if ties:
        parts.append(f"left out: {ties:,} pairs of equal score in ranked rows")
    if cut:
        parts.append(f"cut to fit: fields of {cut:,} rows")
    return "; ".join(parts)


def _prompt_numbers(examples: Iterable[Example]) -> NDArray[np.int64]:
    """A number for the prompt of each pair."""
    numbers: dict[str, int] = {}
    of_pairs = [numbers.setdefault(e.prompt, len(numbers)) for e in examples for _ in e.pairs]
    return np.array(of_pairs, dtype=np.int64)


def _subsets(examples: Iterable[Example]) -> Categories | None:
    """The subset of each pair."""
    names = [example.subset for example in examples for _ in example.pairs]
    if all(name is None for name in names):
        return None
    return Categories.from_values(["(no subset)" if name is None else name for name in names])


def _encode(template: PolarTemplate, examples: Iterable[Example]) -> list[TokenGroup]:
    """Every example with each of its references."""
    scored = [against(example, text) for example in examples for text in example.references]
    return [
        encoded
        for start in range(0, len(scored), ENCODED_AT_ONCE)
        for encoded in encode_examples(template, scored[start : start + ENCODED_AT_ONCE])
    ]


def _digest(examples: Iterable[Example], encoded: Iterable[TokenGroup]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.pairs, example.subset, len(example.references))).encode())
    for item in encoded:
        digest.update(repr(list(map(len, item.sequences))).encode())
        digest.update(np.concatenate(item.sequences).astype(np.int64).tobytes())
    return digest.hexdigest()


def _of_this_rank(
    encoded: Sequence[TokenGroup], tokens_per_batch: int
) -> list[tuple[list[TokenGroup], NDArray[np.int64]]]:
    """The groups of each forward of this rank, and the places of their rewards among all; empty ones last."""
    rank, ranks = get_rank(), get_world_size()
    # Where there is little to score, every rank shall have some of it.
    share = -(-sum(item.tree_tokens() for item in encoded) // ranks)
    next_place = np.cumsum([0, *(len(item.branches) for item in encoded)])
    batches: list[tuple[list[TokenGroup], NDArray[np.int64]]] = []
    for batch in forward_batches(encoded, min(tokens_per_batch, share)):
        places = []
        for index, group in batch:
            places.append(next_place[index] + np.arange(len(group.branches)))
            next_place[index] += len(group.branches)
        batches.append(([group for _, group in batch], np.concatenate(places)))
    own = batches[rank::ranks]
    return own + [([], np.zeros(0, dtype=np.int64))] * (-(-len(batches) // ranks) - len(own))
