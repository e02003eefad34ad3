"""Writing a HuggingFace folder that is a drop-in for the published reward models."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PretrainedConfig

from polar_ft.conversion.llama import llama_config, write_tokenizer
from polar_ft.conversion.model_card import model_card
from polar_ft.conversion.output_folder import unfinished_folder
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.model.adapter_folder import KEY
from polar_ft.model.backbones import Backbone, backbone_of, decoder_config, empty_decoder
from polar_ft.model.base_folder import padding_token
from polar_ft.reward_scale import FILE_NAME
from polar_ft.template import SETTINGS_KEY, PolarTemplate

HEAD = "v_head.weight"
EMBEDDINGS = "llm.embed_tokens.weight"
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
# What else belongs to a reward model, whichever names its tensors have.
SIDE_FILES = (FILE_NAME, "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class _Export:
    """A tensor of the folder, and the tensors of training it is made of.

    Attributes:
        shape: Of the tensor.
        sources: Tensors of training: three where it is a ``wqkv``.
        part: The decoder tensor to take out of the one source, where that is a ``wqkv`` to be split.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    part: str | None = None


def write_hf_folder(
    state: Mapping[str, torch.Tensor],
    *,
    base_folder: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    template: PolarTemplate,
    dtype: torch.dtype,
    max_shard_size: str | int = "5GB",
    force: bool = False,
    as_llama: bool = False,
    repackaged: bool = False,
    on_written: Callable[[int, int], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights, config, tokenizer, model code and a README.

    Atomically: it is written to a temporary folder and renamed. Memory: one shard.

    Args:
        state: Tensors by name, ``llm.…`` in Llama's or InternLM2's names, and ``v_head.weight``.
        base_folder: The model that was fine-tuned: its config, tokenizer and code files are taken over.
        out_dir: Folder to write.
        template: What the model was trained with; the config keeps its settings.
        dtype: Of the weights that are written.
        max_shard_size: Largest weight file, as "5GB".
        force: Replace a model folder that exists.
        as_llama: Write an InternLM2 model as LlamaForSequenceClassification, with no code.
        repackaged: ``base_folder`` is the reward model itself, not what it was trained from: its reward scale
            and licence are copied too.
        on_written: Called after each weight file with the bytes written so far and in all.
        check: Called with the complete folder before it is renamed; raises to refuse it.

    Raises:
        PolarError: A tensor is missing, left over, mis-shaped or not finite, ``out_dir`` is not empty, the
            disk is full, or the model cannot be written as Llama.
    """
    base, out = resolve_folder(base_folder), Path(out_dir)
    config = read_json(base / "config.json")
    settings = decoder_config(config, str(base))
    source = written = backbone_of(config)
    if as_llama:
        config = llama_config(config, template, os.fspath(base_folder))
        written = backbone_of(config)
    exports = _plan(state, source, written, settings, template)
    config = exported_config(config, template, dtype, vocab_size=settings.vocab_size)
    if out.resolve() == base.resolve():
        what = "the model to be converted" if repackaged else "the base model that the config names"
        raise PolarError(f"{out}: is {what}; name another folder")
    with unfinished_folder(out, force) as partial:
        weights = _Weights(state, exports, dtype, source, settings)
        _write_weights(weights, partial, max_shard_size, on_written)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        if written is source:
            copy_files(base, partial, template, code=source.code)
        else:
            write_tokenizer(base, partial, template, config)
        if repackaged:
            _copy(base, partial, SIDE_FILES)
        card = model_card(out.name, os.fspath(base_folder), template, config, repackaged=repackaged)
        (partial / "README.md").write_text(card, encoding="utf-8")
        # safetensors makes its files the owner's alone; the others have the mode that the umask gives.
        mode = stat.S_IMODE((partial / "README.md").stat().st_mode)
        for file in partial.iterdir():
            file.chmod(mode)
        if check is not None:
            check(partial)


def _plan(
    state: Mapping[str, torch.Tensor],
    source: Backbone,
    written: Backbone,
    settings: PretrainedConfig,
    template: PolarTemplate,
) -> dict[str, _Export]:
    """Every tensor of the folder by name, checked against what the checkpoint has; reads no weights.

    Sets ``settings.vocab_size`` to the rows that the trained embeddings have.
    """
    found = shapes_of(state)
    adapters = [name for name in found if "lora_" in name]
    if adapters:
        raise PolarError(
            f"the checkpoint holds LoRA adapters ({adapters[0]} and {len(adapters) - 1} more), not the "
            f"weights of a complete model; they cannot be converted"
        )
    # Rows that were added for new tokens, or to round their number up.
    folder_embeddings = f"llm.{source.names.embeddings}"
    rows = next((found[n][0] for n in (EMBEDDINGS, folder_embeddings) if n in found), settings.vocab_size)
    settings.vocab_size = max(settings.vocab_size, rows, template.reward_token_id + 1)

    # xtuner's own RewardModel trains InternLM2 under the names of its folder.
    as_folder = folder_embeddings != EMBEDDINGS and folder_embeddings in found
    decoder = {name: tuple(tensor.shape) for name, tensor in empty_decoder(settings).state_dict().items()}
    # The head first, also in an error: it is what is lost most often.
    expected: dict[str, tuple[int, ...]] = {HEAD: (1, settings.hidden_size)}
    exports: dict[str, _Export] = {}
    for name, (parts, shape) in source.names.folder_shapes(decoder).items():
        sources = {f"llm.{name}": shape} if as_folder else {f"llm.{part}": decoder[part] for part in parts}
        expected.update(sources)
        if written is source:
            exports[f"model.{name}"] = _Export(shape, tuple(sources))
            continue
        for part in parts:  # Llama has the names of the decoder
            exports[f"model.{part}"] = (
                _Export(decoder[part], (f"llm.{name}",), part)
                if as_folder
                else _Export(decoder[part], (f"llm.{part}",))
            )
    exports[written.head] = _Export(expected[HEAD], (HEAD,))
    _check_tensors(expected, found)
    return exports


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; weights that are merged on access know theirs beforehand."""
    return getattr(state, "shapes", None) or {name: tuple(tensor.shape) for name, tensor in state.items()}


def tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], not_expected: str
) -> list[str]:
    """Tensors that are missing, not expected (``not_expected`` names that), or of another shape.

    >>> tensor_problems({"a": (2,), "b": (3,)}, {"b": (4,), "c": (1,)}, "left over")
    ['a: missing', 'c: left over', 'b: shape [4], expected [3]']
    """
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: {not_expected}" for name in found if name not in expected]
    problems += [
        f"{name}: shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return problems


def _check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises PolarError that names what is missing, left over or mis-shaped."""
    problems = tensor_problems(expected, found, "not part of this model")
    if not problems:
        return
    more = f" … and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    why = (
        "was it trained from the model that the config names?"
        if HEAD in found
        else "without the reward head no reward can be computed, and it cannot be made up"
    )
    raise PolarError(
        f"the checkpoint does not fit the base model: {'; '.join(problems[:NAMED])}{more}; {why}"
    )


@dataclass(frozen=True)
class _Weights:
    """The tensors to be written; each is read, fused and cast when its file is written."""

    state: Mapping[str, torch.Tensor]
    exports: Mapping[str, _Export]
    dtype: torch.dtype
    source: Backbone
    config: PretrainedConfig

    def read(self, name: str) -> torch.Tensor:
        """A copy: tensors of a live model may share memory, which safetensors refuses."""
        export, names = self.exports[name], self.source.names
        parts = [self.state[source].detach().to("cpu", self.dtype, copy=True) for source in export.sources]
        if export.part is None:
            tensor = names.folder_tensor(parts, self.config)
        else:
            whole = export.sources[0].removeprefix("llm.")
            tensor = names.decoder_tensors(whole, parts[0], self.config)[export.part]
        # Their extremes are NaN or infinite if any value is; finds it without a copy of the tensor.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            kind = str(self.dtype).removeprefix("torch.")
            raise PolarError(
                f"{name}: holds NaN or infinity in {kind}; training diverged: take an earlier checkpoint"
                + (", or --dtype bfloat16 if float16 is too narrow" if self.dtype == torch.float16 else "")
            )
        return tensor.contiguous()


def _write_weights(
    weights: _Weights, folder: Path, max_size: str | int, on_written: Callable[[int, int], None] | None
) -> None:
    shapes = {
        name: torch.empty(export.shape, dtype=weights.dtype, device="meta")
        for name, export in weights.exports.items()
    }
    try:
        plan = split_torch_state_dict_into_shards(
            shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_size
        )
    except ValueError as error:
        raise PolarError(f"--max-shard-size {max_size}: is no size such as 5GB or 500MB") from error
    total, done = plan.metadata["total_size"], 0
    free = shutil.disk_usage(folder).free
    if free < total:
        raise PolarError(
            f"{folder.parent}: {_size(total)} are needed and {_size(free)} are free; make room, "
            f"or name a folder on another disk"
        )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights.read(name) for name in names}, folder / file, {"format": "pt"})
        done += sum(shapes[name].nbytes for name in names)
        if on_written is not None:
            on_written(done, total)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _size(count: int) -> str:
    """
    >>> _size(1_234_000), _size(3_400_000_000)
    ('1.2 MB', '3.40 GB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def exported_config(
    base: Mapping[str, Any], template: PolarTemplate, dtype: torch.dtype, vocab_size: int
) -> dict[str, Any]:
    """The folder's ``config.json``: that of the base model, and what the template was trained with."""
    config = dict(base)
    config.update(
        vocab_size=vocab_size,
        torch_dtype=str(dtype).removeprefix("torch."),
        use_cache=True,
        reward_token_id=template.reward_token_id,
    )
    config[SETTINGS_KEY] = template.settings
    for key in ("_name_or_path", KEY):
        config.pop(key, None)
    backbone = backbone_of(config)
    config["architectures"] = [backbone.architecture]
    if backbone.code:
        # xtuner 0.2.0's copy of the config class lacks it, and its model code reads it.
        config["pretraining_tp"] = 1
        config["auto_map"] = dict(backbone.auto_map)
        return config
    config["id2label"], config["label2id"] = {"0": "reward"}, {"reward": 0}
    # vLLM then returns the reward itself by default, not its sigmoid.
    config["problem_type"] = "regression"
    config["pad_token_id"] = padding_token(config, template, "the base model")
    return config


def copy_files(base: Path, folder: Path, template: PolarTemplate, code: Sequence[str] = ()) -> None:
    """Copies tokenizer files, and the model code that a family needs."""
    _copy(base, folder, TOKENIZER_FILES)
    # Also where the base has only a tokenizer with code of its own: this file needs none.
    (folder / "tokenizer.json").write_text(template.tokenizer_json, encoding="utf-8")
    if not code:
        return
    own = base / "modeling_internlm2.py"
    source = base if own.is_file() and "class InternLM2ForRewardModel" in own.read_text() else _shipped_code()
    for name in code:
        shutil.copyfile(source / name, folder / name)


def _copy(base: Path, folder: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in filter(Path.is_file, base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def _shipped_code() -> Path:
    """The folder of xtuner 0.2.0 with the published model code; found without importing xtuner."""
    package = find_spec("xtuner")
    if package is None or not package.submodule_search_locations:
        raise PolarError("xtuner 0.2.0 is needed for its InternLM2 model code: pip install '.[train]'")
    root = Path(package.submodule_search_locations[0])
    return root / "tools" / "model_converters" / "modeling_internlm2_reward"
