"""What is shown of a run: events, their picture, the curves of `polar-ft watch`, and tracking services."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from polar_ft.cli import app
from polar_ft.errors import PolarError
from polar_ft.training import launch
from polar_ft.training.ranks import FOLDER_VARIABLE
from polar_ft.training.terminal.curves import draw_curve
from polar_ft.training.terminal.display import Display
from polar_ft.training.terminal.events import REPORTED, EventReader, report, report_log_records
from polar_ft.training.track import Tracker, as_services, start_tracking

FIGURES = {"loss": 0.5, "accuracy": 0.75, "margin": 0.1, "lr": 1e-3, "pairs_per_s": 8.0}


def step(number: int, steps: int = 40) -> dict:
    return {"kind": "step", "step": number, "steps": steps, "left": 60.0, "figures": FIGURES}


def validation(number: int, *, best: bool) -> dict:
    figures = {"accuracy": number / 1000, "accuracy_low": 0.1, "accuracy_high": 0.9, "log_loss": 0.6}
    text = f"validation at step {number}: accuracy …"
    return {"kind": "validation", "step": number, "figures": figures, "best": best, "text": text}


def shown(events: list[dict], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    display = Display(console)
    for event in events:
        display.show([event])
    display.close()
    return console.file.getvalue()


# --- events ----------------------------------------------------------------------------------------------


def test_events_are_read_once_and_only_complete_ones(tmp_path, monkeypatch):
    reader = EventReader(tmp_path)
    assert list(reader.new()) == []
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    report("line", text="memory: 3 GiB", level="info")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "phase", ')
    assert list(reader.new()) == [{"kind": "line", "text": "memory: 3 GiB", "level": "info"}]
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('"text": "starting"}\n')
    assert list(reader.new()) == [{"kind": "phase", "text": "starting"}]
    monkeypatch.setenv("RANK", "1")  # the first rank speaks for all
    report("line", text="again", level="info")
    assert list(reader.new()) == []


def test_our_log_records_are_reported_and_upstreams_are_not(tmp_path, monkeypatch):
    from mmengine.logging import MMLogger

    monkeypatch.setattr(MMLogger, "callHandlers", MMLogger.callHandlers)
    handlers = list(logging.getLogger("polar_ft").handlers)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    report_log_records()
    try:
        logger = MMLogger.get_instance("of this test")
        ours = str(Path(launch.__file__))
        for path, text, extra in (
            (ours, "plan: 3 steps", {}),
            ("mmengine/runner.py", "Hooks", {}),
            (ours, "Iter", REPORTED),
        ):
            record = logger.makeRecord("mmengine", logging.INFO, path, 1, text, (), None, extra=extra)
            logger.callHandlers(record)
        logging.getLogger("polar_ft.model.tiny_base").warning("%s: made again", "base")
    finally:
        logging.getLogger("polar_ft").handlers[:] = handlers
    # The warning is of this file, which is not in the package.
    assert [event["text"] for event in EventReader(tmp_path).new()] == ["plan: 3 steps"]


# --- the picture -----------------------------------------------------------------------------------------


def test_piped_a_run_is_a_line_every_so_many_steps():
    lines = shown([step(number) for number in range(1, 41)], terminal=False).splitlines()
    assert len(lines) == 21  # the first one, every second one
    assert lines[-1] == "step 40/40  loss 0.5000  accuracy 0.7500  margin 0.1000  lr 1.00e-03  8 pairs/s"


def test_warnings_are_named_and_cannot_command_the_terminal():
    text = shown([{"kind": "line", "text": "bad \x1b[31mrow[/]", "level": "warning"}], terminal=False)
    assert text == "warning: bad \\x1b[31mrow[/]\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_validations_become_a_table_of_the_first_the_best_and_the_newest(terminal):
    events = [validation(number, best=number in (0, 5)) for number in range(30)]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(events, terminal=terminal))
    rows = [row.split() for row in text[text.rindex("log-loss") :].splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "…", "5", "…", *(str(number) for number in range(22, 30))]
    assert [row[0] for row in rows if row[-1] == "best"] == ["5"]


def test_on_a_terminal_the_last_step_stays():
    text = shown([{"kind": "phase", "text": "loading the model"}, step(7), step(8)], terminal=True)
    assert "loading the model …" in text
    assert text.rstrip().splitlines()[-1].endswith("pairs/s  0:01:00 left")


# --- a run that ends badly -------------------------------------------------------------------------------


def test_the_end_of_the_log_is_shown_of_a_process_that_could_say_nothing(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text("--- an earlier start\nold\n--- this one\n" + "".join(f"line {n}\n" for n in range(30)))
    assert launch._explained(-11, tmp_path, 1, log) == 139
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "line 10"
    assert said[-1] == f"error: the run ended with status 139; its output is in {log}"
    assert launch._explained(-9, tmp_path, 1, log) == 137
    assert "status 137 (killed: is the memory full?)" in capsys.readouterr().err


# --- watch -----------------------------------------------------------------------------------------------


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """The folder of a run that was killed after step 3, and resumed from step 2."""
    for start, steps in (("1", (1, 2, 3)), ("2", (3, 4))):
        scalars = tmp_path / start / "vis_data" / "scalars.json"
        scalars.parent.mkdir(parents=True)
        rows = [FIGURES | {"step": number, "time": 2.0, "loss": 1 / number} for number in steps]
        rows.append({"step": steps[-1], "val/accuracy": 0.7, "val/log_loss": 0.5, "val/margin": 0.2})
        scalars.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "step_plan.json").write_text('{"steps": 10}')
    return tmp_path


def test_watch_prints_the_curves_once_where_it_is_piped(work_dir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for pid, state in ((2**30, "ended"), (os.getpid(), "running  0:00:12 left")):
        holder = {"host": os.uname().nodename, "pid": pid}
        (work_dir / ".run.lock.json").write_text(json.dumps(holder))
        done = CliRunner().invoke(app, ["watch", str(work_dir)])
        assert done.exit_code == 0, done.output
        assert f"step 4/10  {state}" in done.output.replace("\n", "")
        for title in ("loss", "accuracy", "margin", "learning rate", "● log-loss on held-out pairs"):
            assert title in done.output
        assert "\x1b" not in done.output


def test_a_curve_spans_its_values_and_averages_many_steps():
    many = {number: float(number % 2) for number in range(1, 10001)}
    lines = [line.plain for line in draw_curve(many, {}, width=30, height=4, last=10000)]
    assert (lines[0][:7], lines[3][:7]) == ("    1 ┤", "    0 ┤")
    assert [set(line[7:]) == {" "} for line in lines[:4]] == [True, False, False, True]  # the mean is 0.5
    assert len({len(line) for line in lines}) == 1
    flat = draw_curve({1: 2.0}, {}, width=20, height=3, last=1)
    assert flat[0].plain.startswith("    2 ┤⠁")
    assert "no values yet" in draw_curve({}, {}, 20, 3, 5)[0].plain
    assert "no values yet" in draw_curve({1: float("nan")}, {}, 20, 3, 5)[0].plain


# --- tracking services -----------------------------------------------------------------------------------


class FakeService:
    """Stands for the package wandb, swanlab or trackio."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.calls: list[tuple] = []

    def init(self, **named: object) -> None:
        self.calls.append(("init", named))

    def log(self, values: dict, step: int) -> None:
        if "boom" in values:
            raise ConnectionError("the service is away")
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_service_gets_config_and_figures_and_no_failure_ends_a_run(name, tmp_path, monkeypatch, caplog):
    service = FakeService(name)
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setattr("polar_ft.training.track.find_spec", lambda package: package)
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        timestamp="now",
        experiment_name="tiny_now",
        cfg=SimpleNamespace(to_dict=lambda: {"lr": 1e-3, "model": {"type": dict}, "betas": (0.9, 0.95)}),
        visualizer=SimpleNamespace(_vis_backends={}),
    )
    (tracker,) = start_tracking({"type": name, "project": "mine"}, runner)
    assert runner.visualizer._vis_backends == {f"track_{name}": tracker}
    tracker.add_scalars({"loss": 0.5}, step=1, file_path="x.json")
    for _ in range(2):
        tracker.add_scalars({"boom": 0.5}, step=2)
    tracker.close()
    (_, named), *others = service.calls
    assert named["project"] == "mine"
    assert named["config"] == {"lr": 1e-3, "model": {"type": str(dict)}, "betas": [0.9, 0.95]}
    assert "tiny_now" in named.values()
    assert others == [("log", 1, {"loss": 0.5}), ("finish",)]
    assert [record.message for record in caplog.records if "failed" in record.message] == [
        f"track: {name} failed in add_scalars (ConnectionError: the service is away); training continues, "
        f"and TensorBoard has every figure"
    ]


def test_a_service_that_cannot_be_started_is_a_warning(caplog):
    def away() -> None:
        raise OSError("no account")

    tracker = Tracker("mlflow", away)
    tracker.add_scalars({"loss": 1.0}, step=1)
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "track: mlflow failed in start"
    ]


def test_services_are_checked_before_training():
    with pytest.raises(PolarError, match=r"'wanbd' is no tracking service; did you mean wandb\?"):
        as_services("wanbd")
    with pytest.raises(PolarError, match=r"there are wandb, swanlab"):
        as_services(7)
    with pytest.raises(PolarError, match=r"dvclive is not installed: pip install dvclive"):
        as_services([{"type": "dvclive", "resume": True}])
