"""Workarounds for upstream, all of them: symptom, upstream file, and when it can go.

`apply` is called by `prepare_training`, the earliest code of ours that a run reaches (see there).
"""

from __future__ import annotations

import importlib
import os
import socket

import torch


def apply(*, deepspeed: bool = True) -> None:
    """Applies every workaround; a second call changes nothing.

    Args:
        deepspeed: Also those that import DeepSpeed, which takes seconds.
    """
    _cpu_has_no_is_bf16_supported()
    _distributed_cpu_has_no_cuda_device()
    _data_parallel_cpu_has_no_devices()
    _checkpoints_hold_no_histories()
    _checkpoints_load_without_running()
    _deepspeed_takes_one_port()
    if deepspeed:
        _deepspeed_compiles_for_nothing()
        _deepspeed_checkpoints_load_without_running()


def _cpu_has_no_is_bf16_supported() -> None:
    """Without a GPU, ``--deepspeed`` ends in AttributeError: torch.cpu has no is_bf16_supported.

    Upstream: xtuner 0.2.0 ``tools/utils.py``, auto_dtype_of_deepspeed_config (and ``model/reward.py``).
    Goes when xtuner asks the device only where there is one.
    """
    if not hasattr(torch.cpu, "is_bf16_supported"):
        torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]


def _distributed_cpu_has_no_cuda_device() -> None:
    """Two processes without a GPU end in an error of torch.cuda.set_device.

    Upstream: mmengine 0.10.6 ``dist/utils.py``, _init_dist_pytorch, which sets the CUDA device for every
    backend. Goes when mmengine sets it only for backends that use one.
    """
    if not torch.cuda.is_available():
        torch.cuda.set_device = lambda device: None  # type: ignore[assignment]


def _data_parallel_cpu_has_no_devices() -> None:
    """Two ranks without a GPU end in ValueError: DistributedDataParallel on a CPU takes no device_ids.

    Upstream: mmengine 0.10.6 ``runner/runner.py``, wrap_model, which gives MMDistributedDataParallel
    ``device_ids=[rank]`` on every device. Goes when mmengine gives them on GPUs only.
    """
    from mmengine.model import MMDistributedDataParallel

    original = MMDistributedDataParallel.__init__
    if torch.cuda.is_available() or getattr(original, "polar_ft", False):
        return

    def __init__(self, module, *args, device_ids=None, **settings):  # noqa: N807
        original(self, module, *args, **settings)

    __init__.polar_ft = True  # type: ignore[attr-defined]
    MMDistributedDataParallel.__init__ = __init__


def _deepspeed_compiles_for_nothing() -> None:
    """Without a GPU, ``--deepspeed`` stalls for one to two minutes: it compiles an operator in C++.

    Upstream: deepspeed 0.16.2 ``comm/torch.py``, TorchBackend, which builds ``deepspeed_shm_comm`` for
    ``inference_all_reduce`` whether or not that is ever called; training does not call it. Goes when it is
    built on first use.
    """
    if not torch.cuda.is_available():
        # Not `deepspeed.comm.torch`: that name is torch itself, which `deepspeed/comm/comm.py` imports.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def _checkpoints_hold_no_histories() -> None:
    """A checkpoint holds mmengine's HistoryBuffer objects, which load by calling ``getattr`` on anything.

    Upstream: mmengine 0.10.6 ``logging/message_hub.py``, MessageHub.state_dict: past values of every logged
    figure, and what hooks record again in every run. Only polar_ft's records, plain data, are kept. Goes
    when mmengine's are plain data too.
    """
    from mmengine.logging import MessageHub

    original = MessageHub.state_dict
    if getattr(original, "polar_ft", False):
        return

    def state_dict(self):
        ours = {k: v for k, v in original(self)["runtime_info"].items() if k.startswith("polar_ft")}
        return {"log_scalars": {}, "runtime_info": ours, "resumed_keys": dict.fromkeys(ours, True)}

    state_dict.polar_ft = True  # type: ignore[attr-defined]
    MessageHub.state_dict = state_dict


def _checkpoints_load_without_running() -> None:
    """``--resume`` ends in UnpicklingError with torch 2.6 and later, whose ``torch.load`` runs no pickles.

    Upstream: mmengine 0.10.6 ``runner/checkpoint.py`` and xtuner 0.2.0 ``tools/utils.py``; a checkpoint holds
    an object of mmengine's. It is named here, and nothing else is loaded. Goes when they save plain data.
    """
    from mmengine.config import ConfigDict

    torch.serialization.add_safe_globals([ConfigDict])


def _deepspeed_checkpoints_load_without_running() -> None:
    """As the one above, for the objects of deepspeed 0.16.2 ``runtime/checkpoint_engine/``."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def _deepspeed_takes_one_port() -> None:
    """Two runs with ``--deepspeed`` and one process each, on one machine: the second ends in EADDRINUSE.

    Upstream: deepspeed 0.16.2 ``comm/comm.py``, init_distributed, which without a launcher asks MPI and then
    always takes port 29500. With the variables of a launcher it does neither. Goes when it takes a free port.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launcher.items():
        os.environ.setdefault(name, str(value))
