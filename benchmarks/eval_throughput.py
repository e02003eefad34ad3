"""Scoring throughput, side by side on the same pairs: polar_ft, and transformers in padded batches.

    python benchmarks/eval_throughput.py --quick --json OUT      within 5 minutes on two CPU cores
    python benchmarks/eval_throughput.py --json OUT              more prompts

The token lengths are those of the RMB benchmark, the ids are random, and tokenizing is left out on both
sides. Every measurement is repeated, the candidates in turn, and medians are reported. benchmarks/README.md
says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine
from benchmarks.train_throughput import SHAPES, workload
from polar_ft.groups import TokenGroup
from polar_ft.model.reward_model import RewardHead
from polar_ft.model.weights import load_backbone
from polar_ft.scoring.scorer import RewardScorer

BATCH = 8  # sequences of a padded batch

# Rewards: of each pair (chosen, rejected), `[pairs, 2]`.
Score = Callable[[], np.ndarray]


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama with a reward head and random weights, as transformers writes it; made once."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, max_position_embeddings=32768, num_labels=1, pad_token_id=0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


class Padded:
    """transformers' own model: the sequences of all pairs in batches of `BATCH`, padded on the right.

    Args:
        folder: The model.
        dtype: To compute in.
        device: Where.
        attention: transformers' attn_implementation.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, attention: str) -> None:
        self.model = LlamaForSequenceClassification.from_pretrained(
            folder, torch_dtype=dtype, attn_implementation=attention
        )
        self.model.to(device).eval()

    @torch.inference_mode()
    def rewards(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """A reward for each sequence, `[sequences]`, in the order given."""
        rewards = np.zeros(len(sequences))
        for start in range(0, len(sequences), BATCH):
            batch = sequences[start : start + BATCH]
            width = max(map(len, batch))
            ids = np.zeros((len(batch), width), dtype=np.int64)
            mask = np.zeros((len(batch), width), dtype=np.int64)
            for row, sequence in enumerate(batch):
                ids[row, : len(sequence)] = sequence
                mask[row, : len(sequence)] = 1
            device = self.model.device
            output = self.model(
                input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
            )
            rewards[start : start + len(batch)] = output.logits.squeeze(-1).float().cpu().numpy()
        return rewards

    def as_they_come(self, groups: Sequence[TokenGroup]) -> Score:
        """Chosen and rejected of every pair in the order of the data, as evaluation scripts do it."""
        sequences = [
            np.concatenate([group.prefix, group.branches[side]])
            for group in groups
            for pair in group.pairs
            for side in pair
        ]
        return lambda: self.rewards(sequences).reshape(-1, 2)

    def once_and_sorted(self, groups: Sequence[TokenGroup]) -> Score:
        """Every candidate once, whatever pairs it is in, sorted by length: the best that padding can do."""
        places = [(at, branch) for at, group in enumerate(groups) for branch in range(len(group.branches))]
        sequences = [
            np.concatenate([groups[at].prefix, groups[at].branches[branch]]) for at, branch in places
        ]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))

        def score() -> np.ndarray:
            rewards = np.zeros(len(sequences))
            rewards[order] = self.rewards([sequences[i] for i in order])
            found = dict(zip(places, rewards.tolist(), strict=True))
            return np.array(
                [
                    [found[at, side] for side in pair]
                    for at, g in enumerate(groups)
                    for pair in g.pairs.tolist()
                ]
            )

        return score


class Tree:
    """polar_ft's scorer, which `polar-ft eval` uses."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, tokens_per_batch: int) -> None:
        decoder, weight, _ = load_backbone(folder, dtype)
        assert weight is not None
        head = RewardHead(decoder.config.hidden_size).to(weight.dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
        self.scorer = RewardScorer(
            decoder.to(device),
            head.to(device),
            template=None,  # the inputs are ids already
            tokens_per_batch=tokens_per_batch,
        )

    def once(self, groups: Sequence[TokenGroup]) -> Score:
        """Every candidate once, those of a (prompt, reference) together."""

        def score() -> np.ndarray:
            rewards = self.scorer.score_encoded(groups)
            return np.array(
                [
                    [row[side] for side in pair]
                    for row, group in zip(rewards, groups, strict=True)
                    for pair in group.pairs.tolist()
                ]
            )

        return score


def count_tokens(groups: Sequence[TokenGroup]) -> dict[str, int]:
    """Tokens that each candidate computes, padding included."""
    flat = [len(g.prefix) + len(g.branches[side]) for g in groups for pair in g.pairs for side in pair]
    once = sorted((len(g.prefix) + len(branch) for g in groups for branch in g.branches), reverse=True)

    def padded(lengths: list[int]) -> int:
        batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
        return sum(max(batch) * len(batch) for batch in batches)

    return {
        "padded": padded(flat),
        "padded_once_and_sorted": padded(once),
        "tree": sum(group.tree_tokens() for group in groups),
    }


def main() -> None:
    """Runs the comparison and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer prompts: within 5 minutes on two cores")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--model", choices=SHAPES, help="default: 25m on a CPU, 1.8b on a GPU")
    parser.add_argument("--prompts", type=int, help="RMB prompts, each with all its pairs")
    parser.add_argument("--repeats", type=int, help="measurements of each candidate")
    parser.add_argument("--tokens-per-batch", type=int, default=16384, help="of polar_ft")
    parser.add_argument("--attention", default="sdpa", help="of transformers: sdpa, eager, flash_attention_2")
    parser.add_argument(
        "--max-tokens", type=int, default=16384, help="longer prompts are left out, and counted"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = args.model or ("1.8b" if device == "cuda" else "25m")
    prompts = args.prompts or (200 if device == "cuda" else 4 if args.quick else 24)
    repeats = args.repeats or (2 if args.quick else 3)
    shape = SHAPES[model]
    folder = make_model(args.work_dir / f"eval-{model}", shape)
    groups = workload("rmb", prompts, args.max_tokens, shape["vocab_size"], args.seed)
    n_pairs = sum(len(group.pairs) for group in groups)

    padded = Padded(folder, dtype, device, args.attention)
    tree = Tree(folder, dtype, device, args.tokens_per_batch)
    candidates: dict[str, Score] = {
        "padded": padded.as_they_come(groups),
        "padded_once_and_sorted": padded.once_and_sorted(groups),
        "tree": tree.once(groups),
    }
    padded.as_they_come(groups[:1])()
    tree.once(groups[:1])()

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rewards: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, score in candidates.items():
            started = time.perf_counter()
            rewards[name] = score()  # the rewards come to the host, so a GPU is waited for
            seconds[name].append(time.perf_counter() - started)

    tokens = count_tokens(groups)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "model": model,
        "parameters": sum(p.numel() for p in padded.model.parameters()),
        "dtype": str(dtype),
        "attention_of_transformers": args.attention,
        "prompts": len(groups),
        "pairs": n_pairs,
        "repeats": repeats,
        "tokens_per_batch": args.tokens_per_batch,
        "padded_batch": BATCH,
        "seed": args.seed,
        "runs": [],
    }
    for name, times in seconds.items():
        middle = median(times)
        report["runs"].append(
            {
                "candidate": name,
                "seconds": times,
                "pairs_per_s": n_pairs / middle,
                "tokens": tokens[name],
                "tokens_per_s": tokens[name] / middle,
            }
        )
        print(
            f"{name:24}{n_pairs / middle:9.2f} pairs/s {tokens[name]:11,} tokens "
            f"{tokens[name] / middle:10,.0f} tokens/s"
        )
    differences = [
        float(np.abs(rewards[name] - rewards["padded"]).max()) for name in ("padded_once_and_sorted", "tree")
    ]
    ratio = median(seconds["padded"]) / median(seconds["tree"])
    report.update(
        tree_over_padded=ratio,
        tree_over_padded_once_and_sorted=median(seconds["padded_once_and_sorted"]) / median(seconds["tree"]),
        padded_tokens_over_tree_tokens=tokens["padded"] / tokens["tree"],
        max_abs_score_diff=max(differences),
        largest_abs_score=float(np.abs(rewards["padded"]).max()),
    )
    for key, value in report.items():
        if isinstance(value, float):
            print(f"{key:45} {value:.3g}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
