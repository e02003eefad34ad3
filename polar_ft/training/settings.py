"""The settings of a config: what each may be, and what it is for.

``python -m polar_ft.training.settings`` writes the tables of docs/configs.md from `Settings`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from polar_ft.data.reading import DataSource, as_sources
from polar_ft.errors import PolarError
from polar_ft.files import write_atomically
from polar_ft.groups import Layout
from polar_ft.model.settings import Checkpointing, LoraSettings, LossType, PenaltyType
from polar_ft.training.config import Options, ParsedConfig, did_you_mean, parse_value, read_config
from polar_ft.training.track import as_services

Metric = Literal["accuracy", "accuracy_ties_half", "macro_accuracy", "log_loss"]

# Top-level names that are no settings: what our configs compute, and what xtuner and mmengine look for.
STRUCTURE = frozenset(
    "model_resource tokenizer model train_dataset train_dataloader optimizer optim_wrapper train_cfg "
    "default_hooks custom_hooks env_cfg backends visualizer randomness work_dir resume load_from launcher "
    "log_level log_processor default_scope experiment_name param_scheduler data_preprocessor "
    "val_cfg val_dataloader val_evaluator test_cfg test_dataloader test_evaluator auto_scale_lr runner_type "
    "strategy compile sync_bn find_unused_parameters model_wrapper_cfg custom_imports framework "
    "use_varlen_attn sequence_parallel_size activation_checkpointing efficient_conv_bn_eval".split()
)

# What other tools call a setting.
ALIASES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "batch_size": "global_batch_pairs",
    "train_batch_size": "global_batch_pairs",
    "train_data": "data",
    "train_file": "data",
    "eval_data": "val_data",
    "validation_data": "val_data",
    "max_seq_length": "max_length",
    "model_name_or_path": "pretrained_model_name_or_path",
    "gradient_clipping": "max_norm",
    "max_grad_norm": "max_norm",
    "gradient_checkpointing": "recompute_layers",
    "save_interval": "save_steps",
    "report_to": "track",
}


def _setting(description: str, at: str | None = None, **bounds: Any) -> Any:
    """A setting that a config may leave out.

    Args:
        description: For docs/configs.md, in Markdown.
        at: The place of a config that is computed from it, and that training reads.
        **bounds: Of pydantic's Field.
    """
    return Field(default=None, description=description, json_schema_extra={"at": at}, **bounds)


class RewardTokens(BaseModel):
    """``reward_tokens = dict(…)`` of a config."""

    model_config = ConfigDict(extra="forbid", strict=True)

    separator: str | None = None
    reward: str | None = None
    add: bool = False


class Settings(BaseModel):
    """Every top-level name of a config that is a setting.

    A field is None where a config does not have it. The order is that of the configs.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    pretrained_model_name_or_path: str = _setting(
        "the base model: a folder, or an id on the HuggingFace hub; the tiny config creates its own from the "
        "data if it does not exist",
        min_length=1,
    )
    data: Any = _setting("what to train on, see [below](#data)", "train_dataloader.dataset.data")
    val_data: Any = _setting(
        "held-out rows to [measure the model on](training.md#validation) while it trains, in the same form; "
        "none of their prompts may be in `data`; `None` for none",
        "train_cfg.validation.data",
    )
    lr: float = _setting("peak learning rate", "optim_wrapper.optimizer.lr", gt=0, le=1)
    max_epochs: int = _setting("passes over the data", "train_cfg.max_epochs", ge=1)
    global_batch_pairs: int = _setting(
        "pairs of one optimizer step, over all GPUs. All steps of an epoch have about that many; the answers "
        "to one prompt and reference stay in one step",
        "train_dataloader.dataset.global_batch_pairs",
        ge=1,
    )
    max_packed_length: int = _setting(
        "tokens of one forward pass. Lower it if memory runs out: a step is then computed in more packs, "
        "with the same pairs, loss and gradient",
        "train_dataloader.dataset.max_packed_length",
        ge=1,
    )
    max_length: int = _setting(
        "limit of an input in all, in tokens. The prompt is truncated on the left to (`max_length` − 4 − "
        "reference − `max_response_length`) // 2 tokens; all answers to it share that prompt",
        "train_dataloader.dataset.tokenizer.max_length",
        ge=6,
    )
    max_response_length: int = _setting(
        "limit of the reference and of each answer, in tokens; they are truncated on the right",
        "train_dataloader.dataset.tokenizer.max_response_length",
        ge=1,
    )
    reward_token_id: int | None = _setting(
        "the id that the reward token must have; a check, not a choice. `None` takes the tokenizer's id",
        "train_dataloader.dataset.tokenizer.reward_token_id",
        ge=0,
    )
    reward_tokens: RewardTokens = _setting("the two control tokens, see [another base](#another-base)")
    allow_tokenizer_code: list[str] = _setting(
        "names of tokenizer classes of the model folder that may run their own Python code",
        "train_dataloader.dataset.tokenizer.allow_tokenizer_code",
        strict=False,  # a tuple will do
    )
    loss_type: LossType = _setting(
        '`"ranking"` is Bradley–Terry, −log σ(chosen − rejected); `"focal"` gives less weight to pairs that '
        'are already right (arXiv 2403.17297, eq. 1); `"margin"` uses the `margin` of the row, −log σ(chosen '
        "− rejected − margin) (arXiv 2307.09288, eq. 2; rows without one count as 0)",
        "model.loss_type",
    )
    penalty_type: PenaltyType = _setting(
        'keeps rewards small, `"log_barrier"` within ±5; added with the factor `penalty_weight` (0.01) of '
        "`model`",
        "model.penalty_type",
    )
    reference_dropout: float = _setting(
        "share of the (prompt, reference) that are trained without their reference, so that the model can "
        "also score without one. Chosen by a hash of `seed` and text: the same ones at every start and in "
        "every epoch",
        "train_dataloader.dataset.reference_dropout",
        ge=0,
        le=1,
    )
    lora: LoraSettings | None = _setting(
        "`dict(r=…, alpha=…, dropout=…)` trains adapters and the head, see "
        "[training.md](training.md#lora-and-qlora); `None` trains all weights",
        "model.lora",
    )
    recompute_layers: Checkpointing = _setting(
        'layers whose activations are recomputed in backward, to save memory: `"none"`, `"selective"` (every '
        'second one), `"full"` (all), or `"auto"`: as few as the memory allows, by an estimate at the start, '
        "which is logged",
        "model.activation_checkpointing",
    )
    fused_kernels: bool = _setting(
        "RMSNorm, rotary embedding and SwiGLU by liger-kernel (`pip install liger-kernel`); on a GPU only, "
        "not tested for this page",
        "model.fused_kernels",
    )
    layout: Layout = _setting(
        '`"tree"` computes once what the answers to one prompt and reference share, `"flat"` computes every '
        "sequence in full. The same gradient",
        "train_dataloader.dataset.layout",
    )
    packs_per_step: int | None = _setting(
        "packs of `max_packed_length` tokens per GPU in a step; `None` takes the smallest number that holds "
        "the step. If a number is too small, the run stops and reports which is enough",
        "train_dataloader.dataset.packs_per_step",
        ge=1,
    )
    betas: list[Annotated[float, Field(strict=True, ge=0, lt=1)]] = _setting(
        "of AdamW", "optim_wrapper.optimizer.betas", strict=False, min_length=2, max_length=2
    )
    weight_decay: float = _setting("of AdamW", "optim_wrapper.optimizer.weight_decay", ge=0)
    max_norm: float = _setting("gradients are clipped to this norm", "optim_wrapper.clip_grad.max_norm", gt=0)
    warmup_ratio: float = _setting(
        "share of the steps for warm-up from 10 % of `lr`, followed by a cosine decay to 10 %",
        "train_cfg.warmup_ratio",
        ge=0,
        lt=1,
    )
    seed: int = _setting(
        "order of the data, choice of `reference_dropout`", "train_dataloader.dataset.seed", ge=0
    )
    save_steps: int = _setting(
        "optimizer steps between checkpoints; the last step is always saved", "train_cfg.save_steps", ge=1
    )
    save_total_limit: int = _setting(
        "number of latest checkpoints that are kept, 0 for all; while one is written, the disk holds one "
        "more",
        "train_cfg.save_total_limit",
    )
    max_bad_steps: int = _setting(
        "the run ends after this many steps in a row with a NaN or infinite loss or gradient; none of them "
        "updates the weights",
        "train_cfg.max_bad_steps",
        ge=1,
    )
    log_interval: int = _setting("steps between lines in the log", "train_cfg.log_interval", ge=1)
    track: str | dict[str, Any] | list[str | dict[str, Any]] | None = _setting(
        "a [tracking service](training.md#tracking-services) that gets all figures as well: its name, or "
        "`dict(type=name, …)` with arguments of it, or a list",
        "train_cfg.track",
    )
    val_interval: int = _setting(
        "steps between [validations](training.md#validation)", "train_cfg.validation.interval", ge=1
    )
    val_metric: Metric = _setting(
        "metric of the best checkpoint, see [validation](training.md#validation)",
        "train_cfg.validation.metric",
    )
    val_patience: int | None = _setting(
        "training ends after this many validations in a row without a new best; `None` trains to the end",
        "train_cfg.validation.patience",
        ge=1,
    )

    @field_validator("track")
    @classmethod
    def _names_services(cls, value: Any) -> Any:
        try:
            as_services(value)
        except PolarError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("data", "val_data")
    @classmethod
    def _names_sources(cls, value: Any, info: ValidationInfo) -> list[DataSource] | None:
        if value is None and info.field_name == "val_data":
            return None
        try:
            return as_sources(value)
        except PolarError as error:
            raise ValueError(str(error)) from error


def check_settings(
    config: Path, parsed: ParsedConfig, options: Options | None = None
) -> tuple[Settings, list[str]]:
    """Checks the settings of a config, and that each has an effect.

    Args:
        config: The file, for messages.
        parsed: What it says, ``options`` in place.
        options: ``--cfg-options``.

    Returns:
        The values that training reads; and warnings, of names without effect.

    Raises:
        PolarError: A value is wrong, or a name is unknown and close to a known one.
    """
    options = options or {}
    problems, warnings = _check_names(parsed, options)
    values: dict[str, Any] = {}
    for name, info in Settings.model_fields.items():
        place = _place(name, info)
        given, used = parsed.names.get(name, _MISSING), part_of(parsed.names, place, _MISSING)
        if used is not _MISSING or given is not _MISSING:
            value = given if used is _MISSING else used
            values[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        if given is _MISSING or name in parsed.read or given == used or place == name:
            continue
        if name in options:
            problems.append(
                f"--cfg-options {name}={options[name]} would have no effect: no line of the config computes "
                f"{place} from it; set {place}"
            )
        elif not any(f"{place}.".startswith(f"{option}.") for option in options):
            now = "there is none" if used is _MISSING else f"that is {used!r}"
            warnings.append(f"{name} = {given!r} has no effect: training reads {place}, and {now}")
    if "pretrained_model_name_or_path" not in values:
        problems.append("has no pretrained_model_name_or_path = …, which xtuner looks for")
    settings = Settings.model_construct()
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems += _value_problems(error, values)
    if problems:
        shown = problems[:8] + ([f"… and {len(problems) - 8} more"] if problems[8:] else [])
        lines = "".join(f"\n  {problem}" for problem in shown)
        raise PolarError(f"{config}:{lines if problems[1:] else f' {problems[0]}'}")
    return settings, warnings


_MISSING: Any = object()


def _place(name: str, info: FieldInfo) -> str:
    """Where training reads a setting: a dotted path in a config."""
    assert isinstance(info.json_schema_extra, dict)
    return str(info.json_schema_extra["at"] or name)


def part_of(names: Any, path: str, default: Any) -> Any:
    """The part of nested dicts at a dotted path."""
    for key in path.split("."):
        if not isinstance(names, Mapping) or key not in names:
            return default
        names = names[key]
    return names


def _check_names(parsed: ParsedConfig, options: Options) -> tuple[list[str], list[str]]:
    """Problems and warnings of names that are none of ours."""
    problems, warnings = [], []
    known = [*Settings.model_fields, *STRUCTURE]
    for name, value in parsed.names.items():
        plain = not callable(value) and not isinstance(value, ModuleType) and not name.startswith("_")
        if name in known or name in parsed.read or not plain:
            continue
        alias = ALIASES.get(name)
        hint = f"did you mean {alias}?" if alias else did_you_mean(name, known)
        if hint:
            problems.append(f"{name} is no setting; {hint}")
        else:
            where = "--cfg-options " if name in {option.partition(".")[0] for option in options} else ""
            warnings.append(f"{where}{name} has no effect: it is no setting, and no line reads it")
    return problems, warnings


def _value_problems(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that is wrong."""
    found: dict[str, str] = {}
    for problem in error.errors():
        name, *path = map(str, problem["loc"])
        value = values[name]
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if isinstance(value, str) and problem["type"] in ("float_type", "int_type"):
            reason += "; write it without quotes" if isinstance(parse_value(value), (int, float)) else ""
        place = ".".join([name, *path])
        found.setdefault(name, f"{name} = {value!r}: {place if path else ''} {reason}".replace(":  ", ": "))
    return list(found.values())


# The line above a table of docs/configs.md, and the first setting in it.
MARKER = "<!-- Settings from {} on, by python -m polar_ft.training.settings -->"
FIRST_OF_TABLES = ("pretrained_model_name_or_path", "max_length")


def write_tables(page: str, configs: Path) -> str:
    """The page docs/configs.md with its tables of settings written again.

    Args:
        page: Its text.
        configs: The folder of the shipped configs, whose values the tables have.
    """
    names = ("polar_1_8b_custom", "polar_7b_custom", "polar_tiny_cpu")
    shipped = [read_config(configs / f"{name}.py").names for name in names]
    schema = Settings.model_json_schema(mode="serialization")["properties"]
    head = "| setting | values | what it does | 1.8B / 7B | tiny |\n|---|---|---|---|---|\n"
    every = list(Settings.model_fields)
    starts = [every.index(name) for name in FIRST_OF_TABLES]
    for first, end in zip(starts, [*starts[1:], len(every)], strict=True):
        marker = MARKER.format(every[first])
        before, _, after = page.partition(f"{marker}\n")
        rows = "".join(f"{_table_row(name, schema[name], shipped)}\n" for name in every[first:end])
        after = re.sub(r"^([|].*\n)*", "", after)
        page = f"{before}{marker}\n{head}{rows}{after}"
    return page


def _table_row(name: str, schema: Mapping[str, Any], shipped: Sequence[Mapping[str, Any]]) -> str:
    *published, tiny = [f"`{code_of(names[name])}`" if name in names else "(none)" for names in shipped]
    both = " / ".join(dict.fromkeys(published))
    cells = [f"`{name}`", _values(schema), schema["description"], both, "" if both == tiny else tiny]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(schema: Mapping[str, Any]) -> str:
    """What a setting may be, of its JSON schema; choices are in its description."""
    kinds = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "`True`, `False`",
        "array": "list",
        "object": "`dict(…)`",
        "null": "`None`",
    }
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "$ref" in schema:
        return "`dict(…)`"
    if "type" not in schema:
        return "[sources](#data)"
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
    return f"{kinds[schema['type']]} {bounds}".strip()


def code_of(value: Any) -> str:
    """A value as a config has it; 1e-5 is not 1e-05.

    >>> code_of(1e-05), code_of((0.9, 0.95)), code_of({"r": 8})
    ('1e-5', '(0.9, 0.95)', 'dict(r=8)')
    """
    if isinstance(value, Mapping):
        return f"dict({', '.join(f'{key}={item!r}' for key, item in value.items())})".replace("'", '"')
    return re.sub(r"e-0(\d)", r"e-\1", repr(value).replace("'", '"'))


if __name__ == "__main__":
    repository = Path(__file__).resolve().parents[2]
    file = repository / "docs" / "configs.md"
    write_atomically(file, write_tables(file.read_text(encoding="utf-8"), repository / "configs"))
