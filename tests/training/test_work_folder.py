"""A work folder belongs to one run: whose it is, its lock, and what may be resumed in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from polar_ft.conversion.checkpoint_files import publish
from polar_ft.errors import PolarError
from polar_ft.training import launch, ranks, work_folder
from polar_ft.training.config import parse_config
from polar_ft.training.work_folder import (
    SETTINGS,
    Run,
    check_folder,
    check_settings,
    identity_of,
)
from tests.training.runs import REPOSITORY, edit_config, make_rows, write_rows

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    return edit_config("polar_tiny_cpu.py", tmp_path / "tiny.py", data=str(rows))


@pytest.fixture
def identity(config: Path) -> dict:
    return identity_of(parse_config(config))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that `launch` runs; none is really started."""
    lines: list[list[str]] = []

    def run(command: list[str], *_: object) -> SimpleNamespace:
        lines.append(command[2:])
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(launch, "_Run", run)
    monkeypatch.delenv(work_folder.OVERWRITE_VARIABLE, raising=False)
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return lines


def save(folder: Path, name: str, run: dict | None, content: object = b"state") -> Path:
    """A checkpoint with a manifest."""
    unfinished = folder / "unfinished" / name
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        unfinished.write_bytes(content)
    else:
        torch.save(content, unfinished)
    publish(unfinished, folder / name, 2, ranks=1, run=run)
    unfinished.parent.rmdir()
    return folder / name


def own(folder: Path, identity: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": identity}))


# --- identity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_has_the_settings(file):
    found = identity_of(parse_config(file))
    missing = {name for name, value in found.items() if value is None}
    assert missing <= {"lora", "max_steps", "min_lr_ratio"}


def test_the_settings_are_those_that_are_trained_with(config, tmp_path):
    changed = edit_config(
        "polar_tiny_cpu.py", config, data=str(tmp_path / "rows.jsonl"), lr=5e-4, loss_type="focal", seed=7
    )
    found = identity_of(parse_config(changed))
    assert (found["lr"], found["loss_type"], found["seed"], found["data"]) == (
        5e-4,
        "focal",
        7,
        str(tmp_path / "rows.jsonl"),
    )


# --- whose a folder is -----------------------------------------------------------------------------------


def test_a_folder_with_checkpoints_is_not_started_in(tmp_path, identity):
    own(tmp_path, identity)
    check_folder(tmp_path, identity, None, overwrite=False)
    save(tmp_path, "best_accuracy_iter_2.pth", identity)
    check_folder(tmp_path, identity, None, overwrite=False)  # killed before its first checkpoint
    other = identity | {"lr": 0.5}
    with pytest.raises(PolarError, match=r"of another run \(lr was 0.001, is 0.5\).*--work-dir.*--overwrite"):
        check_folder(tmp_path, other, None, overwrite=False)
    save(tmp_path, "iter_2.pth", identity)
    with pytest.raises(PolarError, match=r"of this run \(iter_2.pth\).*--resume auto"):
        check_folder(tmp_path, identity, None, overwrite=False)
    for given in (identity, other):
        check_folder(tmp_path, given, None, overwrite=True)
    check_folder(tmp_path, identity, tmp_path / "iter_2.pth", overwrite=False)
    with pytest.raises(PolarError, match="choose one"):
        check_folder(tmp_path, identity, tmp_path / "iter_2.pth", overwrite=True)


def test_a_folder_of_an_earlier_version_is_not_mixed_either(tmp_path, identity):
    (tmp_path / "iter_2.pth").write_bytes(b"of another tool, without manifest")
    with pytest.raises(PolarError, match="of an earlier run"):
        check_folder(tmp_path, identity, None, overwrite=False)


def test_a_checkpoint_from_elsewhere_does_not_mix_two_runs(tmp_path, identity):
    elsewhere = save(tmp_path / "a", "iter_2.pth", identity)
    check_folder(tmp_path / "b", identity, elsewhere, overwrite=False)
    own(tmp_path / "b", identity | {"seed": 1})
    save(tmp_path / "b", "iter_8.pth", identity | {"seed": 1})
    with pytest.raises(PolarError, match=r"another run \(seed was 1, is 0\).* is not one of them"):
        check_folder(tmp_path / "b", identity, elsewhere, overwrite=False)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - work_folder.CHANGEABLE - work_folder._PLACES))
def test_what_cannot_be_changed_is_refused_also_where_it_is_named(tmp_path, identity, name):
    with pytest.raises(PolarError, match=rf"iter_2.pth: belongs to a run with other settings \({name} was"):
        check_settings(identity, identity | {name: 12345}, {name}, tmp_path / "iter_2.pth")


@pytest.mark.parametrize("name", sorted(work_folder.CHANGEABLE))
def test_what_may_be_changed_has_to_be_named(tmp_path, identity, name):
    with pytest.raises(PolarError, match=f"--cfg-options {name}=12345"):
        check_settings(identity, identity | {name: 12345}, set(), tmp_path / "iter_2.pth")
    check_settings(identity, identity | {name: 12345}, {name}, tmp_path / "iter_2.pth")


def test_files_may_be_moved_and_newer_versions_may_know_more(tmp_path, identity):
    moved = identity | {"data": "/elsewhere/rows.jsonl", "pretrained_model_name_or_path": "/elsewhere/base"}
    check_settings(identity, moved | {"new": 1}, set(), tmp_path / "iter_2.pth")


def test_the_command_line_is_refused_before_anything_starts(started, config, tmp_path, identity):
    folder = tmp_path / "runs"
    own(folder, identity)
    save(folder, "iter_2.pth", identity)
    changed = edit_config(
        "polar_tiny_cpu.py", tmp_path / "changed.py", data=str(tmp_path / "rows.jsonl"), lr=0.5
    )
    where = ["--work-dir", str(folder)]
    for arguments, message in (
        (where, "would be lost"),
        ([*where, "--resume", "auto"], "lr was 0.001, is 0.5"),
        ([*where, "--resume", "auto", "--overwrite"], "choose one"),
    ):
        with pytest.raises(PolarError, match=message):
            launch.launch(str(changed), arguments)
        os.environ.pop(work_folder.OVERWRITE_VARIABLE, None)
    assert not started
    named = ["--cfg-options", "lr=0.5"]
    launch.launch(str(config), [*where, "--resume", "auto", *named])
    assert started.pop()[1:] == [*where, "--resume", str(folder / "iter_2.pth"), *named]
    launch.launch(str(changed), [*where, "--overwrite"])
    assert started.pop()[1:] == where
    assert os.environ.pop(work_folder.OVERWRITE_VARIABLE) == "1"
    assert (folder / "iter_2.pth").exists()  # until training begins


def test_what_is_damaged_altogether_is_no_reason_to_start_again(started, config, tmp_path, identity):
    saved = save(tmp_path / "runs", "iter_2.pth", identity)
    saved.write_bytes(b"other")
    with pytest.raises(PolarError, match="none of its checkpoints is complete; --overwrite"):
        launch.launch(str(config), ["--work-dir", str(tmp_path / "runs"), "--resume", "auto"])


@pytest.mark.parametrize("way", ["--work-dir", "--work", "--cfg-options", "f-string", "default"])
def test_resume_auto_looks_where_the_run_writes(started, config, tmp_path, identity, way, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "work_dirs" / "tiny" if way == "default" else tmp_path / "runs" / "a"
    save(folder, "iter_2.pth", identity)
    given = {"--cfg-options": [way, f"work_dir={folder}"], "f-string": [], "default": []}
    if way == "f-string":
        with config.open("a") as file:
            file.write(f'runs = {str(tmp_path / "runs")!r}\nwork_dir = f"{{runs}}/a"\n')
    launch.launch(str(config), ["--resume", "auto", *given.get(way, [way, str(folder)])])
    ((_, resume, checkpoint, *_),) = started
    assert (resume, Path(checkpoint).absolute()) == ("--resume", folder / "iter_2.pth")


def test_overwriting_begins_when_training_begins(tmp_path, identity, monkeypatch):
    folder = tmp_path / "runs"
    old = [save(folder, name, identity) for name in ("iter_2.pth", "best_accuracy_iter_2.pth")]
    (folder / "best_checkpoint").write_text(str(old[1]))
    (folder / "20260101_000000").mkdir()
    new = identity | {"lr": 0.5}
    monkeypatch.setattr(work_folder, "_run", Run(folder, new))
    monkeypatch.setenv(work_folder.OVERWRITE_VARIABLE, "1")
    work_folder.begin()
    assert {file.name for file in folder.iterdir()} == {"run.json", "20260101_000000"}
    assert work_folder.owner_of(folder) == new


# --- the lock --------------------------------------------------------------------------------------------

HOLD = """
import json, os, socket, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.run.lock")
lock.acquire()
with open(sys.argv[1] + "/.run.lock.json", "w") as file:
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": "noon"}, file)
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_at_once_are_refused_by_name(tmp_path, started, config):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        begun = time.monotonic()
        with pytest.raises(PolarError, match=rf"a run is in it \(process {holder.pid} on .*, since noon\)"):
            launch.launch(str(config), ["--work-dir", str(tmp_path)])
        assert time.monotonic() - begun < 10
        assert not started
        holder.kill()
    launch.launch(str(config), ["--work-dir", str(tmp_path)])
    assert started


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder, "_lock", None)
    (tmp_path / "file").touch()
    with pytest.raises(
        PolarError, match=r"file/runs: cannot be written \(Not a directory\); name a --work-dir"
    ):
        work_folder.lock(tmp_path / "file" / "runs")


# --- signals and the launcher ----------------------------------------------------------------------------

# Stands for xtuner's script: reports that it trains if it is told to, and ends with 75 on SIGUSR1.
RANK = """
import json, os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75) if sys.argv[1] == "saves" else None)
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
if sys.argv[1] != "loads":
    beat = dict(rank=0, step=1, phase="computing", time=time.time())
    with open(os.environ["POLAR_FT_RANKS"] + "/beat_0.json", "w") as file:
        json.dump(beat, file)
open(os.environ["POLAR_FT_RANKS"] + "/ready", "w").close()
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("kind", "presses", "status", "said"),
    [
        ("saves", 1, 75, "Ctrl-C: the run saves after this step and stops; a second one ends it at once"),
        ("goes on", 2, 130, "Ctrl-C again: the run ends at once"),
        ("loads", 1, 130, "Ctrl-C before training began, so there is nothing to save: the run ends at once"),
    ],
)
def test_ctrl_c_saves_as_sigterm_does(tmp_path, capsys, kind, presses, status, said):
    script = tmp_path / "tools" / "train.py"
    script.parent.mkdir()
    script.write_text(RANK)

    def press() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    before = {number: signal.getsignal(number) for number in launch._SIGNALS}
    try:
        run = launch._Run([sys.executable, str(script), kind], tmp_path)
        threading.Thread(target=press).start()
        assert run.wait() == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert said in capsys.readouterr().err
    assert not psutil.pid_exists(run.process.pid)


def test_the_command_that_resumes_is_said(monkeypatch, started, config, tmp_path, capsys):
    monkeypatch.setattr(launch, "_Run", lambda *_: SimpleNamespace(wait=lambda: 75))
    assert launch.launch(str(config), ["--work-dir", str(tmp_path / "a b")]) == 75
    again = f"this resumes it: polar-ft train {config} --work-dir '{tmp_path}/a b' --resume auto\n"
    assert again in capsys.readouterr().err


LAUNCHER = """
import subprocess, sys, time
from polar_ft.training.ranks import killed_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=killed_with_parent)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_ranks_end_with_a_launcher_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        rank.wait(timeout=10)


def test_a_rank_whose_launcher_is_gone_already_does_not_begin(monkeypatch):
    monkeypatch.setattr(ranks, "killed_with_parent", lambda: None)
    monkeypatch.setenv(ranks.LAUNCHER_VARIABLE, str(os.getppid()))
    ranks.end_with_launcher()
    monkeypatch.setenv(ranks.LAUNCHER_VARIABLE, "999999999")
    with pytest.raises(SystemExit, match="process 999999999, which started this run, is gone"):
        ranks.end_with_launcher()
