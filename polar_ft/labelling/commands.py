"""The commands ``polar-ft label`` and ``polar-ft label report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polar_ft.data.reading import MAX_LINE_MB, DataSource, expand
from polar_ft.data.report import many, show_problems
from polar_ft.data.writing import refuse_to_overwrite
from polar_ft.errors import PolarError
from polar_ft.options import (
    APP_SETTINGS,
    CalledAsTheGroup,
    Device,
    Dtype,
    Force,
    MaxLineMb,
    RunUnlessNamed,
    Split,
)
from polar_ft.serving.commands import (
    AllowUnauthenticated,
    KeyFile,
    address_of,
    is_loopback,
    listen,
    read_api_key,
    serve_until_signal,
)

label_app = typer.Typer(
    cls=RunUnlessNamed,
    help="Compare answers on a page; report how far people agree.",
    **APP_SETTINGS,
)


@label_app.command("run", cls=CalledAsTheGroup, context_settings=APP_SETTINGS["context_settings"])
def label(
    data: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Rows with prompt and candidates, responses, or chosen and rejected."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of decisions; an existing one is continued.")
    ] = Path("labels"),
    repeat: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Share of pairs shown twice, sides swapped.")
    ] = 0.1,
    pairs_per_row: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest number of pairs from one row.")
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(metavar="HF_DIR", help="Reward model: the pairs it is least certain of come first."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The same order, with rewards from a running server; its key in POLAR_API_KEY.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0 takes a free one.")] = 30080,
    api_key_file: KeyFile = None,
    allow_unauthenticated: AllowUnauthenticated = False,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
) -> None:
    """Serve a page on which people compare two answers by keyboard.

    Each labeller's decisions are one file in --out, which training reads; each decision is on the disk before
    the next pair is shown. Rows may be added to IN between two starts.

    polar-ft label report DIR shows how far labellers agree.
    """
    expand(data)
    key = read_api_key(api_key_file)
    listening = listen(host, port, protected=key is not None or allow_unauthenticated)
    try:
        from polar_ft.labelling.app import create_app
        from polar_ft.serving.telemetry import log_as_json
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise PolarError(
            f"the page needs {error.name}; in the clone of polar_ft: pip install '.[serve]'"
        ) from error
    from polar_ft.labelling.pairs import model_scorer, ordered_pairs, read_tasks, server_scorer
    from polar_ft.labelling.store import Store

    console = Console(stderr=True, highlight=False)
    tasks, problems = read_tasks(DataSource(path=data, split=split, max_line_mb=max_line_mb))
    show_problems(console, problems)
    if not tasks:
        raise PolarError(f"{data}: has no row with two different answers to compare")
    score = None
    if server is not None:
        score = server_scorer(server, model)
    elif model is not None:
        score = model_scorer(model, device=device, dtype=dtype)
    if score is not None and not console.is_terminal:
        console.print(f"asking the model about {many(len(tasks), 'row')}")
    with Progress(
        TextColumn("asking the model"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=score is None or not console.is_terminal,
    ) as progress:
        bar = progress.add_task("", total=len(tasks))
        pairs = ordered_pairs(
            tasks, most=pairs_per_row, score=score, on_scored=lambda count: progress.advance(bar, count)
        )
    store = Store(out, pairs, repeat)
    left_out = f", {many(len(problems), 'row')} left out" if problems else ""
    order = "the least certain ones first" if score else "in the order of the rows"
    typer.echo(f"{many(len(pairs), 'pair')} from {many(len(tasks), 'row')}{left_out}, {order}")
    for name, labeller in store.labellers.items():
        done, total = labeller.progress
        typer.echo(f"{name} continues after {done:,} of {total:,}")
    local = is_loopback(listening.getsockname()[0])
    app = create_app(store, api_key=key, loopback_only=local and key is None and not allow_unauthenticated)
    log_as_json()
    typer.echo(f"labelling at {address_of(listening)}, decisions go to {out} (Ctrl-C ends it)")
    serve_until_signal(app, listening)


@label_app.command("report")
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="Folders of decisions, or files of rows with a labeller."),
    ],
    agreed: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write each pair once, as more than half of its labellers decided."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
    force: Force = False,
) -> None:
    """Report how far labellers agree, with each other and with themselves, and whether they favour a side."""
    from polar_ft.labelling.decisions import read_decisions
    from polar_ft.labelling.report import report_on, show, write_agreed

    if agreed is not None:
        refuse_to_overwrite([agreed], force=force)
        folder = next((path for path in paths if path.resolve() == agreed.resolve().parent), None)
        if folder is not None:
            raise PolarError(
                f"{agreed}: in this folder it would be read as the decisions of one more labeller; write it "
                f"outside {folder}"
            )
    decisions = read_decisions(paths)
    result = report_on(decisions)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        show(Console(highlight=False), result)
    if agreed is not None:
        written, left_out = write_agreed(decisions, agreed)
        Console(stderr=True, highlight=False).print(
            f"{agreed}: {many(written, 'pair')}, {left_out:,} left out as no answer has the majority",
            markup=False,
            soft_wrap=True,
        )
