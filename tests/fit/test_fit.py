"""A real fit of a tiny model: killed, continued, run again, and with another held-out side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from examples.domain_rm.make_data import write_data
from polar_ft import cli
from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.fit.steps import locked
from polar_ft.training.check import check_run
from tests.fit.kills import environment

SETTINGS = ("max_epochs=1", "save_steps=3", "val_interval=3", "global_batch_pairs=32", "max_length=256")


@dataclass(frozen=True)
class Fitted:
    """A fit that has ended: its folder, its data, and what it printed."""

    out: Path
    data: Path
    held_out: Path
    output: str

    def command(self, *more: str) -> list[str]:
        settings = [text for setting in SETTINGS for text in ("--set", setting)]
        command = [sys.executable, "-m", "polar_ft.cli", "fit", str(self.data), "--held-out"]
        return [*command, str(self.held_out), "--out", str(self.out), *settings, *more]

    def again(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*more),
            env=environment(self.out.parent / "home"),
            capture_output=True,
            text=True,
            check=False,
        )

    def done(self) -> dict[str, dict]:
        return json.loads((self.out / "fit.json").read_text())["done"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Killed once after a checkpoint was saved, then continued."""
    folder = tmp_path_factory.mktemp("fit")
    data, held_out = write_data(folder / "source", n_train=400, n_held_out=80)
    fit = Fitted(folder / "my_rm", data, held_out, "")
    kill_after_checkpoint(fit)
    ended = fit.again()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Fitted(fit.out, data, held_out, ended.stdout)


def kill_after_checkpoint(fit: Fitted) -> None:
    process = subprocess.Popen(
        fit.command(), env=environment(fit.out.parent / "home"), stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (fit.out / "train" / "last_checkpoint").exists():
        time.sleep(0.01)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_everything_is_left_behind(fitted: Fitted) -> None:
    out = fitted.out
    for name in (
        "report.html",
        "config.py",
        "model/config.json",
        "model/reward_scale.json",
        "eval/model/report.html",
    ):
        assert (out / name).is_file(), name
    assert sorted(path.stem for path in (out / "data").glob("*.jsonl")) == ["held_out", "train", "val"]
    card = (out / "model" / "README.md").read_text()
    assert re.search(r"## Result\n\n(Better|Worse|Not shown)", card)
    page = (out / "report.html").read_text()
    assert "What to try next" in page
    assert "<script" not in page


def test_each_step_is_shown_and_the_result_is_said_last(fitted: Fitted) -> None:
    lines = fitted.output.splitlines()
    shown = [match[1] for line in lines if (match := re.match(r"[✓·] +(\d+)/13 ", line))]
    assert shown == [str(number) for number in range(1, 14)]
    # The steps before training were done by the fit that was killed.
    assert sum(line.startswith("·") for line in lines if "/13 " in line) >= 7
    result = json.loads((fitted.out / "fit.json").read_text())["done"]["report"]["result"]["outcome"]
    assert " ".join(result["first"].split()) in " ".join(fitted.output.split())
    assert "what to try next" in fitted.output


def test_training_resumed_from_the_checkpoint_of_the_killed_fit(fitted: Fitted) -> None:
    log = (fitted.out / "logs" / "train.log").read_text()
    assert re.search(r"--resume auto: .*iter_\d+\.pth", log)


def test_the_config_alone_trains_the_same_weights(fitted: Fitted, tmp_path: Path) -> None:
    """`polar-ft train` without an interruption, against the fit that was killed."""
    config = fitted.out / "config.py"
    assert check_run([str(config)]).warnings == []
    command = [sys.executable, "-m", "polar_ft.cli", "train", str(config), "--work-dir", str(tmp_path)]
    subprocess.run(command, env=environment(tmp_path / "home"), check=True, capture_output=True)
    ours, theirs = (
        read_checkpoint(Path((folder / "last_checkpoint").read_text())).tensors
        for folder in (tmp_path, fitted.out / "train")
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert load_file(fitted.out / "model" / "model.safetensors")


def test_a_finished_fit_does_nothing_again(fitted: Fitted) -> None:
    before = {path: path.stat().st_mtime_ns for path in fitted.out.rglob("*") if "logs" not in path.parts}
    ended = fitted.again()
    assert ended.returncode == 0, ended.stderr
    assert "nothing has changed, so nothing was done again" in ended.stdout
    after = {path: path.stat().st_mtime_ns for path in fitted.out.rglob("*") if "logs" not in path.parts}
    assert {path for path in before if before[path] != after.get(path)} <= {
        fitted.out / ".fit.lock",
        fitted.out,
    }


def test_another_held_out_side_repeats_what_depends_on_it(fitted: Fitted) -> None:
    before = fitted.done()
    rows = fitted.held_out.read_text().splitlines(keepends=True)
    fitted.held_out.write_text("".join(rows[:-8]))
    ended = fitted.again()
    assert ended.returncode == 0, ended.stderr
    changed = {name for name, step in fitted.done().items() if step["key"] != before[name]["key"]}
    assert changed == {"read held-out", "check", "split", "evaluate", "evaluate base", "calibrate", "report"}
    assert (
        f"of {len(rows) - 8} held-out pairs" in " ".join(ended.stdout.split())
        or "held-out pairs" in ended.stdout
    )


def test_two_fits_in_one_folder_are_refused(fitted: Fitted) -> None:
    with locked(fitted.out):
        ended = fitted.again()
    assert ended.returncode == 1
    assert "another polar-ft fit is running in it" in " ".join(ended.stderr.split())


def test_a_folder_of_something_else_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    ended = Fitted(tmp_path, fitted.data, fitted.held_out, "").again()
    assert ended.returncode == 1
    assert "is not empty and holds no fit.json" in " ".join(ended.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_writes_nothing_and_shows_choices_memory_and_time(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement itself, which takes seconds, is that of `polar-ft doctor`."""
    monkeypatch.setattr("polar_ft.doctor.run.measure_time", lambda *_, **__: "this is a test")
    dry = Fitted(tmp_path / "none", fitted.data, fitted.held_out, "")
    ended = CliRunner().invoke(cli.app, dry.command("--dry-run")[3:])
    assert ended.exit_code == 0, ended.output
    assert not dry.out.exists()
    for words in (
        "global_batch_pairs   32         set by --set",
        "11 optimizer steps an epoch",
        "memory on one process",
        "time: not known; no warm-up, as this is a test",
    ):
        assert words in ended.output
