"""Reading what training pickled, without running what is pickled.

Checkpoints of mmengine and DeepSpeed hold more than tensors: log histories, loss scalers, addresses of
fragments. ``torch.load(weights_only=True)`` refuses those classes; ``weights_only=False`` would run whatever
a file names. Here each known class is replaced by one that does nothing, and any other ends in an error.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from polar_ft.errors import PolarError


class _Ignored:
    """Stands for an object that the conversion does not need; takes any arguments and any state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _ZeroStage(IntEnum):
    """Stands for DeepSpeed's ``ZeroStageEnum``, whose value is needed."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def _attribute(owner: Any, name: str) -> Any:
    """Stands for ``getattr``, by which some releases of Python 3.11 (3.11.2) pickle members of an enum."""
    return _ZeroStage[name] if owner is _ZeroStage else _Ignored()


# Global names found in files that mmengine 0.10.6 and DeepSpeed 0.16.2 wrote, and what stands for them.
_KNOWN: dict[str, Callable[..., Any]] = {
    # message_hub: histories of loss and learning rate, and their numpy arrays (numpy 1 and 2)
    "mmengine.logging.history_buffer.HistoryBuffer": _Ignored,
    "builtins.getattr": _attribute,
    "numpy._core.multiarray._reconstruct": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
    "numpy.core.multiarray._reconstruct": _Ignored,
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy.dtype": _Ignored,
    "numpy.ndarray": _Ignored,
    # DeepSpeed's configuration where it comes from a config of xtuner's
    "mmengine.config.config.ConfigDict": dict,
    # *_optim_states.pt
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Ignored,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Ignored,
    "deepspeed.utils.tensor_fragment.fragment_address": _Ignored,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _ZeroStage,
}


def restricted_load(file: Path) -> dict[str, Any]:
    """Loads a checkpoint file; tensors stay on disk (memory-mapped) until they are used.

    Args:
        file: What ``torch.save`` wrote.

    Returns:
        The pickled dictionary; in it, objects of mmengine's and DeepSpeed's classes are empty stand-ins.

    Raises:
        PolarError: The file is missing or damaged, or needs a class or function that is not known to be
            harmless; the message names it.
    """
    try:
        # Accepts pairs (stand-in, name), which its annotation does not say.
        with safe_globals([(stand_in, name) for name, stand_in in _KNOWN.items()]):  # type: ignore[misc]
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise PolarError(f"{file}: no such file") from error
    except UnpicklingError as error:
        unknown = _unknown_globals(file)
        if not unknown:
            raise _damaged(file, error) from error
        raise PolarError(
            f"{file}: needs {', '.join(unknown)}, which is not known to be harmless, so the file was not "
            f"loaded; a checkpoint of xtuner, mmengine or DeepSpeed does not hold it"
        ) from error
    except Exception as error:  # a damaged pickle can end in any
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise PolarError(f"{file}: holds a {type(content).__name__}, not a checkpoint")
    return content


def check_records(file: Path) -> None:
    """Compares each record of a file of ``torch.save`` with its CRC-32; torch does not when it maps a file.

    Reads the whole file, a piece at a time.

    Raises:
        PolarError: The file is not what was saved.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, zlib and struct each have their own
        raise _damaged(file, error) from error
    if damaged is not None:
        raise PolarError(
            f"{file}: {damaged} in it is not what was saved (its checksum differs); take another checkpoint"
        )


def _unknown_globals(file: Path) -> list[str]:
    try:
        return sorted(set(get_unsafe_globals_in_checkpoint(file)) - set(_KNOWN))
    except Exception:  # the file is no checkpoint at all
        return []


def _damaged(file: Path, error: Exception) -> PolarError:
    first_line = (str(error).splitlines() or [""])[0]
    return PolarError(
        f"{file}: is not a whole checkpoint file ({type(error).__name__}: {first_line[:160]}); saving may "
        f"have been interrupted: take an earlier checkpoint"
    )
