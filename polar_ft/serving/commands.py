"""The command ``polar-ft serve``."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from polar_ft.data.answers import Thinking
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.options import AllowTokenizerCode, Device, Dtype, MaxLength, MaxResponseLength, ModelFolder

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY_VARIABLE = "POLAR_API_KEY"

KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=f"File with the API key that clients must send; or set {KEY_VARIABLE}."
    ),
]
AllowUnauthenticated = Annotated[
    bool,
    typer.Option("--allow-unauthenticated", help="Accept requests from other machines without an API key."),
]


def serve(
    model: ModelFolder,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0 takes a free one.")] = 30000,
    api_key_file: KeyFile = None,
    allow_unauthenticated: AllowUnauthenticated = False,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name for clients.", show_default="its folder's"),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=1,
            help="Most tokens in one forward pass; with fewer, short requests wait less.",
        ),
    ] = 16384,
    max_length: MaxLength = None,
    max_response_length: MaxResponseLength = None,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most requests at a time; more get status 429.")
    ] = 1024,
    max_queue_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=1, help="Most tokens that wait; more get status 429, or 413 in one request."
        ),
    ] = 2**22,
    max_request_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=1, help="Most tokens of all sequences of a request; more get status 413."
        ),
    ] = 2**20,
    max_body_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            min=0.001,
            help="Largest body of a request, in MB.",
            show_default="8 bytes for each of --max-request-tokens",
        ),
    ] = None,
    max_memory_mb: Annotated[
        float,
        typer.Option(
            metavar="MB", min=1, help="Memory for bodies and tokens of all requests; more get status 429."
        ),
    ] = 256,
    max_connections: Annotated[int, typer.Option(metavar="N", min=1, help="Most open connections.")] = 1024,
    max_per_address: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most open connections of one address.",
            show_default="half of them; on this machine alone all",
        ),
    ] = None,
    read_timeout: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.1, help="Seconds for a header; for a body as many, and 1 more for each 64 kB."
        ),
    ] = 10,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.1, help="Seconds until a request that is not answered gets status 504."
        ),
    ] = 600,
    pooling_format: Annotated[
        Literal["vllm", "lmdeploy"],
        typer.Option(help="Format of answers of /pooling where the request does not determine it."),
    ] = "vllm",
    think_start: Annotated[
        str, typer.Option(metavar="TAG", help="Opening tag of thoughts in outputs that RL frameworks send.")
    ] = "<think>",
    think_end: Annotated[str, typer.Option(metavar="TAG", help="Closing tag.")] = "</think>",
    think_in_prompt: Annotated[
        bool,
        typer.Option(
            "--think-in-prompt",
            help="Prompts end with the opening tag, which the framework does not send with them.",
        ),
    ] = False,
    allow_tokenizer_code: AllowTokenizerCode = None,
) -> None:
    """Serve a reward model over HTTP, with a page to try it.

    In the formats of SGLang, vLLM and LMDeploy, as POST /v1/rewards for plain texts, and in the formats in
    which OpenRLHF and slime ask for the rewards of a policy's outputs.
    """
    # Otherwise OpenMP's threads spin between forward passes, on the cores that answer clients.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, below
    if not (think_start and think_end):
        raise PolarError(
            "--think-start, --think-end: a tag is not empty; leave them out if there are no thoughts"
        )
    key = read_api_key(api_key_file)
    listening = listen(host, port, protected=key is not None or allow_unauthenticated)
    read_json(resolve_folder(model) / "config.json")  # a wrong folder is found before torch is imported
    try:
        from polar_ft.model.imports import import_decoders

        import_decoders()
        from polar_ft.scoring.scorer import RewardScorer
        from polar_ft.serving.app import create_app
        from polar_ft.serving.limits import Limits
        from polar_ft.serving.telemetry import log_as_json, note
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise PolarError(
            f"serving needs {error.name}; in the clone of polar_ft: pip install '.[train,serve]'"
        ) from error

    scorer = RewardScorer.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        tokens_per_batch=batch_tokens,
        max_length=max_length,
        max_response_length=max_response_length,
        allow_tokenizer_code=tuple(allow_tokenizer_code or ()),
    )
    # The first forward allocates and compiles, for which no client should wait.
    scorer.score({"prompt": "warm", "reference": "up", "output": "."})
    # Python would visit the million objects of the libraries again and again while it reads large bodies.
    gc.collect()
    gc.freeze()

    local = is_loopback(listening.getsockname()[0])
    if max_per_address is None and not local:  # on this machine all clients have one address
        max_per_address = max(1, max_connections // 2)
    app = create_app(
        scorer,
        name=name or Path(model).resolve().name,
        limits=Limits(
            max_body=None if max_body_mb is None else int(max_body_mb * 2**20),
            max_requests=max_requests,
            max_request_tokens=max_request_tokens,
            max_queue_tokens=max_queue_tokens,
            max_memory=int(max_memory_mb * 2**20),
            max_connections=max_connections,
            max_connections_per_address=max_per_address,
            read_timeout=read_timeout,
            timeout=timeout,
        ),
        api_key=key,
        loopback_only=local and key is None and not allow_unauthenticated,
        pooling_format=pooling_format,
        thinking=Thinking(think_start, think_end, opened_by_prompt=think_in_prompt),
    )
    log_as_json()
    address = address_of(listening)
    typer.echo(f"serving {model} at {address} (a page to try it; Ctrl-C ends it)")
    note("ready", address=address, device=str(scorer.device), dtype=str(scorer.dtype).removeprefix("torch."))
    serve_until_signal(app, listening)


def serve_until_signal(app: FastAPI, listening: socket.socket) -> NoReturn:
    """Serves until SIGINT or SIGTERM, answers what has arrived, and ends the process."""
    from polar_ft.serving.connections import HttpServer

    # uvicorn raises the signals that it got again when it has answered everything.
    got: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _: got.append(signum))
    HttpServer(app).run(sockets=[listening])
    sys.stdout.flush()
    sys.stderr.flush()
    # All is answered and closed. Python's own end takes seconds, to unload torch.
    os._exit(128 + signal.SIGINT if signal.SIGINT in got else 0)


def read_api_key(file: Path | None) -> str | None:
    """The key from the file, else from the environment; not from the command line, which others can see."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        source = f"the environment variable {KEY_VARIABLE}"
        if key is None:
            return None
    else:
        source = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolarError(f"{source}: cannot be read ({error})") from error
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise PolarError(f"{source}: a key is one word of printable ASCII characters")
    return key


def listen(host: str, port: int, *, protected: bool) -> socket.socket:
    """Opens a listening socket, before minutes are spent on loading the model."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        if not protected and not is_loopback(str(address[0])):
            raise PolarError(
                f"--host {host}: other machines could reach the server, and no API key is set; "
                f"give --api-key-file FILE, set {KEY_VARIABLE}, or say --allow-unauthenticated"
            )
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise PolarError(
            f"--host {host} --port {port}: {error.strerror or error}; name another one, or --port 0 for any "
            f"free port"
        ) from error
    return listening


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_of(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
