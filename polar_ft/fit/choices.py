"""What a machine and data ask for: how to train, each choice with its reason in a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polar_ft.data.report import many
from polar_ft.errors import PolarError, validation_sentences
from polar_ft.training.config import did_you_mean, parse_value
from polar_ft.training.settings import ALIASES, Settings

GIB = 2**30
# Published for POLAR (arXiv 2507.05197), for 7B and 1.8B; what lies between takes the lower one.
LR_LARGE, LR_SMALL, LARGE = 2e-5, 1e-5, 4_000_000_000
PUBLISHED_BATCH = 320
# Fewer optimizer steps than these teach little; see `polar_ft.training.loop.ENOUGH_STEPS`.
GOOD_STEPS, FEW_STEPS = 100, 50
PACKS = (32768, 16384)
# Characters that a tiny model reads in about a minute on two cores.
TINY_CHARACTERS = 3_000_000
LORA = {"r": 64, "alpha": 128, "dropout": 0.05}

Strategy = Literal["none", "zero1", "zero2", "zero3", "zero3_offload"]


@dataclass(frozen=True)
class Machine:
    """Where it is trained.

    Attributes:
        device: "cuda" or "cpu".
        gpus: Number of GPUs, or 1 for the CPU.
        memory: Free bytes of each GPU; on a CPU those of the machine.
        host: Free bytes of the machine.
        name: For people.
    """

    device: Literal["cuda", "cpu"]
    gpus: int
    memory: int
    host: int
    name: str

    @classmethod
    def here(cls) -> Machine:
        """This machine. GPUs are looked at in another process, so that this one holds no memory of them."""
        import psutil

        host = psutil.virtual_memory().available
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        there = not hidden and any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))
        if there:
            done = subprocess.run(
                [sys.executable, "-c", _LOOK_AT_GPUS], capture_output=True, text=True, check=False
            )
            found = json.loads(done.stdout) if done.returncode == 0 else []
            if found:
                name, free = found[0][0], min(free for _, free in found)
                described = f"{len(found)} × {name}, {free / GIB:.0f} GiB free on each"
                return cls("cuda", len(found), free, host, described)
        none = "no GPU that torch can use" if there else "no GPU"
        return cls("cpu", 1, host, host, f"{none}; {os.cpu_count()} cores, {host / GIB:.0f} GiB free")


_LOOK_AT_GPUS = """
import json, torch
gpus = range(torch.cuda.device_count())
print(json.dumps([(torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)[0]) for i in gpus]))
"""


@dataclass(frozen=True)
class Base:
    """The base model.

    Attributes:
        name: Folder or hub id.
        shape: Its ``config.json``.
        is_tiny: Made here, with random weights.
        has_head: Whether it gives rewards already; None where that is not known yet.
        reward_tokens: ``reward_tokens`` of a config.
        reward_token_id: Id of the reward token; None where that is not known yet.
        allow_tokenizer_code: Tokenizer classes that may be run.
    """

    name: str
    shape: Mapping[str, Any]
    is_tiny: bool = False
    has_head: bool | None = None
    reward_tokens: Mapping[str, Any] = field(default_factory=dict)
    reward_token_id: int | None = None
    allow_tokenizer_code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """Pairs to train on, their prompts and characters, and characters of the longest input."""

    pairs: int
    prompts: int
    characters: int
    longest: int


class Choice(BaseModel):
    """A setting, its value and why it is that."""

    name: str
    value: Any
    reason: str


class Given(BaseModel):
    """Choices that are no settings of a config; the others are fields of `Settings`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    deepspeed: (
        Literal["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"] | None
    ) = None
    gpus: int | None = Field(default=None, ge=1)
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None


# Of a fit itself: its files.
_FIXED = ("pretrained_model_name_or_path", "data", "val_data")


def parse_given(entries: list[str]) -> dict[str, Any]:
    """Reads ``--set NAME=VALUE``, checked by the types of a config's settings.

    Raises:
        PolarError: There is no such setting, or it cannot have the value.

    >>> parse_given(["lr=1e-5", "lora=None"])
    {'lr': 1e-05, 'lora': None}
    >>> parse_given(["learning_rate=1e-5"])
    Traceback (most recent call last):
    polar_ft.errors.PolarError: --set learning_rate: no such setting; did you mean lr?
    """
    known = [name for name in (*Settings.model_fields, *Given.model_fields) if name not in _FIXED]
    given: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        name = name.strip()
        if not equals:
            raise PolarError(f"--set {entry}: write NAME=VALUE, for instance lr=1e-5")
        if name in _FIXED:
            option = "--base" if name == _FIXED[0] else "DATA and --held-out"
            raise PolarError(f"--set {name}: that is said by {option}")
        if name not in known:
            alias = ALIASES.get(name)
            alias = alias if alias in known else None
            hint = f"did you mean {alias}?" if alias else did_you_mean(name, known, cutoff=0.6)
            raise PolarError(f"--set {name}: no such setting; {hint or 'docs/configs.md lists them'}")
        value = parse_value(text)
        model: type[BaseModel] = Given if name in Given.model_fields else Settings
        try:
            model.model_validate({name: value})
        except ValidationError as error:
            wrong = "; ".join(validation_sentences(error)).replace("Input should be", "must be")
            raise PolarError(f"--set {entry}: {wrong}") from None
        given[name] = value
    return given


def choose(machine: Machine, base: Base, data: Data, given: Mapping[str, Any]) -> list[Choice]:
    """Chooses how to train.

    Args:
        machine: Where.
        base: What.
        data: On what.
        given: What the user has set; the other choices follow it.

    Returns:
        The choices in the order in which a config has them; first those of memory.

    Raises:
        PolarError: Nothing fits into the memory, or more GPUs are asked for than there are.
    """
    if machine.device == "cuda" and given.get("gpus", 1) > machine.gpus:
        raise PolarError(f"--set gpus={given['gpus']}: here {_are_gpus(machine.gpus)} ({machine.name})")
    way = _way(machine, base, data, given)
    parameters = way.parameters
    chosen: dict[str, tuple[Any, str]] = {}
    trained = {"full": "all weights", "LoRA": "LoRA adapters", "QLoRA": "QLoRA adapters"}[way.kind]
    chosen["lora"] = way.lora, f"{trained}: {way.reason}"
    if way.deepspeed != "none":
        chosen["deepspeed"] = f"deepspeed_{way.deepspeed}", way.stage_reason
    else:
        why = "adapters exchange little" if way.lora else "one process, in float32"
        chosen["deepspeed"] = None, f"no DeepSpeed: {why}"
    processes = f"{way.gpus} processes, a GPU each" if way.gpus > 1 else "one process"
    chosen["gpus"] = way.gpus, processes
    chosen["torch_dtype"] = way.dtype, _dtype_reason(way, machine)
    chosen["max_packed_length"] = (
        way.tokens,
        f"such a forward takes about {way.peak / GIB:.2g} of {machine.memory / GIB:.3g} GiB, with "
        f"{way.recomputed} of {way.layers} layers computed again in backward (estimated from shapes)",
    )
    chosen["recompute_layers"] = "auto", "as few layers as the memory allows, decided when training starts"
    response, length, why = _lengths(base, way.tokens)
    response = min(response, given.get("max_length", length) // 3)
    chosen["max_length"] = length, why
    chosen["max_response_length"] = (
        response,
        "of the reference and of each answer; longer ones are cut on the right",
    )

    batch, why = _batch(data, base)
    batch = given.get("global_batch_pairs", batch)
    chosen["global_batch_pairs"] = batch, why
    steps_a_pass = max(1, round(data.pairs / batch))
    epochs, why = _epochs(data, base, steps_a_pass)
    chosen["max_epochs"] = epochs, why
    steps = steps_a_pass * given.get("max_epochs", epochs)
    chosen["lr"] = _learning_rate(base, way, parameters)
    interval = max(1, steps // 10)
    chosen["val_interval"] = (
        interval,
        f"about ten validations in {many(steps, 'step')}, of which the best is kept",
    )
    kept = max(interval, 25) if machine.device == "cuda" else interval
    chosen["save_steps"] = kept, "a killed run loses no more steps than these"
    choices = []
    for name, (value, reason) in chosen.items():
        if name in given:
            value, reason = given[name], "set by --set"
        choices.append(Choice(name=name, value=value, reason=reason))
    more = [name for name in given if name not in chosen]
    return choices + [Choice(name=name, value=given[name], reason="set by --set") for name in more]


def _are_gpus(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {many(count, 'GPU')}"


def planned_steps(choices: list[Choice], pairs: int) -> int:
    """Optimizer steps of the run, as the step plan will have them."""
    values = {choice.name: choice.value for choice in choices}
    return max(1, round(pairs / values["global_batch_pairs"])) * values["max_epochs"]


@dataclass(frozen=True)
class _Way:
    """A way to train that fits."""

    kind: Literal["full", "LoRA", "QLoRA"]
    lora: dict[str, Any] | None
    deepspeed: Strategy
    gpus: int
    dtype: str
    tokens: int
    peak: int
    recomputed: int
    layers: int
    parameters: int
    reason: str
    stage_reason: str


def _way(machine: Machine, base: Base, data: Data, given: Mapping[str, Any]) -> _Way:
    """The first way that fits, of those that train best to those that need least."""
    closest: tuple[float, str] | None = None
    full = None
    for kind, lora, strategy, tokens in _candidates(machine, base, data, given):
        gpus = given.get("gpus") or machine.gpus
        found, size = _estimate(
            json.dumps(dict(base.shape)), json.dumps(lora), strategy, gpus, machine, tokens
        )
        if kind == "full" and full is None:
            full = found.peak
        if found.peak > machine.memory or found.host > machine.host:
            if closest is None or found.peak < closest[0]:
                closest = (
                    found.peak,
                    f"{kind}{'' if strategy == 'none' else f' with {strategy}'}, packs of {tokens:,}",
                )
            continue
        needed = "" if full is None else f" take at least {full / GIB:.0f} GiB on each"
        reason = {
            "full": "they fit, and all weights learn more than adapters",
            "LoRA": f"all weights{needed} and do not fit; adapters of rank 64 do",
            "QLoRA": "neither all weights nor adapters over bfloat16 fit; over weights of four bits they do "
            "(this needs pip install --upgrade bitsandbytes)",
        }[kind]
        if "lora" in given:
            reason = "set by --set"
        float32 = (kind == "full" and strategy == "none") or machine.device == "cpu"
        return _Way(
            kind=kind,
            lora=lora,
            deepspeed=strategy,
            gpus=gpus,
            dtype="float32" if float32 else "bfloat16",
            tokens=tokens,
            peak=found.peak,
            recomputed=found.recomputed_layers,
            layers=size.layers,
            parameters=size.parameters,
            reason=reason,
            stage_reason=_stage_reason(strategy, gpus),
        )
    least = "" if closest is None else f"; the least is {closest[0] / GIB:.0f} GiB ({closest[1]})"
    raise PolarError(
        f"{base.name}: training does not fit here ({machine.name}){least}. Take a smaller base model, or a "
        f"machine with more memory: polar-ft plan shows what fits where"
    )


def _candidates(
    machine: Machine, base: Base, data: Data, given: Mapping[str, Any]
) -> Iterator[tuple[Literal["full", "LoRA", "QLoRA"], dict[str, Any] | None, Strategy, int]]:
    """Kind, ``lora``, ZeRO stage and tokens of a pack, the best first."""
    packs: tuple[int, ...] = (given["max_packed_length"],) if "max_packed_length" in given else PACKS
    if "max_packed_length" not in given and (base.is_tiny or machine.device == "cpu"):
        packs = (16384, 8192, 4096)
    small = packs if "max_packed_length" in given or data.longest > 8192 else (*packs, 8192)
    stages: tuple[Strategy, ...] = ("none",)
    offload: tuple[Strategy, ...] = ()
    if machine.device == "cuda":
        stages = ("zero2",) if (given.get("gpus") or machine.gpus) == 1 else ("zero1", "zero2", "zero3")
        offload = ("zero3_offload",)
    plain: tuple[Strategy, ...] = ("none",)
    if "deepspeed" in given:
        named: Any = (given["deepspeed"] or "none").removeprefix("deepspeed_")
        stages, offload, plain = (named,), (), (named,)
    lora = given.get("lora", LORA)
    if given.get("lora", None) is None:
        yield from (("full", None, stage, tokens) for tokens in packs for stage in stages)
    if lora is not None:
        four_bits = bool(lora.get("load_in_4bit"))
        if not four_bits:
            yield from (("LoRA", dict(lora), stage, tokens) for tokens in small for stage in plain)
        if machine.device == "cuda" and (four_bits or "lora" not in given):
            quantized = {**lora, "load_in_4bit": True}
            yield from (
                ("QLoRA", quantized, stage, tokens) for tokens in small[1:] or small for stage in plain
            )
    if given.get("lora", None) is None:
        yield from (("full", None, stage, tokens) for tokens in packs for stage in offload)


@lru_cache(maxsize=256)
def _estimate(
    shape: str, lora: str, strategy: Strategy, gpus: int, machine: Machine, tokens: int
) -> tuple[Any, Any]:
    """Bytes on each GPU (`polar_ft.doctor.memory.Estimate`), and the size of the model."""
    from polar_ft.doctor.memory import estimate_run
    from polar_ft.model.settings import LoraSettings

    adapters = json.loads(lora)
    return estimate_run(
        json.loads(shape),
        None if adapters is None else LoraSettings.of_config(adapters),
        strategy,
        tokens,
        gpus=gpus,
        available=machine.memory,
        device=machine.device,
    )


def _stage_reason(strategy: Strategy, gpus: int) -> str:
    among = f"divided among {many(gpus, 'GPU')}" if gpus > 1 else "next to bfloat16 weights"
    return {
        "none": "",
        "zero1": f"optimizer state in float32, {among}; the stage that exchanges the least",
        "zero2": f"optimizer state in float32 and gradients, {among}",
        "zero3": f"optimizer state, gradients and weights, {among}: nothing less fits",
        "zero3_offload": "optimizer state in the machine's memory, as nothing else fits: slow",
    }[strategy]


def _dtype_reason(way: _Way, machine: Machine) -> str:
    if way.dtype == "float32":
        on_gpu = "without DeepSpeed there are no float32 copies of bfloat16 weights"
        return "exact on a CPU" if machine.device == "cpu" else on_gpu
    if way.lora is not None:
        return "of the frozen weights; adapters and head are float32"
    return "as the weights are published; DeepSpeed keeps float32 copies of them"


def _lengths(base: Base, tokens: int) -> tuple[int, int, str]:
    """Limits of a response and of an input in tokens: a pair at its longest has to fit into a pack."""
    if base.is_tiny:
        return 340, 1024, "what a tiny model reads in a minute or two; longer prompts are cut on the left"
    positions = int(base.shape.get("max_position_embeddings") or 16384)
    response = min(4096, tokens // 4, positions // 4)
    length = min(16384, positions, tokens - response)
    if length == 16384:
        return response, length, "as published; longer prompts are cut on the left"
    why = "the base reads no more" if length == positions else "a pair has to fit into a forward"
    return response, length, f"{why}; longer prompts are cut on the left"


def _batch(data: Data, base: Base) -> tuple[int, str]:
    if base.is_tiny:
        batch = 64 if data.pairs >= 2000 else 32
        return batch, "small, for many steps: this model starts from random weights"
    wanted = data.pairs // GOOD_STEPS // 8 * 8
    if wanted >= PUBLISHED_BATCH:
        return PUBLISHED_BATCH, "as published"
    batch = max(16, wanted)
    return batch, (
        f"{PUBLISHED_BATCH} is published; with {data.pairs:,} pairs that would be only "
        f"{many(max(1, round(data.pairs / PUBLISHED_BATCH)), 'step')}"
    )


def _epochs(data: Data, base: Base, steps: int) -> tuple[int, str]:
    if base.is_tiny:
        epochs = max(1, min(8, TINY_CHARACTERS // max(1, data.characters)))
        passes = "one pass takes" if epochs == 1 else f"{epochs} passes take"
        return epochs, f"random weights need many steps; {passes} a minute or two"
    if steps < FEW_STEPS:
        return 2, f"one pass has {many(steps, 'step')}, too few to learn; the best checkpoint is kept"
    return 1, "as published: more passes overfit"


def _learning_rate(base: Base, way: _Way, parameters: int) -> tuple[float, str]:
    if base.is_tiny:
        return 3e-3, "high: this model starts from random weights"
    published = LR_LARGE if parameters >= LARGE else LR_SMALL
    if way.lora is None:
        return published, f"published for {'7B' if parameters >= LARGE else '1.8B'}"
    return 10 * published, "ten times that of full training, as is usual for adapters; not tuned"
