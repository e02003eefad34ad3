"""`polar-ft score`: rewards of a data set, from running servers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polar_ft.data.reading import MAX_LINE_MB, DataSource, expand
from polar_ft.data.writing import refuse_to_overwrite
from polar_ft.errors import PolarError
from polar_ft.options import (
    AllowTokenizerCode,
    ApiKeyFile,
    Force,
    MaxLength,
    MaxLineMb,
    MaxResponseLength,
    Split,
)

# Between two lines where there is no terminal to draw a bar on.
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_UPDATES = 0.1


def score(
    data: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Rows with prompt, reference and output or candidates, or preference rows: .jsonl, "
            ".jsonl.gz, .parquet, a folder of those, or a HuggingFace data-set id.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The rows with their rewards: .jsonl or .jsonl.gz.")
    ],
    server: Annotated[
        list[str], typer.Option(help="host:port or URL of an engine or of polar-ft serve; may be repeated.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model, for its tokenizer; default: what the server names."
        ),
    ] = None,
    server_type: Annotated[
        Literal["auto", "sglang", "vllm", "lmdeploy"],
        typer.Option(help="What the servers are; auto asks them."),
    ] = "auto",
    max_length: MaxLength = None,
    max_response_length: MaxResponseLength = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="Apply the reward scale of polar-ft calibrate.")
    ] = False,
    force: Force = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Score everything again, whatever an earlier run left.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at each server.")] = 8,
    tokens_per_request: Annotated[int, typer.Option(min=1, help="Tokens of a request at most.")] = 32768,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=1, help="Tries of a request per server.")] = 8,
    check_raw: Annotated[
        bool, typer.Option(help="Insist on evidence that the servers give raw rewards.")
    ] = True,
    api_key_file: ApiKeyFile = None,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
    allow_tokenizer_code: AllowTokenizerCode = None,
) -> None:
    """Rewards of a data set of any size, from running servers; a killed run resumes."""
    # Imported here: `polar-ft --help` starts at once.
    from polar_ft.client.bulk.scoring import score_data_set
    from polar_ft.client.client import RewardModelClient
    from polar_ft.client.served_model import served_model

    expand(data)
    refuse_to_overwrite([out], force=force)
    key = _read_key(api_key_file)
    console = Console(stderr=True, highlight=False)
    with RewardModelClient(
        model or served_model(server[0], key),
        max_length,
        max_response_length,
        server_type=server_type,
        server_address=server,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        tokens_per_request=tokens_per_request,
        concurrency=concurrency,
        check_raw=check_raw,
        scale=scale,
        allow_tokenizer_code=allow_tokenizer_code or (),
    ) as client:
        for address, profile in zip(server, client.servers(), strict=True):
            if profile is not None:  # the client reports one that does not answer
                name = profile.name or "engine unknown"
                console.print(f"{address}: {name}, model {profile.model}", markup=False)
        with _Progress(console) as progress:
            try:
                result = score_data_set(
                    client,
                    DataSource(path=data, split=split, max_line_mb=max_line_mb),
                    out,
                    batches_under_way=2 * concurrency * len(server),
                    restart=restart,
                    scaled=scale,
                    show=progress.show,
                )
            except KeyboardInterrupt:
                console.print("stopped; what is scored is kept, and the same command resumes from there")
                raise typer.Exit(130) from None
    if result.n_resumed:
        console.print(f"{result.n_resumed:,} rows had been scored by an earlier run")
    if result.n_cut:
        template = client.template
        console.print(
            f"warning: {result.n_cut:,} of {result.n_rows:,} rows were cut: they are longer than max_length="
            f"{template.max_length} and max_response_length={template.max_response_length} allow",
            soft_wrap=True,
        )
    typer.echo(f"wrote {result.n_rows:,} rows to {out}")


class _Progress:
    """A bar on a terminal, a line every so often in a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._phase = ""
        self._shown = self._printed = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, phase: str, done: int, total: int | None) -> None:
        """How far it is, in characters; called for every row, so most calls do nothing."""
        now = time.monotonic()
        if phase != self._phase:
            for task in self._bar.task_ids:  # what came before is over
                self._bar.update(task, total=1, completed=1)
            self._phase, self._shown = phase, 0.0
            # What an earlier run has scored is no measure of the speed.
            self._started, self._before = now, done
            self._task = self._bar.add_task(phase, total=total, completed=done)
        if now - self._shown < SECONDS_BETWEEN_UPDATES and done != total:
            return
        self._shown = now
        self._bar.update(self._task, completed=done)
        if not self._console.is_terminal and total and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            share = (done - self._before) / max(1, total - self._before)
            left = (now - self._started) * (1 - share) / share if share else 0.0
            minutes, seconds = divmod(round(left), 60)
            self._console.print(
                f"{phase}: {done / total:.0%}, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
            )


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("POLAR_API_KEY")
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PolarError(f"{file}: cannot be read as an API key ({error})") from error
