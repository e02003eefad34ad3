"""The command ``polar-ft``: one Typer app, one sub-command per job.

Sub-commands import torch, xtuner and the like when they run, so that ``polar-ft --help`` and ``polar-ft
data`` start at once and need only the base install.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import polar_ft
from polar_ft.client.commands import score
from polar_ft.conversion.commands import convert
from polar_ft.data.commands import data_app
from polar_ft.doctor.commands import doctor, plan
from polar_ft.errors import PolarError, printable
from polar_ft.evaluation.commands import eval_app
from polar_ft.evaluation.scale import calibrate
from polar_ft.fit.commands import fit
from polar_ft.options import APP_SETTINGS
from polar_ft.parity.commands import parity
from polar_ft.rft.commands import rft_app, to_openrlhf, to_trl, to_verl
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

# The help lists them in the order of the work.
COMMANDS = (
    "fit",
    "data",
    "doctor",
    "plan",
    "train",
    "convert",
    "eval",
    "serve",
    "score",
    "parity",
    "calibrate",
    "rft",
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=COMMANDS.index)


app = typer.Typer(
    cls=_InOrder,
    help="Fine-tune, check, convert, evaluate and serve POLAR reward models.",
    no_args_is_help=True,
    **APP_SETTINGS,
)
app.command("fit")(fit)
app.add_typer(data_app, name="data")
app.command("doctor")(doctor)
app.command("plan")(plan)
app.command("convert")(convert)
app.add_typer(eval_app, name="eval")
app.command("serve")(serve)
app.command("score")(score)
app.command("parity")(parity)
app.command("calibrate")(calibrate)
app.add_typer(rft_app, name="rft")
for function in (to_verl, to_trl, to_openrlhf):  # in a layer above `polar_ft.data`
    data_app.command(function.__name__.replace("_", "-"))(function)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"polar-ft {polar_ft.__version__}")
        raise typer.Exit


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="",
    epilog="""Options after CONFIG are those of `xtuner train`:

\b
  --deepspeed NAME         deepspeed_zero1, deepspeed_zero2, deepspeed_zero3,
                           deepspeed_zero3_offload, or a JSON file
  --work-dir DIR           Where checkpoints and logs go.
                           [default: work_dirs/CONFIG]
  --resume CHECKPOINT      Resume a run; auto takes the newest complete
                           checkpoint, and starts anew if there is none.
  --overwrite              Remove the checkpoints of an earlier run in the
                           work folder.
  --cfg-options KEY=VALUE  Other settings than the config's; several in a row.
  --seed N                 Random seed.

Processes: NPROC_PER_NODE in the environment; for several machines also NNODES, NODE_RANK, ADDR, PORT.""",
)
def train(
    context: typer.Context, config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config file.")]
) -> None:
    """Train as `xtuner train` does, and exit with the run's status.

    `xtuner train` itself exits with 0 even if training failed.
    """
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
            f"in the clone of polar_ft, pip install '.[{extra}]'"
        )


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {escape(printable(message))}")
    sys.exit(1)


if __name__ == "__main__":
    main()
