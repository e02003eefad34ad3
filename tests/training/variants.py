"""Models that go wrong on purpose at some step; configs of these tests name them."""

from __future__ import annotations

import os
import signal
import time

import torch

from polar_ft.model.packing import Pack
from polar_ft.training.model import PolarRewardModel

# Which training forward goes wrong.
STEP = int(os.environ.get("GO_WRONG_AT", "2"))


class _CountsSteps(PolarRewardModel):
    """Counts training forwards; with one pack a step those are steps."""

    forwards = 0

    def forward(self, pack: Pack, mode="loss"):
        if mode == "loss":
            self.forwards += 1
        return super().forward(pack, mode)


class NanModel(_CountsSteps):
    """NaN from some step on, or in that step alone."""

    def forward(self, pack: Pack, mode="loss"):
        output = super().forward(pack, mode)
        wrong = self.forwards == STEP or (os.environ.get("GO_ON") and self.forwards >= STEP)
        if mode == "loss" and wrong:
            output["loss"] = output["loss"] * float("nan")
            output["statistics"] = torch.cat(
                [output["loss"].detach().double()[None], output["statistics"][1:]]
            )
        return output


class HangingModel(_CountsSteps):
    """Rank 1 stands still."""

    def forward(self, pack: Pack, mode="loss"):
        if self.forwards + 1 == STEP and os.environ["RANK"] == "1":
            time.sleep(600)
        return super().forward(pack, mode)


class FailingModel(_CountsSteps):
    """Rank 1 fails."""

    def forward(self, pack: Pack, mode="loss"):
        if self.forwards + 1 == STEP and os.environ["RANK"] == "1":
            raise ArithmeticError("on purpose")
        return super().forward(pack, mode)


class PreemptedModel(_CountsSteps):
    """The scheduler tells the command that started the run to stop."""

    def forward(self, pack: Pack, mode="loss"):
        if self.forwards + 1 == STEP and mode == "loss" and os.environ["RANK"] == "0":
            os.kill(int(os.environ["LAUNCHER"]), getattr(signal, os.environ["SIGNAL"]))
        return super().forward(pack, mode)
