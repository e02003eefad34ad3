"""Training throughput, side by side on the same pairs: xtuner 0.2.0, polar_ft flat, polar_ft tree.

    python benchmarks/train_throughput.py --quick --json OUT      within 5 minutes on two CPU cores
    python benchmarks/train_throughput.py --model 1.8b --json OUT      on a GPU

What is timed is forward and backward of one optimizer step's worth of pairs; the optimizer itself is the same
for all. Every measurement is repeated, the candidates in turn, and medians are reported. benchmarks/README.md
says what each figure means.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import flash_attn_stand_in
from benchmarks.machine import describe_machine, peak_flops
from polar_ft.groups import TokenGroup
from polar_ft.model.losses import pair_loss
from polar_ft.model.packing import Pack, build_pack
from polar_ft.model.reward_model import RewardHead, packed_rewards
from polar_ft.model.weights import load_backbone
from polar_ft.training import upstream
from polar_ft.training.log import step_flops

LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "rmb_token_lengths.jsonl"
REWARD_ID, SEPARATOR_ID, BOS_ID, LF_ID = 4, 3, 1, 5

# CPU: 25M parameters, 13M of them in the layers. The others are the shapes of POLAR's config.json files, with
# random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "25m": dict(
        vocab_size=32000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
    ),
    "1.8b": dict(
        vocab_size=92544,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "7b": dict(
        vocab_size=92544,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


@dataclass
class Measurement:
    """Figures of one candidate on one workload."""

    seconds: list[float]
    loss: float
    gradients: dict[str, torch.Tensor]
    tokens: int
    peak_bytes: int


def make_groups(rows: list[dict], vocabulary: int, seed: int) -> list[TokenGroup]:
    """Groups with the token lengths of the workload and random ids."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> np.ndarray:
        return rng.integers(10, vocabulary, max(1, length))

    groups = []
    for row in rows:
        prompt, reference = text(row["prompt"]), text(row["reference"])
        prefix = np.concatenate([[BOS_ID], prompt, [LF_ID], reference, [SEPARATOR_ID], prompt, [LF_ID]])
        used, pairs = np.unique(np.array(row["pairs"]), return_inverse=True)
        groups.append(
            TokenGroup(
                prefix=prefix,
                branches=[np.append(text(row["responses"][i]), REWARD_ID) for i in used],
                pairs=pairs.reshape(-1, 2),
                margins=np.zeros(len(row["pairs"]), dtype=np.float32),
                weights=np.ones(len(row["pairs"]), dtype=np.float32),
            )
        )
    return groups


def workload(name: str, count: int, max_tokens: int, vocabulary: int, seed: int) -> list[TokenGroup]:
    """A random sample of the RMB prompts, ``single``: with one pair each."""
    rows = [json.loads(line) for line in LENGTHS.read_text().splitlines()]
    rng = np.random.default_rng(seed)
    sample = [rows[i] for i in rng.permutation(len(rows))[:count]]
    if name == "single":
        sample = [{**row, "pairs": [row["pairs"][rng.integers(len(row["pairs"]))]]} for row in sample]
    groups = make_groups(sample, vocabulary, seed)
    kept = [g for g in groups if max(len(g.prefix) + len(b) for b in g.branches) <= max_tokens]
    if len(kept) < len(groups):
        print(
            f"{name}: {len(groups) - len(kept)} of {len(groups)} prompts longer than {max_tokens} tokens "
            f"left out"
        )
    return kept


def pack_up(groups: list[TokenGroup], layout: str, capacity: int) -> list[Pack]:
    """Packs of at most ``capacity`` tokens where a group allows it, in the order given."""
    packs, current, tokens = [], [], 0
    for group in groups:
        size = group.tree_tokens() if layout == "tree" else group.flat_tokens()
        if current and tokens + size > capacity:
            packs.append(build_pack(current, layout))
            current, tokens = [], 0
        current.append(group)
        tokens += size
    return [*packs, build_pack(current, layout)]


class PolarCandidate:
    """polar_ft, flat or tree."""

    def __init__(
        self, folder: Path, layout: str, device: str, dtype: torch.dtype, checkpointing: bool
    ) -> None:
        self.layout, self.device = layout, device
        self.decoder, head, _ = load_backbone(folder, dtype)
        self.head = RewardHead(self.decoder.config.hidden_size).to(dtype)
        with torch.no_grad():
            self.head.weight.copy_(head)
        self.decoder.to(device).train()
        self.head.to(device)
        self.layers = len(self.decoder.layers) if checkpointing else 0

    def prepare(self, groups: list[TokenGroup], capacity: int) -> list[Pack]:
        return pack_up(groups, self.layout, capacity)

    def step(self, packs: list[Pack], pairs: int) -> tuple[float, int]:
        total = torch.zeros((), device=self.device)
        for pack in (pack.to(self.device) for pack in packs):
            rewards = packed_rewards(self.decoder, self.head, pack, checkpointed_layers=self.layers)
            loss = pair_loss(rewards[pack.chosen], rewards[pack.rejected], pack.margin).sum() / pairs
            loss.backward()
            total += loss.detach()
        return float(total), sum(len(pack.input_ids) for pack in packs)

    def gradients(self) -> dict[str, torch.Tensor]:
        from polar_ft.model.internlm2 import fuse_wqkv, to_internlm2_name, to_llama_names

        config = self.decoder.config
        named = {name: p.grad for name, p in self.decoder.named_parameters()}
        result = {"v_head.weight": self.head.weight.grad.float().cpu()}
        for name, gradient in named.items():
            target = to_internlm2_name(name)
            if "wqkv" in target:
                parts = [named[part] for part in to_llama_names(target)]
                gradient = fuse_wqkv(*parts, config.num_attention_heads, config.num_key_value_heads)
            result[target] = gradient.float().cpu()
        return result

    def zero_grad(self) -> None:
        self.decoder.zero_grad()
        self.head.zero_grad()

    def clear(self) -> None:
        self.decoder = self.head = None


class XtunerCandidate:
    """Unmodified ``RewardModel`` and ``preference_collate_fn`` of xtuner 0.2.0.

    On a CPU its padded mode with sdpa attention, one pair a batch: its varlen mode needs flash-attention. On
    a GPU its varlen mode on packs, with `benchmarks.flash_attn_stand_in` in place of flash-attention.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, checkpointing: bool) -> None:
        from mmengine.config import ConfigDict
        from transformers import AutoModel
        from xtuner.model.reward import RewardModel

        self.device, self.varlen = device, device == "cuda"
        self.model = RewardModel(
            llm=ConfigDict(
                type=AutoModel.from_pretrained,
                pretrained_model_name_or_path=str(folder),
                trust_remote_code=True,
                torch_dtype=dtype,
                attn_implementation="flash_attention_2" if self.varlen else "sdpa",
            ),
            use_varlen_attn=self.varlen,
            use_activation_checkpointing=checkpointing,
            loss_type="ranking",
            penalty_type="none",
        )
        self.model.to(device).train()

    def prepare(self, groups: list[TokenGroup], capacity: int) -> list[tuple[dict, int]]:
        from xtuner.dataset.collate_fns.preference_collate_fn import preference_collate_fn
        from xtuner.dataset.preference_dataset import PackedDatasetWrapper

        rows = []
        for group in groups:
            for chosen, rejected in group.pairs:
                row = {}
                for label, (side, branch) in enumerate((("chosen", chosen), ("rejected", rejected))):
                    ids = np.concatenate([group.prefix, group.branches[branch]]).tolist()
                    row[f"{side}_ids"] = ids
                    row[f"{side}_labels"] = [-100] * (len(ids) - 1) + [label]
                rows.append(row)
        if not self.varlen:
            return [(preference_collate_fn([row])["data"], 1) for row in rows]
        packed = PackedDatasetWrapper(rows, max_packed_length=capacity, shuffle_before_pack=False)
        return [
            (
                preference_collate_fn([item], use_varlen_attn=True)["data"],
                (len(item["cumulative_len"]) - 1) // 2,
            )
            for item in packed
        ]

    def step(self, batches: list[tuple[dict, int]], pairs: int) -> tuple[float, int]:
        from mmengine import MessageHub

        total, tokens = 0.0, 0
        for data, count in batches:
            inputs = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in data.items()}
            if self.varlen:  # what its VarlenAttnArgsToMessageHubHook does
                hub = MessageHub.get_instance("varlen_attn_args")
                cumulative = [c.to(self.device) for c in inputs.pop("cumulative_len")]
                hub.update_info("cumulative_len_rank_0", cumulative)
                hub.update_info("max_seqlen_rank_0", inputs.pop("max_seqlen"))
            tokens += inputs["input_ids"].numel()
            # Its loss is a mean over the batch; times the batch's share it adds up to the mean of all pairs.
            loss = self.model(inputs, mode="loss")["loss"] * (count / pairs)
            loss.backward()
            total += loss.detach()
        return float(total), tokens

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix("llm."): p.grad.float().cpu()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def clear(self) -> None:
        self.model = None


def peak_memory(device: str, run: Callable[[], Any]) -> int:
    """Peak bytes of activations of a run: on CUDA measured, on a CPU the bytes saved for backward."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    alive, peak = 0, 0
    seen: dict[int, int] = {}

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            if seen.setdefault(self.key, 0) == 0 and not tensor.is_leaf:
                alive += tensor.untyped_storage().nbytes()
                peak = max(peak, alive)
            seen[self.key] += 1

        def __del__(self) -> None:
            nonlocal alive
            seen[self.key] -= 1
            if seen[self.key] == 0 and not self.tensor.is_leaf:
                alive -= self.tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return peak


def compare(
    folder: Path,
    groups: list[TokenGroup],
    names: list[str],
    *,
    checkpointing: bool,
    device: str,
    dtype: torch.dtype,
    capacity: int,
    repeats: int,
) -> dict[str, Measurement]:
    """Measures candidates on the same pairs, in turn, ``repeats`` times."""
    pairs = sum(len(group.pairs) for group in groups)
    candidates: dict[str, Any] = {}
    for name in names:
        if name == "xtuner":
            candidates[name] = XtunerCandidate(folder, device, dtype, checkpointing)
        else:
            candidates[name] = PolarCandidate(folder, name, device, dtype, checkpointing)
    batches = {name: candidate.prepare(groups, capacity) for name, candidate in candidates.items()}
    warm_up = {name: candidate.prepare(groups[:1], 1)[:1] for name, candidate in candidates.items()}
    results: dict[str, Measurement] = {}
    for name, candidate in candidates.items():
        candidate.step(warm_up[name], pairs)
        candidate.zero_grad()
        results[name] = Measurement([], 0.0, {}, 0, 0)
    for repeat in range(repeats):
        for name, candidate in candidates.items():
            candidate.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            loss, tokens = candidate.step(batches[name], pairs)
            if device == "cuda":
                torch.cuda.synchronize()
            results[name].seconds.append(time.perf_counter() - started)
            results[name].loss, results[name].tokens = loss, tokens
            if repeat == 0:
                results[name].gradients = candidate.gradients()
    for name, candidate in candidates.items():
        candidate.zero_grad()
        largest = max(
            batches[name],
            key=lambda b: len(b.input_ids) if isinstance(b, Pack) else b[0]["input_ids"].numel(),
        )
        results[name].peak_bytes = peak_memory(device, lambda c=candidate, b=largest: c.step([b], pairs))
        candidate.clear()
    gc.collect()
    return results


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return (difference / sum(float(g.double().square().sum()) for g in theirs.values())) ** 0.5


def main() -> None:
    """Runs the comparison and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs: within 5 minutes on two cores")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--model", choices=SHAPES, help="default: 25m on a CPU, 1.8b on a GPU")
    parser.add_argument("--prompts", type=int, help="prompts of each workload")
    parser.add_argument("--repeats", type=int, help="measurements of each candidate")
    parser.add_argument("--capacity", type=int, help="tokens of a pack")
    parser.add_argument(
        "--max-tokens", type=int, default=16384, help="longer prompts are left out, and counted"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = args.model or ("1.8b" if device == "cuda" else "25m")
    prompts = args.prompts or (400 if device == "cuda" else 2 if args.quick else 16)
    repeats = args.repeats or (5 if device == "cuda" else 1 if args.quick else 3)
    capacity = args.capacity or (32768 if device == "cuda" else 8192)
    upstream.apply()  # xtuner 0.2.0 asks a CPU whether it has bf16, and torch.cpu cannot answer
    if device == "cuda":
        flash_attn_stand_in.install()
    folder = make_model(args.work_dir / model, SHAPES[model])

    report: dict[str, Any] = {
        "machine": describe_machine(),
        "model": model,
        "dtype": str(dtype),
        "prompts": prompts,
        "repeats": repeats,
        "capacity": capacity,
        "seed": args.seed,
        "runs": [],
    }
    settings = dict(device=device, dtype=dtype, capacity=capacity, repeats=repeats)
    measured: dict[tuple[str, bool], dict[str, Measurement]] = {}
    for name in ("rmb", "single"):
        count = prompts if name == "rmb" else 2 * prompts
        groups = workload(name, count, args.max_tokens, SHAPES[model]["vocab_size"], args.seed)
        pairs = sum(len(group.pairs) for group in groups)
        for checkpointing in (True, False):
            # In a hurry, of the runs that keep activations only the one compared with xtuner as configured.
            names = ["tree"] if args.quick and not checkpointing else ["xtuner", "flat", "tree"]
            results = compare(folder, groups, names, checkpointing=checkpointing, **settings)
            measured[name, checkpointing] = results
            for candidate, figures in results.items():
                seconds = median(figures.seconds)
                run = {
                    "workload": name,
                    "checkpointing": checkpointing,
                    "candidate": candidate,
                    "pairs": pairs,
                    "prompts": len(groups),
                    "seconds": figures.seconds,
                    "pairs_per_s": pairs / seconds,
                    "tokens": figures.tokens,
                    "tokens_per_s": figures.tokens / seconds,
                    "peak_activation_bytes": figures.peak_bytes,
                    "loss": figures.loss,
                }
                flops = step_flops(SHAPES[model], groups, candidate if candidate != "xtuner" else "flat")
                if peak_flops():
                    run["mfu"] = flops / seconds / peak_flops()
                else:
                    run["tflops_per_s"] = flops / seconds / 1e12
                report["runs"].append(run)
                print(
                    f"{name:7} checkpointing {'on ' if checkpointing else 'off'} {candidate:7}"
                    f"{pairs / seconds:9.2f} pairs/s {figures.tokens / seconds:10,.0f} tokens/s"
                    f"{figures.peak_bytes / 2**20:9,.0f} MiB activations   loss {figures.loss:.7f}",
                    flush=True,
                )

    def ratio(name: str, over: str, of: bool, against: bool) -> float:
        ours, theirs = measured[name, of]["tree"], measured[name, against][over]
        return median(theirs.seconds) / median(ours.seconds)

    losses, gradients = [], []
    for (name, _), results in measured.items():
        theirs = measured[name, True]["xtuner"]
        for candidate in sorted({"flat", "tree"} & set(results)):
            ours = results[candidate]
            losses.append(abs(ours.loss - theirs.loss) / abs(theirs.loss))
            gradients.append(relative_difference(ours.gradients, theirs.gradients))
    report.update(
        # xtuner as its configs have it: checkpointing on. Ours, the same memory budget: off where it fits.
        tree_over_xtuner_rmb=ratio("rmb", "xtuner", False, True),
        tree_over_xtuner_single=ratio("single", "xtuner", False, True),
        tree_over_xtuner_rmb_both_checkpointed=ratio("rmb", "xtuner", True, True),
        tree_over_xtuner_single_both_checkpointed=ratio("single", "xtuner", True, True),
        tree_over_flat_rmb=ratio("rmb", "flat", True, True),
        tree_over_flat_single=ratio("single", "flat", True, True),
        max_rel_loss_diff=max(losses),
        max_rel_grad_diff=max(gradients),
    )
    if not args.quick:
        report.update(
            tree_over_xtuner_rmb_neither_checkpointed=ratio("rmb", "xtuner", False, False),
            tree_over_xtuner_single_neither_checkpointed=ratio("single", "xtuner", False, False),
        )
    for key, value in report.items():
        if isinstance(value, float):
            print(f"{key:45} {value:.3g}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.json}")


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A reward model of that shape with random weights, in the published format; made once."""
    from benchmarks.random_model import write_random_reward_model

    if not (folder / "config.json").is_file():
        write_random_reward_model(folder, shape, reward_token_id=REWARD_ID)
    return folder


if __name__ == "__main__":
    main()
