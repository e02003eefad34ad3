"""Writing a HuggingFace folder that is a drop-in for the published reward models."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from polar_ft.conversion.model_card import model_card
from polar_ft.errors import PolarError
from polar_ft.model.internlm2 import fuse_wqkv, split_wqkv, to_internlm2_name, to_llama_names
from polar_ft.model.weights import decoder_config, empty_decoder, read_json
from polar_ft.template import SETTINGS_KEY, PolarTemplate, resolve_folder

HEAD = "v_head.weight"
NAMED = 20  # tensors in an error message
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenization_*.py",
    "generation_config.json",
)
CODE_FILES = ("configuration_internlm2.py", "modeling_internlm2.py")
SEQUENCE_CLASSIFIERS = {"llama": "LlamaForSequenceClassification", "qwen2": "Qwen2ForSequenceClassification"}


def write_hf_folder(
    state: Mapping[str, torch.Tensor],
    *,
    base_folder: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    template: PolarTemplate,
    dtype: torch.dtype,
    max_shard_size: str | int = "5GB",
    force: bool = False,
) -> None:
    """Writes weights, config, tokenizer, model code and a README.

    The folder appears whole or not at all: it is written beside and renamed.

    Args:
        state: Tensors by name, ``llm.…`` in Llama's or InternLM2's names, and ``v_head.weight``.
        base_folder: The model that was fine-tuned: its config, tokenizer and code files are taken over.
        out_dir: Folder to write.
        template: What the model was trained with; the config keeps its settings.
        dtype: Of the weights that are written.
        max_shard_size: Largest weight file, as "5GB".
        force: Replace a folder that is not empty.

    Raises:
        PolarError: A tensor is missing, left over or mis-shaped, ``out_dir`` is not empty, or the disk is full.
    """
    base, out = resolve_folder(base_folder), Path(out_dir)
    config = read_json(base / "config.json")
    weights = _named_for_export(state, config, base, template)
    config = _config(config, template, dtype, vocab_size=_vocab_size(weights))
    with _whole_folder(out, force) as partial:
        _write_weights(weights, partial, dtype, max_shard_size)
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        _copy_files(base, partial, template, with_code=config["model_type"] == "internlm2")
        card = model_card(out.name, os.fspath(base_folder), template, config)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _named_for_export(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: Path, template: PolarTemplate
) -> dict[str, torch.Tensor]:
    """Checks that the tensors are those of the model, and gives them the names of the export."""
    if HEAD not in state:
        raise PolarError(
            f"the checkpoint has no {HEAD}: the reward head was not saved, so no reward can be computed; "
            f"it cannot be made up (xtuner 0.2.0 loses it when it trains with LoRA)"
        )
    settings = decoder_config(config, str(base))
    settings.vocab_size = max(settings.vocab_size, len(template))
    heads, kv_heads = settings.num_attention_heads, settings.num_key_value_heads
    decoder: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        names = to_llama_names(name)  # what xtuner's own RewardModel saved has InternLM2's names
        parts = (tensor,) if len(names) == 1 else split_wqkv(tensor, heads, kv_heads)
        decoder.update(zip(names, parts))
    expected = {f"llm.{name}": tensor.shape for name, tensor in empty_decoder(settings).state_dict().items()}
    _check_tensors(expected | {HEAD: torch.Size([1, settings.hidden_size])}, decoder)

    head = decoder.pop(HEAD)
    decoder = {f"model.{name.removeprefix('llm.')}": tensor for name, tensor in decoder.items()}
    if config["model_type"] != "internlm2":
        return decoder | {"score.weight": head}
    exported: dict[str, torch.Tensor] = {}
    for name, tensor in decoder.items():
        target = to_internlm2_name(name)
        if "wqkv" not in target:
            exported[target] = tensor
        elif target not in exported:
            parts = [decoder[part] for part in to_llama_names(target)]
            exported[target] = fuse_wqkv(*parts, heads, kv_heads)
    return exported | {HEAD: head}


def _check_tensors(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor]) -> None:
    """Raises PolarError that names what is missing, left over or mis-shaped."""
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: not part of this model" for name in found if name not in expected]
    problems += [
        f"{name}: shape {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" … and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise PolarError(
            f"the checkpoint does not fit the base model: {'; '.join(problems[:NAMED])}{more}; "
            f"was it trained from the model that the config names?"
        )


def _vocab_size(weights: Mapping[str, torch.Tensor]) -> int:
    embeddings = ("model.tok_embeddings.weight", "model.embed_tokens.weight")
    return next(weights[name].shape[0] for name in embeddings if name in weights)


def _write_weights(
    weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, max_size: str | int
) -> None:
    shapes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in weights.items()}
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_size
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].to(dtype).contiguous() for name in names}
        save_file(shard, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(
    base: Mapping[str, Any], template: PolarTemplate, dtype: torch.dtype, vocab_size: int
) -> dict[str, Any]:
    config = dict(base)
    config.update(
        vocab_size=vocab_size,
        torch_dtype=str(dtype).removeprefix("torch."),
        use_cache=True,
        reward_token_id=template.reward_token_id,
    )
    config[SETTINGS_KEY] = template.settings
    config.pop("_name_or_path", None)
    if config["model_type"] == "internlm2":
        config["architectures"] = ["InternLM2ForRewardModel"]
        # xtuner 0.2.0's copy of the config class lacks it, and its model code reads it.
        config["pretraining_tp"] = 1
        config["auto_map"] = {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
        }
        return config
    config["architectures"] = [SEQUENCE_CLASSIFIERS[config["model_type"]]]
    config["id2label"], config["label2id"] = {"0": "reward"}, {"reward": 0}
    if config.get("pad_token_id") is None:
        # These classes score the token before the first padding; text never becomes an end-of-text token.
        eos = config.get("eos_token_id")
        config["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return config


def _copy_files(base: Path, folder: Path, template: PolarTemplate, with_code: bool) -> None:
    for pattern in TOKENIZER_FILES:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    # Also where the base has only a tokenizer with code of its own: this file needs none.
    (folder / "tokenizer.json").write_text(template.tokenizer_json, encoding="utf-8")
    if not with_code:
        return
    own = base / "modeling_internlm2.py"
    source = base if own.is_file() and "class InternLM2ForRewardModel" in own.read_text() else _shipped_code()
    for name in CODE_FILES:
        shutil.copyfile(source / name, folder / name)


def _shipped_code() -> Path:
    """The folder of xtuner 0.2.0 with the published model code; found without importing xtuner."""
    package = find_spec("xtuner")
    if package is None or not package.submodule_search_locations:
        raise PolarError("xtuner 0.2.0 is needed for its InternLM2 model code: pip install polar-ft[train]")
    root = Path(package.submodule_search_locations[0])
    return root / "tools" / "model_converters" / "modeling_internlm2_reward"


@contextmanager
def _whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside ``out`` to write into, renamed to it at the end; nothing is left behind by a failure."""
    if out.is_dir() and any(out.iterdir()) and not force:
        raise PolarError(f"{out}: is not empty; name another folder, or replace it with --force")
    if out.exists() and not out.is_dir():
        raise PolarError(f"{out}: is a file; name a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise PolarError(f"{out}: cannot be written ({error}); nothing of it was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
