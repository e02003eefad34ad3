"""What a fit shows: the plan before training, and the result at the end."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.errors import printable
from polar_ft.fit.config_file import as_code
from polar_ft.fit.run import Plan
from polar_ft.fit.steps import clock
from polar_ft.fit.verdict import Outcome

# A dry run measures about so long.
_WARMUP_SECONDS = 4.0


def new_console() -> Console:
    """A console on the standard output of now, whatever that is redirected to later."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = 110
    return console


def show_plan(console: Console, plan: Plan) -> None:
    """Prints the machine and every choice with its reason."""
    console.print(f"\n[bold]machine[/]  {escape(plan.machine.name)}")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", overflow="fold", max_width=34)
    table.add_column(style="dim", overflow="fold")
    for choice in plan.choices:
        table.add_row(choice.name, escape(as_code(choice.value)), escape(choice.reason))
    console.print(table)
    if plan.machine.device == "cpu" and not plan.base.is_tiny:
        console.print("[yellow]no GPU[/]: a real model takes very long on a CPU; --dry-run measures how long")
    console.print()


def show_cost(console: Console, plan: Plan, config: Path) -> None:
    """Prints steps, memory by ZeRO stage, and the time of training, measured where that is possible."""
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):  # what DeepSpeed and bitsandbytes print
        from polar_ft.doctor import run as doctor
        from polar_ft.doctor import settings, tables

    machine, asked = plan.machine, settings.read_settings(config)
    values = {choice.name: choice.value for choice in plan.choices}
    gpus, shape = values["gpus"], dict(plan.base.shape)
    with doctor.inspect_data(asked, shape["hidden_size"], gpus, everything=False) as inspection:
        tokens = inspection.figures.largest_pack if inspection.figures else None
        memory = doctor.memory_table(
            asked,
            shape,
            gpus=gpus,
            available=machine.memory,
            device=machine.device,
            host=machine.host,
            tokens=tokens,
        )
        if inspection.figures is not None:
            tables.show_data(console, inspection.figures, asked.epochs, gpus)
        tables.show_memory(console, memory, gpus, "GPU" if machine.device == "cuda" else "process")
        time = doctor.measure_time(
            asked, shape, inspection, memory, gpus=gpus, device=machine.device, seconds=_WARMUP_SECONDS
        )
        tables.show_time(console, time, gpus)


def show_outcome(console: Console, outcome: Outcome, out: Path, seconds: float) -> None:
    """The last lines: is it better, by how much, how sure, and what next."""
    style = {"passed": "bold green", "warning": "bold yellow", "failed": "bold red"}[outcome.status]
    console.print()
    console.print(escape(outcome.first), style=style)
    for line in outcome.more:
        console.print(escape(line))
    console.print("\n[bold]what to try next[/]")
    for advice in outcome.advice:
        console.print(f"· [bold]{escape(advice.title)}.[/] {escape(advice.text)}")
    shown = escape(printable(str(out)))
    console.print(
        f"\n{shown}/report.html   {shown}/model   ({clock(seconds)})\n[dim]polar-ft serve {shown}/model[/]",
        soft_wrap=True,
    )
