"""Tokenizing and planning, ours and xtuner 0.2.0's, on the same rows.

    python benchmarks/data_preparation.py --json OUT        100,000 pairs; xtuner on a part of them

Rows have the token lengths of the RMB workload and words of real answers. Each measurement runs in a process
of its own, so that peak memory is its own. benchmarks/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import resource
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import describe_machine

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LIMITS = dict(max_length=16384, max_response_length=4096)


def write_rows(file: Path, pairs: int, seed: int = 0) -> None:
    """JSONL with the shape of the RMB workload: several pairs of one prompt, in random order."""
    rng = np.random.default_rng(seed)
    words = real_words()
    lengths = [json.loads(line) for line in (SHARED / "rmb_token_lengths.jsonl").read_text().splitlines()]

    def text(tokens: int) -> str:
        start = int(rng.integers(len(words)))
        # About 1.3 tokens a word for a vocabulary of 32,000.
        return " ".join(words[start : start + max(1, round(tokens / 1.3))])

    written = 0
    with file.open("w", encoding="utf-8") as lines:
        while written < pairs:
            row = lengths[rng.integers(len(lengths))]
            prompt, reference = text(row["prompt"]), text(row["reference"])
            responses = [text(length) for length in row["responses"]]
            for chosen, rejected in row["pairs"][: pairs - written]:
                record = {
                    "prompt": [{"role": "user", "content": prompt}],
                    "reference": [{"role": "assistant", "content": reference}],
                    "chosen": [{"role": "assistant", "content": responses[chosen]}],
                    "rejected": [{"role": "assistant", "content": responses[rejected]}],
                }
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                written += 1


def real_words() -> list[str]:
    """Words of the answers in the AlpacaEval file, in order."""
    words: list[str] = []
    with gzip.open(SHARED / "alpaca_eval_ranked.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            for response in json.loads(line)["responses"][:4]:
                words += response["content"].split()
    return words


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 32,000 pieces, learned from the same words."""
    from polar_ft.model.tiny_base import make_tiny_base

    words = real_words()
    texts = (" ".join(words[i : i + 200]) for i in range(0, len(words), 200))
    make_tiny_base(folder, texts, vocab_size=32000, hidden=64, layers=1)


def ours(file: str, base: str, cache: str) -> dict[str, float]:
    """Tokenize and plan, or map what was tokenized."""
    from polar_ft.data.reading import as_sources
    from polar_ft.data.step_plan import StepPlan
    from polar_ft.data.tokenized import tokenize
    from polar_ft.template import PolarTemplate

    started = time.perf_counter()
    template = PolarTemplate.from_pretrained(base, **LIMITS)
    groups = tokenize(as_sources(file), template, cache)
    plan = StepPlan(groups, global_batch_pairs=320, max_packed_length=32768, hidden_size=2048)
    plan.packs(0, 0)
    return {"seconds": time.perf_counter() - started, "tokens": groups.summary.flat_tokens}


def xtuners(file: str, base: str, cache: str) -> dict[str, float]:
    """xtuner 0.2.0: read, tokenize with two processes, pack."""
    from transformers import AutoTokenizer
    from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(base)
    build_preference_dataset(
        dataset=load_jsonl_dataset(data_files=file),
        tokenizer=tokenizer,
        is_dpo=False,
        is_reward=True,
        reward_token_id=tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]"),
        num_proc=2,
        use_varlen_attn=True,
        max_packed_length=32768,
        is_reference=True,
        **LIMITS,
    )
    return {"seconds": time.perf_counter() - started}


def measured(function, *arguments: str) -> dict[str, Any]:
    """Runs a function in a new process; adds the peak memory of it and its children.

    ``peak_memory_mib`` is the resident set, which counts pages of mapped files that the system may drop at
    any time; ``peak_private_mib`` is what it cannot drop, sampled in the process itself.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_memory, function, arguments).result()


def _with_memory(function, arguments: tuple[str, ...]) -> dict[str, Any]:
    import logging

    logging.disable(logging.INFO)  # xtuner logs every row that it cuts
    private = [0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            status = Path("/proc/self/status").read_text()
            private[0] = max(private[0], int(status.partition("RssAnon:")[2].split()[0]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        result = function(*arguments)
    finally:
        ended.set()
        sampler.join()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return result | {"peak_memory_mib": max(own, children) / 1024, "peak_private_mib": private[0] / 1024}


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--xtuner-pairs", type=int, default=4_000, help="a part of the rows: it is slow")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/benchmarks/data"))
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    base = args.work_dir / "base"
    if not (base / "config.json").is_file():
        make_tokenizer(base)
    report: dict[str, Any] = {"machine": describe_machine()}
    part, half, whole = (args.work_dir / f"{name}.jsonl" for name in ("part", "half", "whole"))
    for file, pairs in ((part, args.xtuner_pairs), (half, args.pairs // 2), (whole, args.pairs)):
        write_rows(file, pairs)

    def figures(name: str, function, file: Path, pairs: int, cache: str) -> dict[str, Any]:
        result = measured(function, str(file), str(base), str(args.work_dir / cache))
        result["pairs_per_s"] = pairs / result["seconds"]
        report[name] = result
        print(
            f"{name:24} {pairs:8,} pairs {result['seconds']:8.2f} s {result['pairs_per_s']:10,.0f} pairs/s "
            f"peak {result['peak_memory_mib']:6,.0f} MiB, private {result['peak_private_mib']:6,.0f} MiB",
            flush=True,
        )
        return result

    for cache in ("cache_part", "cache_half", "cache_whole"):
        shutil.rmtree(args.work_dir / cache, ignore_errors=True)
    theirs = figures("xtuner", xtuners, part, args.xtuner_pairs, "unused")
    same = figures("polar_ft_same_rows", ours, part, args.xtuner_pairs, "cache_part")
    figures("polar_ft_half", ours, half, args.pairs // 2, "cache_half")
    figures("polar_ft_first_start", ours, whole, args.pairs, "cache_whole")
    figures("polar_ft_second_start", ours, whole, args.pairs, "cache_whole")
    report["xtuner_over_polar_ft"] = theirs["seconds"] / same["seconds"]
    print(f"xtuner takes {report['xtuner_over_polar_ft']:.1f} times as long on the same rows")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
