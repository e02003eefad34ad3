"""``polar-ft doctor`` and ``polar-ft plan``."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from polar_ft.data.report import many
from polar_ft.doctor.environment import Check, check_environment
from polar_ft.errors import PolarError

if TYPE_CHECKING:
    from polar_ft.doctor.run import Memory

_WIDTH = 100

Gpus = Annotated[int | None, typer.Option(metavar="N", min=1, help="GPUs (data-parallel ranks) of the run.")]
GpuMemory = Annotated[float | None, typer.Option(metavar="GIB", min=1, help="GiB of each GPU.")]
ModelConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="A config.json to take the shapes from, where the model is not on this machine."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")]


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A config to check.")] = None,
    gpus: Gpus = None,
    gpu_memory: GpuMemory = None,
    warmup: Annotated[bool, typer.Option(help="Measure a few packs to estimate the time.")] = True,
    warmup_seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="About how many seconds to measure.")
    ] = 20,
    all_data: Annotated[
        bool, typer.Option("--all-data", help="Look at all rows of data above 32 MB, not at the first.")
    ] = False,
    model_config: ModelConfig = None,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="Run the config's model_resource first; it may make or download the model."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and what a run of CONFIG will take.

    Exits with status 1 if there is a problem: something that would make a run fail.
    """
    console = Console(highlight=False, width=_width())
    checks = check_environment(Path.cwd())
    report: dict[str, Any] = {}
    if not as_json:
        from polar_ft.doctor.tables import show_checks

        console.print("[bold]this machine[/]")
        show_checks(console, checks)
    if config is not None:
        broken = [name for name in ("torch", "transformers", "mmengine") if find_spec(name) is None]
        if broken:
            checks.append(
                Check(
                    name="config",
                    status="problem",
                    found=f"{config} was not looked at: that needs {', '.join(broken)}",
                    advice="pip install '.[train]' -c constraints.txt",
                )
            )
            if not as_json:
                show_checks(console, checks[-1:])
        else:
            report, found = _look_at(
                config,
                console=None if as_json else console,
                gpus=gpus,
                gpu_memory=gpu_memory,
                warmup_seconds=warmup_seconds if warmup else None,
                all_data=all_data,
                model_config=model_config,
                prepare=prepare,
            )
            checks += found
    problems = sum(check.status == "problem" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    if as_json:
        typer.echo(json.dumps({"checks": [check.model_dump() for check in checks], **report}, indent=1))
    else:
        console.print(f"\n{many(problems, 'problem')}, {many(warnings, 'warning')}")
    if problems:
        raise typer.Exit(1)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config.")],
    gpus: Annotated[int, typer.Option(metavar="N", min=1, help="GPUs (data-parallel ranks) of the run.")] = 1,
    gpu_memory: Annotated[float, typer.Option(metavar="GIB", min=1, help="GiB of each GPU.")] = 80,
    host_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", min=1, help="GiB of the machine, for offload.", show_default="not limited"
        ),
    ] = None,
    model_config: ModelConfig = None,
    as_json: AsJson = False,
) -> None:
    """Print which ZeRO stages fit on GPUs, computed from shapes.

    Neither a GPU nor the model is needed.
    """
    with _quiet():
        from polar_ft.doctor.run import GIB, memory_table
        from polar_ft.doctor.settings import read_settings, read_shape

    settings = read_settings(config)
    shape, origin = read_shape(settings, model_config)
    host = None if host_memory is None else int(host_memory * GIB)
    memory = memory_table(
        settings, shape, gpus=gpus, available=int(gpu_memory * GIB), device="cuda", host=host
    )
    memory.notes.insert(0, f"shapes: {origin}")
    if as_json:
        typer.echo(json.dumps(_memory_as_json(memory), indent=1))
        return
    from polar_ft.doctor.tables import show_choice, show_memory

    console = Console(highlight=False, width=_width())
    show_memory(console, memory, gpus, "GPUs" if gpus > 1 else "GPU")
    float32 = settings.lora is None and settings.dtype != "float32"
    show_choice(console, memory, str(config), gpus, float32=float32)


def _look_at(
    config: Path,
    *,
    console: Console | None,
    gpus: int | None,
    gpu_memory: float | None,
    warmup_seconds: float | None,
    all_data: bool,
    model_config: Path | None,
    prepare: bool,
) -> tuple[dict[str, Any], list[Check]]:
    """The findings of a config as JSON, and its checks; shown as they come where there is a console."""
    import psutil
    import torch

    with _quiet():
        from polar_ft.doctor import run, settings, tables
        from polar_ft.training.config import run_model_resource

    try:
        run_settings = settings.read_settings(config)
        if prepare:
            run_model_resource(config, run_settings.base)
        shape, origin = settings.read_shape(run_settings, model_config)
    except PolarError as error:
        check = Check(name="config", status="problem", found=str(error))
        if console is not None:
            tables.show_checks(console, [check])
        return {}, [check]

    on_gpu = torch.cuda.is_available()
    ranks = gpus or _ranks(torch.cuda.device_count() if on_gpu else 1)
    as_gpu = on_gpu or gpu_memory is not None
    host = psutil.virtual_memory().available
    if gpu_memory is not None:
        available = int(gpu_memory * run.GIB)
    elif on_gpu:
        available = min(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    else:  # the processes share the machine
        available = host // ranks
    report: dict[str, Any] = {"config": str(config), "gpus": ranks}
    with run.inspect_data(run_settings, shape["hidden_size"], ranks, everything=all_data) as inspection:
        memory = run.memory_table(
            run_settings,
            shape,
            gpus=ranks,
            available=available,
            device="cuda" if as_gpu else "cpu",
            host=host,
            tokens=inspection.figures.largest_pack if inspection.figures else None,
        )
        memory.notes.insert(0, f"shapes: {origin}")
        checks = [*inspection.checks, *run.check_run(run_settings, memory, on_gpu=as_gpu)]
        report |= {"memory": _memory_as_json(memory)}
        if inspection.figures is not None:
            report["data"] = inspection.figures.model_dump()
        if console is not None:
            console.print(f"\n[bold]{config}[/]", soft_wrap=True)
            tables.show_checks(console, checks)
            if inspection.figures is not None:
                tables.show_data(console, inspection.figures, run_settings.epochs, ranks)
            unit = "GPU" if as_gpu else "process"
            tables.show_memory(
                console, memory, ranks, unit if ranks == 1 else f"{unit}{'s' if as_gpu else 'es'}"
            )
        if warmup_seconds is None:
            return report, checks
        time = run.measure_time(
            run_settings,
            shape,
            inspection,
            memory,
            gpus=ranks,
            device="cuda" if on_gpu else "cpu",
            seconds=warmup_seconds,
        )
        report["time"] = {"not_known": time} if isinstance(time, str) else time.model_dump()
        if console is not None:
            tables.show_time(console, time, ranks)
    return report, checks


def _memory_as_json(memory: Memory) -> dict[str, Any]:
    return {
        "available": memory.available,
        "host": memory.host,
        "tokens": memory.tokens,
        "parameters": memory.size.parameters,
        "trainable": memory.size.trainable,
        "strategies": [
            asdict(found) | {"peak": found.peak, "fits": memory.fits(found)} for found in memory.estimates
        ],
        "notes": memory.notes,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Imports without what DeepSpeed, bitsandbytes and torch print, on standard output among others."""
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _ranks(devices: int) -> int:
    """As many as `polar-ft train` would start here with this environment; else one for each GPU."""
    processes = os.environ.get("NPROC_PER_NODE")
    return int(processes) * int(os.environ.get("NNODES", "1")) if processes else max(1, devices)


def _width() -> int:
    console = Console()
    return min(_WIDTH, console.width) if console.is_terminal else _WIDTH
