"""The calls of varlen kernels, which run on GPUs alone, against references of the same signatures."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.model import attention
from polar_ft.model.packing import Pack, build_pack

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


def attend(q, k, v, cu_q, cu_k, scale: float, *, top_left: bool = False) -> torch.Tensor:
    """Causal attention of every segment by its definition: softmax of masked scores, times the values."""
    outputs = []
    for segment in range(len(cu_q) - 1):
        rows, columns = slice(cu_q[segment], cu_q[segment + 1]), slice(cu_k[segment], cu_k[segment + 1])
        keys, values = (x[columns].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * scale
        queries, length = scores.shape[1:]
        seen = torch.arange(queries)[:, None] + (0 if top_left else length - queries)
        scores = scores.masked_fill(torch.arange(length) > seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


def check_lengths(q, k, cu_q, cu_k, max_q: int, max_k: int) -> None:
    """What the kernels ask of their arguments."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)


# The parameters of flash_attn 2.8's flash_attn_varlen_func (flash_attn/flash_attn_interface.py); its causal
# mask is aligned to the bottom right since 2.1.
def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal
    assert dropout_p == 0
    check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **settings):
    """torch's, whose own signature is checked below."""
    bound = inspect.signature(REAL_VARLEN).bind(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **settings
    )
    assert bound.arguments["window_size"] == (-1, 0)  # causal
    assert query.shape[1] == key.shape[1] == value.shape[1]  # heads are repeated, not grouped
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    check_lengths(query, key, cu_seq_q, cu_seq_k, max_q, max_k)
    scale = bound.arguments.get("scale") or query.shape[-1] ** -0.5
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale)


varlen = pytest.importorskip("torch.nn.attention.varlen")
REAL_VARLEN = varlen.varlen_attn


@pytest.fixture(params=["flash_attn", "torch"])
def kernel(request, monkeypatch) -> str:
    """A backend whose kernel is the reference."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    attention.check_kernel.cache_clear()
    return request.param


def random_pack(seed: int, layout: str) -> Pack:
    """Trees of one to four groups, with prefixes and branches of one token and more, and without a prefix."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> np.ndarray:
        return rng.integers(0, 50, rng.integers(least, most))

    groups = [
        TokenGroup(ids(0, 20), [ids(1, 9) for _ in range(rng.integers(1, 6))])
        for _ in range(rng.integers(1, 5))
    ]
    return build_pack(groups, layout)


def states(tokens: int, queries: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, length in ((HEADS, queries), (KV_HEADS, tokens), (KV_HEADS, tokens))
    ]


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("layout", ["tree", "flat"])
@pytest.mark.parametrize("seed", range(12))
def test_forward_and_backward_equal_sdpa(kernel, layout, seed, scaling):
    pack = random_pack(seed, layout)
    for segments, queries in (
        (pack.segments, len(pack.input_ids)),
        (pack.reward_segments, len(pack.reward_index)),
    ):
        results = []
        for compute in (
            lambda *qkv: attention._varlen(*qkv, segments, scaling, attention.KERNELS[kernel]),  # noqa: B023
            lambda *qkv: attention._sdpa(*qkv, segments, scaling),  # noqa: B023
        ):
            qkv = states(len(pack.input_ids), queries, seed)
            output = compute(*qkv)
            assert output.shape == (1, queries, HEADS, HEAD_DIM)
            weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
            (output * weights).sum().backward()
            results.append([output, *(x.grad for x in qkv)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_reference_kernel_passes_the_check_on_the_device(kernel):
    attention.check_kernel(kernel, "cpu", torch.float32)


def test_a_kernel_that_aligns_top_left_fails(kernel, monkeypatch):
    """In the comparison above, and where a run begins."""
    this = sys.modules[__name__]
    monkeypatch.setattr(
        this, "attend", lambda *a, original=attend, **settings: original(*a, **settings, top_left=True)
    )
    with pytest.raises(AssertionError, match="not close"):
        test_forward_and_backward_equal_sdpa(kernel, "tree", 0, None)
    with pytest.raises(PolarError, match="does not compute causal attention aligned to the bottom right"):
        attention.check_kernel(kernel, "cpu", torch.float32)


def test_a_kernel_is_checked_when_it_is_chosen(kernel, monkeypatch):
    checked = []
    monkeypatch.setattr(attention, "available_backends", lambda device, dtype: [kernel, "sdpa"])
    monkeypatch.setattr(attention, "check_kernel", lambda *arguments: checked.append(arguments))
    assert attention.choose_backend("auto", torch.device("cpu"), torch.float32) == kernel
    assert checked == [(kernel, "cpu", torch.float32)]
