"""Checkpoints of a run: saved atomically, and restored so that the rest of the run is the same to the bit.

mmengine's runner writes weights and optimizer, and with DeepSpeed each rank its part. What else decides how a
run continues travels in mmengine's message hub, the one part of a checkpoint that comes back both with and
without DeepSpeed: the random state of every rank (dropout of adapters draws from it), what the step plan
follows from, so that a changed plan is noticed, and the validations so far.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, barrier, get_rank, get_world_size, is_main_process

from polar_ft.conversion.checkpoint import RUN_STATE
from polar_ft.conversion.checkpoint_files import (
    BEST,
    UNFINISHED,
    explaining_save_errors,
    point_to,
    pointed_to,
    prune,
    publish,
    remove_checkpoint,
)
from polar_ft.errors import PolarError
from polar_ft.training.data import RewardDataset
from polar_ft.training.ranks import beat
from polar_ft.training.work_folder import CHANGEABLE, current


def checkpoint_path(runner: Any, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(runner.work_dir, f"iter_{step}.pth")


def save_checkpoint(runner: Any, dataset: RewardDataset, step: int, keep: int) -> None:
    """Saves a run after a step; every rank calls it.

    Args:
        runner: Of mmengine.
        dataset: The training data.
        step: Optimizer steps that the state has seen.
        keep: How many checkpoints are kept, those written last; below 1 all are.

    Raises:
        PolarError: It could not be written.
    """
    state = {
        "ranks": get_world_size(),
        "random": all_gather_object(_random_state()),
        "plan": plan_identity(dataset),
    }
    runner.message_hub.update_info(RUN_STATE, state)
    target = checkpoint_path(runner, step)
    _save(runner, target, step)
    if is_main_process():
        point_to(target)
        prune(Path(runner.work_dir), keep)
    runner.logger.info(f"saved {target}")


def save_best(runner: Any, target: Path, step: int) -> None:
    """Saves the weights alone, then removes those that were best before; every rank calls it."""
    _save(runner, target, step, weights_only=True)
    if not is_main_process():
        return
    previous = pointed_to(target.parent, BEST)
    point_to(target, BEST)
    if previous is not None and previous.parent == target.parent and previous.name != target.name:
        remove_checkpoint(previous)


def _save(runner: Any, target: Path, step: int, weights_only: bool = False) -> None:
    """Writes a checkpoint into the folder for unfinished ones, then moves it to its place."""
    unfinished = target.with_name(UNFINISHED)
    with explaining_save_errors(target):
        if is_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        barrier()
        beat("saving")
        runner.save_checkpoint(
            str(unfinished),
            target.name,
            save_optimizer=not weights_only,
            save_param_scheduler=False,
            meta=dict(epoch=runner.epoch, iter=step),
            by_epoch=False,
        )
        beat("saved")
        barrier()
        if is_main_process():
            run = current()
            settings = None if run is None else run.identity
            publish(unfinished / target.name, target, step, get_world_size(), settings)
            shutil.rmtree(unfinished)  # DeepSpeed leaves its zero_to_fp32.py in it
        barrier()


def restore_run_state(runner: Any, dataset: RewardDataset) -> None:
    """Restores what mmengine does not, of a run that it has loaded from a checkpoint.

    Settings that the command line changes on purpose replace those of the checkpoint's optimizer.

    Raises:
        PolarError: The step plan is not the one that the checkpoint was trained by.
    """
    state = runner.message_hub.get_info(RUN_STATE)
    _check_plan(state["plan"], plan_identity(dataset))
    if state["ranks"] == get_world_size():
        _restore_random_state(state["random"][get_rank()])
    else:
        runner.logger.warning(
            f"the checkpoint was saved by {state['ranks']} ranks and resumes with {get_world_size()}: "
            f"the steps hold the same pairs, but sums are rounded in another order, and dropout differs"
        )
    run = current()
    changed = {} if run is None else {n: v for n, v in run.changed().items() if n in CHANGEABLE}
    for name, (before, now) in changed.items():
        runner.logger.info(f"changed since the checkpoint: {name} was {before}, is {now}")
    change_optimizer(runner.optim_wrapper.param_groups, changed)


def change_optimizer(groups: list[dict[str, Any]], changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Gives parameter groups, which hold a checkpoint's settings, those that were changed since.

    >>> groups = [{"initial_lr": 0.1, "lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0}]
    >>> change_optimizer(groups, {"lr": (0.1, 0.5), "betas": ([0.9, 0.95], [0.9, 0.99])})
    >>> groups
    [{'initial_lr': 0.5, 'lr': 0.03, 'betas': (0.9, 0.99), 'weight_decay': 0}]

    Args:
        groups: Of the optimizer; changed in place. ``lr`` itself is set before every step.
        changed: Name to old and new value; other names than the optimizer's are left out.
    """
    for group in groups:
        if "lr" in changed:
            before, now = changed["lr"]
            # A group may have a multiple of the rate.
            group["initial_lr"] = now * (group["initial_lr"] / before)
        if "betas" in changed:
            group["betas"] = tuple(changed["betas"][1])
        if "weight_decay" in changed and group["weight_decay"] == changed["weight_decay"][0]:
            group["weight_decay"] = changed["weight_decay"][1]


def plan_identity(dataset: RewardDataset) -> dict[str, Any]:
    """What decides which pairs each step holds; ranks, packs and memory settings do not."""
    sizes = dataset.plan.sizes
    digest = hashlib.sha256()
    for values in (sizes.pairs, sizes.weights, sizes.tokens["tree"], sizes.tokens["flat"]):
        digest.update(np.ascontiguousarray(values).tobytes())
    return {
        "seed": dataset.plan.seed,
        "steps_per_epoch": dataset.plan.steps_per_epoch,
        "pairs": int(sizes.pairs.sum()),
        "data": digest.hexdigest()[:16],
    }


def _check_plan(then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name} was {then[name]}, is {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise PolarError(
            f"the checkpoint was trained by another step plan ({'; '.join(changed)}), so some pairs would be "
            f"seen twice and others never; restore data, seed, limits and global_batch_pairs, or start again "
            f"from the converted checkpoint"
        )


def _random_state() -> dict[str, Any]:
    version, words, position = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), position],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, words, position = state["python"]
    random.setstate((version, tuple(words), position))
    name, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), int(place), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
