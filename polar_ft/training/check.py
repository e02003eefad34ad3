"""Checks of a run before anything is downloaded or loaded.

They need neither torch nor xtuner: ``polar-ft train`` calls `check_run` before it starts a process, and
`prepare_training` again for ``xtuner train``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polar_ft.data.reading import expand, read_examples
from polar_ft.data.split import prompt_key
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.model.base_folder import check_base
from polar_ft.training.config import (
    RunArguments,
    config_work_dir,
    did_you_mean,
    parse_arguments,
    read_config,
    shipped_by_xtuner,
)
from polar_ft.training.settings import Settings, check_settings, part_of


@dataclass(frozen=True)
class CheckedRun:
    """A run whose arguments, config and files have been checked.

    Attributes:
        config: The file.
        arguments: Of the run.
        names: The names of the config, with ``--cfg-options`` in place.
        settings: Its settings; None for a config that does not train with polar_ft.
        overridden: The options of names that the config sets, so that other lines may read them.
        warnings: Names without effect.
    """

    config: Path
    arguments: RunArguments
    names: Mapping[str, Any]
    settings: Settings | None
    overridden: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def base(self) -> str:
        """Folder or hub id of the base model."""
        return str(self.names["pretrained_model_name_or_path"])

    @property
    def template_settings(self) -> dict[str, Any] | None:
        """Keyword arguments of `PolarTemplate.from_pretrained`; None if the config has another template."""
        tokenizer = part_of(self.names, "train_dataloader.dataset.tokenizer", {})
        if tokenizer.get("type") != "polar_ft.template.PolarTemplate.from_pretrained":
            return None
        return {k: v for k, v in tokenizer.items() if k not in ("type", "pretrained_model_name_or_path")}

    @property
    def work_dir(self) -> Path:
        """Where xtuner puts the run."""
        run = self.arguments
        return run.work_dir or config_work_dir(run.config, run.options)

    @property
    def prepared_by(self) -> str:
        """The function that ``model_resource`` names."""
        return str(part_of(self.names, "model_resource.fn", ""))


def check_run(arguments: Sequence[str]) -> CheckedRun:
    """Checks a run before anything of it is loaded.

    Args:
        arguments: Those of ``xtuner train``, CONFIG among them.

    Raises:
        PolarError: It cannot be trained; the message says what is wrong in which file or option.
    """
    run = parse_arguments(arguments)
    exists = Path(run.config).exists()
    file = Path(run.config) if exists else shipped_by_xtuner(".py").get(run.config)
    if file is None:
        raise PolarError(f"{run.config}: no such config file; `ls configs` shows those that are shipped")
    _check_deepspeed(run.deepspeed)
    parsed = read_config(file, run.options)
    if not _is_ours(parsed.names):
        return CheckedRun(file, run, parsed.names, None, warnings=_check_other_config(file, parsed.names))
    if not parsed.imported:
        raise PolarError(
            f"{file}: names its classes as text, as the copy in a work folder does, which xtuner cannot "
            f"train; train the config that it is a copy of"
        )
    settings, warnings = check_settings(file, parsed, run.options)
    assigned = read_config(file).names.keys() if run.options else ()
    overridden = {name: value for name, value in run.options.items() if name.partition(".")[0] in assigned}
    checked = CheckedRun(file, run, parsed.names, settings, overridden, warnings)
    _check_data(settings)
    _check_base(checked)
    _check_work_dir(checked.work_dir)
    return checked


def check_rows(settings: Settings) -> None:
    """Reads every row, before a model is loaded.

    Raises:
        DataError: Rows cannot be used; the message names file and line.
        PolarError: Prompts of ``val_data`` are also in ``data``; runs of white space count as one space, as
            for ``polar-ft data split``.
    """
    held_out: dict[int, str] = {}
    for example in read_examples(settings.val_data) if settings.val_data else ():
        held_out.setdefault(prompt_key(example.prompt), example.source)
    found: dict[int, str] = {}
    for example in read_examples(settings.data) if settings.data else ():
        prompt = prompt_key(example.prompt)
        if prompt in held_out:
            found.setdefault(prompt, example.source)
    if found:
        prompt, place = next(iter(found.items()))
        raise PolarError(
            f"val_data: {len(found):,} of its {len(held_out):,} prompts are also in data ({held_out[prompt]} "
            f"and {place}, for instance), so validation would measure what was learned by heart; `polar-ft "
            f"data split` divides rows so that no prompt is on both sides"
        )


def _is_ours(names: Mapping[str, Any]) -> bool:
    places = ("model.type", "train_cfg.type", "train_dataloader.dataset.type", "model_resource.fn")
    return any(str(part_of(names, place, "")).startswith("polar_ft.") for place in places)


def _check_other_config(config: Path, names: Mapping[str, Any]) -> list[str]:
    """Other configs are xtuner's business; but flash_attn is found missing only after a download.

    Returns:
        Warnings: what polar_ft has to offer instead.
    """
    model = str(part_of(names, "model.type", "a model"))
    is_reward_model = model.endswith(".RewardModel")
    if names.get("use_varlen_attn") and find_spec("flash_attn") is None:
        raise PolarError(
            f"{config}: trains {model}, which needs flash_attn (not installed); polar_ft does not need it: "
            f"{f'`polar-ft migrate {config}` writes this config for it, or ' if is_reward_model else ''}copy "
            f"one of its configs (configs/polar_7b_custom.py) and set pretrained_model_name_or_path and data"
        )
    if is_reward_model:
        return [f"trains {model} of xtuner; `polar-ft migrate {config}` writes this config for polar_ft"]
    return []


def _check_deepspeed(deepspeed: str | None) -> None:
    if deepspeed is None:
        return
    if Path(deepspeed).is_file():
        read_json(Path(deepspeed))
        return
    shipped = sorted(name for name in shipped_by_xtuner(".json") if name.startswith("deepspeed"))
    if deepspeed not in shipped:
        hint = did_you_mean(deepspeed, shipped) or "check the spelling"
        raise PolarError(
            f"--deepspeed {deepspeed}: no such file, and xtuner ships {', '.join(shipped)}; {hint}"
        )


def _check_data(settings: Settings) -> None:
    """Raises PolarError for a file that does not exist; a data set of the hub is found when it is read."""
    for name in ("data", "val_data"):
        for source in getattr(settings, name) or []:
            try:
                expand(source.path)
            except PolarError as error:
                raise PolarError(f"{name}: {error}") from error


def _check_base(run: CheckedRun) -> None:
    """Checks the base model if it is here already, and no code of its folder has to be run for that."""
    if not run.prepared_by.startswith("polar_ft."):
        return  # a function of the user decides where the model is
    folder = Path(run.base)
    if not folder.is_dir():
        if run.prepared_by.endswith(".prepare_training") and run.base.startswith(("/", ".", "~")):
            resolve_folder(folder)  # a path, and no id of the hub: says that it does not exist
        return
    template = run.template_settings
    if template and template.get("allow_tokenizer_code") and not (folder / "tokenizer.json").is_file():
        template = None
    check_base(folder, template)


def _check_work_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PolarError(
            f"{folder}: the work folder cannot be written ({error.strerror}); name another with --work-dir"
        ) from error
