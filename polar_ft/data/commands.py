"""The commands ``polar-ft data check``, ``convert``, ``export``, ``split`` and ``preview``.

Results go to standard output and progress bars to standard error, so that output of ``--json`` can be piped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from polar_ft.data.converters import CONVERTERS, Recognised, convert_file, parse_mapping, recognise_file
from polar_ft.data.export import TARGETS, export_rows
from polar_ft.data.lint import check
from polar_ft.data.preview import read_example, run_text, summary_table, token_runs
from polar_ft.data.problems import PROBLEMS_SHOWN, FileProblem, RowProblem, raise_problems
from polar_ft.data.reading import (
    MAX_LINE_MB,
    DataSource,
    OnBytes,
    as_sources,
    expand,
    size_in_bytes,
)
from polar_ft.data.report import SUBSETS_SHOWN, many, number_table, report_as_json, show_problems, show_report
from polar_ft.data.split import Side, split_by_prompt
from polar_ft.data.writing import open_rows, refuse_to_overwrite
from polar_ft.errors import PolarError, printable
from polar_ft.options import (
    APP_SETTINGS,
    AllowTokenizerCode,
    Force,
    MaxLength,
    MaxLineMb,
    MaxResponseLength,
    Pairing,
    PairingName,
    Split,
)
from polar_ft.template import REWARD_TOKEN, SEPARATOR_TOKEN, PolarTemplate

data_app = typer.Typer(
    help="Check, convert, split and preview preference data.", no_args_is_help=True, **APP_SETTINGS
)

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE", help="JSON lines, CSV, TSV, Excel (.xlsx), Parquet, folders, or HuggingFace ids."
    ),
]
Input = Annotated[str, typer.Argument(metavar="IN", help="A file, a folder, or a HuggingFace id.")]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of the model whose tokenizer counts tokens.")
]
SeparatorToken = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Token between reference and candidate.",
        show_default=f"the model's own, else {SEPARATOR_TOKEN}",
    ),
]
RewardToken = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Token at the end, which is scored.",
        show_default=f"the model's own, else {REWARD_TOKEN}",
    ),
]
AddTokens = Annotated[
    bool, typer.Option("--add-reward-tokens", help="Add the two tokens if the tokenizer lacks them.")
]


@data_app.command("check")
def check_command(
    files: Files,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    max_response_length: MaxResponseLength = None,
    pairing: Pairing = "adjacent",
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
    allow_tokenizer_code: AllowTokenizerCode = None,
    separator: SeparatorToken = None,
    reward_token: RewardToken = None,
    add_reward_tokens: AddTokens = False,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Held-out data, whose prompts must not be among those of FILES; repeatable."),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the good rows to a .jsonl or .jsonl.gz file."),
    ] = None,
    force: Force = False,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Name bad rows, count the rest, and show what truncation cuts.

    Exits with status 1 if a row is bad or its prompt held out, unless --fix leaves it out. Also left out are
    pairs that are duplicates, contradict an earlier pair, are equal or have an empty text.
    """
    template = None
    if tokenizer is not None:
        template = _template(
            tokenizer,
            max_length,
            max_response_length,
            allow_tokenizer_code,
            separator,
            reward_token,
            add_reward_tokens,
        )
    elif max_length is not None or max_response_length is not None:
        raise PolarError("--max-length and --max-response-length count tokens; add --tokenizer FOLDER")
    sources = _sources(files, split=split, pairing=pairing, max_line_mb=max_line_mb)
    held_out_sources = _sources(held_out, split=split, max_line_mb=max_line_mb) if held_out else []
    if fix is not None:
        refuse_to_overwrite([fix], force=force)
    with open_rows(fix) if fix is not None else nullcontext() as out:
        with _progress("checking", files) as on_bytes:
            report = check(
                sources,
                template,
                held_out=held_out_sources,
                write=out.write if out else None,
                on_bytes=on_bytes,
            )
        if len(report.problems) > report.rows:
            report.warnings += _which_format(sources, report.problems)
        if as_json:
            typer.echo(report_as_json(report))
        else:
            show_report(_console(), report)
        if out is not None:
            damaged = [problem for problem in report.problems if isinstance(problem, FileProblem)]
            raise_problems(damaged, f"{fix}: nothing was written")
            if not out.count:
                raise PolarError(f"{fix}: there is no good row to write")
    if out is not None:
        left_out = report.rows + report.bad_rows - out.count
        Console(stderr=True).print(
            f"{printable(str(fix))}: {many(out.count, 'good row')}, {left_out:,} left out", soft_wrap=True
        )
    elif report.bad_rows or report.held_out_prompts:
        raise typer.Exit(1)


def _which_format(sources: Sequence[DataSource], problems: Sequence[RowProblem]) -> list[str]:
    """Says how data is converted most of whose rows cannot be used."""
    if all(isinstance(problem, FileProblem) for problem in problems):
        return []
    bad = next(
        (source for source in sources if problems[0].file.startswith(printable(source.path))), sources[0]
    )
    row = next((row for _, row in bad.rows() if isinstance(row, dict)), {})
    if {"prompt", "reference", "chosen", "rejected"} <= row.keys() or {"prompt", "responses"} <= row.keys():
        return []  # the layout is ours
    try:
        found = recognise_file(CONVERTERS, bad.path, split=bad.split, max_line_mb=bad.max_line_mb)
    except PolarError as error:
        kind = next((kind for kind, field in _ONE_ANSWER.items() if field in row), None)
        if kind is None:
            return [f"{error} (with polar-ft data convert auto {bad.path} OUT.jsonl)"]
        return [f"these rows look like {kind} with one answer each; a pair needs a better and a worse answer"]
    if found.name == "ranked":
        return []
    command = f"polar-ft data convert {found.name} {bad.path} OUT.jsonl"
    return [f"these rows look like the format {found.name}; {command} makes rows of polar-ft from them"]


_ONE_ANSWER = {"Alpaca's instructions": "output", "ShareGPT": "conversations", "chat messages": "messages"}


def _formats() -> str:
    """The formats and what they read, one paragraph each."""
    lines = []
    for name, fmt in CONVERTERS.items():
        hub = f" ({fmt.hub}, split {fmt.split})" if fmt.hub else ""
        lines.append(f"{name}: {fmt.summary}{hub}")
    return "\n\n".join(lines)


@data_app.command("convert", epilog=_formats())
def convert_command(
    data_format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="One of the formats listed below, or auto.")
    ],
    source: Input,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl or .jsonl.gz file.")],
    pairing: Annotated[
        PairingName | None,
        typer.Option(
            help="ranked: pair with the next worse response, or all worse ones.", show_default="adjacent"
        ),
    ] = None,
    reference: Annotated[
        Literal["best", "pairs", "none"] | None,
        typer.Option(
            help="Where the data has no reference: the best response becomes it (pairs, for rmb and "
            "rmb-polar: the one that the pairs alone say is best), or it is empty.",
            show_default="best for ranked, ultrafeedback, nectar, rmb and rmb-polar, none for rewardbench-2 "
            "and rm-bench",
        ),
    ] = None,
    score: Annotated[
        Literal["overall", "fine-grained", "better", "safer"] | None,
        typer.Option(
            help="What orders the answers: overall or fine-grained for ultrafeedback, better or safer for "
            "pku-saferlhf.",
            show_default="overall; better",
        ),
    ] = None,
    domain: Annotated[
        Literal["chat", "code", "math", "safety-refuse", "safety-response"] | None,
        typer.Option(help="rm-bench: domain of rows without one.", show_default="from the name of the file"),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="OURS=THEIRS",
            help="Read the field THEIRS as OURS, e.g. prompt=question,chosen=answers.0 (repeatable).",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail and write nothing if a row is bad.")] = False,
    keep_readable: Annotated[
        bool,
        typer.Option("--keep-readable", help="Convert what can be read of damaged files instead of failing."),
    ] = False,
    force: Force = False,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Split of a HuggingFace data set.", show_default="the format's, listed below"
        ),
    ] = None,
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Convert data in other formats to rows of polar-ft.

    Rows that cannot be used are dropped, counted and named.

    The formats are listed below the options; auto finds the format by looking at the first rows. If IN is a
    folder, its sub-folders are read too. If a file cannot be read to its end, nothing is written, unless
    --keep-readable is given.
    """
    refuse_to_overwrite([target], force=force)
    console, mapping = _console(), parse_mapping(names or ())
    if data_format == "auto":
        split = split or "train"  # what was looked at is what is converted, whatever the format's own split
        found = recognise_file(CONVERTERS, source, split=split, max_line_mb=max_line_mb, mapping=mapping)
        data_format = found.name
        _show_recognised(console, source, found)
    given = {"pairing": pairing, "reference": reference, "score": score, "domain": domain}
    options = {name: value for name, value in given.items() if value is not None}
    with _progress("converting", expand(source, recursive=True)) as on_bytes:
        done = convert_file(
            data_format,
            source,
            target,
            split=split,
            max_line_mb=max_line_mb,
            options=options,
            mapping=mapping,
            strict=strict,
            keep_readable=keep_readable,
            on_bytes=on_bytes,
        )
    show_problems(console, done.problems)
    written = [(done.pairs, "pair"), (done.ranked, "ranked row")]
    counts = " and ".join(many(count, thing) for count, thing in written if count)
    prompts = "" if done.prompts_in is None else f" of {many(done.prompts_in, 'prompt')}"
    console.print(
        f"[bold]{escape(printable(str(target)))}[/]: {counts} from {many(done.rows_in, 'row')}{prompts}",
        soft_wrap=True,  # so that a path stays on one line
    )
    if done.ranked and CONVERTERS[data_format].pairing != "adjacent":
        console.print(f"to be read with --pairing {CONVERTERS[data_format].pairing}")
    if done.unusable:
        named = "named above" if done.unusable <= PROBLEMS_SHOWN else f"{PROBLEMS_SHOWN} of them named above"
        console.print(f"[yellow]left out {many(done.unusable, 'row')} that cannot be used ({named})[/]")
    if done.guessed:
        console.print(
            f"[yellow]the prompt of {many(done.guessed, 'row')} is what chosen and rejected begin with: "
            "look at some of them[/]"
        )
    if done.damaged:
        console.print(f"[red]{many(len(done.damaged), 'file')} could not be read to the end (named above)[/]")
    for reason, count in sorted(done.left_out.items()):
        console.print(f"left out {many(count, 'pair')} {reason}")
    if done.without_pairs:
        unit = "prompt" if CONVERTERS[data_format].gather else "row"
        console.print(f"left out {many(done.without_pairs, unit)} of which no pair was left")


@data_app.command("export")
def export_command(
    framework: Annotated[str, typer.Argument(metavar="FRAMEWORK", help=" | ".join(TARGETS))],
    files: Files,
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; .json for label-studio and argilla.")],
    pairing: Pairing = "adjacent",
    reference: Annotated[
        Literal["best", "none"],
        typer.Option(
            help="Of ranked rows without a reference: the best response is left out, as in training, or all "
            "are paired."
        ),
    ] = "best",
    margins: Annotated[
        bool, typer.Option("--margins", help="Write margins, which TRL and OpenRLHF subtract in the loss.")
    ] = False,
    force: Force = False,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Write pairs as training or labelling tools read them.

    For Label Studio and Argilla the two answers come in any order, and which of them is chosen is left out.
    What has no place there is counted. A row that cannot be used is an error, and nothing is written.
    """
    suffixes = (TARGETS[framework].suffix,) if framework in TARGETS else (".jsonl", ".json")
    refuse_to_overwrite([out], force=force, suffixes=suffixes)
    with _progress("exporting", files) as on_bytes:
        done = export_rows(
            framework,
            files,
            out,
            pairing=pairing,
            reference=reference,
            margins=margins,
            split=split,
            max_line_mb=max_line_mb,
            on_bytes=on_bytes,
        )
    console = _console()
    console.print(
        f"[bold]{escape(str(out))}[/]: {many(done.pairs, 'pair')} from {many(done.rows_in, 'row')}",
        soft_wrap=True,
    )
    for what, count in done.lost.items():
        console.print(f"[yellow]{many(count, 'pair')} had {what}: not written[/]")
    for reason, count in done.left_out.items():
        console.print(f"[yellow]left out {many(count, 'pair')} {reason}[/]")
    if done.ties:
        console.print(f"left out {many(done.ties, 'pair')} of responses that are ranked the same")
    usage = TARGETS[framework].usage.format(path=out, file=out.name, name=out.stem)
    console.print(escape(usage), soft_wrap=True)


def _show_recognised(console: Console, source: str, found: Recognised) -> None:
    """Says which format was recognised, how sure that is, and why."""
    rows = f"{found.read:,} of the {many(found.looked_at, 'row')} looked at"
    console.print(
        f"[bold]{escape(printable(source))}[/]: {found.name} ({found.certainty}): it reads {rows}",
        soft_wrap=True,
    )
    if found.same:
        console.print(f"  the same as {', '.join(found.same)}")
    if found.rivals:
        console.print(f"  {', '.join(found.rivals)} would read them too, and would convert them differently")
    known = f"  it reads the fields {', '.join(found.known)}"
    kept = f"; it keeps {', '.join(found.unknown)} as they are" if found.unknown else ""
    console.print(escape(printable(known + kept)), soft_wrap=True)


@data_app.command("split")
def split_command(
    files: Files,
    out_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder for train.jsonl and held_out.jsonl.")],
    fraction: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the prompts that is held out.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed holds out other prompts.")] = 0,
    force: Force = False,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Split rows into training and held-out ones, by prompt.

    No prompt is on both sides. The side of a prompt depends only on its text and the seed, not on the order
    of rows.
    """
    paths = out_dir / "train.jsonl", out_dir / "held_out.jsonl"
    refuse_to_overwrite(paths, force=force)
    sources = _sources(files, split=split, max_line_mb=max_line_mb)
    with _progress("splitting", files) as on_bytes:
        sides = split_by_prompt(sources, *paths, fraction=fraction, seed=seed, on_bytes=on_bytes)
    _show_sides(sides)


@data_app.command("preview")
def preview_command(
    source: Input,
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of the model that reads the example.")
    ],
    index: Annotated[int, typer.Option(help="Number of the row, from 0.")] = 0,
    max_length: MaxLength = None,
    max_response_length: MaxResponseLength = None,
    pairing: Pairing = "adjacent",
    everything: Annotated[bool, typer.Option("--all", help="Show long runs of tokens in full.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id after each token.")] = False,
    allow_tokenizer_code: AllowTokenizerCode = None,
    separator: SeparatorToken = None,
    reward_token: RewardToken = None,
    add_reward_tokens: AddTokens = False,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Show one example token by token, with what was cut."""
    template = _template(
        tokenizer,
        max_length,
        max_response_length,
        allow_tokenizer_code,
        separator,
        reward_token,
        add_reward_tokens,
    )
    (data,) = _sources([source], split=split, pairing=pairing, max_line_mb=max_line_mb)
    example = read_example(data, index)
    encoded, shown = token_runs(example, template)
    console = _console()
    console.print(f"[bold]{escape(example.source)}[/]", soft_wrap=True)
    console.print(summary_table(example, encoded))
    about = [f"id {example.id}", f"wrapper {example.wrapper}"]
    about += [f"subset {example.subset}"] if example.subset else []
    about += [f"pairs (chosen > rejected): {', '.join(f'{a} > {b}' for a, b in example.pairs) or 'none'}"]
    console.print(escape(printable(" · ".join(about))), style="dim")
    for run in shown:
        kept = sum(token.kind != "cut" for token in run.tokens)
        cut = len(run.tokens) - kept
        lost = f", [red]{cut:,} cut[/]" if cut else ""
        console.print(f"\n[bold]{escape(printable(run.title))}[/] — {kept:,} tokens{lost}")
        console.print(run_text(run, width=console.width, everything=everything, ids=ids))


def _sources(files: Sequence[str], **settings: Any) -> list[DataSource]:
    return as_sources([{"path": file} | settings for file in files])


def _template(
    folder: str,
    max_length: int | None,
    max_response_length: int | None,
    allow_tokenizer_code: Sequence[str] | None,
    separator: str | None,
    reward_token: str | None,
    add_reward_tokens: bool,
) -> PolarTemplate:
    # What is None is taken from the model's folder, which may store the settings of its training.
    return PolarTemplate.from_pretrained(
        folder,
        allow_tokenizer_code=allow_tokenizer_code or (),
        separator=separator,
        reward_token=reward_token,
        add_missing_tokens=add_reward_tokens or None,
        max_length=max_length,
        max_response_length=max_response_length,
    )


def _console() -> Console:
    return Console(highlight=False)


@contextmanager
def _progress(title: str, paths: Sequence[str]) -> Iterator[OnBytes]:
    """Shows a progress bar over the bytes of the files on standard error, if that is a terminal."""
    sizes = [size_in_bytes(path) for path in paths]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def _show_sides(sides: Sequence[Side]) -> None:
    table = number_table(["", "prompts", "rows", "pairs"])
    prompts = sum(side.prompts for side in sides)
    for side in sides:
        share = f"{side.prompts:,} ({side.prompts / prompts:.1%})"
        table.add_row(escape(printable(str(side.path))), share, f"{side.rows:,}", f"{side.pairs:,}")
        if set(side.subsets) != {None}:
            for name, rows in side.subsets.most_common(SUBSETS_SHOWN):
                table.add_row(f"[dim]  {escape(printable(name or '(none)'))}[/]", "", f"[dim]{rows:,}[/]")
    _console().print(table)
