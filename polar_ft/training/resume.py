"""What a checkpoint holds beside weights, optimizer and schedule, so that the rest of a run is the same bits.

It travels in mmengine's message hub, the one part of a checkpoint that comes back both with and without
DeepSpeed: the state of every rank's random generators (dropout of adapters draws from them), and what the
step plan follows from, so that a changed plan is noticed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.runner.loops import _InfiniteDataloaderIterator

from polar_ft.errors import PolarError
from polar_ft.training.dataset import RewardDataset

_KEY = "polar_ft_resume"


def remember(runner: Any) -> None:
    """Puts what a checkpoint is to hold into the message hub; every rank calls it before saving."""
    state = {
        "ranks": get_world_size(),
        "random": all_gather_object(_random_state()),
        "plan": plan_identity(runner.train_dataloader.dataset),
    }
    runner.message_hub.update_info(_KEY, state)


def go_on(runner: Any) -> None:
    """Makes a run that was loaded from a checkpoint go on where that one was saved.

    Raises:
        PolarError: The step plan is not the one that the checkpoint was trained by.
    """
    state = runner.message_hub.get_info(_KEY)
    if state is None:
        runner.logger.warning(
            "the checkpoint says nothing of random generators and step plan (another tool or an older "
            "version wrote it), so the rest of the run may differ from an uninterrupted one"
        )
    else:
        _check_plan(state["plan"], plan_identity(runner.train_dataloader.dataset))
        if state["ranks"] == get_world_size():
            _restore_random_state(state["random"][get_rank()])
        else:
            runner.logger.warning(
                f"the checkpoint was saved by {state['ranks']} ranks and goes on with {get_world_size()}: "
                f"the steps hold the same pairs, but sums are rounded in another order, and dropout differs"
            )
    loop = runner.train_loop
    loop.dataloader_iterator = _LaterSteps(runner.train_dataloader, skip=runner.iter)


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
            f"seen twice and others never; put data, seed, limits and global_batch_pairs back, or start anew "
            f"from the converted checkpoint"
        )


class _LaterSteps:
    """Steps of a data loader for mmengine's loop, which asks for all before a resumed one and drops them.

    Those are not built: the sampler starts later instead.
    """

    def __init__(self, dataloader: Any, skip: int) -> None:
        epoch, first = divmod(skip, len(dataloader))
        dataloader.sampler.set_epoch(epoch)
        dataloader.sampler.first = first
        self.skip = skip
        self.steps = _InfiniteDataloaderIterator(dataloader)
        self.steps._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.skip:
            self.skip -= 1
            return None
        return next(self.steps)


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
