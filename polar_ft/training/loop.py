"""The training loop: from a step plan to the last checkpoint, read from top to bottom.

mmengine's runner (plain, or with DeepSpeed its flexible one) builds model, optimizer and this loop from a
config, loads the checkpoint of ``--resume``, and calls `TrainingLoop.run`: the order of everything in a run.
The loss of a step is computed in `polar_ft.training.step` by `polar_ft.model.reward_model` and
`polar_ft.model.losses`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.runner import BaseLoop
from torch.utils.data import DataLoader
from xtuner.registry import BUILDER

from polar_ft.errors import PolarError
from polar_ft.training import work_folder
from polar_ft.training.checkpoints import checkpoint_path, restore_run_state, save_checkpoint
from polar_ft.training.data import RewardDataset
from polar_ft.training.engines import DeepSpeedEngine, Engine, PlainEngine
from polar_ft.training.log import TrainingLog, report_bad_step
from polar_ft.training.ranks import STOPPED, StopSignals, beat, report_ending
from polar_ft.training.step import StepBatch, take_step, unwrapped
from polar_ft.training.terminal.events import report
from polar_ft.training.threads import set_threads
from polar_ft.training.track import start_tracking
from polar_ft.training.validation import Validation

# A run of fewer steps is warned of.
ENOUGH_STEPS = 20


class TrainingLoop(BaseLoop):
    """Trains a `PolarRewardModel`; ``train_cfg = dict(type=TrainingLoop, …)`` in a config.

    Args:
        runner: Given by mmengine.
        dataloader: ``train_dataloader`` of the config: ``dataset``, and ``num_workers`` and ``pin_memory`` of
            torch's DataLoader.
        max_epochs: Passes over the data.
        max_steps: Optimizer steps after which training ends; None takes those of ``max_epochs``.
        warmup_ratio: See `warmup_cosine`.
        min_lr_ratio: See `warmup_cosine`.
        autocast: Dtype of automatic mixed precision on CUDA without DeepSpeed; None computes in float32.
        save_steps: Optimizer steps from one checkpoint to the next; the last step is always saved.
        save_total_limit: How many checkpoints are kept, those written last; below 1 all are.
        max_bad_steps: So many steps in a row whose loss or gradient is not finite end the run.
        log_interval: Steps from one line of the log to the next.
        track: Tracking services, see `polar_ft.training.track.as_services`.
        validation: ``data``, ``interval``, ``metric`` and ``patience`` of `Validation`; None, or None as its
            data, for no validation.

    Raises:
        DataError: A row of the data is bad; the message names file and line.
        PolarError: A setting does not fit the data or another setting.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Mapping[str, Any],
        max_epochs: int = 1,
        *,
        max_steps: int | None = None,
        warmup_ratio: float = 0.03,
        min_lr_ratio: float = 0.1,
        autocast: str | None = "bfloat16",
        save_steps: int = 500,
        save_total_limit: int = 2,
        max_bad_steps: int = 5,
        log_interval: int = 1,
        track: Any = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse_hooks(runner)
        report("phase", text="reading and tokenizing the data")
        self.dataset: RewardDataset = BUILDER.build(dataloader["dataset"])
        self.workers = {
            name: dataloader[name] for name in ("num_workers", "pin_memory") if name in dataloader
        }
        # mmengine looks at the length and the batch size of a loader; steps are read by `_batches`.
        super().__init__(runner, DataLoader(self.dataset, batch_size=1))
        self.steps_per_epoch = self.dataset.plan.steps_per_epoch
        self._max_epochs = max_epochs
        self._max_iters = max_steps or max_epochs * self.steps_per_epoch
        self._iter = 0  # set by mmengine when it loads a checkpoint, as is the next, which follows from it
        self._epoch = 0
        self.stop_training = False  # hooks of users may set it

        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio
        self.autocast = getattr(torch, autocast) if autocast else None
        self.save_steps = save_steps
        self.save_total_limit = save_total_limit
        self.max_bad_steps = max_bad_steps
        self.log_interval = log_interval
        self.track = track
        self.validation: Validation | None = None
        if validation is not None and validation.get("data") is not None:
            self.validation = Validation(
                template=self.dataset.template,
                tokens_per_batch=self.dataset.plan.max_packed_length,
                **validation,
            )

    @property
    def iter(self) -> int:
        """Optimizer steps that are done; while one is computed and saved, those before it."""
        return self._iter

    @property
    def epoch(self) -> int:
        """From 0."""
        return self._iter // self.steps_per_epoch

    @property
    def max_epochs(self) -> int:
        """Passes over the data."""
        return self._max_epochs

    @property
    def max_iters(self) -> int:
        """Optimizer steps of the run."""
        return self._max_iters

    def run(self) -> Any:
        """Trains, and returns the model; called by mmengine."""
        runner, steps, first = self.runner, self._max_iters, self._iter
        engine = self._engine()
        model = unwrapped(engine.model)
        set_threads(runner, model.llm.config, resumed=first > 0)
        self._show_plan(engine)
        if first:
            restore_run_state(runner, self.dataset)
        if first >= steps:
            runner.logger.info(f"the checkpoint has seen all {steps} steps, so nothing is left to train")
        trackers = []
        if is_main_process():
            work_folder.begin()
            trackers = start_tracking(self.track, runner)
        runner.call_hook("before_train")
        log = TrainingLog(
            runner,
            model.llm.config.to_dict(),
            frozen=model.adapter is not None,
            interval=self.log_interval,
            first=first,
            steps=steps,
        )
        bad_steps = 0
        with StopSignals() as signals:
            beat("starting", first)  # from here on a signal saves
            if self.validation is not None:
                self.validation.start(runner, engine, first)
                self.stop_training |= first < steps and self.validation.ends(runner, first)
            batches = self._batches(first)
            while self._iter < steps and not self.stop_training:
                step = self._iter + 1
                beat("loading", step)
                started = time.perf_counter()
                batch = next(batches)
                data_time = time.perf_counter() - started

                lr = self._set_learning_rate(step)
                model.train()
                result = take_step(engine, model.objective, batch)
                step_time = time.perf_counter() - started

                bad_steps = 0 if result.updated else bad_steps + 1
                if bad_steps:
                    report_bad_step(runner, self.dataset, batch, result, step, bad_steps, self.max_bad_steps)
                runner.call_hook(
                    "after_train_iter", batch_idx=self._iter, data_batch=batch, outputs=result.figures
                )
                log.write(step, lr, result, data_time, step_time)

                if self.validation is not None:
                    self.validation.after_step(runner, engine, step, last=step == steps)
                    self.stop_training |= step < steps and self.validation.ends(runner, step)

                interrupted = signals.any_rank_got_one()
                if interrupted or self.stop_training or step == steps or step % self.save_steps == 0:
                    save_checkpoint(runner, self.dataset, step, self.save_total_limit)
                self._iter = step
                if interrupted:
                    self._exit_interrupted(step)
        if self.validation is not None:
            self.validation.finish(runner)
        runner.call_hook("after_train")
        for tracker in trackers:
            tracker.close()
        return runner.model

    def _engine(self) -> Engine:
        runner = self.runner
        if type(runner.model).__name__ == "MMDeepSpeedEngineWrapper":
            return DeepSpeedEngine(runner.model.model)
        optim_wrapper = runner.optim_wrapper
        max_norm = (optim_wrapper.clip_grad_kwargs or {}).get("max_norm", math.inf)
        return PlainEngine(runner.model, optim_wrapper.optimizer, max_norm, self.autocast)

    def _show_plan(self, engine: Engine) -> None:
        """Logs and keeps the step plan, and decides which layers are computed again in backward."""
        runner, plan = self.runner, self.dataset.plan
        summary = plan.describe()
        for line in self.dataset.groups.summary.lines():
            runner.logger.info(f"data: {line}")
        for line in summary.lines():
            runner.logger.info(f"plan: {line}")
        # DeepSpeed has allocated its optimizer state by now; AdamW's two moments and gradients come later.
        unallocated = 2 if isinstance(engine, DeepSpeedEngine) else 12
        decision = unwrapped(engine.model).plan_checkpointing(summary.largest_pack, unallocated)
        runner.logger.info(f"memory: {decision}")
        pairs = round(int(plan.sizes.pairs.sum()) * self._max_iters / self.steps_per_epoch)
        warning = short_run_warning(self._max_iters, self.warmup_ratio, pairs)
        if warning is not None:
            runner.logger.warning(warning)
        if is_main_process():
            kept = {
                "settings": plan.settings,
                "steps": self._max_iters,
                "data": str(self.dataset.groups.folder),
                "achieved": asdict(summary),
            }
            Path(runner.work_dir, "step_plan.json").write_text(json.dumps(kept, indent=1) + "\n")

    def _batches(self, first: int) -> Iterator[StepBatch]:
        """The steps after the first so many, of this rank; item i of the data set is step i of the run."""
        return iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=range(first, self._max_iters),
                # An iterator draws a number when it is made; not from the generator that dropout uses, since
                # a resumed run makes another iterator.
                generator=torch.Generator(),
                **self.workers,
            )
        )

    def _set_learning_rate(self, step: int) -> float:
        """Sets the rate that a step uses, from 1; it depends on the step alone."""
        factor = warmup_cosine(step - 1, self._max_iters, self.warmup_ratio, self.min_lr_ratio)
        groups = self.runner.optim_wrapper.param_groups
        for group in groups:
            # As torch's schedulers keep it: it is saved with the optimizer, so a resumed run has it.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        return groups[0]["lr"]

    def _exit_interrupted(self, step: int) -> None:
        self.runner.logger.info(
            f"stopped by a signal after step {step} of {self._max_iters}; "
            f"--resume {checkpoint_path(self.runner, step)} resumes (exit status {STOPPED})"
        )
        report_ending("stopped by a signal", STOPPED)
        raise SystemExit(STOPPED)


def warmup_cosine(step: int, steps: int, warmup_ratio: float, min_ratio: float) -> float:
    """Factor of the learning rate at a step: linear warm-up from ``min_ratio``, then cosine down to it.

    >>> [round(warmup_cosine(step, 10, 0.2, 0.1), 3) for step in (0, 1, 2, 6, 10)]
    [0.1, 0.55, 1.0, 0.55, 0.1]

    Args:
        step: Step, from 0.
        steps: Steps of the run.
        warmup_ratio: Share of the steps that warm up; of a short run at least one step.
        min_ratio: Factor at the first step and at the end.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return min_ratio + (1 - min_ratio) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def short_run_warning(steps: int, warmup_ratio: float, pairs: int) -> str | None:
    """What to do about a run with too few steps to learn anything; None for a longer one.

    >>> short_run_warning(2, 0.03, pairs=84).split("; ")[1]
    'global_batch_pairs = 4 would give 20 or more, or train on more rows or epochs'

    Args:
        steps: Of the run.
        warmup_ratio: See `warmup_cosine`.
        pairs: Of the run, over all epochs.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if steps >= ENOUGH_STEPS and steps > warmup:
        return None
    batch = max(1, pairs // ENOUGH_STEPS)
    return (
        f"the run has {steps} optimizer steps, {warmup} of them warm-up: too few to learn anything; "
        f"global_batch_pairs = {batch} would give {ENOUGH_STEPS} or more, or train on more rows or epochs"
    )


def _refuse_hooks(runner: Any) -> None:
    """Raises PolarError for hooks of mmengine that would do again, at another time, what the loop does."""
    ours = (CheckpointHook, IterTimerHook, LoggerHook, ParamSchedulerHook)
    found = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, ours)]
    if found:
        raise PolarError(
            f"the config registers mmengine's {', '.join(found)}, whose work the training loop does; copy "
            f"the line default_hooks = … from one of configs/"
        )
