"""Real runs that are stopped, go wrong or hang: what is told, the status, and what is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import verify
from tests.training.conftest import STEPS, TOP_LINES, RunOnce
from tests.training.runs import REPOSITORY, Run, edit_config, run, use_model


@pytest.fixture(scope="session")
def go_wrong(project: Path, run_once: RunOnce):
    """A run of `polar-ft train` with one of the models that go wrong."""

    def get(name: str, model: str, *arguments: str, packs: int = 1, **environment: str) -> Run:
        lines = TOP_LINES | {"save_steps": 1, "max_packed_length": 1024 // packs}
        paths = dict(pretrained_model_name_or_path=str(project / "base"), data=str(project / "rows.jsonl"))
        config = edit_config("polar_tiny_cpu.py", project / f"{name}.py", **(lines | paths))
        use_model(config, "tests.training.variants", model)
        # A shell, so that the model knows whom a scheduler would signal: `exec` keeps its process id.
        shell = ("sh", "-c", 'LAUNCHER=$$ exec "$@"', "sh", "polar-ft", "train", str(config), *arguments)
        return run_once(name, *shell, PYTHONPATH=str(REPOSITORY), **environment)

    return get


def nothing_is_left(work_dir: Path) -> bool:
    return not any(
        str(work_dir) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])
    )


@pytest.mark.parametrize(("ranks", "name"), [("1", "SIGTERM"), ("2", "SIGUSR1")])
def test_a_scheduler_stops_the_run_and_auto_goes_on(go_wrong, plain_run, project, ranks, name):
    # On one rank as in `plain_run` two packs a step: the first of step 2 is the third forward.
    packs, forward = (2, "3") if ranks == "1" else (1, "2")
    signalled = dict(packs=packs, NPROC_PER_NODE=ranks, SIGNAL=name, GO_WRONG_AT=forward)
    stopped = go_wrong(f"told_{ranks}", "PreemptedModel", **signalled)
    assert stopped.status == 75, stopped.tail
    assert f"after step 2 of {STEPS}" in stopped.output
    assert stopped.checkpoint.name == "iter_2.pth"
    assert verify(stopped.checkpoint).step == 2
    assert nothing_is_left(stopped.work_dir)
    if ranks == "1":
        command = ("polar-ft", "train", str(project / "tiny.py"), "--resume", "auto")
        resumed = run(command, stopped.work_dir, project)
        assert resumed.status == 0, resumed.tail
        assert f"--resume auto: {stopped.work_dir}/iter_2.pth" in resumed.output
        ours, theirs = (
            read_checkpoint(c).tensors for c in (stopped.work_dir / "iter_3.pth", plain_run.checkpoint)
        )
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", "deepspeed_zero2")], ids=["plain", "zero2"])
def test_a_nan_updates_nothing_and_its_rows_are_told(go_wrong, project, deepspeed):
    ended = go_wrong(f"nan_once_{len(deepspeed)}", "NanModel", *deepspeed, GO_WRONG_AT="2")
    assert ended.status == 0, ended.tail
    assert (
        "step 2: the loss is not finite, so nothing was updated (1 in a row, 5 end the run)" in ended.output
    )
    assert f"It is in the pack that holds {project}/rows.jsonl:" in ended.output
    states = [read_checkpoint(ended.work_dir / f"iter_{step}.pth").tensors for step in (2, 3)]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())
    losses = ended.scalars("loss")
    assert losses[2] != losses[2]
    assert losses[3] == losses[3]


def test_too_many_nans_in_a_row_end_the_run(go_wrong):
    ended = go_wrong("nan_for_good", "NanModel", "--cfg-options", "train_cfg.max_bad_steps=2", GO_ON="1")
    assert ended.status == 1, ended.tail
    assert "2 steps in a row up to step 3 without a finite loss" in ended.tail
    assert f"The last good checkpoint is kept: {ended.work_dir}/iter_2.pth" in ended.tail
    assert "Traceback" not in ended.output


def test_the_rank_that_fails_first_is_named(go_wrong):
    ended = go_wrong("rank_fails", "FailingModel", NPROC_PER_NODE="2")
    assert ended.status == 1, ended.tail
    last = ended.output.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 on ")
    assert last.endswith("failed first: ArithmeticError: on purpose")
    assert nothing_is_left(ended.work_dir)


def test_a_rank_that_hangs_is_named(go_wrong):
    ended = go_wrong("rank_hangs", "HangingModel", NPROC_PER_NODE="2", POLAR_FT_HANG_SECONDS="8")
    assert ended.status == 1, ended.tail
    assert (
        "error: no rank has moved for 8 s: rank 1 is computing step 2, and rank 0 waits for it" in ended.tail
    )
    assert nothing_is_left(ended.work_dir)
