"""LoRA adapters as tensors: their settings, their names, and how they are merged into the weights they adapt.

A weight W [out, in] with adapter A [r, in], B [out, r] computes as ``W + alpha / r · B A`` (Hu et al.,
arXiv 2106.09685, section 4.1). QLoRA (Dettmers et al., arXiv 2305.14314) keeps W in four bits; what it then
computes with is `nf4_rounded` of W.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from polar_ft.errors import PolarError
from polar_ft.model.settings import PROJECTIONS, LoraSettings

# The buffer of a training model, and so the tensor of a checkpoint, that holds an `Adapter` as JSON.
RECORD = "lora_record"

# The 16 values of four-bit NormalFloat (arXiv 2305.14314, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_NF4_BLOCK = 64


class Adapter(BaseModel):
    """What has to be known of adapters in addition to their tensors.

    Attributes:
        lora: How they were trained.
        base: Folder or hub id of the model that they adapt.
        base_digest: `base_digest` of that model in ``base_dtype``.
        base_dtype: In which it was loaded for training, "bfloat16" for instance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora: LoraSettings
    base: str
    base_digest: str
    base_dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """``base_dtype`` of torch."""
        return getattr(torch, self.base_dtype)

    def to_tensor(self) -> torch.Tensor:
        """As bytes of JSON, which can travel among the weights of a checkpoint."""
        return torch.frombuffer(bytearray(self.model_dump_json().encode()), dtype=torch.uint8).clone()

    @classmethod
    def of_tensor(cls, record: torch.Tensor) -> Adapter:
        """The inverse of `to_tensor`.

        Raises:
            PolarError: It is something else.
        """
        try:
            return cls.model_validate_json(bytes(record.cpu().tolist()))
        except ValueError as error:
            raise PolarError(f"{RECORD} of the checkpoint is damaged; take another checkpoint") from error

    def differences(self, other: Adapter) -> list[str]:
        """In what adapters that fit the one would compute something else with the other.

        The place of the base may change, and the dropout.
        """
        pairs = {
            **{
                name: (getattr(self.lora, name), getattr(other.lora, name))
                for name in ("r", "alpha", "load_in_4bit")
            },
            "target_modules": (sorted(self.lora.target_modules), sorted(other.lora.target_modules)),
            "torch_dtype": (self.base_dtype, other.base_dtype),
            "the weights of the base model": (self.base_digest, other.base_digest),
        }
        return [f"{name}: {mine} and {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]

    def check_base(self, digest: str, name: str) -> None:
        """Raises PolarError if these adapters were trained on another model than ``name``."""
        if digest != self.base_digest:
            raise PolarError(
                f"{name}: is not the model that the adapters were trained on ({self.base}): its weights "
                f"differ; name that one"
            )


def base_digest(weights: Mapping[str, torch.Tensor], layers: int, dtype: torch.dtype) -> str:
    """A hash of some weights of a decoder, by which it is known again.

    Args:
        weights: Of the decoder, by Llama's names.
        layers: Number of layers.
        dtype: In which the weights are to be compared.
    """
    digest = hashlib.sha256()
    last = f"layers.{layers - 1}"
    for name in ("norm.weight", f"{last}.self_attn.o_proj.weight", f"{last}.mlp.down_proj.weight"):
        rows = weights[name][:64].detach().to("cpu", dtype).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of the two matrices that adapt a weight, as a training model has them.

    >>> adapter_names("layers.0.self_attn.q_proj.weight")
    ('layers.0.self_attn.q_proj.lora_A.default.weight', 'layers.0.self_attn.q_proj.lora_B.default.weight')
    """
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def projection_of(weight: str) -> str | None:
    """The projection whose weight this is.

    >>> projection_of("layers.0.mlp.up_proj.weight"), projection_of("norm.weight")
    ('up_proj', None)
    """
    parts = weight.split(".")
    return parts[-2] if parts[-1] == "weight" and parts[-2] in PROJECTIONS else None


def adapted_weights(names: Iterable[str], lora: LoraSettings) -> list[str]:
    """Those of a decoder's tensors that have adapters."""
    return [name for name in names if projection_of(name) in lora.target_modules]


def merged(
    name: str,
    weight: torch.Tensor,
    adapter: Adapter,
    matrices: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """A weight of the base as the trained model computed with it.

    Args:
        name: Of the weight, in Llama's names.
        weight: As the base model has it.
        adapter: What is known of the adapters.
        matrices: A [r, in] and B [out, r] if the weight is adapted.

    Returns:
        ``weight`` in the dtype of training; where it is adapted, the sum in float32. Cast that once.
    """
    weight = weight.to(adapter.torch_dtype)
    if adapter.lora.load_in_4bit and projection_of(name):
        weight = nf4_rounded(weight)
    if matrices is None:
        return weight
    a, b = matrices
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=adapter.lora.scale)


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight that bitsandbytes held in four bits: NF4, blocks of 64, without compressed
    statistics.

    In a block, in row-major order, each value is divided by the largest magnitude, rounded to the nearest of
    16 values, and multiplied again. The values next to 0.5 are 0.4407 and 0.5626, so that

    >>> nf4_rounded(torch.tensor([[0.0, -2.0, 1.0, 0.2]])).tolist()
    [[0.0, -2.0, 0.8814196586608887, 0.15916059911251068]]

    Args:
        weight: [out, in], floating point.

    Returns:
        The same shape and dtype.
    """
    values = torch.tensor(_NF4)
    between = (values[1:] + values[:-1]) / 2
    flat = weight.detach().float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    scale = padded.abs().amax(1, keepdim=True)
    codes = torch.bucketize(padded / scale.clamp(min=torch.finfo(torch.float32).tiny), between)
    return (values[codes] * scale).flatten()[: len(flat)].view(weight.shape).to(weight.dtype)


def absolute_base(base: str | os.PathLike[str]) -> str:
    """How adapters name their base: a folder by its whole path, so that they find it from anywhere."""
    return str(Path(base).absolute()) if Path(base).is_dir() else os.fspath(base)
