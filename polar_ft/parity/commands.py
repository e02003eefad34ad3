"""`polar-ft parity`: does every way to a reward give the same reward?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.errors import PolarError
from polar_ft.options import AllowTokenizerCode, ApiKeyFile, Device, Dtype, ModelFolder
from polar_ft.parity.report import ParityReport
from polar_ft.reward_scale import ENGINE_TOLERANCES


def parity(
    model: ModelFolder,
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ENGINE=]HOST:PORT",
            help="A running engine that serves the model; ENGINE is sglang, vllm or lmdeploy, and "
            "found out where it is left out; sglang-mis compares multi-item scoring, and single requests to "
            "the same server. May be repeated.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Also score with transformers and the Python files of HF_DIR: read those first.",
        ),
    ] = False,
    api_key_file: ApiKeyFile = None,
    inputs: Annotated[int, typer.Option(metavar="N", min=1, help="Inputs, each with four candidates.")] = 55,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Longest sequence.", show_default="2048, or the model's if lower"
        ),
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Longest response.", show_default="512, or the model's if lower"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Largest difference that is not an error.",
            show_default="root mean square of the rewards times "
            + ", ".join(f"{value:g} in {name}" for name, value in ENGINE_TOLERANCES.items()),
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    allow_tokenizer_code: AllowTokenizerCode = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check that scorer, training, transformers and engines agree.

    They score the same inputs. Exits with status 1 where one of them is beyond the tolerance, or cannot be
    asked.
    """
    # Imported here: `polar-ft --help` needs no torch.
    from polar_ft.parity.measure import measure_parity

    stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    report = measure_parity(
        model,
        servers=server or (),
        api_key=_api_key(api_key_file),
        trust_remote_code=trust_remote_code,
        n_inputs=inputs,
        max_length=max_length,
        max_response_length=max_response_length,
        tolerance=tolerance,
        device=device,
        dtype=dtype,
        allow_tokenizer_code=allow_tokenizer_code or (),
        on_way=lambda name: stderr.print(f"scoring: {name}"),
    )
    if json_:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, Console(highlight=False))
    if not report.ok:
        raise typer.Exit(1)


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return None  # the client looks into POLAR_API_KEY by itself
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PolarError(f"--api-key-file {file}: cannot be read ({error.strerror})") from error


def show(report: ParityReport, console: Console) -> None:
    """Prints the differences: a row a way, a column a length class."""
    console.print(
        f"{report.n_texts} texts of {report.n_inputs} inputs, at most {report.max_length} tokens, responses "
        f"{report.max_response_length}; scorer, training code and transformers in {report.dtype} on "
        f"{report.device}; rewards {report.min_reward:.4g} to {report.max_reward:.4g}, root mean square "
        f"{report.rms_reward:.4g}",
        markup=False,
    )
    scored = [way for way in report.comparisons if way.lengths]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("largest difference\nfrom the scorer")
    ends = [length.up_to for length in scored[0].lengths] if scored else []
    for end in ends:
        table.add_column("longer" if end is None else f"≤ {end}\ntokens", justify="right")
    for header in ("all", "order\nchanges", "allowed", ""):
        table.add_column(header, justify="right")
    for way in scored:
        table.add_row(
            escape(way.name),
            *(_number(length.max_abs_diff) for length in way.lengths),
            _number(way.max_abs_diff),
            f"{way.n_order_changes}/{way.n_pairs}",
            "" if way.tolerance is None else f"{way.tolerance:.1e}",
            "" if way.tolerance is None else "[green]ok" if way.ok else "[red]beyond",
        )
    console.print(table)
    for line in _notes(report):
        console.print(line, soft_wrap=True)


def _notes(report: ParityReport) -> list[str]:
    lines = []
    for way in report.comparisons:
        name = escape(way.name)
        if way.error:
            lines.append(f"[red]failed:[/] {name}: {escape(way.error)}")
        if not way.ok and way.worst:
            worst = way.worst
            lines.append(
                f"[red]beyond:[/] {name}: worst is input {worst.input} ({worst.kind}), candidate "
                f"{worst.candidate}, {worst.tokens} tokens: {worst.found:.6g} instead of {worst.expected:.6g}"
            )
        if way.note:
            lines.append(f"{name}: {escape(way.note)}")
    lines += [f"[yellow]warning:[/] {escape(warning)}" for warning in report.warnings]
    return lines


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
