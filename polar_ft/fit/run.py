"""The order of a fit, from the data to the report; each line that begins ``steps.run`` is a step."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from polar_ft.data.reading import expand
from polar_ft.errors import PolarError
from polar_ft.fit import data as fit_data
from polar_ft.fit import measuring, verdict
from polar_ft.fit.base import DEFAULT_BASE, TINY, find_base
from polar_ft.fit.choices import Base, Choice, Data, Machine, choose, planned_steps
from polar_ft.fit.config_file import DEFAULTS, as_code
from polar_ft.fit.steps import Result, Steps, Tell, content_of


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
    path = _read(steps, "read", source, data / "rows.jsonl", fix=wanted.fix)
    held_out = None
    if wanted.held_out is not None:
        other = fit_data.held_out_source(source, wanted.held_out)
        held_out = _read(steps, "read held-out", other, data / "held_out_rows.jsonl", fix=False)
    rows = [_content_of_rows(path), _content_of_rows(held_out) if held_out else None]
    good = data / "good.jsonl"
    looked = steps.run(
        "check",
        [rows, path, wanted.fix],
        lambda tell: fit_data.look(source, path, held_out, good, tell, fix=wanted.fix)[1],
        [good] if wanted.fix else [],
    )
    checked = str(good) if wanted.fix else path
    files = [data / f"{name}.jsonl" for name in ("train", "val", "held_out")]
    sides = steps.run(
        "split",
        [_content_of_rows(checked), rows[1]],
        lambda tell: fit_data.split(checked, source.split, data, looked["prompts"], held_out),
        files,
    )
    base = find_base(
        steps, _base_of(steps, wanted, machine), wanted.allow_tokenizer_code, out, files[0], make=make_base
    )
    share = sides["train"]["pairs"] / max(1, looked["pairs"])
    facts = Data(
        pairs=sides["train"]["pairs"],
        prompts=sides["train"]["prompts"],
        characters=int(looked["characters"] * share),
        longest=looked["longest"],
    )
    inputs = [asdict(base), asdict(facts), dict(wanted.given)]
    machine = _machine_of(steps, machine, inputs)

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
        dumped = [choice.model_dump() for choice in choices]
        return {"choices": dumped, "machine": asdict(machine), "said": said}

    chosen = steps.run("choose", [_known(machine), *inputs], choosing)
    choices = [Choice(**choice) for choice in chosen["choices"]]
    return Plan(machine, base, choices, planned_steps(choices, facts.pairs), looked, sides)


def _read(steps: Steps, name: str, source: fit_data.Source, target: Path, *, fix: bool) -> str:
    """Reads data; returns where rows of ours are: as the user named them, or converted in ``target``."""
    before = steps.record.done.get(name)
    made = before is not None and before.result["format"] != fit_data.OURS
    read = steps.run(
        name,
        [source.path, _content_of_rows(source.path), source.split, dict(source.mapping or {}), fix],
        lambda tell: fit_data.read(source, target, tell, fix=fix),
        [target] if made else [],
    )
    return source.path if read["format"] == fit_data.OURS else str(target)


def _content_of_rows(path: str) -> Any:
    """What data is known by: of a folder, only the files that are read."""
    return [content_of(file) for file in expand(path)]


def _base_of(steps: Steps, wanted: Wanted, machine: Machine) -> str | None:
    """The base that is asked for, or else that of a training that has begun, or else the default."""
    if wanted.base is not None:
        return wanted.base
    base = steps.record.done.get("base")
    if base is not None and "train" in steps.record.begun:
        return base.result.get("model")
    return DEFAULT_BASE if machine.device == "cuda" else None


def _known(machine: Machine) -> list[Any]:
    """Free memory changes from start to start, and a run that resumes must not change by itself."""
    return [machine.device, machine.gpus, machine.name.partition(",")[0]]


def _machine_of(steps: Steps, here: Machine, inputs: list[Any]) -> Machine:
    """The machine that choices are made for: where training has begun with the same inputs, that one.

    A finished training is not repeated because the report is made on another machine.

    Raises:
        PolarError: Training is not finished, and this machine has other or fewer GPUs.
    """
    chosen = steps.record.done.get("choose")
    if chosen is None or "train" not in steps.record.begun:
        return here
    began = Machine(**chosen.result["machine"])
    if not steps.is_done("choose", [_known(began), *inputs]):
        return here
    if "train" not in steps.record.done and (began.device, began.gpus) != (here.device, here.gpus):
        raise PolarError(
            f"{steps.folder}: training has begun on another machine ({began.name}) and is not finished, and "
            f"this one ({here.name}) cannot resume it: continue there, or begin anew with another --out"
        )
    return began


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


def fit(
    steps: Steps,
    plan: Plan,
    wanted: Wanted,
    out: Path,
    *,
    before_training: Callable[[Plan], None] = lambda plan: None,
) -> verdict.Outcome:
    """Trains, converts, evaluates, compares, calibrates and reports.

    Args:
        steps: Runs the steps.
        plan: Of `prepare`.
        wanted: What is asked for.
        out: Folder of the fit.
        before_training: Called before a training that resumes nothing; what it raises ends the fit.

    Returns:
        What the last lines and the report say.
    """
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
    plan = _with_edits(plan, config)
    inputs = _inputs_of_training(steps, plan, config, data / "train.jsonl", out)
    if not steps.has_begun("train", inputs):
        before_training(plan)
    training = _train(steps, plan, "train", config, data / "train.jsonl", out / "train", out, plan.steps)
    parts = [_train_part(steps, plan, wanted, out, share) for share in wanted.shares]

    checkpoint = _checkpoint(training, out / "train")

    def converting(tell: Tell) -> Result:
        steps.forget("calibrate", "report")  # what they have put into the folder goes with it
        return measuring.convert(config, checkpoint, model, data / "val.jsonl", tell)

    steps.run("convert", [steps.key("train")], converting, [model / "config.json"])
    held_out = data / "held_out.jsonl"
    evaluated = out / "eval" / "model"
    code = plan.base.allow_tokenizer_code
    steps.run(
        "evaluate",
        [steps.key("convert"), content_of(held_out)],
        lambda tell: measuring.evaluate(str(model), held_out, evaluated, code, shuffle=True),
        [evaluated / "metrics.json"],
    )
    base_folder = out / "eval" / "base" if plan.base.has_head else None
    steps.run(
        "evaluate base",
        [steps.key("base"), content_of(held_out), plan.base.has_head],
        lambda tell: measuring.evaluate_base(plan.base, held_out, base_folder),
        [] if base_folder is None else [base_folder / "metrics.json"],
    )
    curve = [
        _measure_part(steps, plan, share, trained, of_part, out)
        for share, (trained, of_part) in zip(wanted.shares, parts, strict=True)
    ]
    steps.run(
        "calibrate",
        [steps.key("convert"), content_of(held_out)],
        lambda tell: measuring.measure_range(model, held_out, code),
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


def _with_edits(plan: Plan, config: Path) -> Plan:
    """The plan with the values of the config, which the user may have edited."""
    from polar_ft.training.config import read_config

    names = read_config(config).names
    choices = [choice if choice.name not in names else _edited(choice, names) for choice in plan.choices]
    chosen = {choice.name for choice in choices}
    for name, (value, _) in DEFAULTS.items():
        default = Choice(name=name, value=value, reason="")
        if name in names and name not in chosen and (found := _edited(default, names)) != default:
            choices.append(found)
    steps = planned_steps(choices, plan.sides["train"]["pairs"])
    return replace(plan, choices=choices, steps=steps)


def _edited(choice: Choice, names: Mapping[str, Any]) -> Choice:
    value = names[choice.name]
    if json.dumps(value, default=str) == json.dumps(choice.value):  # a tuple is a list in fit.json
        return choice
    return Choice(name=choice.name, value=value, reason="edited in config.py")


def _checkpoint(training: Result, work_dir: Path) -> Path:
    """The checkpoint of a training, also after its folder was moved."""
    named = Path(training["checkpoint"])
    return named if named.exists() else work_dir / named.name


def _known_config(config: Path, out: Path) -> str:
    """What a config is known by: neither its comments nor the place of its folder change the training."""
    text = config.read_text(encoding="utf-8")
    return ast.unparse(ast.parse(text.replace(as_code(str(out.absolute()))[1:-1], "OUT")))


def _inputs_of_training(steps: Steps, plan: Plan, config: Path, train: Path, out: Path) -> list[Any]:
    values = {choice.name: choice.value for choice in plan.choices}
    return [
        _known_config(config, out),
        content_of(train),
        content_of(out / "data" / "val.jsonl"),
        steps.key("base"),
        values["deepspeed"],
        values["gpus"],
    ]


def _train(
    steps: Steps, plan: Plan, name: str, config: Path, train: Path, work_dir: Path, out: Path, planned: int
) -> Result:
    from polar_ft.fit.training import train as train_step

    inputs = _inputs_of_training(steps, plan, config, train, out)
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
        ),
        resumes_in=work_dir,
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


def _measure_part(
    steps: Steps, plan: Plan, share: float, trained: Result, config: Path, out: Path
) -> verdict.Point:
    """Measures a training on a share of the data on the same held-out pairs."""
    held_out, code = out / "data" / "held_out.jsonl", plan.base.allow_tokenizer_code
    part = config.stem.removeprefix("config")
    checkpoint, scratch = _checkpoint(trained, out / "curve" / f"train{part}"), out / "curve" / "model"
    folder = out / "curve" / f"eval{part}"
    done = steps.run(
        f"measure {share:.3g}",
        [steps.key(f"train {share:.3g}"), content_of(held_out)],
        lambda tell: measuring.measure_part(config, checkpoint, scratch, held_out, folder, code),
    )
    pairs = steps.record.done[f"data {share:.3g}"].result["pairs"]
    return verdict.Point(share=share, pairs=pairs, accuracy=done["accuracy"], interval=done["interval"])


def _facts(plan: Plan, wanted: Wanted) -> list[tuple[str, str]]:
    return [
        ("data", f"{Path(wanted.source.path).name}: {plan.looked['said']}"),
        ("split", str(plan.sides["said"])),
        ("base model", TINY if plan.base.is_tiny else plan.base.name),
        ("machine", plan.machine.name),
    ]
