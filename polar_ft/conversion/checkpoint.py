"""What training saved: a ``.pth`` file or a DeepSpeed folder, as tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch

from polar_ft.conversion.checkpoint_files import verify
from polar_ft.conversion.restricted_load import check_records, restricted_load
from polar_ft.conversion.zero import is_zero_folder, open_zero
from polar_ft.errors import PolarError


@dataclass(frozen=True)
class TrainedWeights:
    """The parameters of a training run.

    Attributes:
        tensors: By the names of the training model; read from disk when asked for.
        dtype: The dtype of training: that of the tensors in a ``.pth``, and the one in which the model ran
            under DeepSpeed, whose tensors are its float32 master weights.
    """

    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype


def read_checkpoint(path: Path) -> TrainedWeights:
    """Opens a checkpoint of mmengine (a file) or DeepSpeed (a folder).

    First all of it is compared with the checksums of its manifest or, where another tool wrote it and it has
    none, with those inside its files.

    Raises:
        PolarError: There is none, it is incomplete, or it holds something that is not known to be harmless.
    """
    if path.is_dir():
        if not is_zero_folder(path):
            raise PolarError(f"{path}: holds no DeepSpeed checkpoint{_hint(path)}")
        _check_whole(path, sorted(path.glob("*_states.pt")))
        weights = open_zero(path)
        return TrainedWeights(weights, weights.dtype)
    if not path.exists():
        raise PolarError(f"{path}: no such checkpoint{_hint(path.parent)}")

    _check_whole(path, [path])
    content = restricted_load(path)
    state = content.get("state_dict", content)
    entries = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(value, torch.Tensor)}
    if not any(tensor.is_floating_point() for tensor in tensors.values()) or len(tensors) < len(state):
        keys = ", ".join(map(str, content))
        raise PolarError(
            f"{path}: holds no state_dict of tensors, but {keys[:200] or 'nothing'}; is it a "
            f"checkpoint of xtuner?"
        )
    # Where dtypes differ, the one that loses nothing.
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors.values() if t.is_floating_point()})
    return TrainedWeights(tensors, dtype)


def _check_whole(checkpoint: Path, files: Iterable[Path]) -> None:
    if verify(checkpoint) is None:
        for file in files:
            check_records(file)


def _hint(folder: Path) -> str:
    found = sorted(folder.glob("*.pth")) if folder.is_dir() else []
    if found:
        return f"; there are {', '.join(str(file) for file in found[:8])}"
    if (folder / "config.json").is_file():
        return "; it is a HuggingFace folder already"
    return "; name the iter_….pth that training wrote"
