"""Starting a training run as ``xtuner train`` does, with the exit status that the run really had.

Beyond that: what matters on the terminal and the rest in a log file, ``--resume auto``, the first rank that
failed by name, an end to runs that stand still, and no process left behind.
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
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO

import psutil
from rich.console import Console

from polar_ft.conversion.checkpoint_files import BEST, newest_complete, pointed_to
from polar_ft.errors import PolarError, printable
from polar_ft.training import ranks
from polar_ft.training.check import CheckedRun, check_run
from polar_ft.training.config import xtuner_folder
from polar_ft.training.settings import part_of
from polar_ft.training.terminal.display import Display
from polar_ft.training.terminal.events import EventReader
from polar_ft.training.work_folder import OVERWRITE_VARIABLE, check_start, refuse_if_locked

# Seconds without a sign of life of any rank after which a run is ended.
HANG_VARIABLE = "POLAR_FT_HANG_SECONDS"
HANG_SECONDS = 1800.0

# In the work folder: all that the processes of a run print.
LOG = "train.log"

_POLL = 0.1
_SECONDS_BETWEEN_LOOKS = 0.5
_LINES_OF_A_CRASH = 20
_ENDED_BY_USER = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
# As argparse of xtuner takes it.
_RESUME = tuple("--resume"[:length] for length in range(len("--r"), len("--resume") + 1))
# Names of a config for which a run needs more of xtuner and mmengine than `polar_ft.training.start` imports.
_BUILT_BY_XTUNER = frozenset(
    {"strategy", "runner_type", "model_wrapper_cfg", "compile", "framework", "use_varlen_attn"}
)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(config: str, arguments: Sequence[str], *, verbose: bool = False) -> int:
    """Trains a config; one of ours shows what matters, another one whatever xtuner prints.

    As with ``xtuner train``, the environment variables ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``ADDR`` and ``PORT`` say how many processes there are; more than one is started through torchrun.

    SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) are passed on to the ranks, which save and stop after the current
    step; a second one ends them at once.

    Args:
        config: Path of a config, or the name of one that xtuner ships.
        arguments: Further arguments of ``xtuner train``; ``--resume auto`` resumes from the newest
            complete checkpoint of the work folder, and starts from the beginning where there is none;
            ``--overwrite`` removes the checkpoints of an earlier run there when training begins.
        verbose: Everything that the processes print is shown, and nothing is written to the log file.

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
    started = time.monotonic()
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
    command = [_script(run), config, *resolved]
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
    with tempfile.TemporaryDirectory(prefix="polar_ft_") as name:
        folder = Path(name)
        log = None if verbose or run.settings is None else run.work_dir / _log_name()
        ended = _Run(command, folder).wait() if log is None else _shown(command, folder, log)
        status = _explained(ended, folder, nodes * processes, log)
    if status == ranks.STOPPED:
        again = shlex.join(["polar-ft", "train", config, *_with_resume(arguments, "auto")])
        print(f"\nstopped by a signal, and saved; this resumes it: {again}", file=sys.stderr)
    elif status == 0 and log is not None and os.environ.get("NODE_RANK", "0") == "0":
        _say_what_is_there(config, run.work_dir, log, time.monotonic() - started)
    return status


def _script(run: CheckedRun) -> str:
    """The script of a rank, by its path: xtuner's, which imports for seconds, where part of it is needed."""
    names, settings = run.names, run.settings
    plain = settings is not None and not run.arguments.deepspeed and not _BUILT_BY_XTUNER & names.keys()
    # Names without a dot are of mmengine's registry, where others register theirs.
    optimizer = str(part_of(names, "optim_wrapper.optimizer.type", ""))
    quantized = settings is not None and settings.lora is not None and settings.lora.load_in_4bit
    if plain and "." in optimizer and not quantized:
        return str(Path(__file__).with_name("start.py"))
    return str(xtuner_folder() / "tools" / "train.py")


def _log_name() -> str:
    node = os.environ.get("NODE_RANK", "0")
    return LOG if node == "0" else f"{Path(LOG).stem}_node{node}.log"


def _shown(command: Sequence[str], folder: Path, log: Path) -> int:
    """Runs the processes with their output in a log file, and shows what the first rank reports."""
    with log.open("ab") as output:
        output.write(f"--- {time.strftime('%F %T')}  {shlex.join(command)}\n".encode())
        output.flush()
        if os.environ.get("NODE_RANK", "0") != "0":
            print(f"the command of node 0 shows the run; this one writes {log}", flush=True)
            return _Run(command, folder, output).wait()
        display, events = Display(Console()), EventReader(folder)
        try:
            return _Run(command, folder, output, lambda: display.show(events.new())).wait()
        finally:
            display.show(events.new())
            display.close()


def _say_what_is_there(config: str, work_dir: Path, log: Path, seconds: float) -> None:
    """What a run that has ended well leaves, and what comes next."""
    best = pointed_to(work_dir, BEST)
    kept = [f"last checkpoint {pointed_to(work_dir)}", f"log {log}"]
    if best is not None:
        kept.insert(1, f"best {best}")
    print(f"done in {timedelta(seconds=round(seconds))}: {', '.join(kept)}")
    which = "last" if best is None else "best"
    print(f"next: {shlex.join(['polar-ft', 'convert', config, which])} OUT_DIR", flush=True)


class _Run:
    """The process tree of a run.

    Args:
        command: The command line.
        folder: That ties its processes together, see `polar_ft.training.ranks`.
        output: Where its output goes; None shares the terminal.
        on_poll: Called several times a second.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        output: IO[bytes] | None = None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.on_poll = on_poll
        self.signals = 0
        self.ended_by = 0  # the signal that ended the run at once
        # The ranks take these signals once they train; until then, and in torchrun, they have no effect.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        variables = {ranks.FOLDER_VARIABLE: str(folder), ranks.LAUNCHER_VARIABLE: str(os.getpid())}
        if output is not None:
            variables["PYTHONUNBUFFERED"] = "1"  # a process that is killed has its last lines in the log
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,  # a terminal sends Ctrl-C to this process alone
            preexec_fn=ranks.killed_with_parent,
        )
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)

    def wait(self) -> int:
        """Waits for the end and returns the exit status; nothing of the run is alive after it."""
        limit = float(os.environ.get(HANG_VARIABLE, HANG_SECONDS))
        looked = time.monotonic()
        try:
            while self.process.poll() is None:
                time.sleep(_POLL)
                self.on_poll()
                if time.monotonic() - looked < _SECONDS_BETWEEN_LOOKS:
                    continue
                looked = time.monotonic()
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
        """The processes that train: those that run a script of `_script`."""
        return [p for p in self._tree() if any(arg.endswith(ranks.SCRIPTS) for arg in _arguments(p))]

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


def _explained(status: int, folder: Path, processes: int, log: Path | None) -> int:
    """The status of the run; says why it failed, and which rank failed first where there are several.

    Args:
        status: Of the process that was started; negative for a signal.
        folder: That ties the processes together.
        processes: Of the run, on all nodes.
        log: Where their output went; None if the terminal has it.
    """
    found = ranks.endings(folder)
    status = status if status >= 0 else 128 - status
    if status == 0:
        return status
    if not found:
        if log is not None and status not in _ENDED_BY_USER:
            _show_end(log)
            killed = " (killed: is the memory full?)" if status == 128 + signal.SIGKILL else ""
            print(
                f"\nerror: the run ended with status {status}{killed}; its output is in {log}",
                file=sys.stderr,
            )
        return status
    first = found[0]
    if first.status == ranks.STOPPED:
        return first.status
    if log is not None and first.trace:
        print(first.trace, file=sys.stderr)
    if processes > 1:
        error = f"rank {first.rank} on {first.host} failed first"
        # Where a rank of another node fails, those of this one fail after it.
        alone = "NNODES" not in os.environ or os.environ["NNODES"] == "1"
        others = "" if alone else " of this node (the other nodes' commands name theirs)"
        print(f"\nerror: {error}{others}: {first.error}", file=sys.stderr)
    elif log is not None:
        print(f"\nerror: {first.error}", file=sys.stderr)
    return first.status


def _show_end(log: Path) -> None:
    """Prints the last lines of a log file: what a process said that could not report why it ended."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode("utf-8", "replace").splitlines()
    start = max((number for number, line in enumerate(lines) if line.startswith("--- ")), default=-1) + 1
    for line in lines[start:][-_LINES_OF_A_CRASH:]:
        print(printable(line), file=sys.stderr)


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
