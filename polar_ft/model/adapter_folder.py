"""A folder with adapters, the reward head, and the name of their base model.

::

    adapter_config.json          of peft: the base by name, rank, scale, which projections
    adapter_model.safetensors    of peft: the two matrices of every adapted weight, float32
    reward_head.safetensors      v_head.weight, float32
    config.json                  as the merged model would have it, and what else we know of the adapters
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from polar_ft.errors import PolarError
from polar_ft.model.lora import Adapter, adapted_weights, adapter_names, base_digest, merged

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD_FILE = "reward_head.safetensors"
# Of config.json.
KEY = "polar_adapter"


def peft_name(name: str) -> str:
    """peft's name of an adapter's tensor.

    >>> peft_name("llm.layers.0.self_attn.q_proj.lora_A.default.weight")
    'base_model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"base_model.model.{name.removeprefix('llm.')}".replace(".default.", ".")


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Content of ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "r": adapter.lora.r,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": adapter.lora.dropout,
        "target_modules": list(adapter.lora.target_modules),
        "bias": "none",
        "inference_mode": True,
    }


def read_adapter(folder: Path, config: dict[str, Any], base: str) -> Adapter:
    """What is known of the adapters of a folder.

    Args:
        folder: Where they are.
        config: Its ``config.json``.
        base: The base that its ``adapter_config.json`` names.

    Raises:
        PolarError: It was not written by the conversion.
    """
    try:
        adapter = Adapter.model_validate(config.get(KEY))
    except ValidationError as error:
        raise PolarError(
            f"{folder}: config.json has no {KEY} that says how the adapters were trained; name a folder that "
            f"polar-ft convert --adapter-only wrote"
        ) from error
    return adapter.model_copy(update={"base": base})


def merge_into(
    decoder: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    adapter: Adapter,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Merges adapters into the base that they were trained on; sums are in float32, cast once.

    Args:
        decoder: The base, as it was loaded for training.
        tensors: Of ``adapter_model.safetensors``.
        adapter: What is known of them.
        dtype: Of the result.
        folder: Where the adapters are, for errors.

    Raises:
        PolarError: Base or tensors are not those of the adapters.
    """
    weights = dict(decoder.named_parameters())
    adapter.check_base(base_digest(weights, len(decoder.layers), adapter.torch_dtype), adapter.base)
    left = dict(tensors)
    adapted = set(adapted_weights(weights, adapter.lora))
    for name, weight in weights.items():
        matrices = None
        if name in adapted:
            a, b = (peft_name(matrix) for matrix in adapter_names(name))
            shapes = [tuple(left[matrix].shape) for matrix in (a, b) if matrix in left]
            if shapes != [(adapter.lora.r, weight.shape[1]), (weight.shape[0], adapter.lora.r)]:
                raise PolarError(
                    f"{folder / ADAPTER_FILE}: {a} and {b} are missing or do not fit {adapter.base}; "
                    f"copy the folder again"
                )
            matrices = left.pop(a), left.pop(b)
        weight.data = merged(name, weight.data, adapter, matrices).to(dtype)
    if left:
        raise PolarError(f"{folder / ADAPTER_FILE}: {next(iter(left))} is not part of these adapters")
