"""The highest memory that a process has held since some moment."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

# For the environment of a process that is to be measured: glibc gives freed blocks back at once, so that
# resident memory is what is held. It makes allocation a little slower.
NO_CACHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


class MemoryPeak:
    """Highest memory beyond what the process held when this was made.

    On a GPU it is what torch has allocated there; on a CPU, resident memory of the process.

    Args:
        device: What is measured.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._before = self._now()
        self.forget()

    def forget(self) -> None:
        """Resets the highest value; what was held at first stays the zero."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        except OSError:  # not Linux, or not allowed: the peak is that since the process began
            return

    def bytes(self) -> int:
        """The highest value, less what was held at first."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return _high_water() - self._before

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss


def _high_water() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
