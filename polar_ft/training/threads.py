"""How many threads a run computes with on a CPU: chosen by a short measurement when training begins."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size
from transformers import PretrainedConfig

from polar_ft.groups import TokenGroup
from polar_ft.model.memory import layer_of_zeros
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import run_layer

# In mmengine's message hub, so that it is saved with every checkpoint.
_KEY = "polar_ft_threads"

_SECONDS = 1.0
# Operations of one layer forward and backward: some 50 ms on one core.
_FLOPS = 1e9


def set_threads(runner: Any, config: PretrainedConfig, *, resumed: bool) -> None:
    """Sets the threads of a run on a CPU, logs them, and keeps their number for a resumed run.

    torch takes every core, which can be several times slower than one thread where other processes use the
    cores, or the model is tiny. So without ``OMP_NUM_THREADS`` they are measured (`measure_threads`). With
    it, and with several processes, whose launcher sets it to 1, nothing is chosen.

    Another number of threads adds up in another order. So a resumed run takes the number that its checkpoint
    was trained with, and remains the same to the bit as an uninterrupted one.

    Args:
        runner: Of mmengine.
        config: Of the decoder.
        resumed: Whether the run continues a checkpoint.
    """
    if torch.cuda.is_available():
        return
    saved = runner.message_hub.get_info(_KEY, None) if resumed else None
    if "OMP_NUM_THREADS" in os.environ or get_world_size() > 1:
        now = torch.get_num_threads()
        if saved not in (None, now):
            runner.logger.warning(
                f"threads: {now}, and the checkpoint was trained with {saved}: the rest is that of an "
                f"uninterrupted run up to rounding, not to the bit; OMP_NUM_THREADS={saved} makes it the same"
            )
    elif saved is not None:
        torch.set_num_threads(saved)
        runner.logger.info(f"threads: {saved}, as the checkpoint was trained")
    elif not resumed:  # a checkpoint that does not say was trained with torch's default
        seconds = measure_threads(config)
        torch.set_num_threads(fewest_fast(seconds))
        found = ", ".join(f"{count}: {1000 * value:.0f} ms" for count, value in seconds.items())
        runner.logger.info(
            f"threads: {torch.get_num_threads()}, measured on one layer ({found}); OMP_NUM_THREADS sets them"
        )
    runner.message_hub.update_info(_KEY, torch.get_num_threads())


def measure_threads(config: PretrainedConfig) -> dict[int, float]:
    """Seconds of forward and backward of one layer of zeros, by the number of threads.

    Takes about a second, and tries 1, 2, 4, … and as many threads as torch takes by itself, in turn, so that
    what other processes do meanwhile affects all of them. torch's number is the same afterwards.
    """
    most = torch.get_num_threads()
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})
    if counts == [1]:
        return {1: 0.0}
    config = copy.deepcopy(config)
    decoder = layer_of_zeros(config, torch.float32)
    weights = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    tokens = int(_FLOPS / (6 * weights))
    length = min(max(16, tokens), 256)
    sequences = [[0] * length] * min(max(1, tokens // length), 16)
    pack = build_pack([TokenGroup.of_sequences([ids]) for ids in sequences], "flat")
    hidden = torch.zeros((1, len(pack.input_ids), config.hidden_size), requires_grad=True)
    rotary = decoder.rotary_emb(hidden, pack.position_ids.unsqueeze(0))

    def compute(threads: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        run_layer(decoder.layers[0], hidden, rotary, pack, rewards_only=False).sum().backward()
        return time.perf_counter() - started

    try:
        for count in counts:  # the first run of anything is slower
            compute(count)
        taken: dict[int, list[float]] = {count: [] for count in counts}
        started = time.perf_counter()
        while not taken[most] or time.perf_counter() - started < _SECONDS:
            for count in counts:
                taken[count].append(compute(count))
    finally:
        torch.set_num_threads(most)
    # The lower quartile: another process that runs for part of the second decides nothing, one that runs all
    # the time counts.
    return {count: sorted(values)[len(values) // 4] for count, values in taken.items()}


def fewest_fast(seconds: Mapping[int, float]) -> int:
    """The fewest threads that are within 10 % of the fastest.

    >>> fewest_fast({1: 1.0, 2: 0.95, 4: 0.98}), fewest_fast({1: 1.0, 2: 0.6, 4: 0.4})
    (1, 4)
    """
    fastest = min(seconds.values())
    return min(count for count, value in seconds.items() if value <= 1.1 * fastest)
