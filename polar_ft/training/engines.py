"""How gradients are accumulated, exchanged and applied: without DeepSpeed, and with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polar_ft.errors import PolarError


class PlainEngine:
    """Training without DeepSpeed.

    Args:
        model: The model, perhaps in DistributedDataParallel.
        optimizer: Of its parameters.
        max_norm: Norm to which gradients are clipped.
        autocast: Dtype of automatic mixed precision on CUDA; a CPU computes in the weights' dtype.

    Raises:
        PolarError: Trained weights are in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float = math.inf,
        autocast: torch.dtype | None = None,
    ) -> None:
        _check_dtype(model)
        self.model = model
        self.device = next(model.parameters()).device
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.autocast = autocast

    def begin(self, packs: int) -> None:
        """Begins a step of that many packs."""

    @contextmanager
    def computing(self, last: bool) -> Iterator[None]:
        """The context of forward and backward of a pack; ranks exchange gradients once, with the last one."""
        local: Any = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            local = self.model.no_sync()
        with local, self.mixed_precision():
            yield

    def mixed_precision(self) -> Any:
        """The context of forward: automatic mixed precision on CUDA."""
        if self.autocast is None or self.device.type != "cuda":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss."""
        loss.backward()

    def update(self, finite: bool) -> float:
        """Clips, applies and clears the gradients; returns their norm before clipping.

        Nothing is updated where the norm is not finite, or where ``finite`` is False.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        if finite and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class DeepSpeedEngine:
    """Training by a ``deepspeed.DeepSpeedEngine`` of any ZeRO stage, which clips by its own settings.

    Args:
        engine: Made by mmengine's DeepSpeedStrategy.
    """

    def __init__(self, engine: Any) -> None:
        self.model = engine
        self.device = engine.device

    def begin(self, packs: int) -> None:
        """As `PlainEngine`'s."""
        if hasattr(self.model.optimizer, "gradient_accumulation_steps"):
            # Offload reads it to know whether gradients of several packs are to be added up.
            self.model.optimizer.gradient_accumulation_steps = packs

    @contextmanager
    def computing(self, last: bool) -> Iterator[None]:
        """As `PlainEngine`'s."""
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def mixed_precision(self) -> Any:
        """No context: DeepSpeed casts the weights itself."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """As `PlainEngine`'s."""
        self.model.backward(loss, scale_wrt_gas=False)

    def update(self, finite: bool) -> float:
        """As `PlainEngine`'s."""
        engine = self.model
        if engine.zero_optimization():
            # ZeRO leaves out an update with a gradient that is not finite, and then keeps an old norm; only
            # with float16 does it look by itself.
            engine.optimizer.check_overflow()
            engine.step()
            return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan
        # Without ZeRO DeepSpeed would not keep the norm, and makes any update.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if finite and math.isfinite(norm):
            engine.step()
        else:
            engine.module.zero_grad()
        return norm


# What `polar_ft.training.step.take_step` is given; the methods of the two mean the same.
Engine = PlainEngine | DeepSpeedEngine


def _check_dtype(model: nn.Module) -> None:
    """Raises PolarError for trained half-precision weights without DeepSpeed's float32 master weights.

    An update of 1e-5 of such a weight is rounded away.
    """
    halves = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if halves:
        dtype = str(halves.pop()).removeprefix("torch.")
        raise PolarError(
            f"the config loads the weights in {dtype}, and without DeepSpeed there are no float32 master "
            f"weights, so most updates would be rounded away; add --deepspeed deepspeed_zero2, or set "
            f'torch_dtype="float32"'
        )
