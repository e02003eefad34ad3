"""One optimizer step: all packs of a step forward and backward, then one update.

The loss of a step is the mean over its pairs, over all ranks. Data-parallel wrappers average gradients over
the ranks, so every pack contributes ``sum of its pair losses × ranks / weight of the step``. An iteration of
mmengine is one such step; log, schedule, checkpoints and TensorBoard count optimizer updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polar_ft.model.packing import Pack
from polar_ft.training.ranks import beat


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step.

    Attributes:
        packs: The packs of this rank, as many on every rank.
        weight: Sum of the weights of the pairs of the whole step, over all ranks.
        epoch: From 0.
        step: Step within the epoch, from 0.
        nonfinite: Numbers of the packs whose loss was NaN or infinite; empty until the step has run.
    """

    packs: list[Pack]
    weight: float
    epoch: int
    step: int
    nonfinite: list[int] = field(default_factory=list)

    def pin_memory(self) -> StepBatch:
        """Called by torch's DataLoader."""
        return replace(self, packs=[pack.pin_memory() for pack in self.packs])


# What `PolarRewardModel` sums over the pairs of a pack, in this order, and what the host counts beside it.
STATISTICS = ("loss", "weight", "correct", "chosen", "rejected")
COUNTS = ("pairs", "tokens", "flat_tokens", "attended")

Log = dict[str, float]


def _accumulate(
    batch: StepBatch, device: torch.device, run: Callable[[Pack, float, bool], torch.Tensor]
) -> Log:
    """Runs every pack and returns the step's figures, summed over all ranks.

    ``run(pack, factor, last)`` computes forward and backward of one pack, its loss times ``factor``, and
    returns its statistics.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    counts = [sum(values) for values in zip(*map(_counts, batch.packs), strict=True)]
    of_packs = []
    for number, pack in enumerate(batch.packs):
        last = number == len(batch.packs) - 1
        of_packs.append(run(pack.to(device), ranks / batch.weight, last))
    statistics = torch.stack(of_packs)  # [packs, statistics]
    # The one point of a step at which the host waits for the device.
    total = torch.cat([statistics.sum(0), torch.tensor(counts, dtype=torch.float64, device=device)])
    if ranks > 1:
        dist.all_reduce(total)
    log = _log(dict(zip(STATISTICS + COUNTS, total.tolist(), strict=True)))
    if not math.isfinite(log["loss"]):
        batch.nonfinite[:] = (~statistics[:, 0].isfinite()).nonzero().flatten().tolist()
    return log


def _counts(pack: Pack) -> tuple[int, ...]:
    lengths = zip(pack.segments.q_lengths, pack.segments.k_lengths, strict=True)
    attended = sum(q * (k - q) + q * q // 2 for q, k in lengths)
    return len(pack.chosen), len(pack.input_ids), pack.flat_tokens, attended


def _log(total: dict[str, float]) -> Log:
    chosen, rejected = total["chosen"] / total["pairs"], total["rejected"] / total["pairs"]
    return {
        "loss": total["loss"] / total["weight"],
        "accuracy": total["correct"] / total["pairs"],
        "margin": chosen - rejected,
        "chosen_score": chosen,
        "rejected_score": rejected,
        **{name: total[name] for name in COUNTS},
    }


def plain_step(
    model: nn.Module, batch: StepBatch, optim_wrapper: StepOptimWrapper, device: torch.device
) -> Log:
    """A step without DeepSpeed; ``model`` may be wrapped in DistributedDataParallel."""

    def run(pack: Pack, factor: float, last: bool) -> torch.Tensor:
        beat("computing")
        # Gradients are exchanged between ranks once, with the last pack.
        local = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with local, optim_wrapper.autocast(device):
            output = model(pack=pack, mode="loss")
            if last:
                beat("exchanging")
            (output["loss"] * factor).backward()
        return output["statistics"]

    log = _accumulate(batch, device, run)
    log["grad_norm"] = optim_wrapper.clip_and_step(update=math.isfinite(log["loss"]))
    if not (math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])):
        log["skipped"] = 1.0
    return log


def deepspeed_step(engine: Any, batch: StepBatch) -> Log:
    """A step with a ``deepspeed.DeepSpeedEngine``, any ZeRO stage."""
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        # Offload reads it to know whether gradients of several packs are to be added up.
        engine.optimizer.gradient_accumulation_steps = len(batch.packs)

    def run(pack: Pack, factor: float, last: bool) -> torch.Tensor:
        beat("computing")
        engine.set_gradient_accumulation_boundary(last)
        output = engine(pack=pack, mode="loss")
        if last:
            beat("exchanging")
        engine.backward(output["loss"] * factor, scale_wrt_gas=False)
        return output["statistics"]

    log = _accumulate(batch, engine.device, run)
    if engine.zero_optimization():
        # ZeRO leaves out an update with a gradient that is not finite, and then keeps an old norm; only with
        # float16 does it look by itself.
        engine.optimizer.check_overflow()
        engine.step()
        norm = float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan
    else:  # DeepSpeed would not keep the norm, and makes any update
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm) and math.isfinite(log["loss"]):
            engine.step()
        else:
            engine.module.zero_grad()
    log["grad_norm"] = norm
    if not (math.isfinite(norm) and math.isfinite(log["loss"])):
        log["skipped"] = 1.0
    return log


class StepOptimWrapper(OptimWrapper):
    """mmengine's optimizer wrapper for whole steps, and with automatic mixed precision where it pays.

    Args:
        optimizer: The optimizer.
        clip_grad: ``dict(max_norm=…)``; None does not clip.
        accumulative_counts: For ``--deepspeed``, which reads it; the step plan decides here.
        dtype: Autocast dtype on CUDA, "bfloat16" or None; a CPU computes in float32.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_grad: dict | None = None,
        accumulative_counts: int = 1,
        dtype: str | None = "bfloat16",
    ) -> None:
        super().__init__(optimizer, clip_grad=clip_grad)
        self.dtype = getattr(torch, dtype) if dtype else None

    def autocast(self, device: torch.device):
        """Context in which forward runs."""
        if self.dtype is None or device.type != "cuda":
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def clip_and_step(self, update: bool = True) -> float:
        """Clips, updates and clears the gradients; returns their norm before clipping.

        Nothing is updated where the norm is not finite, or where ``update`` is False.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        max_norm = (self.clip_grad_kwargs or {}).get("max_norm", float("inf"))
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if update and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@MODEL_WRAPPERS.register_module()
class StepDistributedDataParallel(DistributedDataParallel):
    """DistributedDataParallel whose ``train_step`` is one whole optimizer step; on CUDA and on CPU.

    Args:
        module: The model, on its device.
        device_ids: What mmengine gives, the local rank also on a CPU; used on CUDA only.
        **settings: Of DistributedDataParallel.
    """

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, **settings: Any) -> None:
        on_cuda = next(module.parameters()).device.type == "cuda"
        super().__init__(module, device_ids=device_ids if on_cuda else None, **settings)

    def train_step(self, data: StepBatch, optim_wrapper: StepOptimWrapper) -> Log:
        """Called by mmengine's train loop."""
        return plain_step(self, data, optim_wrapper, next(self.module.parameters()).device)
