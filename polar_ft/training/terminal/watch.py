"""``polar-ft watch WORK_DIR``: the curves of a run in the terminal, while it trains and afterwards."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polar_ft.errors import PolarError
from polar_ft.training.terminal.curves import draw_curve, of_name
from polar_ft.training.terminal.display import figures_text

# Title of a curve, its name among the scalars, and that of the validations drawn into it.
CURVES = (
    ("loss", "loss", "val/log_loss"),
    ("accuracy", "accuracy", "val/accuracy"),
    ("margin", "margin", "val/margin"),
    ("learning rate", "lr", None),
)
_HEIGHT = 8
_NARROW = 80  # columns below which curves are drawn one below the other
_SECONDS = 1.0


class RunFolder:
    """The figures of a run, read from its work folder while they are written.

    Args:
        folder: The work folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self._read: dict[Path, int] = {}  # bytes, by file

    def update(self) -> None:
        """Reads what has been written since."""
        for file in sorted(self.folder.glob("*/vis_data/scalars.json")):
            with file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                content = stream.read()
            complete = content[: content.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(complete)
            self.rows += map(json.loads, complete.splitlines())

    @property
    def steps(self) -> int | None:
        """Steps of the run; None where it does not say."""
        return _json(self.folder / "step_plan.json").get("steps")

    def is_running(self) -> bool:
        """Whether the process that trains in it is alive; one on another machine is taken to be."""
        holder = _json(self.folder / ".run.lock.json")
        if not holder:
            return False
        if holder.get("host") != socket.gethostname():
            newest = max((file.stat().st_mtime for file in self._read), default=0.0)
            return time.time() - newest < 600
        with suppress(OSError):
            os.kill(int(holder["pid"]), 0)
            return True
        return False


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def watch(
    work_dir: Annotated[Path, typer.Argument(metavar="WORK_DIR", help="Work folder of a training run.")],
) -> None:
    """Draw the curves of a training run in the terminal.

    Loss, accuracy, margin and learning rate of every step, with validations as ●. A run that is training is
    redrawn every second until it ends, or q or Ctrl-C is pressed. Piped, the curves are printed once.
    """
    run = RunFolder(work_dir)
    if not work_dir.is_dir():
        raise PolarError(
            f"{work_dir}: no such folder; name the work folder of a run (work_dirs/<config name>)"
        )
    run.update()
    running = run.is_running()
    if not run.rows and not running:
        raise PolarError(
            f"{work_dir}: has no figures of a run (…/vis_data/scalars.json); name the work folder of a run "
            f"that has computed a step, and whose config has LocalVisBackend"
        )
    console = Console()
    if not running or not console.is_terminal:
        console.print(picture(run, console.width, running=running))
        return
    with _keys() as pressed, Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while running and pressed() != "q":
            run.update()
            running = run.is_running()
            live.update(picture(run, console.width, running=running, keys="  q ends"), refresh=True)


def picture(run: RunFolder, width: int, *, running: bool, keys: str = "") -> RenderableType:
    """The curves of a run.

    Args:
        run: The run.
        width: Columns of the terminal.
        running: Whether it trains now.
        keys: What keys do, for the first line.
    """
    across = 1 if width < _NARROW else 2
    of_one = width // across - 2
    training = [row for row in run.rows if "loss" in row]
    done = max((int(row["step"]) for row in run.rows), default=0)
    steps = run.steps or done
    grid = Table.grid(padding=(1, 2, 0, 0))
    cells: list[RenderableType] = []
    for title, name, validation in CURVES:
        marks = {} if validation is None else of_name(run.rows, validation)
        heading = Text(title, style="bold")
        if marks:
            of_last = validation or ""
            heading.append(
                f"   ● {of_last.removeprefix('val/').replace('_', '-')} on held-out pairs", "magenta"
            )
        lines = draw_curve(of_name(training, name), marks, of_one, _HEIGHT, max(steps, 1))
        cells.append(Group(heading, *lines))
    for start in range(0, len(cells), across):
        grid.add_row(*cells[start : start + across])
    state = "running" if running else "ended"
    head = Text.assemble((str(run.folder), "bold"), f"  step {done}/{steps}  {state}")
    if running and training and done < steps:
        recent = training[-20:]
        left = sum(row.get("time", 0.0) for row in recent) / len(recent) * (steps - done)
        head.append(f"  {timedelta(seconds=int(left))} left")
    head.append(keys, "dim")
    parts: list[RenderableType] = [head]
    if training:
        parts.append(Text(figures_text(training[-1]), style="dim"))
    return Group(*parts, grid)


@contextmanager
def _keys() -> Iterator[Any]:
    """Gives a function that waits a second for a key and returns it; "" for none."""
    if not sys.stdin.isatty():

        def wait() -> str:
            time.sleep(_SECONDS)
            return ""

        yield wait
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def key() -> str:
        ready, _, _ = select.select([sys.stdin], [], [], _SECONDS)
        return sys.stdin.read(1) if ready else ""

    try:
        yield key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
