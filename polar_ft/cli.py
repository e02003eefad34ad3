"""The command ``polar-ft``: one Typer app, one sub-command per job.

Sub-commands import torch, xtuner and the like when they run, so that ``polar-ft --help`` and ``polar-ft
data`` start at once and need only the base install.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

import polar_ft
from polar_ft.client.commands import score
from polar_ft.conversion.commands import convert
from polar_ft.data.commands import data_app
from polar_ft.doctor.commands import doctor, plan
from polar_ft.errors import PolarError, printable
from polar_ft.evaluation.commands import eval_app
from polar_ft.evaluation.scale import calibrate
from polar_ft.parity.commands import parity
from polar_ft.serving.commands import serve

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

app = typer.Typer(
    help="Fine-tune, check, convert, evaluate and serve POLAR reward models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.command("convert")(convert)
app.command("doctor")(doctor)
app.command("plan")(plan)
app.command("calibrate")(calibrate)
app.command("parity")(parity)
app.command("serve")(serve)
app.command("score")(score)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"polar-ft {polar_ft.__version__}")
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Train like `xtuner train CONFIG …`, but exit with the status of the run.",
    epilog="Options after CONFIG go to xtuner: --deepspeed deepspeed_zero2, --work-dir DIR, --resume PATH, "
    "--cfg-options KEY=VALUE …; --resume auto resumes from the newest complete checkpoint, if any. "
    "Processes: NPROC_PER_NODE in the environment; for several machines also NNODES, NODE_RANK, ADDR, PORT.",
)
def train(context: typer.Context, config: Annotated[Path, typer.Argument(help="A config file.")]) -> None:
    """Passes everything after CONFIG to xtuner."""
    from polar_ft.training.launch import launch

    raise typer.Exit(launch(str(config), context.args))


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
            f"pip install 'polar-ft[{extra}]'"
        )


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(printable(message))}")
    sys.exit(1)


if __name__ == "__main__":
    main()
