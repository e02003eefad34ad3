"""Two ranks under every ZeRO stage, by ``xtuner train``: the rest of a run is the same bits, and converts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polar_ft.conversion.checkpoint import read_checkpoint
from tests.training.conftest import STEPS, RunOnce
from tests.training.runs import REPOSITORY, Run, write_zero_settings

STAGES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_converts_to_the_same_model(
    project: Path, run_once: RunOnce, plain_run: Run, tmp_path: Path, name: str
):
    settings = write_zero_settings(project / f"{name}_ranks.json", **STAGES[name])
    command = ("xtuner", "train", str(project / "tiny.py"), "--deepspeed", str(settings))
    whole = run_once(f"{name}_ranks", *command, NPROC_PER_NODE="2")
    assert whole.status == 0, whole.tail
    middle = whole.work_dir / "iter_2.pth"
    resumed = run_once(f"{name}_ranks_resumed", *command, "--resume", str(middle), NPROC_PER_NODE="2")
    assert resumed.status == 0, resumed.tail
    assert resumed.scalars("loss") == {STEPS: whole.scalars("loss")[STEPS]}

    ours, theirs = (read_checkpoint(run.checkpoint).tensors for run in (resumed, whole))
    assert set(ours) == set(theirs)
    for tensor in theirs:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
    # Another stage is another order of adding; without this, both could be wrong in the same way.
    for step, loss in plain_run.scalars("loss").items():
        assert whole.scalars("loss")[step] == pytest.approx(loss, rel=1e-5)

    converted = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "tools/pth_to_hf.py"), str(project / "tiny.py")),
            *(str(resumed.checkpoint), str(tmp_path / "hf"), "--verify", str(project / "rows.jsonl")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert converted.returncode == 0, converted.stderr[-3000:]
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(exported["v_head.weight"], ours["v_head.weight"])
