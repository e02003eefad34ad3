"""What a run will take, before it begins: memory by ZeRO stage, steps, tokens, truncation, time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from pydantic import BaseModel

from polar_ft.data.reading import DataSource, as_sources, expand, read_examples, size_in_bytes
from polar_ft.data.tokenized import TokenizedGroups
from polar_ft.doctor.environment import Check
from polar_ft.doctor.memory import (
    GIB,
    STRATEGIES,
    Activations,
    Estimate,
    ModelSize,
    estimate,
    layer_activations,
    model_size,
)
from polar_ft.doctor.settings import RunSettings, model_folder
from polar_ft.doctor.warmup import Request, Warmup, measure
from polar_ft.errors import DataError, PolarError
from polar_ft.template import PolarTemplate
from polar_ft.training.data import build_reward_dataset

# Larger data is tokenized completely only with --all-data; else this many rows are.
WHOLE_BYTES = 32 * 2**20
SAMPLE_ROWS = 2000


class DataFigures(BaseModel):
    """Figures of the data; those of a sample are scaled to all data by bytes.

    Attributes:
        rows: Rows of the data.
        pairs: Pairs that are trained on.
        sampled_rows: Rows that were looked at; None where it was all of them.
        steps_per_epoch: Optimizer steps.
        tokens: Tokens computed in an epoch; None without a tokenizer, like all that follows.
        largest_pack: Tokens.
        cost: Of an epoch, in units of one token (`polar_ft.data.step_plan.Piece`).
        lines: What is cut and left out, and what the plan achieves, in words.
    """

    rows: int
    pairs: int
    sampled_rows: int | None
    steps_per_epoch: int
    tokens: int | None = None
    largest_pack: int | None = None
    cost: float | None = None
    lines: list[str] = []


@dataclass
class Inspection:
    """Figures of the data, and where its tokens are while they are needed."""

    figures: DataFigures | None
    checks: list[Check]
    groups: TokenizedGroups | None = None
    plan: dict[str, Any] | None = None


@contextmanager
def inspect_data(
    settings: RunSettings, hidden_size: int, gpus: int, *, everything: bool
) -> Iterator[Inspection]:
    """Reads and tokenizes the data of a run, or a sample of it.

    Small data is tokenized completely, where training will look for it; of large data the first rows of every
    source are, and thrown away afterwards.

    Args:
        settings: Of the run.
        hidden_size: Of the model.
        gpus: Data-parallel ranks.
        everything: Tokenize large data completely too.
    """
    folder = model_folder(settings)
    try:
        sources = as_sources(settings.train["data"])
        sizes = [size_in_bytes(source.path) for source in sources]
    except PolarError as error:
        yield Inspection(None, [_problem("data", error, "correct `data` in the config")])
        return
    whole = everything or sum(size if size is not None else WHOLE_BYTES + 1 for size in sizes) <= WHOLE_BYTES
    with tempfile.TemporaryDirectory(prefix="polar_ft_") as scratch:
        try:
            inspection = _inspected(settings, sources, folder, hidden_size, gpus, whole, Path(scratch))
        except DataError as error:
            advice = "`polar-ft data check` names every bad row"
            inspection = Inspection(None, [_problem("data", error, advice)])
        except PolarError as error:
            inspection = Inspection(None, [_problem("data", error, "correct the data or the setting")])
        yield inspection


def _inspected(
    settings: RunSettings,
    sources: list[DataSource],
    folder: Path | None,
    hidden_size: int,
    gpus: int,
    whole: bool,
    scratch: Path,
) -> Inspection:
    train = settings.train
    parts = sources if whole else [_first_rows(source, -(-SAMPLE_ROWS // len(sources))) for source in sources]
    scale = 1.0 if whole else _scale(sources, parts)

    def steps(pairs: int) -> int:
        return max(1, round(pairs * scale / train["global_batch_pairs"]))

    if folder is None:
        rows, pairs = _count(parts)
        figures = DataFigures(
            rows=round(rows * scale),
            pairs=round(pairs * scale),
            sampled_rows=None if whole else rows,
            steps_per_epoch=steps(pairs),
        )
        check = Check(
            name="tokenizer",
            status="warning",
            found=f"{settings.base} is not on this machine",
            advice="tokens, truncation and time are not known; download the model first",
        )
        return Inspection(figures, [check])
    dataset = build_reward_dataset(
        **{name: value for name, value in train.items() if name != "type"}
        | dict(
            data=parts, tokenizer=_template(train["tokenizer"], folder), ranks=gpus, hidden_size=hidden_size
        )
        | ({} if whole else dict(cache_dir=scratch)),
    )
    groups, plan = dataset.groups, dataset.plan
    achieved, summary = plan.describe(), groups.summary
    figures = DataFigures(
        rows=round(summary.rows * scale),
        pairs=round(summary.pairs * scale),
        sampled_rows=None if whole else summary.rows,
        steps_per_epoch=plan.steps_per_epoch if whole else steps(summary.pairs),
        tokens=round(float(plan.tokens.sum()) * scale),
        largest_pack=achieved.largest_pack,
        cost=float(plan.costs.sum()) * scale,
        lines=[*summary.lines()[1:], *(achieved.lines()[1:])],
    )
    return Inspection(figures, [], groups, plan.arguments)


def _template(tokenizer: dict[str, Any], folder: Path) -> PolarTemplate:
    arguments = {k: v for k, v in tokenizer.items() if k not in ("type", "pretrained_model_name_or_path")}
    return PolarTemplate.from_pretrained(folder, **arguments)


def _first_rows(source: DataSource, rows: int) -> DataSource:
    return source.model_copy(update={"max_samples": min(rows, source.max_samples or rows)})


def _scale(sources: list[DataSource], parts: list[DataSource]) -> float:
    """Rows of the data for each row of the sample, from the bytes that the sample's rows take."""
    wanted = sampled = 0.0
    for source, part in zip(sources, parts, strict=True):
        taken: list[int] = []
        examples = read_examples([source], on_problem=lambda problem: None, on_bytes=taken.append)
        rows = sum(1 for _ in islice(examples, part.max_samples))
        total = size_in_bytes(source.path)
        if total is None or not sum(taken):  # a data set of the hub does not say; the sample stands for it
            total, taken = 1, [1]
        estimated = rows * total / sum(taken)
        wanted += min(estimated, source.max_samples or estimated)
        sampled += rows
    return max(1.0, wanted / sampled) if sampled else 1.0


def _count(sources: list[DataSource]) -> tuple[int, int]:
    rows = pairs = 0
    for example in read_examples(sources):
        rows, pairs = rows + 1, pairs + len(example.pairs)
    return rows, pairs


def _problem(name: str, error: PolarError, advice: str) -> Check:
    return Check(name=name, status="problem", found=str(error), advice=advice)


@dataclass(frozen=True)
class Memory:
    """The table of ZeRO stages.

    Attributes:
        size: Of the model.
        tokens: Of the pack that activations are of.
        estimates: One for each of `STRATEGIES`.
        available: Bytes of each GPU, or of this machine for each process.
        host: Bytes of the machine's memory, for all processes; None is not known and limits nothing.
        gpus: Data-parallel ranks; all of them on one machine.
        device: "cuda" or "cpu"; on a CPU device and host are one.
        refused: Strategies that training refuses, and why.
        notes: How the figures were made.
    """

    size: ModelSize
    tokens: int
    estimates: list[Estimate]
    available: int
    host: int | None
    gpus: int
    device: Literal["cuda", "cpu"]
    refused: dict[str, str]
    notes: list[str]

    def fits(self, found: Estimate) -> bool:
        """Whether it can be used, and its peaks are within what is there, on each GPU and on the machine."""
        host = found.host + (self.gpus * found.peak if self.device == "cpu" else 0)
        return (
            found.strategy not in self.refused
            and found.peak <= self.available
            and (self.host is None or host <= self.host)
        )


def memory_table(
    settings: RunSettings,
    hf_config: dict[str, Any],
    *,
    gpus: int,
    available: int,
    device: Literal["cuda", "cpu"],
    host: int | None = None,
    tokens: int | None = None,
) -> Memory:
    """Estimates every strategy.

    Args:
        settings: Of the run.
        hf_config: Shapes of the model.
        gpus: Data-parallel ranks.
        available: Bytes of each GPU.
        device: What it runs on.
        host: Bytes of the machine's memory; None does not limit.
        tokens: Of the largest pack; None takes ``max_packed_length``.
    """
    size = model_size(hf_config, settings.lora)
    tokens = tokens or settings.max_packed_length
    # Without DeepSpeed, polar_ft trains full weights in float32 only.
    plain_dtype = torch.float32 if settings.lora is None else getattr(torch, settings.dtype)
    by_dtype = {
        dtype: layer_activations(hf_config, dtype, settings.lora) for dtype in {plain_dtype, torch.bfloat16}
    }
    estimates = []
    for strategy in STRATEGIES:
        dtype = plain_dtype if strategy == "none" else torch.bfloat16
        activations = Activations.of_model(
            size, tokens, by_dtype[dtype], dtype.itemsize, settings.checkpointing
        )
        estimates.append(
            estimate(
                strategy,
                size,
                activations,
                gpus=gpus,
                available=available,
                device=device,
                base_bytes=plain_dtype.itemsize,
                autocast=settings.autocast,
            )
        )
    layer = " and ".join(
        f"{count:,} in {str(dtype).removeprefix('torch.')}"
        for dtype, count in sorted(by_dtype.items(), key=str)
    )
    notes = [
        f"weights, gradients, optimizer: counted from shapes, {size.parameters:,} parameters"
        + (f", {size.trainable:,} of them trained" if size.trainable < size.parameters else ""),
        f"activations: a layer keeps {layer} bytes a token, measured on one layer of this shape on the CPU; "
        f"a pack of {tokens:,} tokens; as many layers computed again as training would choose",
    ]
    refused = {}
    if settings.lora is not None and settings.lora.load_in_4bit:
        refused = dict.fromkeys(("zero3", "zero3_offload"), "ZeRO-3 cannot divide weights of four bits")
        notes.insert(0, "QLoRA does not work with ZeRO-3, which cannot divide weights of four bits")
    return Memory(size, tokens, estimates, available, host, gpus, device, refused, notes)


class TimeFigures(BaseModel):
    """How long a run takes, from a warm-up.

    Attributes:
        warmup: What was measured.
        seconds: Of the run.
        load: Cores that other processes used before the warm-up; None on a GPU.
        estimated_peak: Bytes that the estimate gives for what the warm-up computed; None where the two are
            not the same thing.
    """

    warmup: Warmup
    seconds: float
    load: float | None
    estimated_peak: int | None


def measure_time(
    settings: RunSettings,
    hf_config: dict[str, Any],
    inspection: Inspection,
    memory: Memory,
    *,
    gpus: int,
    device: Literal["cuda", "cpu"],
    seconds: float,
) -> TimeFigures | str:
    """Measures a few packs and scales them to the run; returns why not where that is not possible."""
    figures = inspection.figures
    if inspection.groups is None or inspection.plan is None or figures is None or figures.cost is None:
        return "there are no tokens to compute"
    dtype = getattr(torch, settings.dtype)
    size = memory.size
    held = size.parameters * dtype.itemsize + 3 * size.trainable * max(dtype.itemsize, 2)
    activations = Activations.of_model(
        size,
        memory.tokens,
        layer_activations(hf_config, dtype, settings.lora),
        dtype.itemsize,
        settings.checkpointing,
    )
    recomputed = activations.recomputed(int(0.85 * max(0, memory.available - held)))
    # A pack that takes too long is made smaller, but one layer's share of it has to be there.
    if held > 0.9 * memory.available:
        return (
            f"weights, gradients and optimizer of the model take {held / GIB:.0f} GiB in one process, "
            f"and {memory.available / GIB:.0f} are free"
        )
    load = psutil.cpu_percent(interval=1) / 100 * (os.cpu_count() or 1) if device == "cpu" else None
    found = measure(
        Request(
            groups=str(inspection.groups.folder),
            plan=inspection.plan,
            hf_config=hf_config,
            lora=settings.lora.model_dump() if settings.lora else None,
            dtype=settings.dtype,
            autocast=settings.autocast,
            device=device,
            attention=settings.attention,
            recomputed_layers=recomputed,
            seconds=seconds,
            # As the launcher of several processes does.
            threads=1 if device == "cpu" and gpus > 1 and "OMP_NUM_THREADS" not in os.environ else None,
        )
    )
    if isinstance(found, str):
        return found
    steps = figures.steps_per_epoch * settings.epochs
    computing = figures.cost * settings.epochs * found.seconds_per_cost / gpus
    estimated = None
    if settings.dtype == "float32" and settings.lora is None:
        as_measured = Activations.of_model(
            size, found.tokens, activations.layer_bytes, dtype.itemsize, settings.checkpointing
        )
        plain = estimate("none", size, as_measured, gpus=1, available=memory.available, device=device)
        estimated = plain.peak - plain.reserved
    return TimeFigures(
        warmup=found,
        seconds=computing + steps * found.update_seconds,
        load=load,
        estimated_peak=estimated,
    )


def check_run(settings: RunSettings, memory: Memory, *, on_gpu: bool) -> list[Check]:
    """What of a config cannot work on this machine."""
    checks = []

    def add(name: str, status: Literal["warning", "problem"], found: str, advice: str) -> None:
        checks.append(Check(name=name, status=status, found=found, advice=advice))

    if settings.backend == "nccl" and not on_gpu and memory.gpus > 1:  # one process has nothing to exchange
        add(
            "backend",
            "problem",
            "env_cfg.dist_cfg.backend is 'nccl', and several processes need a GPU for it",
            "set 'gloo'",
        )
    if settings.lora is not None and settings.lora.load_in_4bit and not on_gpu:
        add("QLoRA", "problem", "load_in_4bit needs a GPU", "train on a machine with one, or set it False")
    if settings.dtype != "float32" and settings.lora is None:
        add(
            "dtype",
            "warning",
            f"weights are loaded in {settings.dtype}",
            "start with --deepspeed, which keeps float32 master weights",
        )
    checks += _validation(settings)
    checks += _disk(settings, memory)
    if not any(map(memory.fits, memory.estimates)):
        add("memory", "problem", "no ZeRO stage fits", "lower max_packed_length, use LoRA, or more GPUs")
    return checks


def _validation(settings: RunSettings) -> list[Check]:
    try:
        for source in as_sources(settings.validation) if settings.validation else []:
            expand(source.path)
    except PolarError as error:
        return [_problem("val_data", error, "correct val_data in the config")]
    return []


def _disk(settings: RunSettings, memory: Memory) -> list[Check]:
    # docs/training.md, "Where files go": DeepSpeed in bfloat16 saves 14 bytes for each trained parameter.
    each = 14 * memory.size.trainable
    folder = settings.work_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # While one is written, the disk holds one more.
    number = settings.kept_checkpoints + 1 if settings.kept_checkpoints > 0 else 2
    found = f"{number} of {each / GIB:.2f} GiB at a time; {free / GIB:.0f} GiB free in {settings.work_dir}"
    if number * each <= free:
        return [Check(name="checkpoints", status="ok", found=found)]
    advice = "make room, lower save_total_limit, or set --work-dir"
    return [Check(name="checkpoints", status="problem", found=found, advice=advice)]
