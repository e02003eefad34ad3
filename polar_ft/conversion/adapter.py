"""Adapters that training saved: merged into the weights of their base, or as a folder of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from polar_ft.conversion.huggingface import (
    HEAD,
    copy_files,
    exported_config,
    shapes_of,
    tensor_problems,
)
from polar_ft.conversion.model_card import adapter_card
from polar_ft.conversion.output_folder import unfinished_folder
from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.model.adapter_folder import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, KEY, peft_config, peft_name
from polar_ft.model.backbones import backbone_of, decoder_config, empty_decoder
from polar_ft.model.lora import (
    RECORD,
    Adapter,
    absolute_base,
    adapted_weights,
    adapter_names,
    base_digest,
    merged,
)
from polar_ft.model.weights import grown_rows, open_checkpoint
from polar_ft.template import PolarTemplate

_NAMED = 10  # tensors in an error message
_EMBEDDINGS = "embed_tokens.weight"


def holds_adapter(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the tensors of a run with ``lora = dict(…)``."""
    return RECORD in state


class MergedWeights(Mapping[str, torch.Tensor]):
    """The weights of a model that was trained with adapters; each is read and merged when it is asked for.

    Attributes:
        dtype: In which the base was loaded for training.
        shapes: Shape of every tensor.
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        adapter: Adapter,
        base: _BaseWeights,
    ) -> None:
        self.dtype = adapter.torch_dtype
        self.shapes: dict[str, tuple[int, ...]] = {
            f"llm.{name}": shape for name, shape in base.shapes.items()
        }
        self.shapes[HEAD] = (1, base.config.hidden_size)
        self._state = state
        self._adapter = adapter
        self._base = base
        self._adapted = set(adapted_weights(base.shapes, adapter.lora))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == HEAD:
            return self._state[HEAD]
        weight = name.removeprefix("llm.")
        if name not in self.shapes:
            raise KeyError(name)
        matrices = None
        if weight in self._adapted:
            a, b = adapter_names(name)
            matrices = self._state[a], self._state[b]
        return merged(weight, self._base[weight], self._adapter, matrices)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def merge_adapter(
    state: Mapping[str, torch.Tensor], base_folder: str | os.PathLike[str], template: PolarTemplate
) -> MergedWeights:
    """The weights that a checkpoint with adapters stands for; sums are in float32.

    Args:
        state: Tensors of the checkpoint: adapters, head and record.
        base_folder: The model that was adapted.
        template: What it was trained with.

    Raises:
        PolarError: A tensor is missing, left over or mis-shaped, or the base is another one.
    """
    adapter = Adapter.of_tensor(state[RECORD])
    base = _BaseWeights(base_folder, len(template))
    adapter.check_base(
        base_digest(base, base.config.num_hidden_layers, adapter.torch_dtype), os.fspath(base_folder)
    )
    _check_tensors(state, adapter, base)
    return MergedWeights(state, adapter, base)


def write_adapter_folder(
    state: Mapping[str, torch.Tensor],
    *,
    base_folder: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    template: PolarTemplate,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes adapters and head, without the weights that they adapt.

    The folder has peft's ``adapter_config.json`` and ``adapter_model.safetensors``, the head in
    ``reward_head.safetensors``, and what else a reward model needs: ``config.json``, tokenizer, README. It
    can be named wherever a model folder can; the base is read from where ``adapter_config.json`` says.

    Args:
        state: Tensors of the checkpoint: adapters, head and record.
        base_folder: The model that was adapted; its name is written into the folder.
        out_dir: Folder to write.
        template: What the model was trained with.
        force: Replace a model folder that exists.
        check: Called with the complete folder before it is renamed; raises to refuse it.

    Raises:
        PolarError: See `merge_adapter`; or a tensor is not finite, ``out_dir`` is not empty, the disk full.
    """
    weights = merge_adapter(state, base_folder, template)
    adapter = Adapter.of_tensor(state[RECORD])
    adapter = adapter.model_copy(update={"base": absolute_base(base_folder)})
    base, out = resolve_folder(base_folder), Path(out_dir)
    rows = weights.shapes[f"llm.{_EMBEDDINGS}"][0]
    config = exported_config(read_json(base / "config.json"), template, weights.dtype, vocab_size=rows)
    config[KEY] = adapter.model_dump(mode="json")
    adapters = {peft_name(name): _finite(name, state[name]) for name in state if ".lora_" in name}
    with unfinished_folder(out, force) as partial:
        metadata = {"format": "pt"}
        save_file(adapters, partial / ADAPTER_FILE, metadata)
        save_file({HEAD: _finite(HEAD, state[HEAD])}, partial / HEAD_FILE, metadata)
        for name, content in ((CONFIG_FILE, peft_config(adapter)), ("config.json", config)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        copy_files(base, partial, template)
        card = adapter_card(out.name, adapter.base, template)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if check is not None:
            check(partial)


class _BaseWeights(Mapping[str, torch.Tensor]):
    """Tensors of a base model by Llama's names, each read when it is asked for.

    Args:
        folder: Of the base.
        vocabulary: Size of the tokenizer; embeddings grow to it as they did before training.
    """

    def __init__(self, folder: str | os.PathLike[str], vocabulary: int) -> None:
        path = resolve_folder(folder)
        hf_config = read_json(path / "config.json")
        self.config: PretrainedConfig = decoder_config(hf_config, str(path))
        decoder = empty_decoder(self.config)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()
        }
        rows, width = self.shapes[_EMBEDDINGS]
        self.shapes[_EMBEDDINGS] = (max(rows, vocabulary), width)
        self._path = path
        self._weight_names = backbone_of(hf_config, str(path)).names
        self._checkpoint = open_checkpoint(path)
        # A language model's tensors are below "model.", those of a bare decoder are not.
        self._names = {name.removeprefix("model."): name for name in self._checkpoint}

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self._weight_names.folder_name(name)
        if source not in self._names:
            raise PolarError(f"{self._path}: has no tensor {source}, so it is not the complete base model")
        tensor = self._checkpoint[self._names[source]]
        tensor = self._weight_names.decoder_tensors(source, tensor, self.config)[name]
        return grown_rows(tensor, self.shapes[name][0]) if name == _EMBEDDINGS else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check_tensors(state: Mapping[str, torch.Tensor], adapter: Adapter, base: _BaseWeights) -> None:
    """Raises PolarError that names what is missing, left over or mis-shaped; the head first."""
    expected: dict[str, tuple[int, ...]] = {HEAD: (1, base.config.hidden_size)}
    for weight in adapted_weights(base.shapes, adapter.lora):
        rows, columns = base.shapes[weight]
        a, b = adapter_names(f"llm.{weight}")
        expected |= {a: (adapter.lora.r, columns), b: (rows, adapter.lora.r)}
    found = {name: shape for name, shape in shapes_of(state).items() if name != RECORD}
    problems = tensor_problems(expected, found, "left over")
    if problems:
        more = f" … and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise PolarError(
            f"the checkpoint's adapters are incomplete: {'; '.join(problems[:_NAMED])}{more}; without reward "
            f"head and all adapters no reward can be computed: take another checkpoint"
        )


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not tensor.isfinite().all():
        raise PolarError(f"{name}: holds NaN or infinity; training diverged: take an earlier checkpoint")
    return tensor
