"""What a run shows: a line and scalars for each step, its speed, and the operations that it computes."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size

from polar_ft.conversion.checkpoint_files import pointed_to
from polar_ft.errors import PolarError
from polar_ft.groups import Layout, TokenGroup
from polar_ft.training.data import RewardDataset
from polar_ft.training.step import StepBatch, StepResult
from polar_ft.training.terminal.events import REPORTED, report

_ROWS_NAMED = 10

# Dense bfloat16, operations a second, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def token_flops(config: Mapping[str, Any], *, frozen: bool = False) -> int:
    """Operations of forward and backward for one token, without attention to other tokens.

    Six for each weight of the layers' matrices: two forward, two backward to the layer's input and two to
    the weight (Kaplan et al., arXiv 2001.08361, section 2.1). The embedding is a look-up, and reward head
    and LoRA adapters are too small to count.

    Args:
        config: Sizes of the model.
        frozen: The matrices get no gradient, as under LoRA.

    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...              num_key_value_heads=1)
    >>> token_flops(sizes), token_flops(sizes, frozen=True)  # 6, 4 · (q 16 + k 8 + v 8 + o 16 + 3 · 32)
    (864, 576)
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = _head_dim(config) * config["num_attention_heads"]
    kv = _head_dim(config) * config["num_key_value_heads"]
    weights = config["num_hidden_layers"] * (2 * hidden * queries + 2 * hidden * kv + 3 * hidden * inner)
    return (4 if frozen else 6) * weights


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def attention_flops(config: Mapping[str, Any], attended: float) -> float:
    """Operations of forward and backward of attention, causal: what is masked is not counted.

    Each query-key pair costs two products of all heads' dimensions forward, twice that backward, in every
    layer (Chowdhery et al., arXiv 2204.02311, appendix B, which counts all pairs).

    Args:
        config: Sizes of the model.
        attended: Query-key pairs.
    """
    queries = _head_dim(config) * config["num_attention_heads"]
    return 12 * config["num_hidden_layers"] * queries * attended


def step_flops(config: Mapping[str, Any], groups: Sequence[TokenGroup], layout: Layout) -> float:
    """Operations of forward and backward for groups, recomputation not counted.

    Counts all layers for all tokens, also the last one, which computes less: the figure is what the plain
    model needs, so that leaving work out shows as speed.

    Args:
        config: Sizes of the model.
        groups: What is computed.
        layout: "tree" or "flat".
    """
    tokens = sum(g.tree_tokens() if layout == "tree" else g.flat_tokens() for g in groups)
    attended = sum(g.attended(layout) for g in groups)
    return token_flops(config) * tokens + attention_flops(config, attended)


class TrainingLog:
    """Writes the figures of steps to log and TensorBoard, with speed and peak memory.

    Over all ranks: ``pairs_per_s``; ``tokens_per_s``, of the tokens that were computed;
    ``flat_tokens_per_s``, of those that the same pairs have as separate sequences; ``tflops_per_s``
    (`token_flops`, `attention_flops`, no recomputation counted); ``mfu``, its share of what the GPUs' data
    sheet gives, where that is known. Of this rank: ``peak_memory_gib``, on a CPU of the process.

    Args:
        runner: Of mmengine: its logger and visualizer.
        sizes: ``config.json`` of the decoder.
        frozen: Whether only adapters are trained.
        interval: Steps from one line to the next.
        first: Step before the first one.
        steps: Of the run.
    """

    def __init__(
        self, runner: Any, sizes: Mapping[str, Any], *, frozen: bool, interval: int, first: int, steps: int
    ) -> None:
        self.runner = runner
        self.sizes = sizes
        self.frozen = frozen
        self.interval = interval
        self.first = first
        self.steps = steps
        self.seconds = 0.0
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak_flops = PEAK_FLOPS.get(name, 0.0) * get_world_size()

    def write(self, step: int, lr: float, result: StepResult, data_time: float, step_time: float) -> None:
        """Writes a step.

        Args:
            step: From 1.
            lr: Learning rate that it used.
            result: Its figures.
            data_time: Seconds that were spent waiting for its data.
            step_time: Seconds of the step, with that wait.
        """
        self.seconds += step_time
        if step % self.interval:
            return
        figures = result.figures if result.updated else result.figures | {"skipped": 1.0}
        values = {"lr": lr, "data_time": data_time, **figures, "time": step_time}
        for name in ("pairs", "tokens", "flat_tokens"):
            values[f"{name}_per_s"] = figures[name] / step_time
        flops = token_flops(self.sizes, frozen=self.frozen) * figures["tokens"]
        flops += attention_flops(self.sizes, figures["attended"])
        values["tflops_per_s"] = flops / step_time / 1e12
        if self.peak_flops:
            values["mfu"] = flops / step_time / self.peak_flops
        values["peak_memory_gib"] = _peak_memory() / 2**30
        self.runner.visualizer.add_scalars(
            {**values, "iter": step}, step=step, file_path=f"{self.runner.timestamp}.json"
        )
        left = self.seconds / (step - self.first) * (self.steps - step)
        report("step", step=step, steps=self.steps, left=left, figures=values)
        shown = {"lr": f"{lr:.4e}", "eta": str(timedelta(seconds=int(left)))}
        shown |= {name: f"{values[name]:.4f}" for name in ("time", "data_time")}
        shown |= {name: f"{value:.4f}" for name, value in values.items() if name not in shown}
        self.runner.logger.info(
            f"Iter(train) [{step:>{len(str(self.steps))}}/{self.steps}]  "
            + "  ".join(f"{name}: {value}" for name, value in shown.items()),
            extra=REPORTED,
        )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_bad_step(
    runner: Any,
    dataset: RewardDataset,
    batch: StepBatch,
    result: StepResult,
    step: int,
    in_a_row: int,
    most: int,
) -> None:
    """Logs the rows of a step whose loss or gradient is not finite, and ends a run of several in a row.

    Args:
        runner: Of mmengine.
        dataset: The training data.
        batch: The step's.
        result: The step's.
        step: From 1.
        in_a_row: Such steps up to this one, without another between them.
        most: So many in a row end the run.

    Raises:
        PolarError: There were too many in a row.
    """
    what = "loss" if not math.isfinite(result.figures["loss"]) else "gradient"
    runner.logger.error(
        f"step {step}: the {what} is not finite, so nothing was updated ({in_a_row} in a row, {most} end the "
        f"run). {_rows(dataset, batch, result.nonfinite_packs)}. If it continues: a lower lr, a longer "
        f"warm-up, a smaller max_norm, or float32 to find the cause"
    )
    if in_a_row >= most:
        kept = pointed_to(Path(runner.work_dir)) or "none was saved yet"
        raise PolarError(
            f"{in_a_row} steps in a row up to step {step} without a finite {what}; the log names "
            f"their rows. The last good checkpoint is kept: {kept}"
        )


def _rows(dataset: RewardDataset, batch: StepBatch, nonfinite_packs: list[int]) -> str:
    """The rows of the packs whose loss was not finite, of all ranks."""
    packs = dataset.plan.packs(batch.epoch, batch.step)[dataset.rank]
    groups = [piece.group for number in nonfinite_packs for piece in packs[number]]
    sources = [
        source
        for of_rank in all_gather_object([dataset.groups.source(g) for g in groups])
        for source in of_rank
    ]
    if not sources:
        count = len(dataset.plan.groups_of_step(batch.epoch, batch.step))
        return f"Every loss of its {count} groups is finite, so no row stands out"
    more = f" and {len(sources) - _ROWS_NAMED} more" if len(sources) > _ROWS_NAMED else ""
    return f"It is in the pack that holds {', '.join(sources[:_ROWS_NAMED])}{more}"
