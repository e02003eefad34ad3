"""What training saved: a ``.pth`` file or a DeepSpeed folder, as tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from polar_ft.conversion.checkpoint_files import verify
from polar_ft.conversion.restricted_load import check_records, restricted_load
from polar_ft.conversion.zero import is_zero_folder, open_zero
from polar_ft.errors import PolarError

# Under this key mmengine's message hub holds what `polar_ft.training.checkpoints` restores.
RUN_STATE = "polar_ft_resume"


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


def check_resumable(path: Path, *, deepspeed: bool) -> None:
    """Refuses to resume from what is no checkpoint of this training, before mmengine or DeepSpeed read it.

    Only the pickles are read, not the tensors.

    Args:
        path: An existing file or folder.
        deepspeed: Whether the run that resumes it uses DeepSpeed.

    Raises:
        PolarError: It is of another kind or another tool, is damaged, or holds code.
    """
    if path.is_dir() != deepspeed:
        kind = "a DeepSpeed checkpoint" if path.is_dir() else "a checkpoint of a run without DeepSpeed"
        how = "with" if path.is_dir() else "without"
        raise PolarError(f"{path}: is {kind}; start the run {how} --deepspeed, as before")
    weights = "to train from its weights, convert it and name the new folder in the config"
    states = sorted(path.glob("*_model_states.pt")) if path.is_dir() else [path]
    optimizers = sorted(path.glob("*_optim_states.pt"))
    if not states:
        raise PolarError(f"{path}: holds no DeepSpeed checkpoint{_hint(path)}")
    for file in states + optimizers:
        content = restricted_load(file)
        if file in states:
            # mmengine would run it: ``Config.fromstring`` in ``resume`` of its runners.
            if "config" in _mapping(content, "meta"):
                raise PolarError(
                    f"{file}: holds code (a config in Python, in meta) and is refused; {weights}"
                )
            if not optimizers and "optimizer" not in content:
                raise PolarError(f"{file}: holds weights without optimizer; {weights}")
            if RUN_STATE not in _mapping(_mapping(content, "message_hub"), "runtime_info"):
                raise PolarError(f"{file}: was not written by polar_ft (it holds no step plan); {weights}")
        unknown = get_unsafe_globals_in_checkpoint(file)
        if unknown:
            raise PolarError(f"{file}: was written by another tool (holds {', '.join(unknown)}); {weights}")


def _mapping(content: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


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
