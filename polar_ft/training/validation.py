"""Validation during training: the figures of `polar-ft eval`, the best checkpoint, stopping early.

A validation changes nothing in training: it draws no random number, and takes no part in the step's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import MMLogger

from polar_ft.data.reading import Sources
from polar_ft.errors import PolarError
from polar_ft.evaluation.figures import Figures, compute_figures
from polar_ft.evaluation.progress import progress_text
from polar_ft.evaluation.statistics.accuracy import Interval, PairMetrics
from polar_ft.model.packing import Pack
from polar_ft.template import PolarTemplate
from polar_ft.training.checkpoints import save_best
from polar_ft.training.data import HeldOutPairs
from polar_ft.training.engines import Engine
from polar_ft.training.ranks import beat
from polar_ft.training.settings import Metric
from polar_ft.training.step import unwrapped
from polar_ft.training.terminal.events import REPORTED, report

SECONDS_BETWEEN_LINES = 30.0
SUBSETS_SHOWN = 12

# Under this key mmengine's message hub, and so a checkpoint, keeps `_Progress`.
_KEY = "polar_ft_validation"


@dataclass
class _Progress:
    """What a checkpoint keeps of the validations so far.

    Attributes:
        identity: Of data and metric: what makes values comparable.
        best: The best value of the metric, None while there was none.
        best_log_loss: Decides between equal values.
        best_step: The step of the best value.
        best_checkpoint: Its checkpoint; None for the model that training started from.
        without_best: Validations in a row that gave no new best.
    """

    identity: str
    best: float | None = None
    best_log_loss: float | None = None
    best_step: int = 0
    best_checkpoint: str | None = None
    without_best: int = 0

    def is_better(self, value: float | None, log_loss: float | None, lower: bool) -> bool:
        """Whether a value is better than the best so far; of equal values the one of lower log-loss."""
        if value is None or log_loss is None:
            return False
        if self.best is None or self.best_log_loss is None:
            return True
        sign = -1 if lower else 1
        return (sign * value, -log_loss) > (sign * self.best, -self.best_log_loss)


class Validation:
    """Validates a run, keeps its best checkpoint, and says when to stop early.

    The figures go to log and TensorBoard, there under ``val/``. The model of the best validation is kept as
    ``best_<metric>_iter_<step>.pth`` in the work folder, weights only, and the file ``best_checkpoint`` there
    holds its path. The validation before the first step counts: the best checkpoint is better than what
    training started from, or there is none.

    Args:
        data: Held-out rows, in the form that ``data`` of a config has.
        template: Of the model.
        interval: Optimizer steps from one validation to the next.
        metric: What the best checkpoint is best in. Of two validations with the same value the one with the
            lower log-loss is the better one.
        patience: Training ends after so many validations in a row without a new best; None never ends it.
        tokens_per_batch: Tokens that one forward computes at most where possible.

    Raises:
        DataError: A row is bad; the message names file and line.
        PolarError: A row does not fit the limits, or a setting is wrong.
    """

    def __init__(
        self,
        data: Sources,
        template: PolarTemplate,
        interval: int,
        metric: Metric = "accuracy",
        patience: int | None = None,
        tokens_per_batch: int = 16384,
    ) -> None:
        if metric not in get_args(Metric):
            raise PolarError(f"val_metric={metric!r} is not one of {', '.join(map(repr, get_args(Metric)))}")
        if interval < 1 or (patience is not None and patience < 1):
            raise PolarError(f"val_interval={interval} and val_patience={patience} must be 1 or more")
        self.pairs = HeldOutPairs(data, template, tokens_per_batch)
        if metric == "macro_accuracy" and self.pairs.subsets is None:
            raise PolarError(
                'val_metric="macro_accuracy" needs rows with a subset; no row of val_data has one'
            )
        self.interval = interval
        self.metric: Metric = metric
        self.patience = patience
        self.progress = _Progress(f"{metric} {self.pairs.digest}")
        MMLogger.get_current_instance().info(f"validation: {self.pairs}")

    def start(self, runner: Any, engine: Engine, step: int) -> None:
        """Validates what training starts from, or restores the validations of the checkpoint that it resumes.

        Args:
            runner: Of mmengine.
            engine: Holds the model.
            step: Steps that the model has seen.
        """
        kept = runner.message_hub.get_info(_KEY)
        if kept is not None and kept["identity"] == self.progress.identity:
            self.progress = _Progress(**kept)
            return
        if kept is not None:
            runner.logger.warning(
                "validation: val_data or val_metric has changed since the checkpoint; the best so far and "
                "the patience start again"
            )
        self._validate(runner, engine, step, save=False)  # what training starts from exists already

    def after_step(self, runner: Any, engine: Engine, step: int, *, last: bool) -> None:
        """Validates where a validation is due; every rank calls it."""
        if last or step % self.interval == 0:
            self._validate(runner, engine, step)

    def ends(self, runner: Any, step: int) -> bool:
        """Whether the patience has ended."""
        progress = self.progress
        if self.patience is None or progress.without_best < self.patience:
            return False
        best = "none" if progress.best is None else f"{progress.best:.4f} at step {progress.best_step}"
        runner.logger.info(
            f"validation: {progress.without_best} in a row without a new best {self.metric} (best: {best}), "
            f"so training stops after step {step} (val_patience={self.patience})"
        )
        return True

    def finish(self, runner: Any) -> None:
        """Logs which checkpoint is best."""
        if self.progress.best is None:
            return
        best = f"best {self.metric} {self.progress.best:.4f} at step {self.progress.best_step}"
        where = self.progress.best_checkpoint or "no checkpoint is better than what training started from"
        runner.logger.info(f"validation: {best}; {where}")

    def _validate(self, runner: Any, engine: Engine, step: int, save: bool = True) -> None:
        started = time.monotonic()
        beat("validating")
        with _scoring(engine) as rewards:
            table = self.pairs.score(rewards, engine.device, _progress_lines(runner.logger, len(self.pairs)))
        # One process computes the figures, so that all decide alike.
        computed = [compute_figures(table) if is_main_process() else None]
        broadcast_object_list(computed)
        figures = computed[0]
        assert figures is not None
        scalars = scalars_of(figures)
        seconds = time.monotonic() - started
        runner.visualizer.add_scalars({f"val/{name}": value for name, value in scalars.items()}, step=step)
        lines = list(_lines(figures, step, seconds))
        for line in lines:
            runner.logger.info(line, extra=REPORTED)

        value, log_loss = scalars.get(self.metric), scalars.get("log_loss")
        progress = self.progress
        if progress.is_better(value, log_loss, lower=self.metric == "log_loss"):
            progress.best, progress.best_log_loss, progress.best_step = value, log_loss, step
            progress.without_best = 0
            target = Path(runner.work_dir, f"best_{self.metric}_iter_{step}.pth")
            progress.best_checkpoint = str(target) if save else None
        else:
            progress.without_best += 1
        best = progress.without_best == 0
        report("validation", step=step, figures=scalars, best=best, text=lines[0])
        runner.message_hub.update_info(_KEY, asdict(progress))
        if best and progress.best_checkpoint:
            save_best(runner, Path(progress.best_checkpoint), step)
            saved = f"validation: best {self.metric} so far, saved as {progress.best_checkpoint}"
            runner.logger.info(saved, extra=REPORTED)  # the table marks it


def scalars_of(figures: Figures) -> dict[str, float]:
    """The figures that become curves, by name; one that is not known is left out.

    ``accuracy``, ``log_loss``, ``margin`` (mean) and so on are over all scored pairs, ``macro_accuracy`` is
    the mean over subsets, ``subset/<name>/accuracy`` and so on are of one subset; ``_low`` and ``_high`` are
    the bounds of a 95 % interval.
    """
    overall, macro, calibration = figures.overall, figures.macro, figures.calibration
    low, high = _interval(overall) or (None, None)
    values = {
        "pairs": overall.n_pairs,
        "ties": overall.n_ties,
        "nonfinite": overall.n_nonfinite,
        "accuracy": overall.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_ties_half": overall.accuracy_ties_half,
        "log_loss": overall.log_loss,
        "margin": overall.mean_margin,
    }
    if calibration is not None:
        values |= {"ece": calibration.ece, "brier": calibration.brier}
    if macro is not None:
        low, high = macro.accuracy_ci95 or (None, None)
        values |= {"macro_accuracy": macro.accuracy, "macro_accuracy_low": low, "macro_accuracy_high": high}
    for name, subset in _subsets(figures).items():
        values |= {
            f"subset/{name}/accuracy": subset.accuracy,
            f"subset/{name}/log_loss": subset.log_loss,
            f"subset/{name}/margin": subset.mean_margin,
        }
    return {name: float(value) for name, value in values.items() if value is not None}


def _lines(figures: Figures, step: int, seconds: float) -> Iterator[str]:
    """The figures for the log."""
    overall, macro = figures.overall, figures.macro
    parts = [f"validation at step {step}: accuracy {_accuracy(overall)}"]
    if macro is not None and macro.accuracy is not None:
        parts.append(f"mean of subsets {macro.accuracy:.4f}")
    if overall.log_loss is not None:
        parts.append(f"log-loss {overall.log_loss:.4f}, mean margin {overall.mean_margin:.4f}")
    if overall.n_ties:
        parts.append(f"{overall.n_ties} ties")
    if overall.n_nonfinite:
        parts.append(f"{overall.n_nonfinite} pairs without finite scores, left out")
    yield ", ".join([*parts, f"{overall.n_pairs} pairs in {seconds:.1f} s"])
    subsets = _subsets(figures)
    shown = [f"{name} {_accuracy(subset)} ({subset.n_pairs} pairs)" for name, subset in subsets.items()]
    if len(shown) > SUBSETS_SHOWN:
        shown[SUBSETS_SHOWN:] = [f"{len(shown) - SUBSETS_SHOWN} more in TensorBoard"]
    if shown:
        yield f"validation at step {step}, by subset: {'; '.join(shown)}"


def _accuracy(metrics: PairMetrics) -> str:
    interval = _interval(metrics)
    if metrics.accuracy is None or interval is None:
        return "unknown"
    return f"{metrics.accuracy:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def _interval(metrics: PairMetrics) -> Interval | None:
    """The one that knows which pairs share a prompt, where it is there."""
    return metrics.accuracy_ci95_by_prompt or metrics.accuracy_ci95


def _subsets(figures: Figures) -> dict[str, PairMetrics]:
    return figures.subsets["subset"].subsets if "subset" in figures.subsets else {}


@contextmanager
def _scoring(engine: Engine) -> Iterator[Callable[[Pack], torch.Tensor]]:
    """The model as it is being trained, as a function from a pack to its rewards."""
    # Not through data-parallel wrappers. The complete model's forward: under ZeRO-3 its hooks gather the
    # parameters. Not in inference mode, whose tensors could not be trained on where parameters stay gathered.
    model = unwrapped(engine.model)

    def rewards(pack: Pack) -> torch.Tensor:
        with torch.no_grad(), engine.mixed_precision():
            return model(pack)

    training = model.training
    model.eval()
    try:
        yield rewards
    finally:
        model.train(training)


def _progress_lines(logger: Any, pairs: int) -> Callable[[float], None]:
    """Logs now and then how far a validation is; ranks are taken to be equally fast."""
    started = last = time.monotonic()

    def on_batch(share: float) -> None:
        nonlocal last
        beat("validating" if share < 1 else "validated")
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and share < 1:
            logger.info(f"validation: {progress_text(int(share * pairs), pairs, now - started, share)}")
            last = now

    return on_batch
