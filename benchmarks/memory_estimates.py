"""How far the memory estimates of ``polar-ft plan`` are from measured peaks, on CPUs.

    OMP_NUM_THREADS=1 python -m benchmarks.memory_estimates [--model 50m] [--tokens 2048] [--repeats 3]

Every row is a training run of its own: N processes over gloo, three steps of random token ids through
`polar_ft.training.step`, plainly in float32 or under DeepSpeed in bfloat16 with xtuner's settings. Measured
is the highest resident memory of a process during the last two steps, less what it held before the model was
built; of several processes, the highest. The allocator gives freed memory back at once
(MALLOC_MMAP_THRESHOLD_), so that this is what is held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from polar_ft.doctor.peak import NO_CACHING, MemoryPeak

MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=4096, hidden_size=96, intermediate_size=192, num_hidden_layers=2),
    "50m": dict(vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8),
}
for shape in MODELS.values():
    shape |= dict(model_type="internlm2", bias=False, num_attention_heads=8, num_key_value_heads=4)
CASES = [
    *[("none", 1), ("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero3_offload", 1)],
    *[("none", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
]
# DeepSpeed's default is 500 million elements, more than these models have.
BUCKET = 5_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="50m")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--recompute", choices=["none", "full"], default="none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", help="such as zero2:2 (strategy:processes); default: all")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args)
        return
    cases = [(s, int(n)) for s, _, n in (c.partition(":") for c in args.cases)] if args.cases else CASES
    rows = []
    print(f"{args.model}, {args.tokens} tokens a pack, recompute {args.recompute}; MiB a process")
    print(f"{'':16}{'processes':>10}{'estimate':>10}{'measured':>10}{'error':>8}")
    for strategy, gpus in cases:
        measured = statistics.median(measure(strategy, gpus, args) for _ in range(args.repeats))
        estimated = estimated_peak(strategy, gpus, args)
        error = estimated / measured - 1
        rows.append(dict(strategy=strategy, processes=gpus, estimate=estimated, measured=int(measured)))
        print(f"{strategy:16}{gpus:>10}{estimated / 2**20:>10.0f}{measured / 2**20:>10.0f}{error:>+8.0%}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def estimated_peak(strategy: str, gpus: int, args: argparse.Namespace) -> int:
    import torch

    from polar_ft.doctor.memory import TEMPORARY, Activations, estimate, layer_activations, model_size

    dtype = torch.float32 if strategy == "none" else torch.bfloat16
    shape = MODELS[args.model]
    size = model_size(shape)
    activations = Activations.of_model(
        size, args.tokens, layer_activations(shape, dtype), dtype.itemsize, args.recompute
    )
    found = estimate(
        strategy,  # type: ignore[arg-type]
        size,
        activations,
        gpus=gpus,
        available=None,
        device="cpu",
        bucket=BUCKET,
    )
    # Offloaded to where it came from: both are the same memory, at different moments.
    update = TEMPORARY["cpu"] * size.trainable if found.host else 0
    return max(found.peak - found.reserved + found.host // gpus - update, found.host // gpus)


def measure(strategy: str, gpus: int, args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"),
            *("-m", "benchmarks.memory_estimates", "--rank-of", f"{strategy}:{folder}"),
            *("--model", args.model, "--tokens", str(args.tokens), "--recompute", args.recompute),
        ]
        environment = {**os.environ, **NO_CACHING, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return max(int(file.read_text()) for file in Path(folder).iterdir())


def run_rank(case: str, args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn

    from polar_ft.groups import TokenGroup
    from polar_ft.model.backbones import decoder_config, empty_decoder
    from polar_ft.model.losses import PairObjective
    from polar_ft.model.packing import build_pack
    from polar_ft.model.reward_model import RewardHead, packed_rewards
    from polar_ft.training import upstream
    from polar_ft.training.engines import DeepSpeedEngine, PlainEngine
    from polar_ft.training.step import StepBatch, take_step

    upstream.apply()
    strategy, _, folder = case.partition(":")
    plain = strategy == "none"
    shape = MODELS[args.model]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm: Any = empty_decoder(decoder_config(shape, "the shape")).to_empty(device="cpu")
            self.v_head = RewardHead(self.llm.config.hidden_size)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.02)
            self.recomputed = len(self.llm.layers) if args.recompute == "full" else 0

        def forward(self, pack):
            return packed_rewards(self.llm, self.v_head, pack, checkpointed_layers=self.recomputed)

    if plain:
        dist.init_process_group("gloo")
    else:
        import deepspeed
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rng = np.random.default_rng(rank)
    branch = args.tokens // 8  # four groups of a prefix and two branches; the prefix as long as both
    groups = [
        TokenGroup(
            rng.integers(0, 4000, 2 * branch // 2),
            [rng.integers(0, 4000, branch // 2) for _ in range(2)],
            np.array([[0, 1]]),
            np.zeros(1),
            np.ones(1),
        )
        for _ in range(4)
    ]
    pack = build_pack(groups, "tree")
    batch = StepBatch([pack, pack], 8.0 * ranks, 0, 0)
    warm = nn.Linear(8, 8, dtype=torch.float32 if plain else torch.bfloat16)
    warm(torch.zeros(8, 8, dtype=warm.weight.dtype)).sum().backward()
    peak = MemoryPeak()
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if plain:
        wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
        engine: Any = PlainEngine(wrapped, optimizer, max_norm=1)
    else:
        offload = {"device": "cpu", "pin_memory": False}
        zero: dict[str, Any] = {
            "stage": int(strategy[4]),
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET,
        }
        if strategy == "zero3_offload":
            zero |= {"offload_optimizer": offload, "offload_param": offload}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": True},
        }
        initialized, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        engine = DeepSpeedEngine(initialized)
    objective = PairObjective(penalty_type="none")
    take_step(engine, objective, batch)
    peak.forget()
    take_step(engine, objective, batch)
    take_step(engine, objective, batch)
    Path(folder, str(rank)).write_text(str(peak.bytes()))


if __name__ == "__main__":
    main()
