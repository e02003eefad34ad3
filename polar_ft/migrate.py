"""``polar-ft migrate``: a config of xtuner's own RewardModel, as POLAR published it, becomes one of ours.

The old file is read as training reads a config: its code runs, but what it imports is only named, so nothing
heavy is imported and nothing is downloaded. Every value of it is carried over, or named with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polar_ft.errors import PolarError
from polar_ft.files import unfinished
from polar_ft.options import Force
from polar_ft.training.config import ParsedConfig, read_config, shipped_by_xtuner
from polar_ft.training.settings import check_settings, code_of, part_of
from polar_ft.training.track import as_services

# Where the old values are: what xtuner and mmengine look for. All else is what these are computed from.
_ROOTS = (
    *("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks"),
    *("default_hooks", "env_cfg", "visualizer", "randomness", "log_level", "log_processor", "load_from"),
    *("resume", "work_dir"),
)
_DATASET = "train_dataloader.dataset"

# Places without a setting of ours, and why none is needed.
_NOT_NEEDED = {
    "model.use_varlen_attn": "every run is packed, and flash_attn is used if it is there",
    "model.llm.type": "weights are read by polar_ft",
    "model.llm.trust_remote_code": "no model code of a folder is run",
    "model.llm.attn_implementation": 'attention="auto" of model takes the first that runs',
    "model.llm.torch_dtype": "bfloat16, with float32 master weights by DeepSpeed",
    "model.llm.quantization_config": "load_in_4bit of lora: NF4 in blocks of 64, computed in bfloat16",
    "model.lora": "our adapters have no bias",
    f"{_DATASET}.type": "build_reward_dataset reads the rows",
    f"{_DATASET}.tokenizer": "PolarTemplate tokenizes; classes with code are named in allow_tokenizer_code",
    f"{_DATASET}.num_proc": "tokenized once by all cores, then cached",
    f"{_DATASET}.use_varlen_attn": "every run is packed",
    f"{_DATASET}.shuffle_before_pack": "the step plan shuffles, in another order in every epoch",
    f"{_DATASET}.is_dpo": "only reward models are trained",
    f"{_DATASET}.is_reward": "only reward models are trained",
    f"{_DATASET}.is_reference": "every row has a reference, which may be empty",
    f"{_DATASET}.dataset_map_fn": "rows are read in polar_ft's formats",
    "train_dataloader.sampler": "the step plan decides the order, by seed",
    "train_dataloader.collate_fn": "packs are built by the data set",
    "optim_wrapper.type": "DeepSpeed's, or automatic mixed precision in bfloat16",
    "optim_wrapper.loss_scale": "bfloat16 needs no loss scaling",
    "optim_wrapper.dtype": "bfloat16",
    "optim_wrapper.clip_grad.error_if_nonfinite": "a step without a finite gradient is skipped and reported",
    "param_scheduler": "warm-up and cosine are the loop's",
    "train_cfg.type": "TrainingLoop",
    "custom_hooks": "the attention layout travels as an argument",
    "default_hooks": "the training loop does it",
    "env_cfg.cudnn_benchmark": "no convolutions",
    "env_cfg.mp_cfg": "data is memory-mapped",
    "visualizer": "TensorBoard and JSON lines, as in every config of ours",
    "log_level": "train.log has everything",
    "log_processor": "everything counts optimizer steps",
}


@dataclass
class Migration:
    """What an old config becomes.

    Attributes:
        settings: The lines ``name = value`` of the new config, by name.
        parts: Further arguments of the dicts below, by (dict, name).
        changed: (old, new, why) of what has another value or another meaning.
        not_needed: (old, why) of what has no counterpart and needs none.
        open: Old values that are not carried over; the user decides what to do.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[tuple[str, str], Any] = field(default_factory=dict)
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    not_needed: list[tuple[str, str]] = field(default_factory=list)
    open: list[tuple[str, str]] = field(default_factory=list)


class _Old:
    """The values of an old config; notes which were asked for."""

    def __init__(self, parsed: ParsedConfig) -> None:
        self.names = parsed.names
        self._taken: list[str] = []
        unread = parsed.names.keys() - parsed.read - parsed.imported - {*_ROOTS}
        self._tops = sorted(name for name in unread if not name.startswith("_"))

    def take(self, place: str, default: Any = None) -> Any:
        """The value at a dotted place; everything below it counts as carried over."""
        self._taken.append(place)
        return part_of(self.names, place, default)

    def rest(self) -> Iterator[tuple[str, Any]]:
        """Places that were not asked for, and their values."""
        roots = {name: self.names[name] for name in (*_ROOTS, *self._tops) if name in self.names}
        for place, value in _leaves(roots, ""):
            if not any(f"{place}.".startswith(f"{taken}.") for taken in self._taken):
                yield place, value


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """
    >>> list(_leaves({"a": {"b": 1}, "c": [{"d": 2}], "e": [3]}, ""))
    [('a.b', 1), ('c.0.d', 2), ('e', [3])]
    """
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        yield place, value
        return
    for key, item in items:
        yield from _leaves(item, f"{place}.{key}".lstrip("."))


def migrate_config(config: Path, gpus: int = 1) -> Migration:
    """Reads an old config.

    Args:
        config: The file.
        gpus: That it was run on, for the size of a step.

    Raises:
        PolarError: It cannot be read, or trains no reward model of xtuner's.
    """
    parsed = read_config(config)
    old, new = _Old(parsed), Migration()
    model = str(old.take("model.type", ""))
    if model.startswith("polar_ft."):
        raise PolarError(f"{config}: is a config of polar_ft already; polar-ft train {config} trains it")
    if not model.endswith(".RewardModel"):
        raise PolarError(
            f"{config}: trains {model or 'no model'}; migrate reads configs of xtuner's RewardModel "
            f"(xtuner/configs/reward_model, and those of POLAR)"
        )
    _model(old, new)
    _tokens(old, new)
    _data(old, new)
    _batch(old, new, gpus)
    _optimizer(old, new)
    _schedule(old, new)
    _runtime(old, new)
    for place, value in old.rest():
        why = next((why for start, why in _NOT_NEEDED.items() if f"{place}.".startswith(f"{start}.")), None)
        if value in (None, [], {}):
            continue
        shown = str(value).rpartition(".")[2] if place.endswith(".type") else code_of(value)
        if why is None or _is_open(place, value):
            new.open.append((f"{place} = {shown}", "polar_ft has no such setting"))
        else:
            new.not_needed.append((f"{place} = {shown}", why))
    return new


def _is_open(place: str, value: Any) -> bool:
    """Whether a value of a place that needs no counterpart does something that the reason does not cover."""
    if place == f"{_DATASET}.type":
        return not str(value).endswith(".build_preference_dataset")
    if place.startswith("custom_hooks") and place.endswith(".type"):
        return not str(value).endswith(("VarlenAttnArgsToMessageHubHook", "DatasetInfoHook"))
    if place.startswith("param_scheduler") and place.endswith(".type"):
        return not str(value).endswith((".LinearLR", ".CosineAnnealingLR"))
    if place.startswith("default_hooks") and place.endswith(".type"):
        return not str(value).startswith("mmengine.hooks.")
    return False


def _model(old: _Old, new: Migration) -> None:
    base = str(
        old.take("model.llm.pretrained_model_name_or_path", old.take("pretrained_model_name_or_path", ""))
    )
    new.settings["pretrained_model_name_or_path"] = base
    new.settings["loss_type"] = old.take("model.loss_type", "ranking")
    new.settings["penalty_type"] = old.take("model.penalty_type", "log_barrier")
    weight = old.take("model.penalty_weight", 0.01)
    if weight != 0.01:
        new.parts["model", "penalty_weight"] = weight
    if not old.take("model.use_activation_checkpointing", True):
        new.settings["recompute_layers"] = "none"
    else:
        new.changed.append(
            (
                "all layers recomputed",
                'recompute_layers = "auto"',
                "as few as the memory allows; the same gradients",
            )
        )
    new.changed.append(
        (
            f"loss_type = {code_of(new.settings['loss_type'])}, mean of means over packs",
            "mean over the pairs of a step",
            "a pair weighs the same in a full and in an empty pack, on any number of GPUs",
        )
    )
    if old.take("model.lora.type") is None:
        return
    lora = {
        "r": old.take("model.lora.r", 8),
        "alpha": old.take("model.lora.lora_alpha", 8),
        "dropout": old.take("model.lora.lora_dropout", 0.0),
    }
    targets = old.take("model.lora.target_modules")
    if isinstance(targets, (list, tuple)):
        new.open.append(
            (
                f"model.lora.target_modules = {code_of(targets)}",
                "all projections get adapters; name yours in lora",
            )
        )
    if old.take("model.llm.quantization_config.load_in_4bit", False):
        lora["load_in_4bit"] = True
    if old.take("model.llm.quantization_config.load_in_8bit", False):
        new.open.append(("load_in_8bit = True", "there are four bits or none"))
    new.settings["lora"] = lora
    new.changed.append(
        (
            "the trained head is lost on saving",
            "adapters and head are saved",
            "xtuner keeps only the adapters of LoRA",
        )
    )


def _tokens(old: _Old, new: Migration) -> None:
    """Template and length limits."""
    base = new.settings["pretrained_model_name_or_path"].lower()
    token = old.take(f"{_DATASET}.reward_token_id")
    old.take("model.reward_token_id")
    references = bool(part_of(old.names, f"{_DATASET}.is_reference", False))
    new.settings["reward_token_id"] = token
    if references or "polar" in base:
        pass  # as in the config that is the template
    elif "internlm2" in base and token == 92527:
        tokens = dict(separator="[UNUSED_TOKEN_0]", reward="[UNUSED_TOKEN_130]")
        why = "ids 92397 and 92527, as in POLAR's tokenizer, which calls the first one <|reward|>"
        new.settings["reward_tokens"] = tokens
        new.changed.append((f"reward_token_id = {token}", f"reward_tokens = {code_of(tokens)}", why))
    elif "llama-3" in base and token == 128002:
        tokens = dict(separator="<|reserved_special_token_1|>", reward="<|reserved_special_token_0|>")
        why = "the template needs a second token, between reference and answer"
        new.settings |= {"reward_tokens": tokens, "allow_tokenizer_code": ()}
        new.changed.append((f"reward_token_id = {token}", f"reward_tokens = {code_of(tokens)}", why))
    else:
        new.settings |= {
            "reward_tokens": dict(separator="<|reward|>", reward="[UNUSED_TOKEN_130]", add=True),
            "reward_token_id": None,
        }
        new.open.append(
            (f"reward_token_id = {token}", "two new tokens are added; docs/configs.md, another base")
        )
    length = old.take(f"{_DATASET}.max_length")
    new.settings["max_length"] = length
    response = old.take(f"{_DATASET}.max_response_length", 4096)
    if not references:
        response = length // 4
        new.changed.append(
            (
                "no limit of a response",
                f"max_response_length = {response}",
                "a quarter of max_length, for a choice",
            )
        )
        new.changed.append(
            (
                "is_reference = False: chat template, no reference",
                "POLAR's template: prompt, reference, answer",
                'rows need a reference; "reference": "" has none, which a POLAR base does worse',
            )
        )
    new.settings["max_response_length"] = response


def _data(old: _Old, new: Migration) -> None:
    kind = str(old.take(f"{_DATASET}.dataset.type", ""))
    path = old.take(f"{_DATASET}.dataset.path")
    files = old.take(f"{_DATASET}.dataset.data_files")
    folder = old.take(f"{_DATASET}.dataset.data_dir")
    name = old.take(f"{_DATASET}.dataset.name")
    split = old.take(f"{_DATASET}.dataset.split", "train")
    old.take(f"{_DATASET}.dataset.suffix")  # our reader knows the files of a folder
    if kind.endswith("load_dataset") and path not in (None, "json"):
        data: Any = f"{path}:{name}" if name else path
        data = data if split == "train" else {"path": data, "split": split}
        if files is not None:
            new.open.append((f"data_files = {code_of(files)}", f"of {path}: name the files in data"))
    elif files is not None:
        data = files[0] if isinstance(files, (list, tuple)) and len(files) == 1 else files
        data = list(data) if isinstance(data, tuple) else data
    elif folder is not None:
        data = folder
    else:
        data = "data/train.jsonl"
        new.open.append((f"{_DATASET}.dataset = {kind}", "set data to the file or hub id of your rows"))
    new.settings["data"] = data
    if "/your/" in str(data):
        new.open.append((f"data = {code_of(data)}", "a placeholder: name the file or hub id of your rows"))
    function = old.take(f"{_DATASET}.dataset_map_fn")
    if function is not None:
        new.open.append(
            (
                f"dataset_map_fn = {function}",
                "convert the rows first: `polar-ft data convert --help` lists the formats; then set data",
            )
        )


def _batch(old: _Old, new: Migration, gpus: int) -> None:
    size = old.take("train_dataloader.batch_size", 1)
    counts = old.take("optim_wrapper.accumulative_counts", 1)
    packed = bool(part_of(old.names, f"{_DATASET}.use_varlen_attn", False))
    tokens = old.take(f"{_DATASET}.max_packed_length")
    if packed:
        new.settings["max_packed_length"] = tokens or 16384
        new.settings["global_batch_pairs"] = 320
        new.changed.append(
            (
                f"a step of {counts} packs a GPU, however many pairs they hold",
                "global_batch_pairs = 320",
                "the number that POLAR was fine-tuned with (arXiv 2507.05197); every step has about as many",
            )
        )
    else:
        new.settings["max_packed_length"] = 2 * size * new.settings["max_length"]
        new.settings["global_batch_pairs"] = size * counts * gpus
        new.changed.append(
            (
                f"batch_size = {size}, accumulative_counts = {counts}, {gpus} GPU(s)",
                f"global_batch_pairs = {size * counts * gpus}",
                "pairs of a step over all GPUs; --gpus says on how many the old config ran",
            )
        )
    sequence = old.take("sequence_parallel_size", 1)
    if sequence != 1:
        new.open.append((f"sequence_parallel_size = {sequence}", "one sequence is not split over GPUs"))
    new.parts["train_dataloader", "num_workers"] = old.take("train_dataloader.num_workers", 0)


def _optimizer(old: _Old, new: Migration) -> None:
    kind = str(old.take("optim_wrapper.optimizer.type", "AdamW"))
    if kind.rpartition(".")[2] != "AdamW":
        new.open.append(
            (f"optimizer = {kind}", "AdamW of torch is used; name another in optimizer = dict(type=…)")
        )
    new.settings["lr"] = float(old.take("optim_wrapper.optimizer.lr"))
    new.settings["betas"] = tuple(old.take("optim_wrapper.optimizer.betas", (0.9, 0.999)))
    new.settings["weight_decay"] = old.take("optim_wrapper.optimizer.weight_decay", 0.01)
    norm = old.take("optim_wrapper.clip_grad.max_norm")
    new.settings["max_norm"] = 1 if norm is None else norm
    if norm is None:
        new.changed.append(("gradients are not clipped", "max_norm = 1", "set it high to clip none"))


def _schedule(old: _Old, new: Migration) -> None:
    epochs = old.take("train_cfg.max_epochs", 1)
    new.settings["max_epochs"] = epochs
    if iterations := old.take("train_cfg.max_iters"):
        counts = max(1, part_of(old.names, "optim_wrapper.accumulative_counts", 1))
        new.parts["train_cfg", "max_steps"] = max(1, iterations // counts)
        new.changed.append(
            (
                f"max_iters = {iterations}",
                f"max_steps = {max(1, iterations // counts)}",
                "counts steps, not micro-batches",
            )
        )
    lr, ratio = new.settings["lr"], None
    warmup: float | None = 0.0
    factor = 0.1
    schedulers = part_of(old.names, "param_scheduler", None) or []
    for scheduler in [schedulers] if isinstance(schedulers, Mapping) else schedulers:
        kind = str(scheduler.get("type", ""))
        if kind.endswith(".LinearLR"):
            warmup = scheduler.get("end", 0) / epochs if scheduler.get("by_epoch", True) else None
            factor = scheduler.get("start_factor", 1 / 3)
        elif kind.endswith(".CosineAnnealingLR"):
            ratio = scheduler.get("eta_min_ratio", scheduler.get("eta_min", 0.0) / lr)
    new.settings["warmup_ratio"] = warmup if warmup is not None else 0.03
    if warmup is None:
        new.open.append(("a warm-up in iterations", "warmup_ratio = 0.03 is a share of the steps; set yours"))
    if ratio is not None:
        if abs(ratio - 0.1) > 1e-9:
            new.parts["train_cfg", "min_lr_ratio"] = round(ratio, 9)
        if warmup and abs(factor - ratio) > 1e-3:
            new.changed.append(
                (
                    f"warm-up from start_factor = {code_of(factor)} of lr",
                    f"warm-up from {ratio:.0%} of lr",
                    "a factor where a rate was meant (lr · lr · 0.1)"
                    if factor == lr * 0.1
                    else "one lowest rate",
                )
            )


def _runtime(old: _Old, new: Migration) -> None:
    counts = max(1, part_of(old.names, "optim_wrapper.accumulative_counts", 1))
    interval = old.take("default_hooks.checkpoint.interval", 500)
    saves = part_of(old.names, "default_hooks.checkpoint", None)
    # mmengine's default; the default of a config without this hook is ours.
    by_epoch = isinstance(saves, Mapping) and saves.get("by_epoch", True)
    steps = max(1, interval // counts) if interval > 0 and not by_epoch else 500
    new.settings["save_steps"] = steps
    if by_epoch:
        each = "each epoch" if interval == 1 else f"every {interval} epochs"
        new.open.append((f"a checkpoint {each}", "save_steps = 500 counts steps; the last is always saved"))
    elif steps != interval:
        new.changed.append(
            (
                f"save_steps = {interval}",
                f"save_steps = {steps}",
                f"counts steps, of {counts} micro-batches each",
            )
        )
    keep = old.take("default_hooks.checkpoint.max_keep_ckpts", -1)
    new.settings["save_total_limit"] = max(0, keep)
    logged = old.take("default_hooks.logger.interval")
    if logged not in (None, 1):
        new.changed.append((f"log every {logged} micro-batches", "log_interval = 1", "every step"))
    seed = old.take("randomness.seed")
    new.settings["seed"] = 0 if seed is None else seed
    if seed is None:
        new.changed.append(("a random seed", "seed = 0", "a run can be repeated"))
    if old.take("randomness.deterministic", False):
        new.open.append(("deterministic = True", "set it in randomness"))
    backend = old.take("env_cfg.dist_cfg.backend", "nccl")
    if backend != "nccl":
        new.open.append((f"backend = {code_of(backend)}", "set it in env_cfg"))
    for name, advice in (
        ("load_from", "its weights: convert it, and name the folder as base"),
        ("resume", "--resume"),
    ):
        if value := old.take(name):
            new.open.append((f"{name} = {code_of(value)}", advice))
    if (folder := old.take("work_dir")) is not None:
        new.parts["", "work_dir"] = folder
    services = {"WandbVisBackend": "wandb", "MLflowVisBackend": "mlflow", "AimVisBackend": "aim"}
    services |= {
        "ClearMLVisBackend": "clearml",
        "NeptuneVisBackend": "neptune",
        "DVCLiveVisBackend": "dvclive",
    }
    kinds = [
        str(b.get("type", "")).rpartition(".")[2] for b in part_of(old.names, "visualizer.vis_backends", [])
    ]
    tracked = [services[kind] for kind in kinds if kind in services]
    if tracked:
        track = tracked[0] if len(tracked) == 1 else tracked
        try:
            as_services(track)
            new.settings["track"] = track
        except PolarError as error:
            new.open.append((f"visualizer of {', '.join(tracked)}", f"track = {code_of(track)}; {error}"))


def config_text(new: Migration, source: Path) -> str:
    """A config of ours with other values.

    Args:
        new: The values.
        source: The old file, for the first line.
    """
    template = Path(__file__).resolve().parents[1] / "configs" / "polar_7b_custom.py"
    if not template.is_file():
        raise PolarError(f"{template}: not found; run this with the clone of polar_ft, which has the configs")
    text = re.sub(
        r"\A(#.*\n)+", f"# Migrated from {source.name} by polar-ft migrate.\n", template.read_text("utf-8")
    )
    for name, value in new.settings.items():
        line = f"{name} = {code_of(value)}"
        text, count = re.subn(rf"(?m)^{name} = .*?(  #.*)?$", lambda found: line + (found[1] or ""), text)  # noqa: B023
        assert count == 1, name
    for (owner, name), value in new.parts.items():
        if not owner:
            text += f"{name} = {code_of(value)}\n"
        elif f"{name}=" in re.search(rf"(?ms)^{owner} = dict\(.*?\)$", text)[0]:  # type: ignore[index]
            text = re.sub(rf"(?m)^({owner} = dict\(.*?){name}=\w+", rf"\g<1>{name}={code_of(value)}", text)
        else:
            text = re.sub(
                rf"(?ms)^({owner} = dict\(.*?\n)\)$", rf"\g<1>    {name}={code_of(value)},\n)", text
            )
    return text


def migrate(
    old_config: Annotated[
        str,
        typer.Argument(metavar="OLD_CONFIG", help="A config of xtuner's RewardModel, or its name in xtuner."),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The config to write.", show_default="NAME_polar_ft.py"),
    ] = None,
    gpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs that the old config ran on, for the size of a step.")
    ] = 1,
    force: Force = False,
) -> None:
    """Turn a config of POLAR or xtuner into one of polar_ft.

    Lists what changed and why, and what could not be carried over. The code of the old file is run, but what
    it imports is not, and nothing is downloaded or trained.
    """
    file = Path(old_config)
    if not file.exists():
        with suppress(ModuleNotFoundError):  # the message below
            file = shipped_by_xtuner(".py").get(old_config, file)
    new = migrate_config(file, gpus)
    target = out or Path(f"{file.stem}_polar_ft.py")
    if target.exists() and not force:
        raise PolarError(f"{target}: exists; name another file, or replace it with --force")
    with unfinished(target) as part:
        checked = part.with_suffix(".py")
        checked.write_text(config_text(new, file), encoding="utf-8")
        try:
            _, warnings = check_settings(checked, read_config(checked))
        finally:
            checked.rename(part)
    _show(new, target, warnings)


def _show(new: Migration, target: Path, warnings: list[str]) -> None:
    console = Console(highlight=False)
    console.print(f"wrote {target}", markup=False, soft_wrap=True)
    kept = ", ".join(f"{name} = {code_of(value)}" for name, value in new.settings.items())
    console.print(f"\nsettings: {kept}", markup=False)
    by_reason: dict[str, list[str]] = {}
    for old, why in new.not_needed:
        by_reason.setdefault(why, []).append(old)
    for title, columns, rows in (
        ("changed", ("old", "new", "why"), new.changed),
        ("no longer needed", ("why", "old"), [(why, "; ".join(olds)) for why, olds in by_reason.items()]),
        ("NOT carried over: decide", ("old", "what to do"), new.open),
    ):
        if rows:
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            console.print()
            console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    console.print(
        f"\nnext: polar-ft train {target} --deepspeed deepspeed_zero2", soft_wrap=True, markup=False
    )
