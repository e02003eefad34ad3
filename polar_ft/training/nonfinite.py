"""Steps whose loss or gradient is NaN or infinite: told with their rows, and not too many of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook

from polar_ft.errors import PolarError
from polar_ft.training.checkpoints import pointed_to

_ROWS_TOLD = 10


class NonFiniteHook(Hook):
    """Tells which rows a loss that is not finite comes from, and ends a run that has several in a row.

    Such a step updates nothing (`polar_ft.training.step`).

    Args:
        max_in_a_row: So many steps in a row end the run.
    """

    # Before log, validation and checkpoint of the step.
    priority = "VERY_HIGH"

    def __init__(self, max_in_a_row: int = 5) -> None:
        self.max_in_a_row = max_in_a_row
        self.in_a_row = 0

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Called by mmengine after each step.

        Raises:
            PolarError: There were too many in a row.
        """
        assert outputs is not None
        if "skipped" not in outputs:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        step = runner.iter + 1
        what = "loss" if not math.isfinite(outputs["loss"]) else "gradient"
        runner.logger.error(
            f"step {step}: the {what} is not finite, so nothing was updated ({self.in_a_row} in a row, "
            f"{self.max_in_a_row} end the run). {_rows(runner.train_dataloader.dataset, data_batch)}. If it "
            f"goes on: a lower lr, a longer warm-up, a smaller max_norm, or float32 to find the cause"
        )
        if self.in_a_row >= self.max_in_a_row:
            kept = pointed_to(Path(runner.work_dir)) or "none was saved yet"
            raise PolarError(
                f"{self.in_a_row} steps in a row up to step {step} without a finite {what}; the log names "
                f"their rows. The last good checkpoint is kept: {kept}"
            )


def _rows(dataset: Any, batch: Any) -> str:
    """The rows of the packs whose loss was not finite, of all ranks."""
    packs = dataset.plan.packs(batch.epoch, batch.step)[dataset.rank]
    groups = [piece.group for number in batch.nonfinite for piece in packs[number]]
    sources = [
        source
        for of_rank in all_gather_object([dataset.groups.source(g) for g in groups])
        for source in of_rank
    ]
    if not sources:
        count = len(dataset.plan.groups_of_step(batch.epoch, batch.step))
        return f"Every loss of its {count} groups is finite, so no row stands out"
    more = f" and {len(sources) - _ROWS_TOLD} more" if len(sources) > _ROWS_TOLD else ""
    return f"It is in the pack that holds {', '.join(sources[:_ROWS_TOLD])}{more}"
