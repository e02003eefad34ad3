"""The command ``polar-ft``: one Typer app, one sub-command per job.

Imports of torch, xtuner and the like are left to the sub-commands, so that ``polar-ft --help`` and
``polar-ft data`` start at once and need the base install only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import polar_ft
from polar_ft.conversion.commands import convert
from polar_ft.data.commands import data_app
from polar_ft.errors import PolarError
from polar_ft.evaluation.commands import evaluate

app = typer.Typer(
    help="Fine-tune, check, convert and evaluate POLAR reward models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command("eval")(evaluate)
app.command("convert")(convert)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"polar-ft {polar_ft.__version__}")
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Train like `xtuner train CONFIG …`, and exit with the run's real status.",
)
def train(context: typer.Context, config: Annotated[Path, typer.Argument(help="A config file.")]) -> None:
    """Everything after CONFIG is handed to xtuner: --deepspeed, --work-dir, --resume, --cfg-options …"""
    from polar_ft.training.launch import launch

    raise typer.Exit(launch(str(config), context.args))


def main() -> None:
    """Entry point; what the user can mend is told in a line and ends with status 1."""
    run(app)


def run(command: typer.Typer) -> None:
    """Runs a Typer app, turning `PolarError` into a message and status 1."""
    try:
        command()
    except PolarError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {_plain(error)}")
        sys.exit(1)


def _plain(error: PolarError) -> str:
    from rich.markup import escape

    return escape(str(error))


if __name__ == "__main__":
    main()
