"""A start imports what it uses, a run shows what matters, and both ways to start it have the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from tests.training.conftest import STEPS, RunOnce
from tests.training.runs import REPOSITORY, Run

# What a command must not import, and the code that does its work up to where it would.
CHECK = """
from polar_ft.cli import main
sys.argv[1:] = {!r}
try:
    main()
except SystemExit:
    pass
"""
COMMANDS = {
    "help": (["--help"], {"pydantic", "rich", "httpx", "torch"}),
    "data check": (["data", "check", "rows.jsonl"], {"torch", "transformers", "scipy", "datasets", "pandas"}),
    "data check --tokenizer": (
        ["data", "check", "rows.jsonl", "--tokenizer", "base"],
        {"torch", "scipy", "pandas"},
    ),
    "eval": (  # up to the end of the import of a model: the base has no head
        ["eval", "base", "rows.jsonl", "--out", "{tmp}/eval"],
        {"sklearn", "torchvision", "pandas", "mmengine", "xtuner", "deepspeed", "torch._dynamo"},
    ),
}
NOT_BY_TRAINING = {
    *("deepspeed", "peft", "datasets", "sklearn", "torchvision", "pandas", "matplotlib", "bitsandbytes"),
    *("torch._dynamo", "torch.distributed.fsdp", "xtuner.model", "xtuner.dataset", "xtuner.engine"),
}


def imported(code: str, folder: Path, unwanted: set[str]) -> list[str]:
    """Which unwanted modules a process has imported after some code."""
    script = (
        f"import atexit, sys\natexit.register(lambda: print(sorted({unwanted!r} & {{*sys.modules}})))\n{code}"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},  # of whose cache `plain_run` has made use
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return eval(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_what_it_uses(name: str, project: Path, tmp_path: Path):
    arguments, unwanted = COMMANDS[name]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    reached = {"transformers.models.llama.modeling_llama"} if name == "eval" else set()
    assert imported(CHECK.format(arguments), project, unwanted | reached) == sorted(reached)


@pytest.fixture(scope="module")
def lean_run(
    project: Path, plain_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Work folder of a run by our script with its data cached, and what it imported without need."""
    work_dir = tmp_path_factory.mktemp("lean")
    script = REPOSITORY / "polar_ft" / "training" / "start.py"
    code = (
        "from polar_ft.training import start\n"
        f"sys.argv = [{str(script)!r}, 'tiny.py', '--work-dir', {str(work_dir)!r}]\nstart.main()"
    )
    return work_dir, imported(code, project, NOT_BY_TRAINING)


def test_training_imports_what_it_uses(lean_run: tuple[Path, list[str]]):
    assert lean_run[1] == []


def test_both_scripts_train_the_same_bits(lean_run: tuple[Path, list[str]], plain_run: Run):
    """`plain_run` is that of `xtuner train`."""
    ours, theirs = (Run(0, "", folder) for folder in (lean_run[0], plain_run.work_dir))
    for name in ("loss", "accuracy", "margin", "grad_norm", "lr"):
        assert ours.scalars(name) == theirs.scalars(name), name
    weights, expected = (
        read_checkpoint(run.work_dir / f"iter_{STEPS}.pth").tensors for run in (ours, theirs)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_terminal_shows_what_matters(project: Path, run_once: RunOnce, plain_run: Run):
    ended: Run = run_once("shown", "polar-ft", "train", str(project / "tiny.py"), NPROC_PER_NODE="2")
    assert ended.status == 0, ended.tail
    lines = ended.output.splitlines()
    assert len(lines) <= 25
    starts = ("data: ", "plan: ", "memory: ", "step 1/", f"step {STEPS}/{STEPS}  loss ", "done in ", "next: ")
    for start in starts:
        assert any(line.startswith(start) for line in lines), (start, ended.output)
    assert "warning: the run has 3 optimizer steps" in ended.output
    for noise in ("mmengine", "System environment", "Hooks will be executed", "torchrun", "W1"):
        assert noise not in ended.output
    log = (ended.work_dir / "train.log").read_text()
    for kept in ("System environment", "Hooks will be executed", "Iter(train) [3/3]", "plan: "):
        assert kept in log
        assert kept == "plan: " or kept not in ended.output
    # `xtuner train` shows all of it, as ever.
    assert "Hooks will be executed" in plain_run.output
    assert not (plain_run.work_dir / "train.log").exists()
