"""A config and a checkpoint to a HuggingFace folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from xtuner.registry import BUILDER

from polar_ft.conversion.adapter import holds_adapter, merge_adapter, write_adapter_folder
from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.checkpoint_files import read_manifest, resolve_checkpoint
from polar_ft.conversion.huggingface import HEAD, write_hf_folder
from polar_ft.conversion.llama import llama_config
from polar_ft.conversion.verify import (
    Verification,
    compare_rewards,
    sample,
    scorer_of_weights,
)
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.model.weights import load_backbone
from polar_ft.reward_scale import TOLERANCES
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.template import PolarTemplate
from polar_ft.tokenizer import tokenizer_digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_checkpoint(
    config_file: Path,
    checkpoint: Path,
    out_dir: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
    adapter_only: bool = False,
    as_llama: bool = False,
    verify: Path | None = None,
    verify_tolerance: float | None = None,
    allow_tokenizer_code: Iterable[str] = (),
    on_written: Callable[[int, int], None] | None = None,
    on_verified: Callable[[Verification], None] | None = None,
) -> torch.dtype:
    """Converts what a training run saved.

    Args:
        config_file: The config of the run: ours, or one for xtuner 0.2.0's own RewardModel.
        checkpoint: ``iter_N.pth``, a file or a DeepSpeed directory; or see `resolve_checkpoint`.
        out_dir: Folder to write.
        dtype: "float32", "bfloat16" or "float16"; None takes the one in which the model was trained.
        max_shard_size: Largest weight file.
        force: Replace a folder that is not empty.
        adapter_only: Write the adapters of a LoRA run instead of merging them into the base.
        as_llama: Write an InternLM2 model as LlamaForSequenceClassification; see `llama_config`.
        verify: Rows that checkpoint and folder have to give the same rewards; see `compare_rewards`.
        verify_tolerance: Largest difference of two rewards, as a share of the range of all; None takes that
            of the dtype in `polar_ft.reward_scale.TOLERANCES`.
        allow_tokenizer_code: See `PolarTemplate.from_pretrained`; for configs that do not say it themselves.
        on_written: Called after each weight file with the bytes written so far and in all.
        on_verified: Called with the outcome of ``verify``.

    Returns:
        The dtype that was written.

    Raises:
        PolarError: Config, checkpoint or base model do not fit, or the folder does not give the rewards of
            the checkpoint; the message says which and what to do. Nothing is left behind.
    """
    _check_dtype(dtype)
    if as_llama and adapter_only:
        raise PolarError("--as llama: adapters alone are no Llama; leave out --adapter-only or --as")
    config = read_training_config(config_file)
    work_dir = Path(config.get("work_dir") or Path("work_dirs", config_file.stem))  # as xtuner puts it
    checkpoint = resolve_checkpoint(checkpoint, work_dir)
    base = config["pretrained_model_name_or_path"]
    template = build_template(config, allow_tokenizer_code)
    # Before anything that takes long.
    examples = sample(verify) if verify is not None else None
    _check_tokenizer(checkpoint, base)
    if as_llama:
        llama_config(read_json(resolve_folder(base) / "config.json"), template, base)
    weights = read_checkpoint(checkpoint)
    tensors, written = weights.tensors, weights.dtype
    if adapter_only and not holds_adapter(tensors):
        raise PolarError(f"--adapter-only: {checkpoint} was not trained with lora = dict(…)")
    if adapter_only and dtype is not None:
        raise PolarError("--dtype: adapters are written in float32, as they are; leave it out")
    merged = merge_adapter(tensors, base, template) if holds_adapter(tensors) else None
    if adapter_only:
        written = torch.float32
    elif merged is not None:
        # Adapters are float32 also where the base is not.
        written = min(written, merged.dtype, key=lambda kind: kind.itemsize)
    if dtype is not None:
        written = DTYPES[dtype]

    def check(folder: Path) -> None:
        if examples is None:
            return
        outcome = compare_rewards(
            examples,
            trained=lambda: scorer_of_weights(tensors if merged is None else merged, base, template),
            exported=lambda: RewardScorer.from_pretrained(folder, dtype=torch.float32),
            tolerance=_tolerance(written, verify_tolerance),
        )
        if on_verified is not None:
            on_verified(outcome)

    if adapter_only:
        write_adapter_folder(
            tensors, base_folder=base, out_dir=out_dir, template=template, force=force, check=check
        )
    else:
        write_hf_folder(
            tensors if merged is None else merged,
            base_folder=base,
            out_dir=out_dir,
            template=template,
            dtype=written,
            max_shard_size=max_shard_size,
            force=force,
            as_llama=as_llama,
            on_written=on_written,
            check=check,
        )
    return written


def convert_folder(
    folder: str | os.PathLike[str],
    out_dir: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
    verify: Path | None = None,
    verify_tolerance: float | None = None,
    allow_tokenizer_code: Iterable[str] = (),
    on_written: Callable[[int, int], None] | None = None,
    on_verified: Callable[[Verification], None] | None = None,
) -> torch.dtype:
    """Writes a reward model that is a HuggingFace folder as LlamaForSequenceClassification.

    Adapters are merged into their base. The weights are memory-mapped.

    Args:
        folder: Folder or hub id of an InternLM2 reward model; of a Llama, the copy has its tensors as they
            are.
        out_dir: Folder to write; other arguments are those of `convert_checkpoint`.
        dtype: None keeps that of the weights.
        max_shard_size: Largest weight file.
        force: Replace a folder that is not empty.
        verify: Rows that both folders have to give the same rewards.
        verify_tolerance: Largest difference of two rewards, as a share of the range of all.
        allow_tokenizer_code: See `PolarTemplate.from_pretrained`.
        on_written: Called after each weight file with the bytes written so far and in all.
        on_verified: Called with the outcome of ``verify``.

    Returns:
        The dtype that was written.

    Raises:
        PolarError: The folder is no reward model of these families, or the copy has other rewards. Nothing
            is left behind.
    """
    _check_dtype(dtype)
    template = PolarTemplate.from_pretrained(folder, allow_tokenizer_code=allow_tokenizer_code)
    llama_config(read_json(resolve_folder(folder) / "config.json"), template, os.fspath(folder))
    examples = sample(verify) if verify is not None else None
    decoder, head, _ = load_backbone(folder)
    if head is None:
        raise PolarError(
            f"{os.fspath(folder)}: has no reward head, so it is a base model and gives no rewards"
        )
    written = decoder.dtype if dtype is None else DTYPES[dtype]
    state = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()} | {HEAD: head}

    def scorer(of: str | os.PathLike[str]) -> RewardScorer:
        return RewardScorer.from_pretrained(
            of, dtype=torch.float32, allow_tokenizer_code=allow_tokenizer_code
        )

    def check(copy: Path) -> None:
        if examples is None:
            return
        outcome = compare_rewards(
            examples,
            trained=lambda: scorer(folder),
            exported=lambda: scorer(copy),
            tolerance=_tolerance(written, verify_tolerance),
        )
        if on_verified is not None:
            on_verified(outcome)

    write_hf_folder(
        state,
        base_folder=folder,
        out_dir=out_dir,
        template=template,
        dtype=written,
        max_shard_size=max_shard_size,
        force=force,
        as_llama=True,
        repackaged=True,
        on_written=on_written,
        check=check,
    )
    return written


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise PolarError(f"--dtype {dtype}: is not one of {', '.join(DTYPES)}")


def _tolerance(written: torch.dtype, chosen: float | None) -> float:
    return TOLERANCES[str(written).removeprefix("torch.")] if chosen is None else chosen


def _check_tokenizer(checkpoint: Path, base: str) -> None:
    """Raises PolarError if the base model's tokenizer is not that of the run: rewards would be wrong."""
    manifest = read_manifest(checkpoint) if checkpoint.exists() else None
    then = (manifest.run or {}).get("tokenizer") if manifest is not None else None
    if then is not None and then != tokenizer_digest(resolve_folder(base)):
        raise PolarError(
            f"{base}: its tokenizer is not the one that {checkpoint} was trained with; restore the base "
            f"model of the run, or name the run's config"
        )


def read_training_config(file: Path) -> Config:
    """A config of a training run.

    Raises:
        PolarError: There is none, it cannot be parsed, or it names no model.
    """
    if not file.is_file():
        raise PolarError(f"{file}: no such config; name the one that the run was started with")
    try:
        config = Config.fromfile(file)
    except Exception as error:
        raise PolarError(f"{file}: cannot be read as a config ({type(error).__name__}: {error})") from error
    if "pretrained_model_name_or_path" not in config:
        raise PolarError(f"{file}: has no pretrained_model_name_or_path; is it a config of a training run?")
    return config


def build_template(config: Config, allow_tokenizer_code: Iterable[str] = ()) -> PolarTemplate:
    """The template that a run of this config trains with.

    Args:
        config: Ours, whose ``tokenizer`` is a `PolarTemplate`, or one of xtuner's.
        allow_tokenizer_code: For one of xtuner's.
    """
    tokenizer: dict[str, Any] = dict(config.get("tokenizer", {}))
    if getattr(tokenizer.get("type"), "__self__", None) is PolarTemplate:
        return BUILDER.build(tokenizer)
    tokens = config.get("reward_tokens") or {}
    return PolarTemplate.from_pretrained(
        config["pretrained_model_name_or_path"],
        separator=tokens.get("separator"),
        reward_token=tokens.get("reward"),
        allow_tokenizer_code=allow_tokenizer_code,
        reward_token_id=config.get("reward_token_id"),
        max_length=config.get("max_length"),
        max_response_length=config.get("max_response_length"),
    )
