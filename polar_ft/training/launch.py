"""Starting a training run as ``xtuner train`` does, with the exit status that the run really had.

Beyond that: ``--resume auto``, the first rank that failed by name, an end to runs that stand still, and no
process left behind.
"""

from __future__ import annotations

import os
import shlex
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
from polar_ft.training.check import CheckedRun, check_run
from polar_ft.training.config import xtuner_folder
from polar_ft.training.work_folder import OVERWRITE_VARIABLE, check_start, refuse_if_locked

# Seconds without a sign of life of any rank after which a run is ended.
HANG_VARIABLE = "POLAR_FT_HANG_SECONDS"
HANG_SECONDS = 1800.0

_POLL = 0.5
# As argparse of xtuner takes it.
_RESUME = tuple("--resume"[:length] for length in range(len("--r"), len("--resume") + 1))
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(config: str, arguments: Sequence[str]) -> int:
    """Runs xtuner's training script on a config.

    As with ``xtuner train``, the environment variables ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``ADDR`` and ``PORT`` say how many processes there are; more than one is started through torchrun.

    SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) are passed on to the ranks, which save and stop after the current
    step; a second one ends them at once.

    Args:
        config: Path of a config, or the name of one that xtuner ships.
        arguments: Further arguments of ``xtuner train``; ``--resume auto`` resumes from the newest
            complete checkpoint of the work folder, and starts from the beginning where there is none;
            ``--overwrite`` removes the checkpoints of an earlier run there when training begins.

    Returns:
        The exit status; xtuner 0.2.0's own command always exits 0 (``xtuner/entry_point.py``). 75 is a run
        that saved and stopped on a signal.

    Raises:
        PolarError: `check_run` finds a mistake, or the work folder belongs to another run.
    """
    arguments = list(arguments)
    if "--overwrite" in arguments:
        arguments.remove("--overwrite")
        os.environ[OVERWRITE_VARIABLE] = "1"
    run = check_run([config, *arguments])
    for warning in run.warnings:
        print(f"warning: {config}: {warning}", file=sys.stderr)
    if os.environ.get("NODE_RANK", "0") == "0":
        refuse_if_locked(run.work_dir)
    checkpoint = _checkpoint(run)
    check_start(run, checkpoint)  # the ranks do the same, but only after the imports
    resolved = _with_resume(arguments, checkpoint)
    nodes = int(os.environ.get("NNODES", "1"))
    processes = int(os.environ.get("NPROC_PER_NODE", "1"))
    # By its path, as importing the script takes as long as the start of a run.
    script = str(xtuner_folder() / "tools" / "train.py")
    command = [script, config, *resolved]
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
        status = _explained(_Run(command, Path(folder)).wait(), Path(folder), nodes, processes)
    if status == ranks.STOPPED:
        again = shlex.join(["polar-ft", "train", config, *_with_resume(arguments, "auto")])
        print(f"\nstopped by a signal, and saved; this resumes it: {again}", file=sys.stderr)
    return status


class _Run:
    """The process tree of a run."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.signals = 0
        self.ended_by = 0  # the signal that ended the run at once
        # The ranks take these signals once they train; until then, and in torchrun, they have no effect.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        variables = {ranks.FOLDER_VARIABLE: str(folder), ranks.LAUNCHER_VARIABLE: str(os.getpid())}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            start_new_session=True,  # a terminal sends Ctrl-C to this process alone
            preexec_fn=ranks.killed_with_parent,
        )
        for number in _SIGNALS:
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
            return 128 + self.ended_by if self.ended_by else self.process.returncode
        finally:
            self._end()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self.signals > 1 or not ranks.beats(self.folder):
            when = "again" if self.signals > 1 else "before training began, so there is nothing to save"
            print(f"\n{name} {when}: the run ends at once", file=sys.stderr)
            self.ended_by = number
            self._end()
            return
        print(
            f"\n{name}: the run saves after this step and stops; a second one ends it at once",
            file=sys.stderr,
        )
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


def _checkpoint(run: CheckedRun) -> Path | None:
    """The checkpoint that a run resumes; of ``--resume auto`` the newest complete one, if there is one.

    Raises:
        PolarError: There are checkpoints, and none of them is complete.
    """
    given = run.arguments.resume
    if given != "auto":
        return None if given is None else Path(given)
    refused: list[str] = []
    newest = newest_complete(run.work_dir, refused.append)
    for problem in refused:
        print(f"not resumed: {problem}", file=sys.stderr)
    if newest is None and refused:
        raise PolarError(
            f"{run.work_dir}: none of its checkpoints is complete; --overwrite removes them and starts again"
        )
    none = f"{run.work_dir} has no checkpoint, so the run starts from the beginning"
    print(f"--resume auto: {newest or none}", flush=True)
    return newest


def _with_resume(arguments: Sequence[str], checkpoint: Path | str | None) -> list[str]:
    """Command-line arguments with another value of ``--resume``, or without it.

    >>> _with_resume(["--resume", "auto", "--seed", "1"], None)
    ['--seed', '1']
    >>> _with_resume(["--resume=auto", "--seed", "1"], "runs/iter_2.pth")
    ['--resume', 'runs/iter_2.pth', '--seed', '1']
    """
    rest: list[str] = []
    place = None
    for number, argument in enumerate(arguments):
        if argument.partition("=")[0] in _RESUME:
            place = len(rest)
        elif not (number > 0 and arguments[number - 1] in _RESUME):
            rest.append(argument)
    if checkpoint is not None:
        place = len(rest) if place is None else place
        rest[place:place] = ["--resume", str(checkpoint)]
    return rest


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
