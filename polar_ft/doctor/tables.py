"""The findings on a terminal of 100 columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.data.report import many
from polar_ft.doctor.environment import GIB, Check

if TYPE_CHECKING:  # those import torch, which what is shown of a machine must not need
    from polar_ft.doctor.memory import Estimate
    from polar_ft.doctor.run import DataFigures, Memory, TimeFigures

NAMES = {"none": "none", "zero1": "1", "zero2": "2", "zero3": "3", "zero3_offload": "3 + offload"}
_STYLES = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}

# See docs/doctor.md.
MEASURED = (
    "error against measured peaks: -9% to +3% with 48M parameters on CPUs (docs/doctor.md); not measured on "
    "a GPU"
)


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """One line a check, and under it what to do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        advice = f"\n[bold]→[/] {escape(check.advice)}" if check.advice else ""
        table.add_row(_STYLES[check.status], escape(check.name), escape(check.found) + advice)
    console.print(table)


def show_data(console: Console, data: DataFigures, epochs: int, gpus: int) -> None:
    """Steps, tokens and truncation."""
    console.print(f"\n[bold]the run[/] on {many(gpus, 'rank')}")
    about = "about " if data.sampled_rows is not None else ""
    if data.sampled_rows is not None:
        console.print(
            f"from a sample, the first {data.sampled_rows:,} rows, scaled to all data by bytes "
            f"(--all-data looks at all of it)"
        )
    console.print(
        f"{about}{many(data.rows, 'row')}, {many(data.pairs, 'pair')}; "
        f"{data.steps_per_epoch:,} optimizer steps an "
        f"epoch, {data.steps_per_epoch * epochs:,} in all"
    )
    if data.tokens is not None:
        console.print(f"{about}{data.tokens:,} tokens to compute in an epoch")
    for line in data.lines:
        console.print(line)


def show_memory(console: Console, memory: Memory, gpus: int, unit: str) -> None:
    """The table of ZeRO stages, in GiB on each GPU."""
    console.print(
        f"\n[bold]memory on {f'each of {gpus}' if gpus > 1 else 'one'} {unit}[/], in GiB; "
        f"{memory.available / GIB:.1f} are there"
        + (f", and {memory.host / GIB:.1f} on the machine" if memory.host and memory.device == "cuda" else "")
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("ZeRO", header_style="dim", no_wrap=True)
    for column in "weights grads optim. buffers activ. update peak recomp. host fits".split():
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    for found in memory.estimates:
        table.add_row(*_row(memory, found))
    console.print(table)
    reserved = memory.estimates[0].reserved
    console.print(
        "peak: the larger of backward (weights to activ., the activations) and update (while the optimizer "
        "runs)"
        + (f", and {reserved / GIB:.0f} for CUDA and NCCL" if reserved else "")
        + "; recomp.: layers whose activations are computed again; host: in the machine's memory, for all",
        style="dim",
    )
    for note in memory.notes:
        console.print(note, style="dim")
    console.print(MEASURED, style="dim")


def _row(memory: Memory, found: Estimate) -> list[str]:
    parts = [found.weights, found.gradients, found.optimizer, found.buffers, found.activations, found.update]
    fits = memory.fits(found)
    return [
        NAMES[found.strategy],
        *(gib(part) for part in parts),
        f"[bold]{gib(found.peak)}[/]",
        f"{found.recomputed_layers}/{memory.size.layers}",
        gib(found.host) if found.host else "",
        "[green]yes[/]" if fits else "[red]no[/]",
    ]


def show_choice(console: Console, memory: Memory, config: str, gpus: int, *, float32: bool) -> None:
    """The first strategy that fits: each exchanges more than the one before.

    Args:
        console: Where to.
        memory: The table.
        config: How the user calls the config.
        gpus: Data-parallel ranks.
        float32: Whether the config has to be changed to float32 for training without DeepSpeed.
    """
    fitting = [found.strategy for found in memory.estimates if memory.fits(found)]
    if not fitting:
        console.print(
            "[red]nothing fits[/]: lower max_packed_length, train adapters (lora = dict(r=64, alpha=128) in "
            "the config), or take more or larger GPUs"
            + (", or more memory in the machine" if memory.host is not None else "")
        )
        return
    start = f"NPROC_PER_NODE={gpus} " if gpus > 1 else ""
    host = next(found.host for found in memory.estimates if found.strategy == fitting[0])
    option = "" if fitting[0] == "none" else f" --deepspeed deepspeed_{fitting[0]}"
    console.print(
        f"the first that fits exchanges the least: [bold]{start}polar-ft train {escape(config)}{option}[/]"
        + (' (with torch_dtype="float32")' if fitting[0] == "none" and float32 else "")
        + (f"; it needs {gib(host)} GiB of the machine's memory as well" if host else ""),
        soft_wrap=True,
    )


def show_time(console: Console, time: TimeFigures | str, gpus: int) -> None:
    """Estimated time, and the measured peak next to its estimate."""
    if isinstance(time, str):
        console.print(f"\n[bold]time[/]: not known; no warm-up, as {escape(time)}")
        return
    warmup = time.warmup
    more = "" if gpus == 1 else "; exchange between GPUs is not counted"
    console.print(
        f"\n[bold]time[/]: about {duration(time.seconds)} to train without DeepSpeed; start, validation and "
        f"saving are not counted{more}"
    )
    console.print(
        f"measured: {warmup.packs} packs of {warmup.tokens:,} tokens, {1 / warmup.seconds_per_cost:,.0f} "
        f"tokens a second, attention counted in, {warmup.update_seconds:.2f} s an update; random weights of "
        "this shape",
        style="dim",
    )
    if time.load is not None:
        console.print(
            f"with {many(warmup.threads, 'thread')} on {os.cpu_count()} cores, of which other processes used "
            f"about {time.load:.1f}: with another load the time is another",
            style="dim",
        )
    against = ""
    if time.estimated_peak is not None:
        error = time.estimated_peak / warmup.peak - 1
        against = f"; the estimate for that is {gib(time.estimated_peak)}: {error:+.0%}"
    console.print(f"measured peak of memory: {gib(warmup.peak)} GiB{against}", style="dim")


def gib(count: int) -> str:
    """Bytes in GiB, with two digits below ten.

    >>> gib(0), gib(1), gib(2**27), gib(3 * 2**30), gib(100 * 2**30)
    ('0', '<0.01', '0.12', '3.0', '100')
    """
    value = count / GIB
    if not count or value >= 100:
        return f"{value:.0f}"
    if value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """A time as one would say it.

    >>> duration(40), duration(600), duration(9000)
    ('40 s', '10 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
