"""How much memory a run takes on each GPU, by ZeRO stage: computed from shapes, without building the model.

A step has two moments at which memory is highest, and the estimate is the larger of the two:

- **backward**: weights, gradients, optimizer state, communication buffers, and the activations of a pack;
- **update**: no activations, but gradients in float32 and AdamW's temporaries.

What each ZeRO stage divides among N GPUs is that of arXiv 1910.02054, section 5; what DeepSpeed 0.16.2 holds
beyond that was read in its ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``. docs/doctor.md has the errors
of these estimates against measured peaks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from polar_ft.model.backbones import decoder_config, empty_decoder
from polar_ft.model.lora import projection_of
from polar_ft.model.memory import (
    USABLE,
    activation_bytes_per_token,
    layer_of_zeros,
    layers_to_checkpoint,
)
from polar_ft.model.settings import Checkpointing, LoraSettings

Strategy = Literal["none", "zero1", "zero2", "zero3", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

GIB = 2**30
# CUDA's own share of a GPU, NCCL's buffers and the libraries' workspaces: a round figure, not measured.
RESERVED = 2 * GIB
# NF4 with a float32 scale for each 64 values (`polar_ft.model.lora`).
NF4_BYTES = 0.5 + 4 / 64
# Elements of DeepSpeed's buffer in which gradients are gathered for exchange (reduce_bucket_size), and of
# the parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters): its defaults, which xtuner's JSON
# files leave alone.
BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
# Elements that ZeRO-3 updates at a time (sub_group_size).
SUB_GROUP = 1_000_000_000
# Bytes of AdamW's temporaries for each of those, on a GPU and on a CPU.
TEMPORARY = {"cuda": 4, "cpu": 8}


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, and what a token costs.

    Attributes:
        parameters: Of decoder, head and adapters.
        trainable: Of those, what is trained.
        quantized: Of those, what QLoRA holds in four bits.
        largest: Elements of the largest trained tensor.
        layers: Of the decoder.
        hidden_size: Of the decoder.
        intermediate_size: Of the feed-forward layer.
    """

    parameters: int
    trainable: int
    quantized: int
    largest: int
    layers: int
    hidden_size: int
    intermediate_size: int


def model_size(hf_config: Mapping[str, Any], lora: LoraSettings | None = None) -> ModelSize:
    """Counts the parameters of a model that need not be there, on the device "meta".

    >>> tiny = dict(model_type="internlm2", bias=False, vocab_size=10, hidden_size=8,
    ...             intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...             num_key_value_heads=1)
    >>> size = model_size(tiny)  # embedding 80, q 64, k 32, v 32, o 64, three of 128, norms 3 · 8, head 8
    >>> size.parameters, size.trainable, size.largest
    (688, 688, 128)
    >>> model_size(tiny, LoraSettings(r=2, alpha=2, target_modules=("q_proj",))).trainable  # 2 · (8 + 8) + 8
    40

    Args:
        hf_config: The model's ``config.json``.
        lora: Of the config; None where all weights are trained.

    Raises:
        PolarError: The model's type is not supported, or sizes are missing.
    """
    decoder: Any = empty_decoder(decoder_config(hf_config, "config.json"))
    config = decoder.config
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    base, head = sum(shape.numel() for shape in shapes.values()), config.hidden_size
    trained = [shape.numel() for shape in shapes.values()]
    adapters = quantized = 0
    if lora is not None:
        adapted = [shape for name, shape in shapes.items() if projection_of(name) in lora.target_modules]
        trained = [lora.r * side for shape in adapted for side in shape]
        adapters = sum(trained)
        if lora.load_in_4bit:
            quantized = sum(shape.numel() for name, shape in shapes.items() if projection_of(name))
    return ModelSize(
        parameters=base + adapters + head,
        trainable=sum(trained) + head,
        quantized=quantized,
        largest=max(trained),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )


def layer_activations(
    hf_config: Mapping[str, Any], dtype: torch.dtype, lora: LoraSettings | None = None
) -> int:
    """Bytes that a layer of this shape keeps for backward, for each token; measured on one layer of zeros.

    Measured on the CPU with its attention kernel; flash-attention keeps about as much.
    """
    decoder = layer_of_zeros(decoder_config(hf_config, "config.json"), dtype)
    if lora is not None:
        from polar_ft.training.lora import add_adapters

        # Four bits need a GPU, and change only how the weights are held.
        add_adapters(decoder, lora.model_copy(update={"load_in_4bit": False}), ".")
    return activation_bytes_per_token(decoder)


@dataclass(frozen=True)
class Activations:
    """What the pack of a step keeps for backward.

    Attributes:
        tokens: Of the largest pack.
        layer_bytes: What a layer keeps, a token (`layer_activations`).
        boundary_bytes: Of a layer's input, a token.
        temporary_bytes: Of what exists only while backward is in a layer, a token.
        layers: Of the decoder.
        checkpointing: ``recompute_layers`` of the config.
    """

    tokens: int
    layer_bytes: int
    boundary_bytes: int
    temporary_bytes: int
    layers: int
    checkpointing: Checkpointing = "auto"

    @classmethod
    def of_model(
        cls, size: ModelSize, tokens: int, layer_bytes: int, itemsize: int, checkpointing: Checkpointing
    ) -> Activations:
        """Backward of ``down(silu(gate) · up)`` has three tensors of the intermediate size at once."""
        return cls(
            tokens=tokens,
            layer_bytes=layer_bytes,
            boundary_bytes=size.hidden_size * itemsize,
            temporary_bytes=3 * size.intermediate_size * itemsize,
            layers=size.layers,
            checkpointing=checkpointing,
        )

    def recomputed(self, free: int) -> int:
        """How many layers training would compute again with so many bytes free for activations."""
        return layers_to_checkpoint(
            self.checkpointing,
            self.layers,
            tokens=self.tokens,
            bytes_per_token=self.layer_bytes,
            boundary_bytes=self.boundary_bytes,
            free_bytes=free,
        )

    def bytes(self, recomputed: int) -> int:
        """At their peak, with so many layers computed again.

        The last layer computes little more than keys and values, and is counted with the others.

        >>> Activations(10, layer_bytes=100, boundary_bytes=8, temporary_bytes=40, layers=3).bytes(2)
        2560
        """
        kept = (self.layers - recomputed) * self.layer_bytes + recomputed * self.boundary_bytes
        again = self.layer_bytes if recomputed else 0
        return self.tokens * (kept + again + self.temporary_bytes)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU.

    Attributes:
        strategy: ZeRO stage, or none.
        weights: As forward uses them.
        gradients: Of a step.
        optimizer: AdamW's two moments, and float32 master weights where there are such.
        buffers: Of communication, gathered parameters, and copies for mixed precision.
        activations: Of the largest pack, with ``recomputed_layers``.
        recomputed_layers: As training would choose it.
        update: All that is there while the optimizer runs.
        host: In the machine's memory, for all GPUs together.
        reserved: See `RESERVED`; 0 on a CPU.
    """

    strategy: Strategy
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    recomputed_layers: int
    update: int
    host: int = 0
    reserved: int = 0

    @property
    def backward(self) -> int:
        """All that is there at the peak of backward."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations

    @property
    def peak(self) -> int:
        """The larger of the two moments, with what is reserved."""
        return max(self.backward, self.update) + self.reserved


def estimate(
    strategy: Strategy,
    size: ModelSize,
    activations: Activations,
    *,
    gpus: int,
    available: int | None,
    device: Literal["cuda", "cpu"] = "cuda",
    base_bytes: int = 4,
    autocast: bool = True,
    bucket: int = BUCKET,
) -> Estimate:
    """What a strategy takes on each GPU.

    Args:
        strategy: ZeRO stage, or none.
        size: Of the model.
        activations: Of its largest pack.
        gpus: Data-parallel ranks.
        available: Bytes of a GPU; None does not limit, so that no layer is computed again unless the config
            says so.
        device: On a CPU PyTorch's AdamW has other temporaries, and buffers count as far as they are used.
        base_bytes: With "none" and adapters, of each frozen weight; all else is float32 there.
        autocast: With "none": float32 weights are copied to bfloat16 for the length of a pack.
        bucket: See `BUCKET`.
    """
    if strategy == "none":
        parts = _plain(size, gpus, device, base_bytes, autocast)
    elif strategy in ("zero1", "zero2"):
        parts = _zero12(size, gpus, device, bucket, stage=int(strategy[-1]))
    else:
        parts = _zero3(size, gpus, device, bucket, offload=strategy == "zero3_offload")
    reserved = RESERVED if device == "cuda" else 0
    held = parts["weights"] + parts["gradients"] + parts["optimizer"] + parts["buffers"]
    free = 1 << 62 if available is None else int(USABLE * max(0, available - reserved - held))
    recomputed = activations.recomputed(free)
    return Estimate(
        strategy=strategy,
        activations=activations.bytes(recomputed),
        recomputed_layers=recomputed,
        reserved=reserved,
        **parts,
    )


def estimate_run(
    hf_config: Mapping[str, Any],
    lora: LoraSettings | None,
    strategy: Strategy,
    tokens: int,
    *,
    gpus: int,
    available: int,
    device: Literal["cuda", "cpu"],
) -> tuple[Estimate, ModelSize]:
    """What a run takes on each GPU, in the dtype that such a run would be configured with.

    That is float32 on a CPU and for all weights without DeepSpeed, else bfloat16.

    Args:
        hf_config: Shapes of the model.
        lora: Adapters; None trains all weights.
        strategy: ZeRO stage, or none.
        tokens: Of the largest pack.
        gpus: Data-parallel ranks.
        available: Bytes of a GPU.
        device: What it runs on.
    """
    size = model_size(hf_config, lora)
    exact = device == "cpu" or (strategy == "none" and lora is None)
    dtype = torch.float32 if exact else torch.bfloat16
    layer = _layer_bytes(json.dumps(dict(hf_config)), dtype, lora)
    activations = Activations.of_model(size, tokens, layer, dtype.itemsize, "auto")
    found = estimate(
        strategy,
        size,
        activations,
        gpus=gpus,
        available=available,
        device=device,
        base_bytes=dtype.itemsize,
    )
    return found, size


@lru_cache(maxsize=16)
def _layer_bytes(hf_config: str, dtype: torch.dtype, lora: LoraSettings | None) -> int:
    return layer_activations(json.loads(hf_config), dtype, lora)


def _plain(size: ModelSize, gpus: int, device: str, base_bytes: int, autocast: bool) -> dict[str, int]:
    trained, frozen = size.trainable, size.parameters - size.trainable
    weights = 4 * trained + _frozen(frozen, size.quantized, base_bytes)
    gradients, optimizer = 4 * trained, 8 * trained
    # DistributedDataParallel's buckets are a second copy of the gradients.
    buffers = 4 * trained if gpus > 1 else 0
    copies = 2 * (trained + (frozen - size.quantized if base_bytes == 4 else 0))
    in_backward = copies if autocast and device == "cuda" else 0
    # AdamW's square roots: of all tensors at once on a GPU, of one at a time on a CPU, where they are two.
    temporary = TEMPORARY[device] * (trained if device == "cuda" else size.largest)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buffers": buffers + in_backward,
        "update": weights + gradients + optimizer + buffers + temporary,
    }


def _zero12(size: ModelSize, gpus: int, device: str, bucket: int, stage: int) -> dict[str, int]:
    trained = size.trainable
    share = -(-trained // gpus)
    weights = 2 * trained + _frozen(size.parameters - trained, size.quantized, 2)
    gradients = 2 * (trained if stage == 1 else share)
    optimizer = 12 * share
    # overlap_comm, which xtuner's files switch on, takes two buckets.
    buffers = 2 * 2 * (bucket if device == "cuda" else min(bucket, trained))
    temporary = TEMPORARY[device] * share
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buffers": buffers,
        "update": weights + optimizer + 4 * share + temporary,
    }


def _zero3(size: ModelSize, gpus: int, device: str, bucket: int, offload: bool) -> dict[str, int]:
    trained = size.trainable
    share = -(-trained // gpus)
    weights = -(-(2 * trained + _frozen(size.parameters - trained, size.quantized, 2)) // gpus)
    group = min(share, SUB_GROUP)
    temporary = group * (4 + TEMPORARY[device])  # and the gradient in float32
    gathered = 2 * min(size.parameters, LIVE_PARAMETERS) if gpus > 1 or (offload and device == "cuda") else 0
    buffers = gathered + 2 * (bucket if device == "cuda" else min(bucket, trained))
    if not offload:
        return {
            "weights": weights,
            "gradients": 2 * share,
            "optimizer": 12 * share,
            "buffers": buffers,
            "update": weights + 14 * share + buffers + temporary,
        }
    # AdamW runs on the CPU, and the gradients stay there in float32 as well.
    host = gpus * (weights + 18 * share + group * TEMPORARY["cpu"])
    return {"weights": 0, "gradients": 0, "optimizer": 0, "buffers": buffers, "update": 0, "host": host}


def _frozen(parameters: int, quantized: int, itemsize: int) -> int:
    return int((parameters - quantized) * itemsize + quantized * NF4_BYTES)
