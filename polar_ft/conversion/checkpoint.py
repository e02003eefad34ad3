"""Tensors of a training checkpoint: a ``.pth`` file, or a DeepSpeed directory of any ZeRO stage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from polar_ft.conversion.pickles import load_pickle
from polar_ft.errors import PolarError


@dataclass(frozen=True)
class TrainedWeights:
    """What a checkpoint holds.

    Attributes:
        tensors: By the name that the training model gave them, ``llm.…`` and ``v_head.weight``.
        dtype: In which the model ran; the tensors may be float32 master weights of it.
    """

    tensors: dict[str, torch.Tensor]
    dtype: torch.dtype


def read_checkpoint(path: Path) -> TrainedWeights:
    """Reads a checkpoint that mmengine or DeepSpeed saved.

    Args:
        path: A ``.pth`` file or a DeepSpeed directory (``iter_N.pth/``).

    Raises:
        PolarError: There is no such checkpoint, or it is damaged or incomplete.
    """
    if path.is_file():
        content = load_pickle(path)
        tensors = content.get("state_dict", content)
        if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise PolarError(f"{path}: holds no state_dict of tensors; is it a checkpoint of xtuner?")
        return TrainedWeights(dict(tensors), _dtype_of(tensors))
    if not path.is_dir():
        raise PolarError(f"{path}: no such checkpoint; a run saves work_dirs/CONFIG/iter_N.pth")
    return _read_deepspeed(path)


def _read_deepspeed(path: Path) -> TrainedWeights:
    model_files = sorted(path.glob("*model_states.pt"), key=_rank)
    if not model_files:
        inner = sorted(child.name for child in path.glob("iter_*.pth"))
        hint = f"; name one of the checkpoints in it: {', '.join(inner)}" if inner else ""
        raise PolarError(f"{path}: is no DeepSpeed checkpoint (no *model_states.pt in it){hint}")
    model = load_pickle(model_files[0])
    module: dict[str, torch.Tensor] = model["module"] or {}
    optimizer_files = sorted(path.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    if not optimizer_files:
        return TrainedWeights(module, _dtype_of(module))

    states = [load_pickle(file)["optimizer_state_dict"] for file in optimizer_files]
    count = states[0]["partition_count"]
    ranks = max(count) if isinstance(count, list) else int(count)
    if ranks != len(states):
        raise PolarError(
            f"{path}: was written by {ranks} ranks, but the optimizer states of {len(states)} are there; "
            f"copy the files *optim_states.pt of every node"
        )
    if model.get("frozen_param_shapes"):
        raise PolarError(f"{path}: holds frozen parameters (LoRA), which are not converted yet")
    stage = int(states[0]["zero_stage"])
    shapes: list[Mapping[str, torch.Size]] = model["param_shapes"]
    if stage <= 2:
        flat = [[state["single_partition_of_fp32_groups"][i] for state in states] for i in range(len(shapes))]
        tensors = dict(_join_stage_2(flat, shapes, path))
    else:
        tensors = dict(_join_stage_3([state["fp32_flat_groups"] for state in states], shapes, path))
    for name, source in dict(model.get("shared_params") or []).items():
        tensors[name] = tensors[source]
    dtype = _dtype_of(module) if module else _dtype_of_config(model["ds_config"])
    return TrainedWeights(tensors, dtype)


def _join_stage_2(
    flat: list[list[torch.Tensor]], shapes: list[Mapping[str, torch.Size]], path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """ZeRO 1 and 2: the parameters of a group lie end to end, and the ranks hold one slice of that each."""
    for parts, group in zip(flat, shapes):
        whole = torch.cat(parts)
        offset = 0
        for name, shape in group.items():
            size = prod(shape)
            if offset + size > len(whole):
                raise PolarError(f"{path}: the optimizer states end within {name}; a file is truncated")
            yield name, whole[offset : offset + size].view(shape)
            offset += size


def _join_stage_3(
    groups: list[Any], shapes: list[Mapping[str, torch.Size]], path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """ZeRO 3: every rank holds a slice of every parameter, the last one padded."""
    ranks = [torch.cat(list(parts)) if not isinstance(parts, torch.Tensor) else parts for parts in groups]
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        size = prod(shape)
        part = -(-size // len(ranks))
        if offset + part > len(ranks[0]):
            raise PolarError(f"{path}: the optimizer states end within {name}; a file is truncated")
        whole = torch.cat([flat[offset : offset + part] for flat in ranks])
        yield name, whole[:size].view(shape)
        offset += part


def _rank(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _dtype_of(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())


def _dtype_of_config(config: Mapping[str, Any]) -> torch.dtype:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(name) or {}).get("enabled"):
            return dtype
    return torch.float32
