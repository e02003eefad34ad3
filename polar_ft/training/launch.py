"""Starting a training run as ``xtuner train`` does, with the exit status that the run really had.

Beyond that: ``--resume auto``, the first rank that failed by name, an end to runs that stand still, and no
process left behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from polar_ft.conversion.checkpoint_files import newest_complete
from polar_ft.errors import PolarError
from polar_ft.training import ranks
from polar_ft.training.check import check_run
from polar_ft.training.config import config_work_dir, xtuner_folder

# Seconds without a sign of life of any rank after which a run is ended.
HANG_VARIABLE = "POLAR_FT_HANG_SECONDS"
HANG_SECONDS = 1800.0

_POLL = 0.5


def launch(config: str, arguments: Sequence[str]) -> int:
    """Runs xtuner's training script on a config.

    As with ``xtuner train``, the environment variables ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``ADDR`` and ``PORT`` say how many processes there are; more than one is started through torchrun.

    SIGTERM and SIGUSR1 are passed on to the ranks, which save and stop after the current step; a second one
    ends them at once.

    Args:
        config: Path of a config, or the name of one that xtuner ships.
        arguments: Further arguments of ``xtuner train``; ``--resume auto`` resumes from the newest
            complete checkpoint of the work folder, and starts from the beginning where there is none.

    Returns:
        The exit status; xtuner 0.2.0's own command always exits 0 (``xtuner/entry_point.py``). 75 is a run
        that saved and stopped on a signal.

    Raises:
        PolarError: There is no such config, or `check_run` finds a mistake.
    """
    for warning in check_run([config, *arguments]).warnings:
        print(f"warning: {config}: {warning}", file=sys.stderr)
    nodes = int(os.environ.get("NNODES", "1"))
    processes = int(os.environ.get("NPROC_PER_NODE", "1"))
    # By its path, as importing the script takes as long as the start of a run.
    script = str(xtuner_folder() / "tools" / "train.py")
    command = [script, config, *_resolve_resume(config, list(arguments))]
    if nodes == 1 and processes == 1:
        command = [sys.executable, *command]
    else:
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes={nodes}",
            f"--node_rank={os.environ.get('NODE_RANK', '0')}",
            f"--nproc_per_node={processes}",
            f"--master_addr={os.environ.get('ADDR', '127.0.0.1')}",
            f"--master_port={os.environ.get('PORT') or _free_port()}",
            *(*command, "--launcher", "pytorch"),
        ]
    with tempfile.TemporaryDirectory(prefix="polar_ft_") as folder:
        status = _Run(command, Path(folder)).wait()
        return _explained(status, Path(folder), nodes, processes)


class _Run:
    """The process tree of a run."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.signals = 0
        # The ranks take these signals once they train; until then, and in torchrun, they have no effect.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        self.process = subprocess.Popen(command, env={**os.environ, ranks.FOLDER_VARIABLE: str(folder)})
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)

    def wait(self) -> int:
        """Waits for the end and returns the exit status; nothing of the run is alive after it."""
        limit = float(os.environ.get(HANG_VARIABLE, HANG_SECONDS))
        try:
            while self.process.poll() is None:
                time.sleep(_POLL)
                beats = ranks.beats(self.folder)
                if beats and time.time() - max(beat.time for beat in beats) > limit:
                    raise PolarError(
                        f"no rank has moved for {limit:.0f} s: {ranks.describe_standstill(beats)}; the run "
                        f"was ended. --resume auto resumes it; {HANG_VARIABLE} sets the time"
                    )
            return self.process.returncode
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            self._end()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        training = bool(ranks.beats(self.folder))
        if self.signals > 1 or not training:
            self._end()
            return
        for process in self._workers():
            process.send_signal(signal.SIGUSR1)

    def _workers(self) -> list[psutil.Process]:
        """The processes that train: those that run xtuner's script."""
        return [p for p in self._tree() if any(arg.endswith("tools/train.py") for arg in _arguments(p))]

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _end(self) -> None:
        for process in self._tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def _arguments(process: psutil.Process) -> list[str]:
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return []
    # torchrun has the script among its arguments as well.
    return [] if "torch.distributed.run" in arguments else arguments


def _explained(status: int, folder: Path, nodes: int, processes: int) -> int:
    """The status of the run; says which rank failed first where there are several."""
    found = ranks.endings(folder)
    if status == 0 or not found:
        return status if status >= 0 else 128 - status
    first = found[0]
    if first.status != ranks.STOPPED and nodes * processes > 1:
        error = f"rank {first.rank} on {first.host} failed first"
        # Where a rank of another node fails, those of this one fail after it.
        others = "" if nodes == 1 else " of this node (the other nodes' commands name theirs)"
        print(f"\nerror: {error}{others}: {first.error}", file=sys.stderr)
    return first.status


def _resolve_resume(config: str, arguments: list[str]) -> list[str]:
    """Replaces ``--resume auto`` by the newest complete checkpoint, or by nothing."""
    for number, argument in enumerate(arguments):
        if argument == "--resume=auto":
            return _resolve_resume(
                config, [*arguments[:number], "--resume", "auto", *arguments[number + 1 :]]
            )
        if argument == "--resume" and arguments[number + 1 : number + 2] == ["auto"]:
            work_dir = _work_dir(config, arguments)
            newest = newest_complete(
                work_dir, lambda problem: print(f"not resumed: {problem}", file=sys.stderr)
            )
            none = f"{work_dir} has no checkpoint, so the run starts from the beginning"
            print(f"--resume auto: {newest or none}")
            chosen = ["--resume", str(newest)] if newest else []
            return [*arguments[:number], *chosen, *arguments[number + 2 :]]
    return arguments


def _work_dir(config: str, arguments: Sequence[str]) -> Path:
    """Where xtuner puts the run: ``--work-dir``, else the config's ``work_dir``, else by its name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--work-dir", type=Path)
    given = parser.parse_known_args(arguments)[0].work_dir
    if given is not None:
        return given
    return config_work_dir(config)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
