"""A model folder's weights, read into transformers' own decoder without running code of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from polar_ft.errors import PolarError
from polar_ft.files import first_line, read_json, resolve_folder
from polar_ft.model.adapter_folder import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, merge_into, read_adapter
from polar_ft.model.internlm2 import internlm2_config_to_llama, split_wqkv, to_llama_names

Shapes = dict[str, tuple[int, ...]]

# Index file, single file.
_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
_PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")

# The reward head: InternLM2ForRewardModel's, and that of …ForSequenceClassification.
HEAD_NAMES = ("v_head.weight", "score.weight")
# A language model's head, and buffers that old checkpoints hold: expected, not needed.
_IGNORED = ("output.weight", "lm_head.weight", "rotary_emb.inv_freq")

# Names in an error message; a model has hundreds.
_NAMED = 20


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name; each is read when it is asked for, on the CPU, in the dtype it has.

    Args:
        folder: Where the files are.
        files: Tensor name to file name.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder = folder
        self._files = dict(files)
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open_file(self.folder / file)
        opened = self._open[file]
        try:
            return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise PolarError(
                f"{self.folder / file}: tensor {name!r} cannot be read ({error}); copy the folder anew"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Opens the weights of a HuggingFace folder: safetensors if it has them, else ``pytorch_model*.bin``.

    Pickles are read with ``weights_only=True``, so that no code in them runs.

    Raises:
        PolarError: The folder has no weights, a file that its index lists is missing, or a file is damaged.
    """
    path = Path(folder)
    for index, single in (_SAFETENSORS, _PICKLES):
        if (path / index).is_file():
            files = read_json(path / index).get("weight_map", {})
            missing = sorted(name for name in set(files.values()) if not (path / name).is_file())
            if missing or not files:
                raise PolarError(
                    f"{path}: {index} lists files that are not there: {_listed(missing)}; "
                    f"copy or download the folder anew"
                )
            return Checkpoint(path, files)
        if (path / single).is_file():
            opened = _open_file(path / single)
            return Checkpoint(path, dict.fromkeys(opened.keys(), single))
    raise PolarError(
        f"{path}: has no weights (model*.safetensors or pytorch_model*.bin); "
        f"name a folder that holds a whole model"
    )


def load_backbone(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, torch.Tensor | None, dict[str, Any]]:
    """Loads the decoder and the reward head of a model folder.

    InternLM2 weights go into `LlamaModel`, which is the same mathematics. Memory: one copy of the model.
    Adapters are merged into their base.

    Args:
        folder: Folder or hub id of a model of type internlm2, llama or qwen2, or of adapters to one.
        dtype: Dtype of the decoder; None keeps what the folder has.

    Returns:
        The decoder (`LlamaModel` or `Qwen2Model`) in training mode; the head's weight [1, hidden] as the
        folder has it, or None for a base model; and the folder's ``config.json``.

    Raises:
        PolarError: No such folder, a model of another type, or weights that do not fit its config; the
            message lists missing, unexpected and mis-shaped tensors.
    """
    path = resolve_folder(folder)
    hf_config = read_json(path / "config.json")
    if (path / CONFIG_FILE).is_file():
        return _load_adapted(path, hf_config, dtype)
    config = decoder_config(hf_config, str(path))
    decoder = empty_decoder(config)
    checkpoint = open_checkpoint(path)

    shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    state: dict[str, torch.Tensor] = {}
    head: torch.Tensor | None = None
    problems: list[str] = []
    for name in checkpoint:
        if name in HEAD_NAMES:
            head = checkpoint[name]
            if tuple(head.shape) != (1, config.hidden_size):
                problems.append(f"{name}: shape {list(head.shape)}, expected {[1, config.hidden_size]}")
        elif not name.endswith(_IGNORED):
            problems += _take(checkpoint, name, hf_config["model_type"], config, shapes, dtype, state)
    problems += [f"{name}: missing" for name in shapes if name not in state]
    if problems:
        raise PolarError(f"{path}: the weights do not fit config.json: {_listed(problems)}")

    decoder.load_state_dict(state, strict=True, assign=True)
    config.torch_dtype = decoder.dtype
    return decoder, head, hf_config


def _load_adapted(
    folder: Path, hf_config: dict[str, Any], dtype: torch.dtype | None
) -> tuple[PreTrainedModel, torch.Tensor, dict[str, Any]]:
    """`load_backbone` of a folder that ``polar-ft convert --adapter-only`` wrote."""
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path") or ""
    adapter = read_adapter(folder, hf_config, base)
    try:
        decoder, _, _ = load_backbone(base, adapter.torch_dtype)
    except PolarError as error:
        raise PolarError(
            f"{folder / CONFIG_FILE}: the base model that it names cannot be read ({error}); set "
            f"base_model_name_or_path there to where it is"
        ) from error
    if hf_config["vocab_size"] > decoder.config.vocab_size:
        grow_embeddings(decoder, hf_config["vocab_size"])
    tensors = {file: _read_file(folder / file) for file in (ADAPTER_FILE, HEAD_FILE)}
    dtype = dtype or adapter.torch_dtype
    merge_into(decoder, tensors[ADAPTER_FILE], adapter, dtype, folder)
    decoder.config.torch_dtype = dtype
    head = tensors[HEAD_FILE].get(HEAD_NAMES[0])
    if head is None or tuple(head.shape) != (1, decoder.config.hidden_size):
        raise PolarError(f"{folder / HEAD_FILE}: holds no reward head of this model; copy the folder anew")
    return decoder, head, hf_config


def decoder_config(hf_config: Mapping[str, Any], name: str) -> PretrainedConfig:
    """The config of the transformers decoder that runs a model.

    Args:
        hf_config: The model's ``config.json``.
        name: How errors call the model.

    Raises:
        PolarError: The model's type, or a variant of it, is not supported.
    """
    kind = hf_config.get("model_type")
    if hf_config.get("use_sliding_window"):
        raise PolarError(
            f"{name}: sliding-window attention (use_sliding_window in config.json) is not supported"
        )
    if hf_config.get("quantization_config"):
        raise PolarError(
            f"{name}: is quantized (quantization_config in config.json); name the original model"
        )
    if kind == "internlm2":
        try:
            return internlm2_config_to_llama(hf_config)
        except PolarError as error:
            raise PolarError(f"{name}: {error}") from error
    if kind in ("llama", "qwen2"):
        config_class = LlamaConfig if kind == "llama" else Qwen2Config
        try:
            return config_class.from_dict(dict(hf_config))
        except (KeyError, TypeError, ValueError) as error:
            raise PolarError(f"{name}: config.json is not that of a {kind} model ({error})") from error
    raise PolarError(
        f"{name}: model_type {kind!r} in config.json is not supported; internlm2, llama and qwen2 are"
    )


def empty_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder without memory for its parameters (device "meta"), but with right rotary frequencies."""
    with torch.device("meta"):
        decoder = Qwen2Model(config) if isinstance(config, Qwen2Config) else LlamaModel(config)
    # Not a parameter and in no checkpoint: computed here, on the CPU.
    rotary = _Qwen2Rotary if isinstance(config, Qwen2Config) else _LlamaRotary
    decoder.rotary_emb = rotary(config=config)
    return decoder


def grow_embeddings(decoder: Any, size: int) -> None:
    """Rows for added tokens: the mean of the others, as xtuner 0.2.0 does it."""
    old = decoder.embed_tokens.weight.data
    padding = decoder.embed_tokens.padding_idx
    new = torch.nn.Embedding(size, old.shape[1], padding_idx=padding, dtype=old.dtype, device=old.device)
    new.weight.data = grown_rows(old, size)
    decoder.embed_tokens = new
    decoder.config.vocab_size = size


def grown_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings with as many rows as asked for.

    >>> grown_rows(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), 3).tolist()
    [[1.0, 0.0], [3.0, 2.0], [2.0, 1.0]]
    """
    mean = rows.float().mean(0).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - len(rows), -1)])


class _Float32Frequencies:
    """Rotary frequencies stay float32 when the model is cast.

    DeepSpeed casts buffers together with the parameters. In bfloat16 a frequency is off by up to 0.2 %, so
    that at position 1000 angles are off by a radian and more: a model trained like that is not the one that
    is served.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        device = fn(self.inv_freq.new_empty(0)).device
        self.original_inv_freq = self.original_inv_freq.to(device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)  # type: ignore[misc]


class _LlamaRotary(_Float32Frequencies, LlamaRotaryEmbedding):
    pass


class _Qwen2Rotary(_Float32Frequencies, Qwen2RotaryEmbedding):
    pass


def _take(
    checkpoint: Checkpoint,
    name: str,
    model_type: str,
    config: PretrainedConfig,
    shapes: Shapes,
    dtype: torch.dtype | None,
    state: dict[str, torch.Tensor],
) -> list[str]:
    """Puts a tensor of the folder into the decoder's state; returns what is wrong with it."""
    plain = name.removeprefix("model.")
    names = to_llama_names(plain) if model_type == "internlm2" else (plain,)
    if not all(target in shapes for target in names):
        return [f"{name}: unexpected"]
    tensor = checkpoint[name]
    if len(names) == 1:
        expected = shapes[names[0]]
    else:
        expected = (sum(shapes[target][0] for target in names), *shapes[names[0]][1:])
    if tuple(tensor.shape) != expected:
        return [f"{name}: shape {list(tensor.shape)}, expected {list(expected)}"]
    parts: tuple[torch.Tensor, ...] = (tensor,)
    if len(names) == 3:
        parts = split_wqkv(tensor, config.num_attention_heads, config.num_key_value_heads)
    for target, part in zip(names, parts, strict=True):
        state[target] = part.to(dtype or part.dtype)
    return []


def _open_file(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # safetensors, zipfile and pickle each have their own
        raise PolarError(
            f"{file}: cannot be read ({type(error).__name__}: {first_line(error)}); the file is cut "
            f"short, or only a pointer of git-lfs: copy or download it anew"
        ) from error


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise PolarError(f"{file.parent}: has no {file.name}; copy the folder anew")
    opened = _open_file(file)
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _listed(problems: list[str]) -> str:
    more = f" … and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more
