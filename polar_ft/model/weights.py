"""A model folder's weights, read into transformers' own decoder without running code of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from polar_ft.errors import PolarError
from polar_ft.files import first_line, read_json, resolve_folder
from polar_ft.model.adapter_folder import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, merge_into, read_adapter
from polar_ft.model.backbones import WeightNames, backbone_of, decoder_config, empty_decoder

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
                f"{self.folder / file}: tensor {name!r} cannot be read ({error}); copy the folder again"
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
                    f"copy or download the folder again"
                )
            return Checkpoint(path, files)
        if (path / single).is_file():
            opened = _open_file(path / single)
            return Checkpoint(path, dict.fromkeys(opened.keys(), single))
    raise PolarError(
        f"{path}: has no weights (model*.safetensors or pytorch_model*.bin); "
        f"name a folder that holds a complete model"
    )


def load_backbone(
    folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, torch.Tensor | None, dict[str, Any]]:
    """Loads the decoder and the reward head of a model folder.

    InternLM2 weights go into `LlamaModel`, which is the same mathematics. Memory: one copy of the model.
    Adapters are merged into their base.

    Args:
        folder: Folder or hub id of a model of a known family, or of adapters to one.
        dtype: Dtype of the decoder; None keeps what the folder has.

    Returns:
        The decoder (see `polar_ft.model.backbones`) in training mode; the head's weight [1, hidden] as the
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
    names = backbone_of(hf_config).names
    expected = {name: shape for name, (_, shape) in names.folder_shapes(shapes).items()}
    state: dict[str, torch.Tensor] = {}
    head: torch.Tensor | None = None
    problems: list[str] = []
    for name in checkpoint:
        if name in HEAD_NAMES:
            head = checkpoint[name]
            if tuple(head.shape) != (1, config.hidden_size):
                problems.append(f"{name}: shape {list(head.shape)}, expected {[1, config.hidden_size]}")
        elif not name.endswith(_IGNORED):
            problems += _take(checkpoint, name, names, config, expected, dtype, state)
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
        raise PolarError(f"{folder / HEAD_FILE}: holds no reward head of this model; copy the folder again")
    return decoder, head, hf_config


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


def _take(
    checkpoint: Checkpoint,
    name: str,
    names: WeightNames,
    config: PretrainedConfig,
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    state: dict[str, torch.Tensor],
) -> list[str]:
    """Puts a tensor of the folder into the decoder's state; returns what is wrong with it."""
    plain = name.removeprefix("model.")
    if plain not in expected:
        return [f"{name}: unexpected"]
    tensor = checkpoint[name]
    if tuple(tensor.shape) != expected[plain]:
        return [f"{name}: shape {list(tensor.shape)}, expected {list(expected[plain])}"]
    for target, part in names.decoder_tensors(plain, tensor, config).items():
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
            f"short, or only a pointer of git-lfs: copy or download it again"
        ) from error


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise PolarError(f"{file.parent}: has no {file.name}; copy the folder again")
    opened = _open_file(file)
    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _listed(problems: list[str]) -> str:
    more = f" … and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return "; ".join(problems[:_NAMED]) + more
