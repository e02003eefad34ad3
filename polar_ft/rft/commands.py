"""`polar-ft rft watch`, and `polar-ft data to-verl`, `to-trl` and `to-openrlhf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.data.report import many, show_problems
from polar_ft.errors import PolarError
from polar_ft.options import APP_SETTINGS, Force, Split
from polar_ft.rft.data import Framework, Source, write_rl_data
from polar_ft.rft.watch import alarms, read_watch

rft_app = typer.Typer(
    help="Watch a policy that is trained with POLAR as its reward.", no_args_is_help=True, **APP_SETTINGS
)

Input = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="File, folder or HuggingFace data set of questions with references or ranked answers.",
    ),
]
Layout = Annotated[
    Source, typer.Option(help="Our own rows, or those of hh-rlhf, MATH or AM-DeepSeek-R1-Distilled.")
]


def _output(suffix: str) -> object:
    return typer.Argument(metavar="OUT", help=f"File to write; its name ends in {suffix}.")


def to_verl(
    source: Input,
    target: Annotated[Path, _output(".parquet")],
    layout: Layout = "polar",
    split: Split = "train",
    force: Force = False,
) -> None:
    """Write questions and references as verl's Parquet files."""
    _write(source, target, "verl", layout, split, force)


def to_trl(
    source: Input,
    target: Annotated[Path, _output(".jsonl")],
    layout: Layout = "polar",
    split: Split = "train",
    force: Force = False,
) -> None:
    """Write questions and references for TRL's online trainers."""
    _write(source, target, "trl", layout, split, force)


def to_openrlhf(
    source: Input,
    target: Annotated[Path, _output(".jsonl")],
    layout: Layout = "polar",
    split: Split = "train",
    force: Force = False,
) -> None:
    """Write questions and references for OpenRLHF."""
    _write(source, target, "openrlhf", layout, split, force)


def _write(source: str, target: Path, framework: Framework, layout: Source, split: str, force: bool) -> None:
    if target.exists() and not force:
        raise PolarError(f"{target}: exists already; choose another name, or --force to replace it")
    done = write_rl_data(source, target, framework, layout=layout, split=split)
    console = Console(highlight=False)
    show_problems(console, done.problems)
    console.print(f"[bold]{escape(str(target))}[/]: {many(done.rows, 'row')} for {framework}", soft_wrap=True)
    if done.problems:
        console.print(
            f"[yellow]left out {many(len(done.problems), 'row')} that cannot be used (named above)[/]"
        )


@rft_app.command("watch")
def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What watch=… of the reward names, or a file.")
    ],
    last: Annotated[int, typer.Option(min=1, help="Lines to show.")] = 20,
) -> None:
    """Show figures of a policy's answers, and alarms where they drift."""
    lines = read_watch(folder)
    table = Table(
        "answers", "reward", "unanswered", "cut", "length", "repetition", "overlap", "reward~length"
    )
    for line in lines[-last:]:
        table.add_row(
            f"{line.answers:,}",
            f"{line.reward:.2f} ± {line.reward_std:.2f}",
            f"{line.unanswered:.1%}",
            f"{line.truncated:.1%}",
            f"{line.length:.0f}",
            f"{line.repetition:.1%}",
            f"{line.overlap:.1%}",
            f"{line.reward_by_length:+.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    found = alarms(lines)
    for alarm in found:
        console.print(f"[red]alarm:[/red] {alarm}", soft_wrap=True)
    if not found:
        console.print("no alarm")
    raise typer.Exit(1 if found else 0)
