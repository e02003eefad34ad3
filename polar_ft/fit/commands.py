"""The command ``polar-ft fit``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from polar_ft.errors import PolarError, printable
from polar_ft.options import AllowTokenizerCode, Split

if TYPE_CHECKING:
    from polar_ft.fit.run import Wanted


def fit(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Preferences in any format that polar-ft data convert reads: a file, a folder or a "
            "HuggingFace id.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for model, report, config and data.", show_default="DATA_rm"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or HuggingFace id of the base model.",
            show_default="internlm/POLAR-1_8B-Base; without a GPU a tiny one, made here",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Pairs to measure on.", show_default="a tenth of the prompts of DATA"
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="OURS=THEIRS", help="Read the field THEIRS as OURS; as in polar-ft data convert."
        ),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Leave out bad rows and count them, instead of stopping.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Make a choice yourself, e.g. lr=1e-5; may be repeated."
        ),
    ] = None,
    learning_curve: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=3,
            max=5,
            help="Also train on 1/2, 1/4, … of the data, to see whether more helps: N trainings in all.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show data, choices, memory and time; write and train nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before training.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the model at the end.")] = False,
    allow_tokenizer_code: AllowTokenizerCode = None,
    split: Split = "train",
) -> None:
    """Make a reward model from a file of preferences.

    Checks the data, chooses how to train on this machine, trains, converts, compares with the base model,
    and reports. The same command resumes a fit that was interrupted.
    """
    from polar_ft.data.converters import parse_mapping
    from polar_ft.data.reading import expand

    for named in filter(None, (data, held_out)):
        expand(named)  # a misspelt one is named before a folder is made
    source_name = Path(data).name.partition(".")[0] or "data"
    folder = out or Path(f"{source_name}_rm")
    mapping = parse_mapping(names or ())
    try:
        from polar_ft.fit import run
        from polar_ft.fit.choices import parse_given
    except ModuleNotFoundError as error:
        raise PolarError(
            f"fit needs {error.name}; in the clone of polar_ft: pip install '.[train,eval,serve]'"
        ) from error
    from polar_ft.fit.data import Source

    wanted = run.Wanted(
        source=Source(data, split, mapping or None),
        base=base,
        held_out=held_out,
        given=parse_given(settings or []),
        curve=learning_curve or 0,
        fix=fix,
        allow_tokenizer_code=tuple(allow_tokenizer_code or ()),
    )
    if dry_run:
        _dry_run(wanted, folder)
        return
    started = time.monotonic()
    try:
        _fit(wanted, folder, yes=yes, started=started)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; the same command resumes", err=True)
        raise typer.Exit(130) from None
    if serve:
        command = [sys.executable, "-m", "polar_ft.cli", "serve", str(folder / "model")]
        for name in allow_tokenizer_code or ():
            command += ["--allow-tokenizer-code", name]
        sys.stdout.flush()
        os.execv(sys.executable, command)


def _fit(wanted: Wanted, folder: Path, *, yes: bool, started: float) -> None:
    from polar_ft.fit import run, terminal
    from polar_ft.fit.choices import Machine
    from polar_ft.fit.steps import Steps, locked

    console = terminal.new_console()
    with locked(folder):
        steps = Steps(folder, console, run.count_steps(wanted))
        machine = Machine.here()
        plan = run.prepare(steps, wanted, folder, machine)

        def ask(plan: run.Plan) -> None:
            terminal.show_plan(console, plan)
            asks = not yes and not plan.base.is_tiny and console.is_terminal and sys.stdin.isatty()
            again = " The training in this folder is removed." if "train" in steps.record.begun else ""
            if asks and not typer.confirm(f"Train?{again}", default=True):
                raise typer.Exit(1)

        outcome = run.fit(steps, plan, wanted, folder, before_training=ask)
        if not steps.ran:
            console.print("\nnothing has changed, so nothing was done again", style="dim")
        terminal.show_outcome(console, outcome, folder, time.monotonic() - started)


def _dry_run(wanted: Wanted, folder: Path) -> None:
    """Everything before training, in a folder that is thrown away, then memory and time."""
    from polar_ft.fit import run, terminal
    from polar_ft.fit.choices import Machine
    from polar_ft.fit.steps import Steps

    console = terminal.new_console()
    with tempfile.TemporaryDirectory(prefix="polar_ft_") as scratch:
        out = Path(scratch)
        steps = Steps(out, console, run.count_steps(wanted))
        plan = run.prepare(steps, wanted, out, Machine.here(), make_base=False)
        terminal.show_plan(console, plan)
        config = run.write_config_of(plan, wanted, out)
        terminal.show_cost(console, plan, config)
    console.print(f"without --dry-run, all goes to {escape(printable(str(folder)))}")
