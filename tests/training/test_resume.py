"""``--resume``: from a checkpoint of a step, the rest of the run is the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import verify
from polar_ft.training.loop import warmup_cosine
from polar_ft.training.work_folder import owner_of
from tests.training.conftest import STEPS, TOP_LINES, RunOnce
from tests.training.runs import Run, edit_config


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


def test_what_is_changed_on_purpose_takes_effect(project: Path, run_once: RunOnce, plain_run: Run):
    """Another learning rate and twice as many epochs, after the end: the rate follows the new schedule."""
    named = ["--cfg-options", "max_epochs=2", "lr=0.01"]
    command = ["polar-ft", "train", str(project / "tiny.py"), "--resume", str(plain_run.checkpoint), *named]
    resumed = run_once("resumed_longer", *command)
    assert resumed.status == 0, resumed.tail
    assert "changed since the checkpoint: lr was 0.03, is 0.01" in resumed.output
    assert resumed.scalars("lr") == {
        step: pytest.approx(0.01 * warmup_cosine(step - 1, 2 * STEPS, 0.03, 0.1))
        for step in range(STEPS + 1, 2 * STEPS + 1)
    }
    settings = verify(resumed.checkpoint).run
    assert (settings["lr"], settings["max_epochs"]) == (0.01, 2)
    assert owner_of(resumed.work_dir) == settings


def test_other_data_is_no_way_to_go_on(project: Path, run_once: RunOnce, plain_run: Run):
    rows = (project / "rows.jsonl").read_text().splitlines(keepends=True)
    (project / "fewer_rows.jsonl").write_text("".join(rows[:40]))
    paths = dict(pretrained_model_name_or_path=str(project / "base"), data=str(project / "fewer_rows.jsonl"))
    config = edit_config("polar_tiny_cpu.py", project / "fewer.py", **paths, **TOP_LINES)
    command = ["polar-ft", "train", str(config), "--resume", str(plain_run.work_dir / "iter_2.pth")]
    ended = run_once("resumed_with_other_data", *command)
    assert ended.status == 1
    assert "was trained by another step plan" in ended.tail
    assert "pairs was 60, is 40" in ended.tail
    assert "Traceback" not in ended.output


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(
    project: Path, run_once: RunOnce, plain_run: Run, tmp_path: Path
):
    for file in ("iter_2.pth", "iter_2.pth.manifest.json"):
        (tmp_path / file).write_bytes((plain_run.work_dir / file).read_bytes())
    content = bytearray((tmp_path / "iter_2.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "iter_2.pth").write_bytes(content)
    command = ["polar-ft", "train", str(project / "tiny.py"), "--resume", str(tmp_path / "iter_2.pth")]
    ended = run_once("resumed_from_damaged", *command)
    assert ended.status == 1
    assert f"{tmp_path}/iter_2.pth: is not what was saved (its checksum differs)" in ended.tail
    assert "Traceback" not in ended.output
