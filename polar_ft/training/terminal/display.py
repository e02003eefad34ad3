"""Draws a run on the terminal: notes, validations as a table, and progress; plain lines where it is piped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from polar_ft.errors import printable
from polar_ft.training.terminal.events import Event

# Where the output is piped: about so many lines of a run, and at least one in so many seconds.
_LINES = 20
_SECONDS_BETWEEN_LINES = 600.0
# Rows of the table of validations: the first, the best, and the newest.
_VALIDATIONS = 10

_STYLES = {"warning": "yellow", "error": "red"}


class Display:
    """Shows the events of a run.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = "starting"
        self._step: Event | None = None
        self._line_at = -math.inf
        self._validations: list[Event] = []
        # Refreshed by `show` alone: no thread of its own competes with the run.
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        if self._live is not None:
            self._live.start()

    def show(self, events: Iterable[Event]) -> None:
        """Shows new events; called often, also without any, so that the spinner turns."""
        changed = self._step is None
        for event in events:
            changed = True
            match event["kind"]:
                case "phase":
                    self._phase = event["text"]
                case "line":
                    self._print(event["text"], event["level"])
                case "step":
                    self._show_step(event)
                case "validation":
                    self._validations.append(event)
                    if self._live is None:
                        self._print(event["text"])
        if self._live is not None and changed:
            self._live.update(self._picture(), refresh=True)

    def close(self) -> None:
        """Ends the live picture; the last step and the validations stay on the terminal."""
        if self._live is not None:
            self._live.update(Text())
            self._live.stop()
            if self._step is not None:
                self._console.print(step_line(self._step), highlight=False)
        if self._validations:
            self._console.print(validation_table(self._validations))

    def _print(self, text: str, level: str = "info") -> None:
        label = f"{level}: " if level in _STYLES else ""
        text = escape(printable(label + text))
        style = _STYLES.get(level)
        self._console.print(text, style=style, highlight=False, soft_wrap=True)

    def _show_step(self, event: Event) -> None:
        self._step = event
        if self._live is not None:
            return
        step, steps, now = event["step"], event["steps"], time.monotonic()
        due = step % max(1, steps // _LINES) == 0 or step == steps
        if due or now - self._line_at >= _SECONDS_BETWEEN_LINES:
            self._line_at = now
            self._print(step_line(event))

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = [validation_table(self._validations)] if self._validations else []
        if self._step is None:
            parts.append(Spinner("dots", Text(f"{self._phase} …")))
        else:
            parts += [_bar(self._step), Text(figures_text(self._step["figures"]), style="dim")]
        return Group(*parts)


def _bar(event: Event) -> RenderableType:
    step, steps = event["step"], event["steps"]
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=steps, completed=step, width=30)
    left = "done" if step == steps else f"{_clock(event['left'])} left"
    grid.add_row(f"step {step}/{steps}", bar, f"{100 * step // steps} %", left)
    return grid


def step_line(event: Event) -> str:
    """A step as one line.

    >>> figures = {"loss": 0.6317, "accuracy": 0.71875, "margin": 0.139, "lr": 1.1128e-4, "pairs_per_s": 43}
    >>> step_line({"step": 12, "steps": 40, "left": 72.4, "figures": figures})
    'step 12/40  loss 0.6317  accuracy 0.7188  margin 0.1390  lr 1.11e-04  43 pairs/s  0:01:12 left'
    """
    step, steps = event["step"], event["steps"]
    left = "" if step == steps else f"  {_clock(event['left'])} left"
    return f"step {step}/{steps}  {figures_text(event['figures'])}{left}"


def figures_text(figures: Mapping[str, Any]) -> str:
    """The figures of a step that matter while it trains."""
    parts = [f"{name} {figures[name]:.4f}" for name in ("loss", "accuracy", "margin")]
    parts.append(f"lr {figures['lr']:.2e}")
    rate = figures["pairs_per_s"]
    parts.append(f"{rate:.0f} pairs/s" if rate >= 10 else f"{rate:.2g} pairs/s")
    if figures.get("skipped"):
        parts.append("not finite, skipped")
    return "  ".join(parts)


def validation_table(validations: Sequence[Event]) -> Table:
    """Validations of a run as a table: the first, the best and the newest ones.

    Args:
        validations: Their events, oldest first.
    """
    columns = {
        "accuracy": "accuracy",
        "macro_accuracy": "mean of subsets",
        "log_loss": "log-loss",
        "margin": "margin",
    }
    columns = {name: title for name, title in columns.items() if name in validations[-1]["figures"]}
    table = Table(title="validation", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("step", justify="right")
    for name, title in columns.items():
        table.add_column(title, justify="right")
        if name == "accuracy":
            table.add_column("95 % interval", justify="center")
    table.add_column("")
    best = max((number for number, event in enumerate(validations) if event["best"]), default=None)
    newest = range(max(0, len(validations) - _VALIDATIONS + 2), len(validations))
    shown = sorted({0, *newest} | ({best} if best is not None else set()))
    before = -1
    for number in shown:
        if number > before + 1:
            table.add_row("…")
        before = number
        figures = validations[number]["figures"]
        row = [str(validations[number]["step"])]
        for name in columns:
            row.append(_number(figures.get(name)))
            if name == "accuracy":
                row.append(
                    f"{_number(figures.get('accuracy_low'))} – {_number(figures.get('accuracy_high'))}"
                )
        table.add_row(*row, "best" if number == best else "", style="bold" if number == best else None)
    return table


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
