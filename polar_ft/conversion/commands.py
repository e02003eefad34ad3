"""The command that converts a checkpoint: ``polar-ft convert`` and ``tools/pth_to_hf.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from polar_ft.errors import PolarError

if TYPE_CHECKING:
    from polar_ft.conversion.verify import Verification


def convert(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|HF_DIR",
            help="Config of the run; with --as also an exported model, and then no CHECKPOINT follows.",
        ),
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="iter_N.pth (a file or a DeepSpeed folder), best or last."),
    ],
    out_dir: Annotated[
        Path | None,
        typer.Argument(metavar="OUT_DIR", help="HuggingFace folder to write.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="float32, bfloat16 or float16.", show_default="that of the training"
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT_DIR if it is a model folder.")] = False,
    family: Annotated[
        Literal["llama"] | None,
        typer.Option(
            "--as",
            metavar="FAMILY",
            help="llama: write an InternLM2 model as LlamaForSequenceClassification, which transformers and "
            "engines load without code from the folder.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only", help="Of a LoRA run write the adapters and the head, not the merged model."
        ),
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS",
            help="Rows, as for training: the first 32 are scored before and after the conversion, in "
            "float32; if the rewards differ, nothing is kept.",
        ),
    ] = None,
    verify_tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            help="Largest difference, as a share of the range of the rewards.",
            show_default="0.0001 for float32, 0.01 for float16, 0.05 for bfloat16",
        ),
    ] = None,
    allow_tokenizer_code: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="Name of a tokenizer class whose code in the folder may be run, as in the shipped configs.",
        ),
    ] = None,
) -> None:
    """Convert a saved checkpoint to a HuggingFace folder.

    With --as llama also an exported model: polar-ft convert HF_DIR OUT_DIR --as llama.
    """
    if out_dir is None and (family is None or adapter_only or Path(config).is_file()):
        raise PolarError(
            f"{config} {checkpoint}: OUT_DIR is missing; give CONFIG CHECKPOINT OUT_DIR, or for an exported "
            f"model HF_DIR OUT_DIR --as llama"
        )
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TimeElapsedColumn())
    verified: list[Verification] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=None)

        def on_written(done: int, total: int) -> None:
            progress.update(task, description="writing", completed=done, total=total)

        from polar_ft.conversion.convert import convert_checkpoint, convert_folder

        options: dict[str, Any] = dict(
            dtype=dtype,
            max_shard_size=max_shard_size,
            force=force,
            verify=verify,
            verify_tolerance=verify_tolerance,
            allow_tokenizer_code=allow_tokenizer_code or (),
            on_written=on_written,
            on_verified=verified.append,
        )
        if out_dir is None:
            out_dir = Path(checkpoint)
            written = convert_folder(config, out_dir, **options)
        else:
            written = convert_checkpoint(
                Path(config),
                Path(checkpoint),
                out_dir,
                adapter_only=adapter_only,
                as_llama=family == "llama",
                **options,
            )
    size = sum(file.stat().st_size for file in out_dir.glob("*.safetensors"))
    typer.echo(
        f"{out_dir}: written in {str(written).removeprefix('torch.')}, {size / 1e6:,.1f} MB of weights"
    )
    for outcome in verified:
        typer.echo(f"verified: {outcome}")
    typer.echo(f"next: polar-ft eval {out_dir} held_out.jsonl")
