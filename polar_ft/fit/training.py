"""Training as a step of a fit: ``polar-ft train`` in a process of its own, with its progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polar_ft.conversion.checkpoint_files import BEST, POINTER, pointed_to
from polar_ft.errors import PolarError
from polar_ft.fit.choices import Choice
from polar_ft.fit.steps import Result, Tell
from polar_ft.training.ranks import STOPPED

_POLL = 0.3
# `polar-ft` that ends with the process that started it, however that ends. Not by a preexec_fn: tokenizers
# warn of a fork.
_TRAIN = """
from polar_ft.training.ranks import killed_with_parent
killed_with_parent()
from polar_ft.cli import main
main()
"""
_TAIL = 12


def train(
    config: Path,
    work_dir: Path,
    choices: Sequence[Choice],
    tell: Tell,
    *,
    log: Path,
    steps: int,
) -> Result:
    """Trains, or resumes what was killed and is in the work folder.

    Args:
        config: The config.
        work_dir: Of the run.
        choices: Of them "deepspeed" and "gpus" are no lines of the config.
        tell: Says how far it is.
        log: File for what training prints.
        steps: Optimizer steps that are expected.

    Returns:
        "checkpoint", the best one or else the last; "is_best", "validations", "losses", "seconds".

    Raises:
        PolarError: It failed; the message has the error of training.
        KeyboardInterrupt: It was stopped by a signal, and saved.
    """
    values = {choice.name: choice.value for choice in choices}
    command = [sys.executable, "-c", _TRAIN, "train", str(config), "--work-dir", str(work_dir)]
    command += ["--resume", "auto"]
    command += ["--deepspeed", values["deepspeed"]] if values["deepspeed"] else []
    environment = {**os.environ, "NPROC_PER_NODE": str(values["gpus"]), "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        tell("starting")
        began = time.time()
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                tell(*_progress(work_dir, steps, began))
        except KeyboardInterrupt:  # the terminal sent it to training too, which saves and stops
            tell("stopping after this step; what is trained is saved")
            process.wait()
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == STOPPED:
        raise KeyboardInterrupt
    if process.returncode:
        raise PolarError(_failure(log, start, process.returncode))
    return result_of(work_dir)


def _progress(work_dir: Path, steps: int, began: float) -> tuple[str, float | None]:
    """What a line says of a run, and the share of its steps that are done."""
    logged = _scalars(work_dir, since=began)
    written = [line for line in logged if "loss" in line]
    if not written:
        return "loading model and data", None
    last = written[-1]
    step = int(last["step"])
    recent = written[-20:]
    parts = [f"step {step} of {max(step, steps)}"]
    for name, shown in (("loss", "loss {:.3f}"), ("accuracy", "accuracy {:.0%}")):
        values = [line[name] for line in recent if name in line]
        parts += [shown.format(sum(values) / len(values))] if values else []
    if validated := [line for line in logged if "val/accuracy" in line]:
        parts.append(f"validation {validated[-1]['val/accuracy_ties_half']:.1%}")
    return ", ".join(parts), min(1.0, step / max(1, steps))


def _scalars(work_dir: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """What the starts of a run have logged, in the order of time; a resumed step replaces its first one."""
    lines = []
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        if file.stat().st_mtime < since:
            continue
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # it is being written, or its process was killed
                continue
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


def result_of(work_dir: Path) -> Result:
    """What a run that has ended has given.

    Raises:
        PolarError: It has left no checkpoint.
    """
    best, last = pointed_to(work_dir, BEST), pointed_to(work_dir, POINTER)
    if last is None:
        raise PolarError(f"{work_dir}: training ended without a checkpoint")
    losses: dict[int, float] = {}
    validations: dict[int, dict[str, Any]] = {}
    for line in _scalars(work_dir):
        step = int(line["step"])
        if "loss" in line:
            losses[step] = line["loss"]
        if "val/accuracy" in line:
            names = ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
            figures = {name: line.get(f"val/{name}") for name in names}
            validations[step] = {**figures, "ties_half": line.get("val/accuracy_ties_half")}
    done = max(losses, default=0)
    said = f"{done} steps"
    is_best = best is not None and best.exists()
    best_step = _step_of(best) if is_best and best is not None else None
    if best_step in validations:
        said += f"; best validation {validations[best_step]['accuracy']:.1%}, at step {best_step}"
    elif validations:
        said += "; no validation was better than before training, so the last checkpoint is taken"
    return {
        "checkpoint": str(best if is_best else last),
        "is_best": is_best,
        "best_step": best_step,
        "steps": done,
        "losses": sorted(losses.items()),
        "validations": [{"step": step, **figures} for step, figures in sorted(validations.items())],
        "said": said,
    }


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("_")[2])


def _failure(log: Path, start: int, status: int) -> str:
    """The error of training, which is in its log, or the end of it."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode("utf-8", "replace").splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    if errors:
        said = "\n".join(lines[errors[-1] :][:_TAIL]).removeprefix("error:").strip()
    else:
        said = "\n".join(["it ended with", *(f"  {line}" for line in lines[-_TAIL:])])
    return f"training failed (status {status}): {said}\nthe complete log: {log}"
