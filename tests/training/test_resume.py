"""``--resume``: from a checkpoint of a step, the rest of the run is the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from tests.training.conftest import STEPS, RunOnce
from tests.training.runs import Run


@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", "deepspeed_zero2")], ids=["plain", "zero2"])
def test_a_resumed_run_ends_with_the_same_weights(
    project: Path, run_once: RunOnce, deepspeed: tuple[str, ...]
):
    name = "zero2" if deepspeed else "plain"
    whole: Run = run_once(name, "xtuner", "train", str(project / "tiny.py"), *deepspeed)
    middle = whole.work_dir / "iter_2.pth"
    command = ["polar-ft", "train", str(project / "tiny.py"), *deepspeed, "--resume", str(middle)]
    resumed = run_once(f"{name}_resumed", *command)
    assert resumed.status == 0, resumed.output[-3000:]
    assert list(resumed.scalars("loss")) == [STEPS]
    assert resumed.scalars("loss")[STEPS] == whole.scalars("loss")[STEPS]
    ours, theirs = (read_checkpoint(run.checkpoint).tensors for run in (resumed, whole))
    assert set(ours) == set(theirs)
    for tensor in theirs:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
