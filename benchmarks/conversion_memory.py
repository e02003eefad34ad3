"""Peak memory of a conversion: DeepSpeed checkpoints of POLAR-1.8B's shape with random weights.

    python benchmarks/conversion_memory.py --work-dir DIR --json OUT     20 GB of disk, some minutes

The checkpoints are in DeepSpeed's format as its ZeRO stages 2 and 3 save them, without Adam's moments, which
a conversion never uses. Every conversion is `polar-ft convert` in a process of its own. What is counted is
anonymous memory (RssAnon of Linux), every 5 ms: pages of memory-mapped checkpoints are page cache, which the
kernel takes back whenever it needs it. The bound is the largest weight file plus one rank's partition.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine
from polar_ft.files import read_json
from polar_ft.model.backbones import decoder_config, empty_decoder
from polar_ft.model.tiny_base import make_tiny_base

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
}
SHARDS = ("5GB", "1GB")
STAGES = (2, 3)

CONFIG = """\
from polar_ft.template import PolarTemplate
from polar_ft.training.model import PolarRewardModel

pretrained_model_name_or_path = {base!r}
tokenizer = dict(
    type=PolarTemplate.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
)
model = dict(
    type=PolarRewardModel,
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path),
    tokenizer=tokenizer,
)
"""


def make_base(folder: Path, shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Config and tokenizer of a base model; a conversion reads nothing else of it.

    Returns:
        Shapes of the parameters that training has.
    """
    make_tiny_base(folder, ["Which city is the capital of China?\nBeijing."] * 20, vocab_size=300)
    config = read_json(folder / "config.json") | shape
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    decoder = empty_decoder(decoder_config(config, str(folder)))
    shapes = {f"llm.{name}": tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    return shapes | {"v_head.weight": (1, config["hidden_size"])}


def make_checkpoint(folder: Path, stage: int, ranks: int, shapes: dict[str, tuple[int, ...]]) -> int:
    """Writes a checkpoint of random weights, rank by rank.

    Returns:
        Bytes of one rank's partition of the float32 weights.
    """
    folder.mkdir(parents=True)
    sizes = [math.prod(shape) for shape in shapes.values()]
    if stage == 3:
        partition = sum(math.ceil(size / ranks) for size in sizes)
    else:
        partition = math.ceil(sum(sizes) / (2 * ranks)) * 2
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    model = {
        "module": {name: torch.zeros(0, dtype=torch.bfloat16) for name in shapes},
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
    }
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(rank)
        flat = torch.empty(partition).normal_(std=0.02, generator=generator)
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks], key: [flat]}
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_{prefix}_optim_states.pt")
        if stage == 3:
            torch.save(model, folder / f"{prefix}_model_states.pt")
    if stage != 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")
    return partition * 4


def convert(config: Path, checkpoint: Path, out: Path, shard: str) -> dict[str, Any]:
    """Runs the command and watches its memory."""
    command = [sys.executable, "-m", "polar_ft.cli", "convert", *map(str, (config, checkpoint, out))]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--max-shard-size", shard],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    peak = max(_samples(process), default=0)
    if process.returncode:
        raise SystemExit(f"the conversion ended with status {process.returncode}")
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    shutil.rmtree(out)
    return {
        "peak_rss_anon_bytes": peak,
        "largest_file_bytes": max(files),
        "files": len(files),
        "seconds": time.perf_counter() - started,
    }


def _samples(process: subprocess.Popen[bytes]) -> Iterator[int]:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                yield int(line.split()[1]) * 1024
        time.sleep(0.005)


def main() -> None:
    """Measures what the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True)
    config = args.work_dir / "config.py"
    config.write_text(CONFIG.format(base=str(args.work_dir / "base")))
    try:
        small = make_base(args.work_dir / "base", {})
        tiny = args.work_dir / "tiny"
        make_checkpoint(tiny, 2, args.ranks, small)
        libraries = convert(config, tiny, args.work_dir / "out", "5GB")["peak_rss_anon_bytes"]

        shapes = make_base(args.work_dir / "base", SHAPE)
        report: dict[str, Any] = {
            "machine": describe_machine(),
            "parameters": sum(map(math.prod, shapes.values())),
            "ranks": args.ranks,
            "written": "bfloat16",
            "rss_anon_bytes_of_converting_a_tiny_model": libraries,
            "runs": [],
        }
        for stage in STAGES:
            checkpoint = args.work_dir / f"zero{stage}"
            partition = make_checkpoint(checkpoint, stage, args.ranks, shapes)
            for shard in SHARDS:
                run = convert(config, checkpoint, args.work_dir / "out", shard)
                bound = run["largest_file_bytes"] + partition
                run |= {"stage": stage, "max_shard_size": shard, "partition_bytes": partition}
                run |= {"bound_bytes": bound, "peak_over_bound": run["peak_rss_anon_bytes"] / bound}
                report["runs"].append(run)
                print(
                    f"ZeRO-{stage}, files of up to {shard}: peak {run['peak_rss_anon_bytes'] / 1e9:.2f} GB "
                    f"({libraries / 1e9:.2f} of it interpreter and libraries), bound {bound / 1e9:.2f} GB, "
                    f"{run['seconds']:.0f} s"
                )
            shutil.rmtree(checkpoint)
    finally:
        shutil.rmtree(args.work_dir)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
