"""`polar-ft rft watch`, and `polar-ft data to-verl`, `to-trl` and `to-openrlhf`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from polar_ft.data.report import many, number_table, show_problems
from polar_ft.errors import DataError, PolarError
from polar_ft.options import APP_SETTINGS, Force, Split
from polar_ft.rft.data import Framework, Source, write_rl_data
from polar_ft.rft.rules import Rule
from polar_ft.rft.watch import WatchLine, alarms, read_watch

FOLLOW_SECONDS = 2.0
# Columns of `polar-ft rft watch` after the rewards.
FIGURES = ["no answer", "cut", "length", "repetition", "overlap", "distance"]

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


WithRule = Annotated[
    Rule | None,
    typer.Option(
        help="Rule that rewards all rows in place of the reward model; math compares final answers by "
        "math-verify.",
        show_default="each row's own field rule",
    ),
]


def _output(suffix: str) -> object:
    return typer.Argument(metavar="OUT", help=f"File to write; its name ends in {suffix}.")


def to_verl(
    source: Input,
    target: Annotated[Path, _output(".parquet")],
    layout: Layout = "polar",
    split: Split = "train",
    rule: WithRule = None,
    force: Force = False,
) -> None:
    """Write questions and references as verl's Parquet files."""
    _write(source, target, "verl", layout, split, rule, force)


def to_trl(
    source: Input,
    target: Annotated[Path, _output(".jsonl")],
    layout: Layout = "polar",
    split: Split = "train",
    rule: WithRule = None,
    force: Force = False,
) -> None:
    """Write questions and references for TRL's online trainers."""
    _write(source, target, "trl", layout, split, rule, force)


def to_openrlhf(
    source: Input,
    target: Annotated[Path, _output(".jsonl")],
    layout: Layout = "polar",
    split: Split = "train",
    rule: WithRule = None,
    force: Force = False,
) -> None:
    """Write questions and references for OpenRLHF."""
    _write(source, target, "openrlhf", layout, split, rule, force)


def _write(
    source: str,
    target: Path,
    framework: Framework,
    layout: Source,
    split: str,
    rule: Rule | None,
    force: bool,
) -> None:
    if target.exists() and not force:
        raise PolarError(f"{target}: exists already; choose another name, or --force to replace it")
    done = write_rl_data(source, target, framework, layout=layout, split=split, rule=rule)
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
        Path,
        typer.Argument(metavar="FOLDER", help="Folder that watch=… of the reward names, or a file in it."),
    ],
    last: Annotated[int, typer.Option(metavar="N", min=1, help="Number of latest lines to show.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Show new lines until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write lines and alarms as JSON.")] = False,
) -> None:
    """Show figures of a policy's answers, and alarms where they drift.

    They are written where the reward has the setting watch=FOLDER. Exits with status 1 if there is an alarm.
    """
    console = Console(highlight=False)
    if follow:
        with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_shown(_lines_so_far(folder), last), refresh=True)
                time.sleep(FOLLOW_SECONDS)
    lines = read_watch(folder)
    found = alarms(lines)
    if as_json:
        shown = {"lines": [line.model_dump() for line in lines[-last:]], "alarms": found}
        typer.echo(json.dumps(shown, indent=1))
    elif not follow:
        console.print(_shown(lines, last), soft_wrap=True)
    raise typer.Exit(1 if found else 0)


def _lines_so_far(folder: Path) -> list[WatchLine]:
    """None yet where the run has only just begun."""
    try:
        return read_watch(folder)
    except DataError:
        if folder.is_dir():
            return []
        raise


def _shown(lines: Sequence[WatchLine], last: int) -> Group:
    """The last lines as a table, and the alarms below it."""
    shaped = any(line.raw != line.reward for line in lines)
    table = number_table(["answers", "reward", *(["raw"] if shaped else []), *FIGURES])
    for line in lines[-last:]:
        table.add_row(
            f"{line.answers:,}",
            f"{line.reward:.2f} ± {line.reward_std:.2f}",
            *([f"{line.raw:.2f}"] if shaped else []),
            f"{line.unanswered:.1%}",
            f"{line.truncated:.1%}",
            f"{line.length:.0f} ({line.reward_by_length:+.2f})",
            f"{line.repetition:.1%} ({line.reward_by_repetition:+.2f})",
            f"{line.overlap:.1%} ({line.reward_by_overlap:+.2f})",
            f"{line.distance:.1%} ({line.reward_by_distance:+.2f})",
        )
    note = Text("in brackets: correlation with the raw reward", style="dim")
    found = [Text.assemble(("alarm: ", "red"), sentence) for sentence in alarms(lines)]
    return Group(table, note, *(found or [Text("no alarm" if lines else "no lines yet")]))
