"""What ties the processes of a run to the command that started it: where they are, and why they ended.

`polar_ft.training.launch` makes a folder and names it in the environment; every process writes two small
files there. Without such a folder (``xtuner train`` makes none) nothing is written.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

from polar_ft.files import write_atomically

FOLDER_VARIABLE = "POLAR_FT_RANKS"
# Process id of `polar_ft.training.launch`.
LAUNCHER_VARIABLE = "POLAR_FT_LAUNCHER"

# What a process that trains runs, by the end of its path: xtuner's script, or ours.
SCRIPTS = ("tools/train.py", "training/start.py")

# Exit status of a run that saved and stopped because of a signal: EX_TEMPFAIL of sysexits.h, nothing is
# wrong, the same command may be tried again.
STOPPED = 75

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


# What a rank does in a step, in this order. In a phase of ``_WAITING`` it may be done with its part.
_PHASES = ("starting", "loading", "computing", "exchanging", "validating", "validated", "saving", "saved")
_WAITING = frozenset({"exchanging", "validated", "saved"})
_DOING = {"validated": "waiting after the validation of", "saved": "waiting after saving"}


@dataclass(frozen=True)
class Beat:
    """Where a process is.

    Attributes:
        rank: Of the process.
        step: Optimizer step it is in, from 1.
        phase: "loading", "computing", "exchanging" (waiting for the other ranks' gradients), "saving",
            "saved" (waiting for the other ranks' parts), …
        time: Seconds since 1970.
    """

    rank: int
    step: int
    phase: str
    time: float


@dataclass(frozen=True)
class Ending:
    """Why a process ended before its work was done.

    Attributes:
        rank: Of the process.
        host: Name of its machine.
        status: Exit status.
        error: In a line.
        time: Seconds since 1970.
        trace: The traceback of an error that the user cannot fix.
    """

    rank: int
    host: str
    status: int
    error: str
    time: float
    trace: str = ""


_step = 0


def beat(phase: str, step: int | None = None) -> None:
    """Records where this process is; ``step`` stays what it was if it is not given."""
    global _step
    _step = _step if step is None else step
    _write("beat", asdict(Beat(_rank(), _step, phase, time.time())))


def report_ending(error: str, status: int = 1, trace: str = "") -> None:
    """Records why this process ends."""
    _write("ending", asdict(Ending(_rank(), socket.gethostname(), status, error, time.time(), trace)))


def beats(folder: Path) -> list[Beat]:
    """What the processes reported last, by rank."""
    return sorted((Beat(**entry) for entry in _read(folder, "beat")), key=lambda beat: beat.rank)


def endings(folder: Path) -> list[Ending]:
    """Why processes ended, the first one first."""
    return sorted((Ending(**entry) for entry in _read(folder, "ending")), key=lambda ending: ending.time)


def describe_standstill(found: Sequence[Beat]) -> str:
    """Which ranks the others wait for.

    >>> describe_standstill([Beat(0, 7, "exchanging", 0.0), Beat(1, 7, "computing", 0.0)])
    'rank 1 is computing step 7, and rank 0 waits for it'
    >>> describe_standstill([Beat(0, 7, "exchanging", 0.0), Beat(1, 7, "exchanging", 0.0)])
    'ranks 0, 1 are exchanging step 7; a rank of another node, or the network, holds them up'
    >>> describe_standstill([Beat(0, 7, "validating", 0.0), Beat(1, 7, "exchanging", 0.0)])
    'rank 1 is exchanging step 7, and rank 0 waits for it'
    """

    def named(ranks: Sequence[int]) -> str:
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"

    def place(beat: Beat) -> tuple[int, int]:
        return beat.step, _PHASES.index(beat.phase)

    last = min(place(beat) for beat in found)
    behind = [beat for beat in found if place(beat) == last]
    others = [beat.rank for beat in found if place(beat) != last]
    ranks = [beat.rank for beat in behind]
    doing = _DOING.get(behind[0].phase, behind[0].phase)
    where = f"{named(ranks)} {'is' if len(ranks) == 1 else 'are'} {doing} step {behind[0].step}"
    if others:
        return f"{where}, and {named(others)} wait{'s' * (len(others) == 1)} for it"
    if behind[0].phase in _WAITING:
        return f"{where}; a rank of another node, or the network, holds them up"
    return where


def killed_with_parent() -> None:
    """Linux: has the kernel kill this process when the one that started it ends, however that ends.

    Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_launcher() -> None:
    """Ends this process when the command that started the run is gone; without one it does nothing.

    Raises:
        SystemExit: It is gone already.
    """
    import psutil  # in the extra "train" alone

    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return
    killed_with_parent()
    if int(launcher) not in {parent.pid for parent in psutil.Process().parents()}:
        raise SystemExit(f"process {launcher}, which started this run, is gone")


class StopSignals:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they take a machine away.

    Within the context they stop nothing by themselves: the loop asks after every step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> StopSignals:
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def any_rank_got_one(self) -> bool:
        """Whether any rank received a signal; every rank calls it, so that all stop after the same step."""
        import torch
        from mmengine.dist import all_reduce

        received = torch.tensor(int(self._received))
        all_reduce(received, "max")
        return bool(received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write(kind: str, entry: dict[str, object]) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or not os.path.isdir(folder):
        return
    file = Path(folder, f"{kind}_{_rank()}.json")
    with suppress(OSError):  # a full disk is reported by what needs the disk
        write_atomically(file, json.dumps(entry))


def _read(folder: Path, kind: str) -> list[dict]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{kind}_*.json")]
