"""A short measured warm-up: forward, backward and update of a few packs, in a process of its own.

The model has the run's shapes and random weights, which take as long as any others, so the weights need not
be there. ``python -m polar_ft.doctor.warmup REQUEST RESULT`` is that process; `measure` starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from polar_ft.groups import Layout

if TYPE_CHECKING:
    from polar_ft.data.step_plan import Piece


class Request(BaseModel):
    """What to measure.

    Attributes:
        groups: Folder of tokenized data.
        plan: Arguments of `StepPlan` other than the sizes.
        hf_config: Shapes of the model.
        lora: Settings of adapters, or None.
        dtype: Of the weights.
        autocast: Whether forward runs in bfloat16 on a GPU.
        device: "cuda" or "cpu".
        attention: Backend.
        recomputed_layers: Layers that are computed again in backward.
        seconds: About how long to measure.
        threads: On a CPU; None measures how many are the fastest, as training does.
        kept: So many of a pack's pieces are computed once for their memory; None measures the time of as many
            as the seconds allow.
    """

    groups: str
    plan: dict[str, Any]
    hf_config: dict[str, Any]
    lora: dict[str, Any] | None
    dtype: str
    autocast: bool
    device: str
    attention: str
    recomputed_layers: int
    seconds: float = 20.0
    threads: int | None = None
    kept: int | None = None


class Warmup(BaseModel):
    """What was measured.

    Attributes:
        tokens: Of the largest pack that was computed.
        packs: Packs that were timed.
        seconds_per_cost: Forward and backward, for each unit of `Piece.cost`: a token, attention included.
        update_seconds: One update by AdamW.
        threads: On a CPU.
        kept: Pieces of a pack that were computed at a time.
        peak: Bytes beyond what the process held before the model was built.
    """

    tokens: int
    packs: int
    seconds_per_cost: float
    update_seconds: float
    threads: int
    kept: int
    peak: int


def measure(request: Request) -> Warmup | str:
    """Runs the warm-up; returns why there is no measurement where it failed.

    On a CPU memory is measured in a second process, as allocation is slower where that can be measured.
    """
    from polar_ft.doctor.peak import NO_CACHING

    timed = _in_a_process(request, {})
    if isinstance(timed, str) or request.device != "cpu":
        return timed
    held = _in_a_process(request.model_copy(update=dict(kept=timed.kept, threads=timed.threads)), NO_CACHING)
    return held if isinstance(held, str) else timed.model_copy(update=dict(peak=held.peak))


def _in_a_process(request: Request, environment: dict[str, str]) -> Warmup | str:
    with tempfile.TemporaryDirectory(prefix="polar_ft_") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(request.model_dump_json())
        command = [sys.executable, "-m", "polar_ft.doctor.warmup", str(question), str(answer)]
        limit = 120 + 6 * request.seconds
        try:
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"it was not done after {limit:.0f} s"
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return (
                lines[-1][:200] if lines else f"it ended with status {done.returncode} (killed for memory?)"
            )
        return Warmup.model_validate_json(answer.read_text())


def run(request: Request) -> Warmup:
    """The measurement, in this process."""
    import torch
    from torch import nn

    from polar_ft.data.step_plan import StepPlan
    from polar_ft.data.tokenized import TokenizedGroups
    from polar_ft.doctor.peak import MemoryPeak
    from polar_ft.groups import select_pairs
    from polar_ft.model.backbones import decoder_config, empty_decoder
    from polar_ft.model.losses import pair_loss
    from polar_ft.model.packing import Pack, build_pack
    from polar_ft.model.reward_model import RewardHead, packed_rewards
    from polar_ft.model.settings import LoraSettings
    from polar_ft.training.threads import fewest_fast, measure_threads

    groups = TokenizedGroups(Path(request.groups))
    plan = StepPlan(groups, **request.plan)
    layout: Layout = plan.layout
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    config = decoder_config(request.hf_config, "config.json")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(fewest_fast(measure_threads(config)))
    nn.Linear(8, 8).to(device)(torch.zeros(1, 8, device=device)).sum().backward()  # what torch itself takes
    peak = MemoryPeak(device)
    decoder: Any = empty_decoder(config)
    for module in decoder.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(nn.init.normal_(new, std=0.02)))
    decoder.to(device)
    if request.lora is not None:
        from polar_ft.training.lora import add_adapters

        add_adapters(decoder, LoraSettings.of_config(request.lora), ".")
        decoder.to(device)
    head = RewardHead(decoder.config.hidden_size).to(device, dtype)
    trained = [p for p in (*decoder.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def pack_of(pieces: list[Piece]) -> Pack:
        parts = [select_pairs(groups.group(p.group), slice(p.first_pair, p.last_pair)) for p in pieces]
        return build_pack(parts, layout).to(device)

    def compute(pieces: list[Piece]) -> float:
        started = _now(device)
        pack = pack_of(pieces)  # training makes it in the same process
        mixed = request.autocast and request.dtype == "float32" and device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if mixed else nullcontext():
            rewards = packed_rewards(
                decoder,
                head,
                pack,
                backend=request.attention,  # type: ignore[arg-type]
                checkpointed_layers=request.recomputed_layers,
            )
            pair_loss(rewards[pack.chosen], rewards[pack.rejected], pack.margin, "ranking").sum().backward()
        return _now(device) - started

    def update() -> float:
        started = _now(device)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return _now(device) - started

    pack_pieces = max(
        (pieces for of_rank in plan.packs(0, 0) for pieces in of_rank),
        key=lambda pieces: sum(piece.cost for piece in pieces),
    )
    by_cost = sorted(pack_pieces, key=lambda piece: piece.cost)
    if request.kept is not None:
        kept = by_cost[: request.kept]
    else:
        # The cheapest piece tells what a pack would take; a first run of anything is slower.
        compute(by_cost[:1])
        speed = compute(by_cost[:1]) / by_cost[0].cost
        kept = by_cost[:1]
        while len(kept) < len(by_cost) and speed * _cost(by_cost[: len(kept) + 1]) <= request.seconds / 3:
            kept = by_cost[: len(kept) + 1]
    compute(kept)
    update()
    timings: list[float] = []
    update_timings: list[float] = []
    started = time.monotonic()
    while not timings or (
        request.kept is None
        and (len(timings) < 2 or (len(timings) < 8 and time.monotonic() - started < request.seconds / 3))
    ):
        timings.append(compute(kept))
        update_timings.append(update())
    return Warmup(
        tokens=len(pack_of(kept).input_ids),
        packs=len(timings),
        seconds_per_cost=sorted(timings)[len(timings) // 2] / _cost(kept),
        update_seconds=sorted(update_timings)[len(timings) // 2],
        threads=torch.get_num_threads(),
        kept=len(kept),
        peak=peak.bytes(),
    )


def _cost(pieces: Sequence[Piece]) -> float:
    return sum(piece.cost for piece in pieces)


def _now(device: Any) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    measured = run(Request.model_validate_json(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(measured.model_dump_json())
