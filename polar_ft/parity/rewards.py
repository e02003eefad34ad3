"""The ways to a reward: each gives a reward for every candidate of every input, ``[inputs][candidates]``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polar_ft.errors import PolarError
from polar_ft.files import first_line
from polar_ft.groups import TokenGroup
from polar_ft.model.packing import build_pack
from polar_ft.parity.inputs import ParityInput
from polar_ft.parity.report import Rewards
from polar_ft.template import PolarTemplate

if TYPE_CHECKING:
    from polar_ft.client import RewardModelClient
    from polar_ft.scoring.scorer import RewardScorer

# Tokens in a training pack: several groups, as in training, and little memory.
PACK_TOKENS = 8192


def scorer_rewards(scorer: RewardScorer, inputs: Sequence[ParityInput]) -> Rewards:
    """`RewardScorer.score`, in this process, as a notebook calls it."""
    return _by_input(scorer.score([row for item in inputs for row in item.rows()]), inputs)


def client_rewards(client: RewardModelClient, inputs: Sequence[ParityInput]) -> Rewards:
    """`RewardModelClient`, through a server, as a training loop calls it."""
    return _by_input(client([row for item in inputs for row in item.rows()]), inputs)


def training_rewards(
    folder: Path,
    template: PolarTemplate,
    encoded: Sequence[TokenGroup],
    dtype: torch.dtype,
    device: torch.device,
) -> Rewards:
    """The model that xtuner trains, in training mode: packs of several groups, layers computed again.

    Args:
        folder: The exported model.
        template: With the limits that ``encoded`` was made with.
        encoded: The inputs.
        dtype: To compute in.
        device: Where.
    """
    from polar_ft.training.model import PolarRewardModel

    # PolarRewardModel keeps its head as it was trained, in float32, whatever the decoder's dtype.
    model = PolarRewardModel(
        llm={"pretrained_model_name_or_path": folder, "torch_dtype": dtype},
        tokenizer=template,
        activation_checkpointing="full",
    )
    model.to(device).train()
    rewards: Rewards = []
    for groups in _packs(encoded):
        values = iter(model(build_pack(groups).to(device)).tolist())
        rewards += [[next(values) for _ in group.branches] for group in groups]
    return rewards


def transformers_rewards(
    folder: Path, encoded: Sequence[TokenGroup], dtype: torch.dtype, device: torch.device, *, own_code: bool
) -> Rewards:
    """Transformers' own classes, one sequence at a time.

    Args:
        folder: The exported model.
        encoded: The inputs.
        dtype: To compute in.
        device: Where.
        own_code: Run the Python files of the folder (InternLM2), instead of a class of transformers.

    Raises:
        PolarError: The model cannot be loaded.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    loader = AutoModel if own_code else AutoModelForSequenceClassification
    try:
        model = loader.from_pretrained(folder, torch_dtype=dtype, trust_remote_code=own_code)
    except (ImportError, OSError, ValueError) as error:
        reason = first_line(error)
        raise PolarError(f"{folder}: transformers cannot load it ({reason})") from error
    model.to(device).eval()
    with torch.inference_mode():
        return [[_logit(model, ids, device) for ids in item.sequences] for item in encoded]


def _logit(model: Any, ids: np.ndarray, device: torch.device) -> float:
    input_ids = torch.from_numpy(ids).long().unsqueeze(0).to(device)
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.item()


def _packs(encoded: Sequence[TokenGroup]) -> Iterator[list[TokenGroup]]:
    groups: list[TokenGroup] = []
    tokens = 0
    for item in encoded:
        group = _training_group(item)
        if groups and tokens + group.tree_tokens() > PACK_TOKENS:
            yield groups
            groups, tokens = [], 0
        groups.append(group)
        tokens += group.tree_tokens()
    yield groups


def _training_group(encoded: TokenGroup) -> TokenGroup:
    """All candidates, every one in a pair with every other."""
    pairs = np.array(list(combinations(range(len(encoded.branches)), 2)), dtype=np.int64).reshape(-1, 2)
    ones = np.ones(len(pairs), dtype=np.float32)
    return replace(encoded, pairs=pairs, margins=0 * ones, weights=ones)


def _by_input(rewards: Sequence[float], inputs: Sequence[ParityInput]) -> Rewards:
    values = iter(rewards)
    return [[next(values) for _ in item.candidates] for item in inputs]
