"""`polar-ft score`: scores a data set with running servers."""

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
from polar_ft.files import first_line
from polar_ft.options import (
    AllowTokenizerCode,
    ApiKeyFile,
    Force,
    MaxLength,
    MaxLineMb,
    MaxResponseLength,
    Split,
)

# Between two lines of progress where there is no terminal.
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_UPDATES = 0.1


def score(
    data: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Rows with prompt, reference and output or candidates, or preference rows: JSON lines, a "
            "table, Parquet, a folder, or a HuggingFace data-set id.",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The rows with their rewards: .jsonl or .jsonl.gz.")
    ],
    server: Annotated[
        list[str],
        typer.Option(
            metavar="HOST:PORT", help="Address or URL of an engine or of polar-ft serve; may be repeated."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="HF_DIR",
            help="Folder or hub id of the model, for its tokenizer.",
            show_default="where the server has it from",
        ),
    ] = None,
    server_type: Annotated[
        Literal["auto", "sglang", "vllm", "lmdeploy", "sglang-mis"],
        typer.Option(
            metavar="ENGINE", help="auto, sglang, vllm, lmdeploy or sglang-mis; auto asks the servers."
        ),
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
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests in progress at each server.")
    ] = 8,
    tokens_per_request: Annotated[
        int, typer.Option(metavar="TOKENS", min=1, help="Most tokens in a request.")
    ] = 32768,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds that one request may take.")] = 120.0,
    max_retries: Annotated[int, typer.Option(metavar="N", min=1, help="Tries of a request per server.")] = 8,
    check_raw: Annotated[
        bool, typer.Option(help="Require evidence that the servers give raw rewards.")
    ] = True,
    api_key_file: ApiKeyFile = None,
    split: Split = "train",
    max_line_mb: MaxLineMb = MAX_LINE_MB,
    allow_tokenizer_code: AllowTokenizerCode = None,
) -> None:
    """Score a data set with running servers.

    It may be of any size; an interrupted run resumes with the same command.
    """
    # Imported here, so that `polar-ft --help` starts at once.
    from polar_ft.client.bulk.scoring import score_data_set
    from polar_ft.client.client import RewardModelClient

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
    """A bar on a terminal; else a line now and then, for a log file."""

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
        """Shows the progress, in characters; called for every row, so most calls do nothing."""
        now = time.monotonic()
        if phase != self._phase:
            for task in self._bar.task_ids:  # the phase before has ended
                self._bar.update(task, total=1, completed=1)
            self._phase, self._shown = phase, 0.0
            # What an earlier run has scored must not count as speed of this run.
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


def served_model(address: str, api_key: str | None = None) -> str:
    """Asks a server for the folder or hub id from which it loaded its model.

    Args:
        address: ``host:port`` or a URL.
        api_key: As `RewardModelClient` takes it.

    Raises:
        RewardServerError: The server does not answer.
        PolarError: It does not say, or the folder is not on this machine.
    """
    import httpx

    from polar_ft.client.client import clean_api_key
    from polar_ft.client.contact import first_card, refusal
    from polar_ft.client.errors import RewardServerError
    from polar_ft.client.servers import parse_addresses
    from polar_ft.client.transport import CONNECT_SECONDS, NO_PROXY

    name, url = parse_addresses(address)[0]
    key = clean_api_key(api_key)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(headers=headers, timeout=CONNECT_SECONDS, mounts=NO_PROXY) as http:
            response = http.get(f"{url}/v1/models")
    except httpx.HTTPError as error:
        raise RewardServerError(name, f"no connection, or it broke off ({first_line(error)})") from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code in (401, 403):
        raise RewardServerError(name, refusal(response.status_code, answer), response.status_code)
    path = first_card(answer).get("root")
    if not isinstance(path, str) or not path:
        raise PolarError(f"{name}: does not say where its model is; name the model's folder with --model")
    if os.path.isabs(path) and not os.path.isdir(path):
        raise PolarError(
            f"{name}: has its model in {path}, which is not on this machine; name a folder here with --model"
        )
    return path


def _read_key(file: Path | None) -> str | None:
    if file is None:
        return None  # the client reads POLAR_API_KEY
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PolarError(f"{file}: cannot be read as an API key ({error})") from error
