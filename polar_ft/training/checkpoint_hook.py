"""When checkpoints are saved, and how a run stops between two steps when it is told to."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import Hook

from polar_ft.training import resume
from polar_ft.training.checkpoints import UNFINISHED, point_to, prune, publish, told_when_not_saved
from polar_ft.training.ranks import STOPPED, beat, tell_ending

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StepCheckpointHook(Hook):
    """Saves a checkpoint every so many steps, after the last one, and before a run stops early.

    SIGTERM and SIGUSR1 (schedulers send them before they take a machine away) stop the run after the current
    step: it saves, and exits with status 75. A checkpoint is there as a whole or not at all; older ones go
    after the new one is there. A run that was loaded from a checkpoint goes on as if it had never stopped.

    Args:
        interval: Optimizer steps from one checkpoint to the next.
        max_keep_ckpts: How many are kept, those written last; below 1 all are.
    """

    # After validation, whose findings a checkpoint holds.
    priority = "VERY_LOW"

    def __init__(self, interval: int, max_keep_ckpts: int = -1) -> None:
        self.interval = interval
        self.max_keep_ckpts = max_keep_ckpts
        self.told: signal.Signals | None = None

    def before_train(self, runner: Any) -> None:
        """Called by mmengine before the first step, of a resumed run too."""
        # An iterator of a DataLoader draws a number when it is made; not of the generator that dropout uses,
        # since a resumed run makes another one.
        runner.train_dataloader.generator = torch.Generator()
        if runner.iter:
            resume.go_on(runner)
        beat("starting", runner.iter)
        for number in SIGNALS:
            signal.signal(number, self._remember_signal)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Called by mmengine before each step."""
        beat("loading", runner.iter + 1)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Called by mmengine after each step."""
        step = runner.iter + 1
        told = self._any_rank_was_told()
        stops = told or runner.train_loop.stop_training or step == runner.max_iters
        if stops or step % self.interval == 0:
            self._save(runner, step)
        if told:
            runner.logger.info(
                f"stopped by a signal after step {step} of {runner.max_iters}; "
                f"--resume {Path(runner.work_dir, _name(step))} goes on (exit status {STOPPED})"
            )
            tell_ending("stopped as told", STOPPED)
            raise SystemExit(STOPPED)

    def after_train(self, runner: Any) -> None:
        """Called by mmengine after the last step."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _remember_signal(self, number: int, frame: FrameType | None) -> None:
        self.told = signal.Signals(number)

    def _any_rank_was_told(self) -> bool:
        """Asked after every step, so that all ranks stop after the same one."""
        told = torch.tensor(int(self.told is not None))
        all_reduce(told, "max")
        return bool(told)

    def _save(self, runner: Any, step: int) -> None:
        runner.logger.info(f"Saving checkpoint at {step} iterations")
        beat("saving")
        resume.remember(runner)
        target = Path(runner.work_dir, _name(step))
        save(runner, target, step)
        if is_main_process():
            point_to(target)
            prune(Path(runner.work_dir), self.max_keep_ckpts)


def save(runner: Any, target: Path, step: int, weights_only: bool = False) -> None:
    """Saves a checkpoint that is whole or not there; every rank calls it.

    Args:
        runner: Of mmengine.
        target: Where to; what is there is replaced.
        step: Optimizer steps that the state has seen.
        weights_only: Leave optimizer and schedule out.

    Raises:
        PolarError: It could not be written.
    """
    unfinished = target.with_name(UNFINISHED)
    with told_when_not_saved(target):
        if is_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        barrier()
        runner.save_checkpoint(
            str(unfinished),
            target.name,
            save_optimizer=not weights_only,
            save_param_scheduler=not weights_only,
            meta=dict(epoch=runner.epoch, iter=step),
            by_epoch=False,
        )
        barrier()
        if is_main_process():
            publish(unfinished / target.name, target, step, get_world_size())
            shutil.rmtree(unfinished)  # DeepSpeed leaves its zero_to_fp32.py in it
        barrier()


def _name(step: int) -> str:
    return f"iter_{step}.pth"
