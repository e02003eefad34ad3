"""The order of a fit, from the data to the report; each line that begins ``steps.run`` is a step."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.data.report import many
from polar_ft.errors import PolarError, printable
from polar_ft.files import read_json, resolve_folder
from polar_ft.fit import data as fit_data
from polar_ft.fit.choices import Base, Choice, Data, Machine, choose, planned_steps
from polar_ft.fit.config_file import as_code
from polar_ft.fit.steps import Result, Steps, Tell, clock, content_of

TINY = "a tiny base model"
DEFAULT_BASE = "internlm/POLAR-1_8B-Base"
# The published folders keep their tokenizer in Python code of their own; no other code of them is run.
TOKENIZER_CODE = ("tokenization_internlm2_fast.InternLM2TokenizerFast",)
# A dry run measures about so long.
_WARMUP_SECONDS = 4.0


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    Attributes:
        source: The data.
        base: Folder or hub id of the base model; None makes a tiny one where there is no GPU.
        held_out: The held-out side, where it is another file.
        given: Choices that are set.
        curve: Points of a learning curve; 0 for none.
        fix: Leave out bad rows.
        allow_tokenizer_code: Further tokenizer classes that may be run.
    """

    source: fit_data.Source
    base: str | None = None
    held_out: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    curve: int = 0
    fix: bool = False
    allow_tokenizer_code: tuple[str, ...] = ()

    @property
    def shares(self) -> list[float]:
        """Shares of the training data that are trained on as well, by rising size.

        >>> Wanted(fit_data.Source("a.jsonl"), curve=3).shares
        [0.25, 0.5]
        """
        return [0.5**power for power in range(self.curve - 1, 0, -1)]


@dataclass(frozen=True)
class Plan:
    """What is known before training begins."""

    machine: Machine
    base: Base
    choices: list[Choice]
    steps: int
    looked: Result
    sides: Result


def count_steps(wanted: Wanted) -> int:
    """Number of steps of a fit."""
    return 12 + (wanted.held_out is not None) + 3 * len(wanted.shares)


def prepare(steps: Steps, wanted: Wanted, out: Path, machine: Machine, *, make_base: bool = True) -> Plan:
    """Reads, checks and divides the data, and chooses how to train.

    Args:
        steps: Runs the steps.
        wanted: What is asked for.
        out: Folder of the fit.
        machine: Where it will be trained.
        make_base: Make or download the base model; else its shapes alone are taken, where they are known.
    """
    data, source = out / "data", wanted.source
    data.mkdir(exist_ok=True)
    known_source = [content_of(source.path), source.split, dict(source.mapping or {}), wanted.fix]
    read = steps.run(
        "read",
        [source.path, known_source],
        lambda tell: fit_data.read(source, data / "rows.jsonl", tell, fix=wanted.fix),
    )
    held_out = None
    if wanted.held_out is not None:
        other = fit_data.Source(wanted.held_out, source.split, source.mapping)
        inputs = [wanted.held_out, content_of(wanted.held_out), source.split, dict(source.mapping or {})]
        held = steps.run(
            "read held-out",
            inputs,
            lambda tell: fit_data.read(other, data / "held_out_rows.jsonl", tell, fix=False),
        )
        held_out = held["path"]
    rows = [content_of(read["path"]), content_of(held_out) if held_out else None]
    looked = steps.run(
        "check",
        [rows, read["path"], wanted.fix],
        lambda tell: fit_data.look(source, read["path"], held_out, data / "good.jsonl", tell, fix=wanted.fix)[
            1
        ],
    )
    files = [data / f"{name}.jsonl" for name in ("train", "val", "held_out")]
    sides = steps.run(
        "split",
        [content_of(looked["path"]), rows[1]],
        lambda tell: fit_data.split(looked["path"], source.split, data, looked["prompts"], held_out),
        files,
    )
    base = _base(steps, wanted, out, machine, files[0], make=make_base)
    share = sides["train"]["pairs"] / max(1, looked["pairs"])
    facts = Data(
        pairs=sides["train"]["pairs"],
        prompts=sides["train"]["prompts"],
        characters=int(looked["characters"] * share),
        longest=looked["longest"],
    )
    # Free memory changes from start to start, and a run that resumes must not change by itself.
    known_machine = [machine.device, machine.gpus, machine.name.partition(",")[0]]

    def choosing(tell: Tell) -> Result:
        tell("looking at what fits")
        choices = choose(machine, base, facts, wanted.given)
        values = {choice.name: choice.value for choice in choices}
        kind = (
            "all weights"
            if values["lora"] is None
            else "adapters over four bits"
            if values["lora"].get("load_in_4bit")
            else "adapters"
        )
        said = f"{kind}, lr {as_code(values['lr'])}, {values['global_batch_pairs']} pairs a step, "
        said += f"{planned_steps(choices, facts.pairs):,} steps"
        return {"choices": [choice.model_dump() for choice in choices], "said": said}

    chosen = steps.run("choose", [known_machine, asdict(base), asdict(facts), dict(wanted.given)], choosing)
    choices = [Choice(**choice) for choice in chosen["choices"]]
    return Plan(machine, base, choices, planned_steps(choices, facts.pairs), looked, sides)


def _base(steps: Steps, wanted: Wanted, out: Path, machine: Machine, train: Path, *, make: bool) -> Base:
    """The base model: a folder, a download, or a tiny one that is made."""
    name = wanted.base or (DEFAULT_BASE if machine.device == "cuda" else None)
    allowed = (*TOKENIZER_CODE, *wanted.allow_tokenizer_code)
    if name is None:
        folder = out / "base"
        result = steps.run(
            "base", ["tiny", content_of(train)], lambda tell: _make_tiny(folder, train), [folder]
        )
        return Base(
            name=str(folder),
            shape=read_json(folder / "config.json"),
            is_tiny=True,
            has_head=False,
            reward_tokens=result["reward_tokens"],
            reward_token_id=result["reward_token_id"],
        )
    if not make and not Path(name).is_dir():
        from polar_ft.doctor.settings import PUBLISHED_SHAPES

        shape = PUBLISHED_SHAPES.get(name.removesuffix("-Base"))
        if shape is None:
            raise PolarError(
                f"{name}: is not on this machine, so its size is not known; leave --dry-run out and it is "
                f"downloaded, or name a folder"
            )
        return Base(name=name, shape=shape, allow_tokenizer_code=allowed)

    def look(tell: Tell) -> Result:
        tell(f"looking for {name}")
        return _look_at(name, resolve_folder(name), allowed)

    result = steps.run("base", [name, content_of(name), allowed], look)
    folder = resolve_folder(name)
    return Base(
        name=str(folder) if Path(name).is_dir() else name,
        shape=read_json(folder / "config.json"),
        has_head=result["has_head"],
        reward_tokens=result["reward_tokens"],
        reward_token_id=result["reward_token_id"],
        allow_tokenizer_code=allowed,
    )


def _make_tiny(folder: Path, train: Path) -> Result:
    """A tiny base whose vocabulary is as large as that of the data."""
    from polar_ft.model.tiny_base import make_tiny_base, texts_of

    words = len({word for text in texts_of(str(train)) for word in re.findall(r"\w+", text)})
    vocab = 768 if words < 2000 else 4096
    shutil.rmtree(folder, ignore_errors=True)
    make_tiny_base(folder, texts_of(str(train)), vocab_size=vocab, hidden=96, heads=8, kv_heads=4)
    found = _look_at(str(folder), folder, ())
    return found | {
        "said": f"{TINY} with random weights, to see how everything works; --base names a real one"
    }


def _look_at(name: str, folder: Path, allowed: Sequence[str]) -> Result:
    """What of a base decides how it is trained.

    Raises:
        PolarError: It cannot be trained.
    """
    from polar_ft.model.base_folder import check_base
    from polar_ft.model.weights import HEAD_NAMES, open_checkpoint
    from polar_ft.template import PolarTemplate

    tokens: dict[str, Any] = {}
    try:
        template = PolarTemplate.from_pretrained(folder, allow_tokenizer_code=allowed)
    except PolarError as error:
        if "has no token" not in str(error):
            raise
        tokens = {"add": True}
        template = PolarTemplate.from_pretrained(
            folder, allow_tokenizer_code=allowed, add_missing_tokens=True
        )
    settings = {"allow_tokenizer_code": allowed, "add_missing_tokens": tokens.get("add")}
    check_base(folder, settings)
    head = any(name in open_checkpoint(folder) for name in HEAD_NAMES)
    said = "gives rewards already" if head else "has no reward head, so it gives no rewards before training"
    return {
        "has_head": head,
        "reward_tokens": {"separator": template.separator, "reward": template.reward_token, **tokens},
        "reward_token_id": None if tokens else template.reward_token_id,
        "said": f"{name}: {said}",
    }


def show_plan(console: Console, plan: Plan) -> None:
    """Prints the machine and every choice with its reason."""
    console.print(f"\n[bold]machine[/]  {escape(plan.machine.name)}")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", overflow="fold", max_width=34)
    table.add_column(style="dim", overflow="fold")
    for choice in plan.choices:
        table.add_row(choice.name, escape(as_code(choice.value)), escape(choice.reason))
    console.print(table)
    if plan.machine.device == "cpu" and not plan.base.is_tiny:
        console.print("[yellow]no GPU[/]: a real model takes very long on a CPU; --dry-run measures how long")
    console.print()


def show_cost(console: Console, plan: Plan, config: Path) -> None:
    """Prints steps, memory by ZeRO stage, and the time of training, measured where that is possible."""
    from polar_ft.doctor import run as doctor
    from polar_ft.doctor import settings, tables

    machine, asked = plan.machine, settings.read_settings(config)
    values = {choice.name: choice.value for choice in plan.choices}
    gpus, shape = values["gpus"], dict(plan.base.shape)
    with doctor.inspect_data(asked, shape["hidden_size"], gpus, everything=False) as inspection:
        tokens = inspection.figures.largest_pack if inspection.figures else None
        memory = doctor.memory_table(
            asked,
            shape,
            gpus=gpus,
            available=machine.memory,
            device=machine.device,
            host=machine.host,
            tokens=tokens,
        )
        if inspection.figures is not None:
            tables.show_data(console, inspection.figures, asked.epochs, gpus)
        tables.show_memory(console, memory, gpus, "GPU" if machine.device == "cuda" else "process")
        time = doctor.measure_time(
            asked, shape, inspection, memory, gpus=gpus, device=machine.device, seconds=_WARMUP_SECONDS
        )
        tables.show_time(console, time, gpus)


def write_config_of(plan: Plan, wanted: Wanted, out: Path, *, share: float | None = None) -> Path:
    """Writes the config of a run: of all data, or of a share of it."""
    from polar_ft.fit.config_file import write_config

    part = "" if share is None else f"_{share:.3g}".replace("0.", "")
    choices = plan.choices
    if share is not None:
        less = {"val_interval", "save_steps"}
        choices = [
            choice.model_copy(update={"value": max(1, round(choice.value * share))})
            if choice.name in less
            else choice
            for choice in choices
        ]
    file = out / f"config{part}.py" if share is None else out / "curve" / f"config{part}.py"
    file.parent.mkdir(exist_ok=True)
    data = out / "data"
    write_config(
        file,
        choices,
        plan.base,
        data_name=Path(wanted.source.path).name,
        train=(data / f"train{part}.jsonl").absolute(),
        val=(data / "val.jsonl").absolute(),
        work_dir=(out / "train" if share is None else out / "curve" / f"train{part}").absolute(),
        on_gpu=plan.machine.device == "cuda",
    )
    return file


def fit(steps: Steps, plan: Plan, wanted: Wanted, out: Path) -> Any:
    """Trains, converts, evaluates, compares, calibrates and reports.

    Args:
        steps: Runs the steps.
        plan: Of `prepare`.
        wanted: What is asked for.
        out: Folder of the fit.

    Returns:
        The outcome (`polar_ft.fit.verdict.Outcome`).
    """
    from polar_ft.fit import verdict
    from polar_ft.fit.report import extend_card, write_report

    data, config, model = out / "data", out / "config.py", out / "model"
    choices = [choice.model_dump() for choice in plan.choices]

    before = steps.record.done.get("config")

    def configuring(tell: Tell) -> Result:
        said = f"{config}: for polar-ft train and xtuner train as well"
        if before is not None and config.is_file() and content_of(config) != before.result.get("content"):
            edited = config.with_name("config.edited.py")
            config.replace(edited)
            said += f"; what was edited is in {edited}"
        write_config_of(plan, wanted, out)
        return {"content": content_of(config), "said": said}

    steps.run("config", [choices, asdict(plan.base), str(out.absolute())], configuring, [config])
    _check_config(config)
    training = _train(steps, plan, "train", config, data / "train.jsonl", out / "train", out, plan.steps)
    parts = [_train_part(steps, plan, wanted, out, share) for share in wanted.shares]

    allowed = plan.base.allow_tokenizer_code
    _convert(steps, "convert", config, training, model, data / "val.jsonl")
    held_out = data / "held_out.jsonl"
    evaluated = out / "eval" / "model"
    code = list(allowed)
    steps.run(
        "evaluate",
        [steps.key("convert"), content_of(held_out)],
        lambda tell: _evaluate(str(model), held_out, evaluated, code, shuffle=True),
        [evaluated / "metrics.json"],
    )
    base_folder = out / "eval" / "base" if plan.base.has_head else None
    steps.run(
        "evaluate base",
        [steps.key("base"), content_of(held_out), plan.base.has_head],
        lambda tell: _evaluate_base(plan.base, held_out, base_folder, code),
        [] if base_folder is None else [base_folder / "metrics.json"],
    )
    curve = [
        _evaluate_part(steps, share, part, config_of_part, out, held_out, code)
        for share, (part, config_of_part) in zip(wanted.shares, parts, strict=True)
    ]
    steps.run(
        "calibrate",
        [steps.key("convert"), content_of(held_out)],
        lambda tell: _calibrate(model, held_out, code),
    )

    def reporting(tell: Tell) -> Result:
        tell("comparing")
        if base_folder is not None:
            from polar_ft.evaluation.comparing import compare_runs

            compare_runs([base_folder, evaluated], out / "eval", ())
        outcome = verdict.judge(
            evaluated,
            base_folder,
            curve=curve,
            training=training,
            tiny=plan.base.is_tiny,
            without_reference=plan.looked["without_reference"],
        )
        write_report(
            out / "report.html",
            outcome,
            plan.choices,
            title=f"{out.resolve().name}: a reward model from {Path(wanted.source.path).name}",
            training=training,
            facts=_facts(plan, wanted),
            steps={name: done.seconds for name, done in steps.record.done.items() if name != "report"},
        )
        extend_card(model / "README.md", outcome, plan.choices)
        return {"outcome": outcome.model_dump(), "said": str(out / "report.html")}

    inputs = [steps.key(name) for name in ("train", "convert", "evaluate", "evaluate base", "calibrate")]
    result = steps.run(
        "report", [inputs, [point.model_dump() for point in curve], choices], reporting, [out / "report.html"]
    )
    return verdict.Outcome.model_validate(result["outcome"])


def _check_config(config: Path) -> None:
    """The same checks as of any config, also of one that the user has edited."""
    from polar_ft.training.config import read_config
    from polar_ft.training.settings import check_settings

    check_settings(config, read_config(config))


def _train(
    steps: Steps, plan: Plan, name: str, config: Path, train: Path, work_dir: Path, out: Path, planned: int
) -> Result:
    from polar_ft.fit.training import train as train_step

    values = {choice.name: choice.value for choice in plan.choices}
    base = steps.key("base")
    inputs = [
        config.read_text(encoding="utf-8"),
        content_of(train),
        content_of(out / "data" / "val.jsonl"),
        base,
    ]
    inputs += [values["deepspeed"], values["gpus"]]
    resume = steps.has_begun(name, inputs)
    return steps.run(
        name,
        inputs,
        lambda tell: train_step(
            config,
            work_dir,
            plan.choices,
            tell,
            log=out / "logs" / f"{name.replace(' ', '_')}.log",
            steps=planned,
            resume=resume,
        ),
    )


def _train_part(steps: Steps, plan: Plan, wanted: Wanted, out: Path, share: float) -> tuple[Result, Path]:
    """Trains on a share of the data."""
    whole = out / "data" / "train.jsonl"
    config = write_config_of(plan, wanted, out, share=share)
    part = out / "data" / f"train{config.stem.removeprefix('config')}.jsonl"
    made = steps.run(
        f"data {share:.3g}",
        [content_of(whole), share],
        lambda tell: fit_data.part_of(whole, part, share),
        [part],
    )
    planned = planned_steps(plan.choices, made["pairs"])
    work_dir = out / "curve" / f"train{config.stem.removeprefix('config')}"
    return _train(steps, plan, f"train {share:.3g}", config, part, work_dir, out, planned), config


def _convert(steps: Steps, name: str, config: Path, training: Result, model: Path, rows: Path) -> Result:
    def convert(tell: Tell) -> Result:
        from polar_ft.conversion.convert import convert_checkpoint

        tell("reading")
        verified: list[Any] = []
        written = convert_checkpoint(
            config,
            Path(training["checkpoint"]),
            model,
            force=True,
            verify=rows,
            on_written=lambda done, total: tell("writing", done / max(1, total)),
            on_verified=verified.append,
        )
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        said = f"{model}: {str(written).removeprefix('torch.')}, {size / 1e6:,.1f} MB"
        if verified:
            apart = f"rewards differ by {verified[0].difference:.1e}"
            said += f"; verified on {many(verified[0].rows, 'row')}, {apart}"
        return {"difference": verified[0].difference if verified else None, "said": said}

    return steps.run(name, [steps.key("train")], convert, [model / "config.json"])


def _evaluate(model: str, held_out: Path, folder: Path, code: list[str], *, shuffle: bool) -> Result:
    from polar_ft.data.reading import DataSource
    from polar_ft.evaluation.evaluate import score_and_report
    from polar_ft.evaluation.references import ReferenceSettings
    from polar_ft.evaluation.report.report import METRICS_FILE, Report
    from polar_ft.evaluation.report.texts import percent, percent_interval

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    score_and_report(
        model,
        [DataSource(path=str(held_out))],
        folder,
        ReferenceSettings(shuffle_seed=0 if shuffle else None),
        (),
        device=None,
        dtype="auto",
        batch_tokens=None,
        template={"max_length": None, "max_response_length": None, "allow_tokenizer_code": tuple(code)},
        gates=shuffle,
        cache_dir=Path(os.environ.get("POLAR_FT_CACHE", "~/.cache/polar_ft")),
        force=True,
    )
    overall = Report.model_validate_json((folder / METRICS_FILE).read_bytes()).metrics.overall
    said = f"{percent(overall.accuracy)} % of {many(overall.n_scored, 'held-out pair')} right"
    return {
        "accuracy": overall.accuracy,
        "interval": overall.interval,
        "said": f"{said} (95 % interval {percent_interval(overall.interval)})",
    }


def _evaluate_base(base: Base, held_out: Path, folder: Path | None, code: list[str]) -> Result:
    if folder is None:
        return {"said": "the base has no reward head and gives no rewards: chance is what it is held against"}
    return _evaluate(base.name, held_out, folder, code, shuffle=False)


def _evaluate_part(
    steps: Steps, share: float, training: Result, config: Path, out: Path, held_out: Path, code: list[str]
) -> Any:
    """Converts and scores a training on a share of the data; its weights are not kept."""
    from polar_ft.fit.verdict import Point

    name = f"measure {share:.3g}"
    folder = out / "curve" / f"eval{config.stem.removeprefix('config')}"

    def measure(tell: Tell) -> Result:
        from polar_ft.conversion.convert import convert_checkpoint

        model = out / "curve" / "model"
        convert_checkpoint(config, Path(training["checkpoint"]), model, force=True)
        result = _evaluate(str(model), held_out, folder, code, shuffle=False)
        shutil.rmtree(model)
        return result

    done = steps.run(name, [steps.key(f"train {share:.3g}"), content_of(held_out)], measure)
    pairs = steps.record.done[f"data {share:.3g}"].result["pairs"]
    return Point(share=share, pairs=pairs, accuracy=done["accuracy"], interval=done["interval"])


def _calibrate(model: Path, held_out: Path, code: list[str]) -> Result:
    from polar_ft.evaluation.scale import calibrate
    from polar_ft.reward_scale import RewardScale

    calibrate(str(model), [str(held_out)], allow_tokenizer_code=code)
    scale = RewardScale.load(model)
    said = f"rewards {scale.centre:.2f} ± {scale.spread:.2f}"
    said += "" if scale.temperature is None else f", temperature {scale.temperature:.2f}"
    return {"said": f"{said}, kept in the model's folder"}


def _facts(plan: Plan, wanted: Wanted) -> list[tuple[str, str]]:
    return [
        ("data", f"{Path(wanted.source.path).name}: {plan.looked['said']}"),
        ("split", str(plan.sides["said"])),
        ("base model", TINY if plan.base.is_tiny else plan.base.name),
        ("machine", plan.machine.name),
    ]


def show_outcome(console: Console, outcome: Any, out: Path, seconds: float) -> None:
    """The last lines: is it better, by how much, how sure, and what next."""
    style = {"passed": "bold green", "warning": "bold yellow", "failed": "bold red"}[outcome.status]
    console.print()
    console.print(escape(outcome.first), style=style)
    for line in outcome.more:
        console.print(escape(line))
    console.print("\n[bold]what to try next[/]")
    for advice in outcome.advice:
        console.print(f"· [bold]{escape(advice.title)}.[/] {escape(advice.text)}")
    shown = escape(printable(str(out)))
    console.print(
        f"\n{shown}/report.html   {shown}/model   ({clock(seconds)})\n[dim]polar-ft serve {shown}/model[/]",
        soft_wrap=True,
    )
