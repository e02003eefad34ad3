"""The work folder of a run: which run it belongs to, its lock, and what may be resumed in it.

A folder belongs to one run. Its file ``run.json``, and the manifest of every checkpoint, hold the run's
identity: the settings that change the result. A start is refused where it would mix two runs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

import polar_ft
from polar_ft.conversion.checkpoint_files import (
    BEST,
    POINTER,
    UNFINISHED,
    read_manifest,
    remove_checkpoint,
    verify,
)
from polar_ft.errors import PolarError
from polar_ft.files import write_atomically
from polar_ft.tokenizer import tokenizer_digest
from polar_ft.training.check import CheckedRun

RUN = "run.json"
# Set to 1: what is in the work folder is removed when training begins; ``--overwrite`` of ``polar-ft train``.
OVERWRITE_VARIABLE = "POLAR_FT_OVERWRITE"

_LOCK = ".run.lock"
_HOLDER = ".run.lock.json"
_SECONDS_IF_HELD = 3.0
_SECONDS_IF_HOLDER_IS_GONE = 20.0

# The settings that change the result: by the name that our configs give them, and where they have effect.
SETTINGS = {
    "pretrained_model_name_or_path": "model.llm.pretrained_model_name_or_path",
    "data": "train_dataloader.dataset.data",
    "global_batch_pairs": "train_dataloader.dataset.global_batch_pairs",
    "seed": "train_dataloader.dataset.seed",
    "reference_dropout": "train_dataloader.dataset.reference_dropout",
    "max_length": "train_dataloader.dataset.tokenizer.max_length",
    "max_response_length": "train_dataloader.dataset.tokenizer.max_response_length",
    "lora": "model.lora",
    "loss_type": "model.loss_type",
    "penalty_type": "model.penalty_type",
    "lr": "optim_wrapper.optimizer.lr",
    "betas": "optim_wrapper.optimizer.betas",
    "weight_decay": "optim_wrapper.optimizer.weight_decay",
    "max_norm": "optim_wrapper.clip_grad.max_norm",
    "max_epochs": "train_cfg.max_epochs",
    "max_steps": "train_cfg.max_steps",
    "warmup_ratio": "train_cfg.warmup_ratio",
    "min_lr_ratio": "train_cfg.min_lr_ratio",
}
# A resumed run may have other values of these, if the command line names them.
CHANGEABLE = frozenset(
    {
        *("loss_type", "penalty_type", "lr", "betas", "weight_decay", "max_norm"),
        *("max_epochs", "max_steps", "warmup_ratio", "min_lr_ratio"),
    }
)
# Places: what they hold is compared instead (the step plan, the tokenizer), so both may be moved.
_PLACES = frozenset({"data", "pretrained_model_name_or_path"})
_TOKENIZER = "tokenizer"

LOGGER = logging.getLogger(__name__)

Identity = dict[str, Any]


@dataclass
class Run:
    """The run of this process, as `enter` found it.

    Attributes:
        folder: Its work folder.
        identity: Its settings, by name.
        before: Those of the run that it resumes, where they are known.
        resumes: Whether it resumes a checkpoint.
    """

    folder: Path
    identity: Identity
    before: Identity | None = None
    resumes: bool = False

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not what the resumed run had: name to old and new value."""
        return {} if self.before is None else _differences(self.before, self.identity)


_run: Run | None = None
_lock: FileLock | None = None


def current() -> Run | None:
    """The run of this process; None where nothing has called `enter`."""
    return _run


def identity_of(config: Mapping[str, Any]) -> Identity:
    """The settings of a config that change the result, as plain data.

    >>> identity = identity_of({"model": {"loss_type": "focal"}, "train_cfg": {"max_epochs": 2}})
    >>> identity["loss_type"], identity["max_epochs"], identity["lr"]
    ('focal', 2, None)
    """
    return {name: json.loads(json.dumps(_at(config, path), default=str)) for name, path in SETTINGS.items()}


def enter(checked: CheckedRun) -> None:
    """Locks the work folder of this run, and refuses to mix it with another one; every rank calls it.

    Nothing in the folder is changed, besides the lock. A second call does nothing.

    Raises:
        PolarError: Another run is in the folder or has left its checkpoints there; the checkpoint of
            ``--resume`` is damaged, holds code, or belongs to a run with other settings, or was saved by
            another number of ranks. The message says what to do.
    """
    global _run
    if _run is not None:
        return
    if os.environ.get("RANK", "0") == "0":
        lock(checked.work_dir)
    arguments = checked.arguments
    resume = None if arguments.resume is None else Path(arguments.resume)
    run = check_start(checked, resume)
    if resume is not None:
        has_strategy = checked.names.get("strategy") is not None
        _check_resumed(resume, deepspeed=arguments.deepspeed is not None or has_strategy)
    _run = run


def check_start(checked: CheckedRun, resume: Path | None) -> Run:
    """Compares a run that is to start with what its work folder and its checkpoint belong to.

    Args:
        checked: The run.
        resume: The checkpoint that it resumes.

    Raises:
        PolarError: See `check_folder` and `check_settings`.
    """
    run = Run(checked.work_dir, identity_of(checked.names), resumes=resume is not None)
    if checked.settings is None:  # a config of xtuner's own, whose checkpoints are none of ours
        return run
    check_folder(run.folder, run.identity, resume, overwrite=_overwrites())
    if resume is not None and (manifest := read_manifest(resume)) is not None:
        run.before = manifest.run
        if run.before is not None:
            parts = {option.rpartition(".")[2] for option in checked.arguments.options}
            named = {name for name, path in SETTINGS.items() if path.rpartition(".")[2] in parts}
            check_settings(run.before, run.identity, named, resume)
    return run


def check_tokenizer(base: Path) -> None:
    """Compares the tokenizer of the base model with that of the resumed run.

    Raises:
        PolarError: It is another one.
    """
    if _run is None:
        return
    _run.identity[_TOKENIZER] = tokenizer_digest(base)
    if _TOKENIZER in _run.changed():
        raise PolarError(
            f"{base}: its tokenizer is not the one that the checkpoint of --resume was trained with; restore "
            f"it, or start another run in a folder of its own (--work-dir)"
        )


def begin() -> None:
    """Writes whose the work folder is; the main process calls it when training begins.

    With ``--overwrite`` the checkpoints of the run before are removed first.
    """
    if _run is None:
        return
    if _overwrites() and not _run.resumes:
        clear(_run.folder)
    content = {"polar_ft": polar_ft.__version__, "command": sys.argv, "settings": _run.identity}
    write_atomically(_run.folder / RUN, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def clear(folder: Path) -> None:
    """Removes a run's checkpoints and the files that name them; its logs stay."""
    (folder / RUN).unlink(missing_ok=True)
    for name in (POINTER, BEST):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in (*_steps(folder), *_bests(folder), folder / UNFINISHED):
        remove_checkpoint(checkpoint)


def check_folder(folder: Path, identity: Identity, resumed: Path | None, *, overwrite: bool) -> None:
    """Refuses a start in a folder that holds another run.

    Args:
        folder: The work folder.
        identity: Of the run that is started.
        resumed: The checkpoint that it resumes.
        overwrite: Whether what is there may be removed.

    Raises:
        PolarError: It holds checkpoints that the run would mix with its own, or remove.
    """
    if overwrite and resumed is not None:
        raise PolarError(
            f"--resume keeps what is in {folder}, and --overwrite ({OVERWRITE_VARIABLE}) removes it: choose "
            f"one"
        )
    steps, bests = _steps(folder), _bests(folder)
    if overwrite or not (steps or bests):
        return
    owner = owner_of(folder)
    differs = {"run": ("", "")} if owner is None else _differences(owner, identity)
    if resumed is None:
        # A run that was killed before its first checkpoint starts again, and may have had a best one.
        if not steps and not differs:
            return
        resume = "" if differs else "resume it with --resume auto, "
        raise PolarError(
            f"{folder}: holds the checkpoints of {_whose(owner, differs)} ({_names(steps or bests)}), which "
            f"would be lost; {resume}name another folder with --work-dir, or remove them with --overwrite "
            f"(polar-ft train; {OVERWRITE_VARIABLE}=1 for xtuner train)"
        )
    if resumed.absolute().parent.resolve() != folder.resolve() and differs:
        raise PolarError(
            f"{folder}: holds the checkpoints of {_whose(owner, differs)} ({_names(steps or bests)}), and "
            f"{resumed} is not one of them; name another folder with --work-dir"
        )


def owner_of(folder: Path) -> Identity | None:
    """The identity of the run that a folder belongs to; None where it does not say."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_settings(before: Identity, now: Identity, named: Set[str], checkpoint: Path) -> None:
    """Refuses to resume with other settings, unless they may be changed and the command line names them.

    Raises:
        PolarError: A setting differs; the message says which, and what to do.
    """
    differs = {n: v for n, v in _differences(before, now).items() if n not in _PLACES and n != _TOKENIZER}
    fixed = {name: values for name, values in differs.items() if name not in CHANGEABLE}
    if fixed:
        raise PolarError(
            f"{checkpoint}: belongs to a run with other settings ({_described(fixed)}); restore them, or "
            f"start another run in a folder of its own (--work-dir)"
        )
    silent = {name: values for name, values in differs.items() if name not in named}
    if silent:
        options = " ".join(f"{name}={_option(new)}" for name, (_, new) in silent.items())
        raise PolarError(
            f"{checkpoint}: belongs to a run with other settings ({_described(silent)}); restore them, or, "
            f"to change them from this step on, name them on the command line: --cfg-options {options}"
        )


def lock(folder: Path) -> None:
    """Locks a work folder for this process until it ends, and says there who holds it.

    Raises:
        PolarError: Another process holds it, or nothing can be written there.
    """
    global _lock
    if _lock is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _acquired(folder)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        write_atomically(folder / _HOLDER, json.dumps(holder) + "\n")
    except OSError as error:
        raise PolarError(
            f"{folder}: cannot be written ({error.strerror}); name a --work-dir that can"
        ) from error
    _lock = held


def refuse_if_locked(folder: Path) -> None:
    """Raises PolarError, which names host and process, if a run is in a work folder."""
    if (folder / _LOCK).is_file():
        with suppress(OSError):  # what cannot be written is reported by the run
            _acquired(folder).release()


def _acquired(folder: Path) -> FileLock:
    """The lock of a folder, acquired. Waits for a process that has just ended: its children hold it too."""
    held = FileLock(folder / _LOCK)
    started = time.monotonic()
    while True:
        try:
            held.acquire(timeout=0.2)
            return held
        except Timeout:
            holder = _holder(folder)
            gone = holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"])
            if time.monotonic() - started > (_SECONDS_IF_HOLDER_IS_GONE if gone else _SECONDS_IF_HELD):
                raise PolarError(
                    f"{folder}: a run is in it (process {holder['pid']} on {holder['host']}, since "
                    f"{holder['since']}); wait for it, end it, or name another folder with --work-dir"
                ) from None


def _holder(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"host": "an unknown host", "pid": 0, "since": "a moment ago"}


def _check_resumed(checkpoint: Path, *, deepspeed: bool) -> None:
    """Verifies the checkpoint of ``--resume`` before xtuner and mmengine read it."""
    from polar_ft.conversion.checkpoint import check_resumable  # imports torch; the launcher needs none

    if os.environ.get("LOCAL_RANK", "0") == "0" and verify(checkpoint) is None:  # it may be large
        LOGGER.warning("%s: its integrity cannot be checked (no manifest)", checkpoint)
    check_resumable(checkpoint, deepspeed=deepspeed)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    partitioned = any(name.endswith("_optim_states.pt") for name in manifest.files)
    if manifest.ranks != ranks and partitioned:
        raise PolarError(
            f"{checkpoint}: was saved by {manifest.ranks} ranks, each with its part of the optimizer (ZeRO), "
            f"and this run has {ranks}; start with as many (NPROC_PER_NODE, NNODES), or convert it with "
            f"polar-ft convert and train from its weights"
        )


def _overwrites() -> bool:
    return os.environ.get(OVERWRITE_VARIABLE, "0") not in ("", "0")


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("iter_*.pth"), key=lambda path: (len(path.name), path.name))


def _bests(folder: Path) -> list[Path]:
    return sorted(folder.glob("best_*_iter_*.pth"))


def _at(config: Mapping[str, Any], path: str) -> Any:
    """
    >>> _at({"model": {"llm": {"a": 1}}}, "model.llm.a"), _at({"model": None}, "model.llm.a")
    (1, None)
    """
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _differences(before: Identity, now: Identity) -> dict[str, tuple[Any, Any]]:
    """Name to old and new value of what both have; a version that knows more settings adds nothing.

    >>> _differences({"lr": 0.1, "seed": 0, "old": 1}, {"lr": 0.2, "seed": 0, "new": 1})
    {'lr': (0.1, 0.2)}
    """
    return {n: (before[n], now[n]) for n in now if n in before and before[n] != now[n]}


def _described(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(
        f"{name} was {_option(old)}, is {_option(new)}" for name, (old, new) in differences.items()
    )


def _whose(owner: Identity | None, differs: Mapping[str, tuple[Any, Any]]) -> str:
    if owner is None:
        return "an earlier run"
    return f"another run ({_described(differs)})" if differs else "this run"


def _names(checkpoints: Sequence[Path]) -> str:
    return ", ".join(path.name for path in checkpoints[-3:])


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
