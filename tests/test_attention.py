"""Attention in blocks against the network's own and against float64, on both sides of every limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llama_scratch import attention
from llama_scratch.attention import attend_in_blocks
from llama_scratch.linear import product
from llama_scratch.model import attend, causal_mask

CPU = torch.device("cpu")


def inputs(T: int, S: int, n_heads: int, n_kv_heads: int, B: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (n_heads, T), (n_kv_heads, S), (n_kv_heads, S)
    q, k, v = (torch.randn(B, *shape, 64, generator=generator) for shape in shapes)
    return 3 * q, k, v  # sharp shares, so that a token too many would be seen


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every head by itself, with all scores at once."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(64)
    future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize(("T", "S"), [(32, 64), (33, 64), (64, 64), (100, 131), (31, 64), (1, 64), (40, 63), (2, 2)])
def test_attention_in_blocks_is_attention(
    monkeypatch: pytest.MonkeyPatch, T: int, S: int, heads: tuple[int, int]
) -> None:
    """Whole and half blocks, with and without tokens before them, and below the limits."""
    monkeypatch.setattr(attention, "LONG", 64)
    q, k, v = inputs(T, S, *heads)
    out = attend_in_blocks(q, k, v, causal_mask(T, S, CPU))
    expected = in_float64(q, k, v)
    assert out.shape == expected.shape
    assert float((out.double() - expected).norm() / expected.norm()) <= 1e-5


def test_a_long_context_goes_in_blocks_and_keys_may_be_a_part_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the real limit, with strides as the cache gives them; and the fused operator is not asked."""
    q, k, v = inputs(70, 2048, 4, 2)
    k, v = k[:, :, :1100], v[:, :, :1100]
    expected = attend(q, k, v, causal_mask(70, 1100, CPU))
    monkeypatch.setattr(attention, "attend", None)
    out = attend_in_blocks(q, k, v, causal_mask(70, 1100, CPU))
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_growing_context_comes_with_few_numbers_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN keeps code for each; 4,096 tokens that came by 512 once had 96. What lies between is masked."""
    found = set()

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        found.add(max(weight.shape))
        return product(x, weight)

    monkeypatch.setattr(attention, "product", counted)
    q, k, v = inputs(512, 4096, 2, 1)
    for end in range(1024, 4097, 512):
        out = attend_in_blocks(q, k[:, :, :end], v[:, :, :end], None)
        expected = in_float64(q, k[:, :, :end], v[:, :, :end])
        assert float((out.double() - expected).norm() / expected.norm()) <= 1e-5
    assert len(found) <= 30


def test_several_sequences_go_the_usual_way() -> None:
    """The blocks are for one."""
    q, k, v = inputs(40, 1100, 4, 2, B=2)
    mask = causal_mask(40, 1100, CPU)
    assert torch.equal(attend_in_blocks(q, k, v, mask), attend(q, k, v, mask))
