"""What a later start of the same fit repeats, and what it keeps; training and measuring are played."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polar_ft.errors import PolarError
from polar_ft.fit import measuring, run, verdict
from polar_ft.fit.base import DEFAULT_BASE
from polar_ft.fit.choices import GIB, Base, Machine
from polar_ft.fit.data import Source
from polar_ft.fit.steps import FIT_FILE, Done, Steps, locked
from tests.fit.test_choices import CPU, EIGHT_80, TINY, TWO_80
from tests.fit.test_data import lines, rows
from tests.fit.test_report import OUTCOME


def steps_of(out: Path) -> Steps:
    out.mkdir(exist_ok=True)
    return Steps(out, Console(file=io.StringIO()), 12)


@dataclass
class Played:
    """What the steps of a played fit did."""

    trained: list[str] = field(default_factory=list)
    reported: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Steps that leave the files of real ones."""
    done = Played()

    def find_base(steps: Steps, name: str | None, *_: Any, **__: Any) -> Base:
        steps.run("base", ["tiny"], lambda tell: {"said": "made"})
        return replace(TINY, name="base", has_head=False)

    def train(config: Path, work_dir: Path, *_: Any, **__: Any) -> dict[str, Any]:
        done.trained.append(config.read_text())
        work_dir.mkdir(parents=True)
        (work_dir / "iter_9.pth").write_text("weights")
        return {"checkpoint": str(work_dir / "iter_9.pth")}

    def convert(config: Path, checkpoint: Path, model: Path, *_: Any) -> dict[str, Any]:
        assert checkpoint.read_text() == "weights"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / "README.md").write_text("# A model\n")
        return {}

    def measure_range(model: Path, *_: Any) -> dict[str, Any]:
        (model / "reward_scale.json").write_text("{}")
        return {}

    def evaluate(model: str, held_out: Path, folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text("{}")
        return {}

    def write_report(file: Path, outcome: Any, choices: Any, **__: Any) -> None:
        file.write_text("report")
        done.reported.append({choice.name: (choice.value, choice.reason) for choice in choices})

    monkeypatch.setattr(run, "find_base", find_base)
    monkeypatch.setattr("polar_ft.fit.training.train", train)
    monkeypatch.setattr("polar_ft.fit.report.write_report", write_report)
    monkeypatch.setattr(verdict, "judge", lambda *_, **__: OUTCOME)
    for name, step in (("convert", convert), ("evaluate", evaluate), ("measure_range", measure_range)):
        monkeypatch.setattr(measuring, name, step)
    return done


def fit(
    out: Path,
    source: Path,
    machine: Machine = CPU,
    ask: Callable[[run.Plan], None] = lambda plan: None,
    **given: Any,
) -> Steps:
    wanted = run.Wanted(Source(str(source)), given=given)
    steps = steps_of(out)
    run.fit(steps, run.prepare(steps, wanted, out, machine), wanted, out, before_training=ask)
    return steps


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows of another format, so that they are converted."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines([{k: v for k, v in row.items() if k != "reference"} for row in rows(60)]))
    return file


def test_a_model_that_was_removed_comes_back_complete(tmp_path: Path, source: Path, played: Played) -> None:
    out = tmp_path / "rm"
    fit(out, source)
    shutil.rmtree(out / "model")
    fit(out, source)
    assert len(played.trained) == 1
    assert (out / "model" / "reward_scale.json").exists()
    assert OUTCOME.first in (out / "model" / "README.md").read_text()


def test_what_is_edited_is_trained_and_reported(tmp_path: Path, source: Path, played: Played) -> None:
    out = tmp_path / "rm"
    fit(out, source)
    assert played.reported[-1]["lr"][0] == 3e-3
    config = out / "config.py"
    text = config.read_text().replace("lr = 0.003", "lr = 0.001")
    config.write_text(text.replace("weight_decay = 0", "weight_decay = 0.1"))
    fit(out, source)
    assert len(played.trained) == 2
    assert played.reported[-1]["lr"] == (1e-3, "edited in config.py")
    assert played.reported[-1]["weight_decay"] == (0.1, "edited in config.py")
    assert "lr 0.001" in (out / "model" / "README.md").read_text()
    assert {reason for _, reason in played.reported[0].values()} & {"edited in config.py"} == set()


def test_a_training_that_would_replace_another_is_asked_for(
    tmp_path: Path, source: Path, played: Played
) -> None:
    out = tmp_path / "rm"
    asked: list[float] = []

    def ask(plan: run.Plan) -> None:
        asked.append(next(choice.value for choice in plan.choices if choice.name == "lr"))
        if len(asked) > 1:
            raise KeyboardInterrupt

    fit(out, source, ask=ask)
    fit(out, source, ask=ask)
    assert asked == [3e-3]
    with pytest.raises(KeyboardInterrupt):
        fit(out, source, ask=ask, lr=1e-4)
    assert asked == [3e-3, 1e-4]
    assert (out / "train" / "iter_9.pth").exists()


def test_neither_a_comment_nor_another_place_trains_again(
    tmp_path: Path, source: Path, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(Path("rm"), source)
    config = tmp_path / "rm" / "config.py"
    config.write_text(f"# A note of mine.\n{config.read_text()}")
    fit(Path("rm"), source)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fit(tmp_path / "rm", source)
    shutil.move(tmp_path / "rm", tmp_path / "mein Modell")
    fit(tmp_path / "mein Modell", source)
    assert len(played.trained) == 1
    shutil.rmtree(tmp_path / "mein Modell" / "model")
    fit(tmp_path / "mein Modell", source)  # the checkpoint has moved, too
    assert len(played.trained) == 1


def test_converted_rows_that_were_removed_are_made_again(
    tmp_path: Path, source: Path, played: Played
) -> None:
    out = tmp_path / "rm"
    fit(out, source)
    (out / "data" / "rows.jsonl").unlink()
    steps = fit(out, source)
    assert steps.ran == 1
    assert (out / "data" / "rows.jsonl").exists()


def test_a_report_on_another_machine_does_not_train_again(
    tmp_path: Path, source: Path, played: Played
) -> None:
    out = tmp_path / "rm"
    fit(out, source, EIGHT_80)
    assert fit(out, source, CPU).ran == 0
    assert fit(out, source, TWO_80).ran == 0
    fit(out, source, TWO_80, lr=1e-4)
    assert [reported["gpus"][0] for reported in played.reported] == [8, 2]


def test_a_training_that_is_not_finished_is_not_lost_on_another_machine(
    tmp_path: Path, source: Path, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rm"

    def killed(config: Path, work_dir: Path, *_: Any, **__: Any) -> None:
        work_dir.mkdir(exist_ok=True)
        (work_dir / "iter_3.pth").write_text("weights")
        raise KeyboardInterrupt

    monkeypatch.setattr("polar_ft.fit.training.train", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(out, source, EIGHT_80)
    with pytest.raises(PolarError, match=r"begun on another machine \(8 × 80\).* this one \(2 × 80\)"):
        fit(out, source, TWO_80)
    with pytest.raises(KeyboardInterrupt):  # as many GPUs, less of their memory free
        fit(out, source, replace(EIGHT_80, memory=60 * GIB))
    assert (out / "train" / "iter_3.pth").exists()


def test_without_base_a_fit_keeps_its_own(tmp_path: Path) -> None:
    wanted = run.Wanted(Source("rows.jsonl"))
    steps = steps_of(tmp_path / "rm")
    assert run._base_of(steps, wanted, EIGHT_80) == DEFAULT_BASE
    assert run._base_of(steps, wanted, CPU) is None
    steps.record.done["base"] = Done(key="k", seconds=1, result={"model": "/my/base"})
    steps.record.begun["train"] = "k"
    for machine in (CPU, EIGHT_80):
        assert run._base_of(steps, wanted, machine) == "/my/base"
    assert run._base_of(steps, replace(wanted, base="/other"), CPU) == "/other"


def test_a_kill_while_an_old_run_is_removed_does_not_resume_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work_dir = tmp_path / "rm", tmp_path / "rm" / "train"
    found: list[bool] = []

    def work(tell: Callable[..., None]) -> dict[str, Any]:
        found.append(work_dir.exists())
        work_dir.mkdir(exist_ok=True)
        return {}

    def start(inputs: str) -> None:
        steps_of(out).run("train", inputs, work, resumes_in=work_dir)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    start("old")
    with monkeypatch.context() as patch:
        patch.setattr("polar_ft.fit.steps.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start("new")
    start("new")
    assert found == [False, False]


def test_a_fit_that_is_killed_at_its_very_beginning_can_be_started_again(tmp_path: Path) -> None:
    out = tmp_path / "rm"
    with locked(out):
        steps_of(out)
    (out / "data").mkdir()
    (out / f".{FIT_FILE}.123.part").write_text("{")
    with locked(out):
        steps_of(out)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def work(tell: Callable[..., None]) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        PolarError, match=r"the disk is full .* at the step convert; .* same command continues"
    ):
        steps_of(tmp_path / "rm").run("convert", [], work)
    assert json.loads((tmp_path / "rm" / FIT_FILE).read_text())["done"] == {}
