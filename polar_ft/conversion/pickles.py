"""Reading the pickles that training leaves behind, without running what is in them.

A checkpoint of mmengine or DeepSpeed holds, beside tensors, objects of their own (a log of numbers, a loss
scaler, an enum), so ``torch.load(weights_only=True)`` refuses it, and ``weights_only=False`` would run
whatever a file says. Here a pickle may name only what stands in this module: plain containers and tensors
are made, the known other objects are replaced by inert placeholders, and anything else is an error.
"""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import torch

from polar_ft.errors import PolarError

# Made for real: harmless, and what tensors are made of.
_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Tensor"): torch.Tensor,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    # A tensor with attributes (ZeRO 3 hangs its own on every parameter): the tensor alone.
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, arguments, state: rebuild(*arguments),
}
_TORCH_TYPES = (torch.dtype, type(torch.FloatStorage))

# Replaced by a placeholder: present in such files, not needed for the weights.
_INERT = {
    ("_codecs", "encode"),
    ("builtins", "getattr"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
}


class _Inert:
    """Stands for an object that is not needed; takes any arguments and state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """A dict in place of mmengine's ConfigDict, whose items a pickle sets one by one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(arg for arg in args if isinstance(arg, dict)))

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # protocol 2, which torch writes, has Python 2's name
            module = "builtins"
        if (module, name) in _REAL:
            return _REAL[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), _TORCH_TYPES):
            return getattr(torch, name)
        if (module, name) == ("mmengine.config.config", "ConfigDict"):
            return _Dict
        if (module, name) == ("deepspeed.runtime.zero.config", "ZeroStageEnum"):
            return int
        if (module, name) in _INERT:
            return _Inert
        raise PolarError(
            f"the file names {module}.{name}, which no checkpoint of xtuner or DeepSpeed needs; "
            f"it is not loaded, because loading it would run it"
        )


_PICKLE = types.SimpleNamespace(
    Unpickler=_Unpickler,
    load=lambda file, **_: _Unpickler(file).load(),
    __name__="polar_ft restricted pickle",
)


def load_pickle(file: Path) -> dict[str, Any]:
    """The content of a checkpoint file; tensors stay on disk until they are used.

    Args:
        file: Written by ``torch.save``.

    Raises:
        PolarError: The file is damaged, no checkpoint, or names a class that is not on the list.
    """
    try:
        content = torch.load(file, map_location="cpu", pickle_module=_PICKLE, weights_only=False, mmap=True)
    except PolarError as error:
        raise PolarError(f"{file}: {error}") from error
    except Exception as error:
        raise PolarError(f"{file}: cannot be read as a checkpoint ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise PolarError(f"{file}: holds no checkpoint, but a {type(content).__name__}")
    return content
