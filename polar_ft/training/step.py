"""One optimizer step: forward and backward of its packs, then one update.

The loss of a step is the mean over its pairs, over all ranks. Data-parallel wrappers average gradients over
the ranks, so every pack contributes ``sum of its pair losses × ranks / weight of the step``: the same
mathematics whatever the packing, the number of ranks and the ZeRO stage (``tests/invariance``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polar_ft.model.losses import STATISTICS, PairObjective
from polar_ft.model.packing import Pack
from polar_ft.training.engines import Engine
from polar_ft.training.ranks import beat


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step.

    Attributes:
        packs: The packs of this rank, as many on every rank.
        weight: Sum of the weights of the pairs of the step, over all ranks.
        epoch: From 0.
        step: Step within the epoch, from 0.
    """

    packs: list[Pack]
    weight: float
    epoch: int
    step: int

    def pin_memory(self) -> StepBatch:
        """Called by torch's DataLoader."""
        return replace(self, packs=[pack.pin_memory() for pack in self.packs])


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, over all ranks.

    Attributes:
        figures: ``loss``, ``accuracy``, ``margin``, ``grad_norm`` and the counts of the step, by name.
        nonfinite_packs: Numbers of this rank's packs whose loss was NaN or infinite.
        updated: Whether the weights were updated; not where loss or gradient are not finite.
    """

    figures: dict[str, float]
    nonfinite_packs: list[int]
    updated: bool


# What the host counts of a pack, next to what the objective sums on the device.
COUNTS = ("pairs", "tokens", "flat_tokens", "attended")


def unwrapped(model: nn.Module) -> Any:
    """The model within DistributedDataParallel or a DeepSpeed engine."""
    return getattr(model, "module", model)


def take_step(engine: Engine, objective: PairObjective, batch: StepBatch) -> StepResult:
    """Computes all packs of a step and makes one update; every rank calls it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    factor = ranks / batch.weight
    engine.begin(len(batch.packs))
    of_packs = []
    for number, pack in enumerate(batch.packs):
        last = number == len(batch.packs) - 1
        pack = pack.to(engine.device)
        with engine.computing(last):
            beat("computing")
            loss, statistics = objective(engine.model(pack), pack)
            if last:
                beat("exchanging")
            engine.backward(loss * factor)
        of_packs.append(statistics)

    statistics = torch.stack(of_packs)  # [packs, statistics]
    counts = torch.tensor([_counts(pack) for pack in batch.packs], dtype=torch.float64)
    total = torch.cat([statistics.sum(0), counts.sum(0).to(engine.device)])
    if ranks > 1:
        dist.all_reduce(total)
    # The one point of a step at which the host waits for the device.
    figures = _figures(dict(zip(STATISTICS + COUNTS, total.tolist(), strict=True)))
    finite = math.isfinite(figures["loss"])
    figures["grad_norm"] = engine.update(finite)
    return StepResult(
        figures,
        nonfinite_packs=[] if finite else (~statistics[:, 0].isfinite()).nonzero().flatten().tolist(),
        updated=finite and math.isfinite(figures["grad_norm"]),
    )


def _counts(pack: Pack) -> tuple[int, ...]:
    lengths = zip(pack.segments.q_lengths, pack.segments.k_lengths, strict=True)
    attended = sum(q * (k - q) + q * q // 2 for q, k in lengths)
    return len(pack.chosen), len(pack.input_ids), pack.flat_tokens, attended


def _figures(total: dict[str, float]) -> dict[str, float]:
    chosen, rejected = total["chosen"] / total["pairs"], total["rejected"] / total["pairs"]
    return {
        "loss": total["loss"] / total["weight"],
        "accuracy": total["correct"] / total["pairs"],
        "margin": chosen - rejected,
        "chosen_score": chosen,
        "rejected_score": rejected,
        **{name: total[name] for name in COUNTS},
    }
