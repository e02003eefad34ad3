"""The memory of a conversion is that of one weight file, not of the model."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint import read_checkpoint
from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.model.tiny_base import make_tiny_base
from polar_ft.model.weights import load_backbone
from polar_ft.template import PolarTemplate
from tests.conversion.test_checkpoint import save_zero

RANKS = 8


@pytest.fixture
def libc() -> Iterator[ctypes.CDLL]:
    """glibc, which meanwhile returns a tensor's memory at once; else it keeps some, now more, now less."""
    library = ctypes.CDLL(None)
    m_mmap_threshold = -3
    library.mallopt(m_mmap_threshold, 1 << 16)
    yield library
    library.mallopt(m_mmap_threshold, 1 << 25)


def rss_anon() -> int:
    """Anonymous memory of this process in bytes; mapped files are not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel does not say RssAnon")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_peak_is_a_weight_file_and_a_partition(tmp_path, libc, stage):
    """77 MB of float32 weights of eight ranks, written in files of 10 MB."""
    base = make_tiny_base(tmp_path / "base", ["a b"] * 20, vocab_size=300, hidden=512, layers=8, heads=8)
    decoder, _, _ = load_backbone(base, torch.float32)
    weights = {f"llm.{name}": tensor for name, tensor in decoder.state_dict().items()}
    weights["v_head.weight"] = torch.ones(1, 512)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    module = {name: torch.zeros(0, dtype=torch.bfloat16) for name in weights}
    if stage == 3:
        # Every size is a multiple of eight.
        cut = [tensor.flatten().chunk(RANKS) for tensor in weights.values()]
        vectors = [torch.cat([pieces[rank] for pieces in cut]) for rank in range(RANKS)]
    else:
        flat = torch.cat([tensor.flatten() for tensor in weights.values()])
        vectors = [vector.clone() for vector in flat.chunk(RANKS)]
        del flat
    save_zero(tmp_path / "iter_1.pth", stage, [[vector] for vector in vectors], module, [shapes])
    model_bytes = 4 * sum(map(math.prod, shapes.values()))
    partition = 4 * len(vectors[0])
    del decoder, weights, vectors

    template = PolarTemplate.from_pretrained(base, max_length=300, max_response_length=80)
    # What was freed above goes back to the system; otherwise it would be used again, unseen.
    libc.malloc_trim(0)
    peak = before = rss_anon()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, rss_anon())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        write_hf_folder(
            read_checkpoint(tmp_path / "iter_1.pth").tensors,
            base_folder=base,
            out_dir=tmp_path / "out",
            template=template,
            dtype=torch.float32,
            max_shard_size="10MB",
        )
    finally:
        ended.set()
        thread.join()
    largest = max(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert largest < 11e6
    assert model_bytes > 70e6
    assert peak - before < largest + partition, f"{(peak - before) / 1e6:.1f} MB"
    # And it was measured at all: that file was in memory.
    assert peak - before > 0.7 * largest
