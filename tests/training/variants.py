"""Models that go wrong on purpose at some step; configs of these tests name them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mmengine.hooks import Hook

from polar_ft.model.packing import Pack
from polar_ft.training.model import PolarRewardModel

# Which training forward goes wrong.
STEP = int(os.environ.get("GO_WRONG_AT", "2"))


class _CountsSteps(PolarRewardModel):
    """Counts training forwards; with one pack a step those are steps."""

    forwards = 0

    def forward(self, pack: Pack):
        self.forwards += self.training
        return super().forward(pack)


class NanModel(_CountsSteps):
    """NaN from some step on, or in that step alone."""

    def forward(self, pack: Pack):
        rewards = super().forward(pack)
        wrong = self.forwards == STEP or (os.environ.get("GO_ON") and self.forwards >= STEP)
        return rewards * float("nan") if wrong and self.training else rewards


class HangingModel(_CountsSteps):
    """Rank 1 stands still."""

    def forward(self, pack: Pack):
        if self.forwards + 1 == STEP and os.environ["RANK"] == "1":
            time.sleep(600)
        return super().forward(pack)


class FailingModel(_CountsSteps):
    """Rank 1 fails."""

    def forward(self, pack: Pack):
        if self.forwards + 1 == STEP and os.environ["RANK"] == "1":
            raise ArithmeticError("on purpose")
        return super().forward(pack)


class PreemptedModel(_CountsSteps):
    """The scheduler tells the command that started the run to stop."""

    def forward(self, pack: Pack):
        if self.forwards + 1 == STEP and self.training and os.environ["RANK"] == "0":
            os.kill(int(os.environ["LAUNCHER"]), getattr(signal, os.environ["SIGNAL"]))
        return super().forward(pack)


class NotingHook(Hook):
    """A hook of a user: notes what it is called with in the work folder."""

    def _note(self, runner, text: str) -> None:
        with Path(runner.work_dir, "hook_calls").open("a") as file:
            file.write(f"{text} at {runner.iter}\n")

    def before_run(self, runner) -> None:
        self._note(runner, "before_run")

    def before_train(self, runner) -> None:
        self._note(runner, "before_train")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        assert data_batch.step == batch_idx  # one epoch
        self._note(runner, f"after_train_iter {outputs['pairs']:g}")

    def after_train(self, runner) -> None:
        self._note(runner, "after_train")
