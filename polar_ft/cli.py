"""The command ``polar-ft``: one Typer app, one sub-command per job.

A sub-command is imported when it is run, so that ``polar-ft --help`` starts at once. Torch, xtuner and so on
are imported when they are needed, so that ``polar-ft data`` needs only the base install.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import polar_ft
from polar_ft.errors import PolarError, printable
from polar_ft.options import APP_SETTINGS

# For each extra the packages that it installs; see setup.py.
EXTRAS = {
    "eval": {"jinja2", "matplotlib", "rapidfuzz", "scipy"},
    "serve": {"fastapi", "prometheus_client", "uvicorn"},
    "train": {
        "deepspeed",
        "filelock",
        "mmengine",
        "peft",
        "psutil",
        "pyarrow",
        "safetensors",
        "torch",
        "transformers",
        "xtuner",
        "xxhash",
    },
}

# The commands in the order of the work: where each is (a function or an app), and its line in the help.
COMMANDS = {
    "fit": ("polar_ft.fit.commands:fit", "Make a reward model from a file of preferences."),
    "data": ("polar_ft.data.commands:data_app", "Check, convert, split and preview preference data."),
    "label": (
        "polar_ft.labelling.commands:label_app",
        "Compare answers on a page; report how far people agree.",
    ),
    "doctor": ("polar_ft.doctor.commands:doctor", "Check this machine, and what a run of CONFIG will take."),
    "plan": ("polar_ft.doctor.commands:plan", "Print which ZeRO stages fit on GPUs, computed from shapes."),
    "train": (
        "polar_ft.training.commands:train",
        "Train as `xtuner train` does, and exit with the run's status.",
    ),
    "migrate": ("polar_ft.migrate:migrate", "Turn a config of POLAR or xtuner into one of polar_ft."),
    "watch": ("polar_ft.training.commands:watch", "Draw the curves of a training run in the terminal."),
    "convert": (
        "polar_ft.conversion.commands:convert",
        "Convert a saved checkpoint to a HuggingFace folder.",
    ),
    "eval": (
        "polar_ft.evaluation.commands:eval_app",
        "Score held-out pairs, or compare two runs (eval compare A B).",
    ),
    "serve": ("polar_ft.serving.commands:serve", "Serve a reward model over HTTP, with a page to try it."),
    "score": ("polar_ft.client.commands:score", "Score a data set with running servers."),
    "parity": (
        "polar_ft.parity.commands:parity",
        "Check that scorer, training, transformers and engines agree.",
    ),
    "calibrate": (
        "polar_ft.evaluation.scale:calibrate",
        "Measure the range of a model's rewards, for use in RL.",
    ),
    "rft": ("polar_ft.rft.commands:rft_app", "Watch a policy that is trained with POLAR as its reward."),
}


@cache
def load(name: str) -> Any:
    """The sub-command of that name, imported."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    if name == "data":
        from polar_ft.rft import commands  # in a layer above `polar_ft.data`

        for function in (commands.to_verl, commands.to_trl, commands.to_openrlhf):
            found.command(function.__name__.replace("_", "-"))(function)
    if isinstance(found, typer.Typer):
        command: Any = typer.main.get_group(found)
    else:
        alone = typer.Typer(**APP_SETTINGS)
        alone.command(name, **getattr(found, "command_settings", {}))(found)
        command = typer.main.get_command(alone)
    command.name = name
    return command


class _Commands(TyperGroup):
    """The commands by name and help; the one that is run is imported."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load(name), rest


app = typer.Typer(
    cls=_Commands,
    help="Fine-tune, check, convert, evaluate and serve POLAR reward models.",
    no_args_is_help=True,
    **APP_SETTINGS,
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"polar-ft {polar_ft.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of ``polar-ft``."""
    run(app)


def run(command: typer.Typer) -> None:
    """Runs a Typer app; an error that the user can fix becomes a message and exit status 1."""
    try:
        command()
    except PolarError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        _fail(
            f"this command needs {error.name}, which the base install leaves out: "
            f"in the clone of polar_ft, pip install '.[{extra}]'"
        )


def _fail(message: str) -> NoReturn:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(printable(message))}")
    sys.exit(1)


if __name__ == "__main__":
    main()
