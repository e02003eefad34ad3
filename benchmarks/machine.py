"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polar_ft.training.log import PEAK_FLOPS

PACKAGES = (
    "torch",
    "transformers",
    "xtuner",
    "deepspeed",
    "mmengine",
    "tokenizers",
    "flash-attn",
    "liger-kernel",
)


def describe_machine() -> dict[str, Any]:
    """Processor, GPU, memory and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def peak_flops() -> float | None:
    """Dense bf16 peak of the GPU in operations a second; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
