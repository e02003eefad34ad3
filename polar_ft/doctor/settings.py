"""What a config says of a run, read without building anything of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar_ft.errors import PolarError
from polar_ft.files import read_json
from polar_ft.model.settings import LoraSettings
from polar_ft.training.config import config_work_dir, read_config
from polar_ft.training.data import build_reward_dataset, with_defaults
from polar_ft.training.loop import TrainingLoop
from polar_ft.training.model import PolarRewardModel, weights_dtype
from polar_ft.training.settings import check_settings

MODEL = f"{PolarRewardModel.__module__}.{PolarRewardModel.__qualname__}"

# Of InternLM2 (arXiv 2403.17297), on which POLAR is built: only used where the model's folder is not here.
_VOCABULARY = dict(model_type="internlm2", bias=False, vocab_size=92544, num_key_value_heads=8)
PUBLISHED_SHAPES: dict[str, dict[str, Any]] = {
    "internlm/POLAR-1_8B": _VOCABULARY
    | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16),
    "internlm/POLAR-7B": _VOCABULARY
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
}


@dataclass(frozen=True)
class RunSettings:
    """What memory, steps and time of a run follow from.

    Attributes:
        config: The file.
        base: Folder or hub id of the base model.
        prepared_by: The function that the config's ``model_resource`` names; empty if there is none.
        dtype: In which weights are loaded, "bfloat16" for instance.
        autocast: Of training without DeepSpeed, on a GPU.
        attention: Attention backend.
        checkpointing: ``recompute_layers``.
        lora: Adapters; None where all weights are trained.
        train: ``train_dataset`` with its defaults: data, tokenizer, and what the step plan follows from.
        validation: Data of the validations, None for none.
        epochs: Of training.
        optimizer: Dotted name of its class.
        backend: Of torch.distributed.
        kept_checkpoints: How many are kept; below 1 all.
        work_dir: Where xtuner puts the run.
    """

    config: Path
    base: str
    prepared_by: str
    dtype: str
    autocast: bool
    attention: Any
    checkpointing: Any
    lora: LoraSettings | None
    train: dict[str, Any]
    validation: Any
    epochs: int
    optimizer: str
    backend: str
    kept_checkpoints: int
    work_dir: Path

    @property
    def max_packed_length(self) -> int:
        """Tokens that a pack may hold."""
        return self.train["max_packed_length"]


def read_settings(config: Path) -> RunSettings:
    """Reads a config of polar_ft.

    Classes are not imported: a lazy config holds their names.

    Raises:
        PolarError: There is no such file, it is not a config of ours, or a setting is wrong.
    """
    complete = read_config(config)
    parsed = complete.names

    def part(name: str) -> dict[str, Any]:
        value = parsed.get(name)
        if not isinstance(value, Mapping):
            raise PolarError(f"{config}: has no {name} = dict(…); start from one of configs/")
        return dict(value)

    model, train = part("model"), part("train_dataset")
    if model.get("type") != MODEL:
        raise PolarError(
            f"{config}: its model is {model.get('type')!r}, and only configs of polar_ft can be planned "
            f"({MODEL}); start from one of configs/"
        )
    check_settings(config, complete)
    for name in ("data", "tokenizer", "pretrained_model_name_or_path"):
        if name not in train:
            raise PolarError(f"{config}: train_dataset has no {name}; start from one of configs/")
    optim, loop = part("optim_wrapper"), with_defaults(TrainingLoop, part("train_cfg"))
    model = with_defaults(PolarRewardModel, model)
    lora = model["lora"]
    return RunSettings(
        config=config,
        base=str(train["pretrained_model_name_or_path"]),
        prepared_by=str((parsed.get("model_resource") or {}).get("fn") or ""),
        dtype=str(weights_dtype(model.get("llm", {}))).removeprefix("torch."),
        autocast=loop["autocast"] is not None,
        attention=model["attention"],
        checkpointing=model["activation_checkpointing"],
        lora=None if lora is None else LoraSettings.of_config(lora),
        train=with_defaults(build_reward_dataset, train),
        validation=(loop["validation"] or {}).get("data"),
        epochs=int(loop["max_epochs"]),
        optimizer=str((optim.get("optimizer") or {}).get("type")),
        backend=str(((parsed.get("env_cfg") or {}).get("dist_cfg") or {}).get("backend", "nccl")),
        kept_checkpoints=int(loop["save_total_limit"]),
        work_dir=config_work_dir(str(config)),
    )


def model_folder(settings: RunSettings) -> Path | None:
    """The base model's folder, if it is on this machine; nothing is downloaded."""
    if Path(settings.base).is_dir():
        return Path(settings.base)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(settings.base, local_files_only=True))
    except Exception:  # a path is no hub id, or the hub's cache does not have it
        return None


def read_shape(settings: RunSettings, model_config: Path | None) -> tuple[dict[str, Any], str]:
    """The ``config.json`` of the base model, and where it was read.

    Args:
        settings: Of the run.
        model_config: A ``config.json``, or a folder with one, to be read instead of the model's own.

    Raises:
        PolarError: It is not here, and it is not one of the published models.
    """
    folder = model_folder(settings)
    file = model_config or (folder / "config.json" if folder else None)
    if file is not None:
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise PolarError(f"{file}: no such file; name the config.json of a model")
        return read_json(file), str(file)
    known = PUBLISHED_SHAPES.get(settings.base.removesuffix("-Base"))
    if known is not None:
        return dict(known), "the published shape (the model is not on this machine)"
    prepare = ""
    if settings.prepared_by.rpartition(".")[2] not in ("", "prepare_training"):
        prepare = (
            f"--prepare runs {settings.prepared_by.rpartition('.')[2]} of the config, as training does; "
        )
    raise PolarError(
        f"{settings.base}: the model is not on this machine, so its size is not known; {prepare}"
        f"--model-config FILE takes the shapes from a config.json"
    )
