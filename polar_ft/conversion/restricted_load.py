"""Reading what training pickled, without running what is pickled.

Checkpoints of mmengine and DeepSpeed hold more than tensors: log histories, loss scalers, addresses of
fragments. ``torch.load(weights_only=True)`` refuses those classes; ``weights_only=False`` would run whatever
a file names. Here each known class is replaced by one that does nothing, and any other ends in an error.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import safe_globals

from polar_ft.errors import PolarError
from polar_ft.files import first_line


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

# What torch's own files name beside those; ``torch.load`` checks each of them itself.
_TORCH = ("torch.", "collections.OrderedDict", "_codecs.encode")


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
    except Exception as error:  # a damaged pickle can end in any
        raise _refusal(file, error) from error
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
        raise _refusal(file, error) from error
    if damaged is not None:
        raise PolarError(
            f"{file}: {damaged} in it is not what was saved (its checksum differs); take another checkpoint"
        )


def _refusal(file: Path, error: Exception) -> PolarError:
    """Says that a file holds code, where it does; else that it is damaged."""
    unknown = sorted(name for name in _globals(file) if name not in _KNOWN and not name.startswith(_TORCH))
    if unknown:
        return PolarError(
            f"{file}: needs {', '.join(unknown[:8])}, which is not known to be harmless: the file holds code "
            f"and is refused; nothing of it was run. A checkpoint of xtuner, mmengine or DeepSpeed does not "
            f"hold it: do not use files of this origin"
        )
    if isinstance(error, UnpicklingError):  # torch's advice is to switch its protection off
        return _damaged(file, "its pickle cannot be read")
    return _damaged(file, f"{type(error).__name__}: {first_line(error, 160)}")


def _damaged(file: Path, reason: str) -> PolarError:
    return PolarError(
        f"{file}: is not a whole checkpoint file ({reason}); saving may have been interrupted: take an "
        f"earlier checkpoint"
    )


def _globals(file: Path) -> set[str]:
    """Names of the classes and functions that the pickles of a file name; nothing of them is run."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        with archive.open(name) as stream:
                            _collect_globals(stream, found)
        else:  # a bare pickle, or several, as torch saved before it wrote zip files
            with file.open("rb") as stream:
                while True:
                    _collect_globals(stream, found)
    except Exception:  # the end, or what is no pickle
        pass
    return found


def _collect_globals(stream: Any, found: set[str]) -> None:
    """Adds the names in a pickle of any protocol, also of one that is damaged further on."""
    strings: list[str] = []  # as they are pushed; STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    argument: Any
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            found.add(argument.replace(" ", ".", 1).replace("__builtin__.", "builtins."))
        elif code.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]))
        elif isinstance(argument, str) and "UNICODE" in code.name:
            strings.append(argument)
        elif code.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = strings[-1] if strings else ""
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            strings.append(memo.get(int(argument), ""))
