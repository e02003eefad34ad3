"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler


def warmup_cosine(step: int, steps: int, warmup_ratio: float, min_ratio: float) -> float:
    """Factor of the learning rate at a step: linear warm-up from ``min_ratio``, then cosine down to it.

    >>> [round(warmup_cosine(step, 10, 0.2, 0.1), 3) for step in (0, 1, 2, 6, 10)]
    [0.1, 0.55, 1.0, 0.55, 0.1]

    Args:
        step: Step, from 0.
        steps: Steps of the whole run.
        warmup_ratio: Share of the steps that warm up; of a short run at least one step.
        min_ratio: Factor at the first step and at the end.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return min_ratio + (1 - min_ratio) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class WarmupCosineLR(LRSchedulerMixin, _ParamScheduler):
    """`warmup_cosine` as a scheduler of mmengine.

    One scheduler for both phases, because mmengine's LinearLR refuses a warm-up that rounds to no step, as
    3 % of a short run does.

    Args:
        optimizer: Given by mmengine.
        warmup_ratio: See `warmup_cosine`.
        min_ratio: See `warmup_cosine`.
        **kwargs: ``begin`` and ``end`` of mmengine's schedulers.
    """

    def __init__(
        self, optimizer: Any, *args: Any, warmup_ratio: float, min_ratio: float, **kwargs: Any
    ) -> None:
        self.warmup_ratio = warmup_ratio
        self.min_ratio = min_ratio
        super().__init__(optimizer, *args, **kwargs)

    @classmethod
    def build_iter_from_epoch(
        cls, *args: Any, end: float, epoch_length: int, begin: float = 0, by_epoch: bool = True, **kwargs: Any
    ) -> WarmupCosineLR:
        """The scheduler in steps, of ``begin`` and ``end`` in epochs; called by mmengine."""
        return cls(
            *args, begin=int(begin * epoch_length), end=int(end * epoch_length), by_epoch=False, **kwargs
        )

    def _get_value(self) -> list[float]:
        factor = warmup_cosine(self.last_step, self.end - self.begin, self.warmup_ratio, self.min_ratio)
        return [base * factor for base in self.base_values]
