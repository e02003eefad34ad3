"""Hooks of mmengine's runner."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook

from polar_ft.errors import PolarError
from polar_ft.training.flops import PEAK_FLOPS, attention_flops, token_flops


class StepPlanHook(Hook):
    """Before training: shows and keeps the step plan, and decides on activation checkpointing.

    The plan's settings and what it achieves are written to ``step_plan.json`` in the work folder.
    """

    def before_train(self, runner: Any) -> None:
        """Called by mmengine once model, optimizer and data are there."""
        if not is_deepspeed(runner.model):
            _check_dtype(unwrap(runner.model))
        dataset = runner.train_dataloader.dataset
        summary = dataset.plan.describe()
        for line in summary.lines():
            runner.logger.info(f"plan: {line}")
        # DeepSpeed has allocated its optimizer state by now; AdamW's two moments and gradients come later.
        engine = is_deepspeed(runner.model)
        runner.logger.info(
            f"memory: {unwrap(runner.model).plan_checkpointing(summary.largest_pack, 2 if engine else 12)}"
        )
        if is_main_process():
            plan = {
                "settings": dataset.plan.settings,
                "data": str(dataset.groups.folder),
                "achieved": asdict(summary),
            }
            Path(runner.work_dir, "step_plan.json").write_text(json.dumps(plan, indent=1) + "\n")


class ThroughputHook(Hook):
    """Adds speed and peak memory of every step to log and TensorBoard.

    Over all ranks: ``pairs_per_s``; ``tokens_per_s``, of the tokens that were computed;
    ``flat_tokens_per_s``, of those that the same pairs have as separate sequences; ``tflops_per_s``
    (`polar_ft.training.flops`, no recomputation counted); ``mfu``, its share of what the GPUs' data sheet
    gives, where that is known. Of this rank: ``peak_memory_gib``, on a CPU of the process.
    """

    def before_train(self, runner: Any) -> None:
        """Called by mmengine once the model is there."""
        self.sizes = unwrap(runner.model).llm.config.to_dict()
        self.frozen = unwrap(runner.model).adapter is not None
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak_flops = PEAK_FLOPS.get(name, 0.0) * get_world_size()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Called by mmengine after each step."""
        hub, figures = runner.message_hub, outputs or {}
        seconds = hub.get_scalar("train/time").current()
        for name in ("pairs", "tokens", "flat_tokens"):
            hub.update_scalar(f"train/{name}_per_s", figures[name] / seconds)
        flops = token_flops(self.sizes, frozen=self.frozen) * figures["tokens"]
        flops += attention_flops(self.sizes, figures["attended"])
        hub.update_scalar("train/tflops_per_s", flops / seconds / 1e12)
        if self.peak_flops:
            hub.update_scalar("train/mfu", flops / seconds / self.peak_flops)
        hub.update_scalar("train/peak_memory_gib", _peak_memory() / 2**30)


def _check_dtype(model: Any) -> None:
    """Without DeepSpeed nothing keeps float32 master weights of half-precision parameters.

    Raises:
        PolarError: There are such parameters: an update of 1e-5 of a weight is rounded away.
    """
    halves = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if halves:
        dtype = str(halves.pop()).removeprefix("torch.")
        raise PolarError(
            f"the config loads the weights in {dtype}, and without DeepSpeed there are no float32 master "
            f"weights, so most updates would be rounded away; add --deepspeed deepspeed_zero2, or set "
            f'torch_dtype="float32"'
        )


def is_deepspeed(model: Any) -> bool:
    """Whether the runner's model is a DeepSpeed engine, wrapped by mmengine."""
    return type(model).__name__ == "MMDeepSpeedEngineWrapper"


def unwrap(model: Any) -> Any:
    """The `PolarRewardModel` within what mmengine's runner calls the model."""
    if is_deepspeed(model):
        model = model.model
    return getattr(model, "module", model)


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
