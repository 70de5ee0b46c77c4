"""The kernels' attention against the network's and against float64, at every boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.inference import long_attention
from llama_scratch.inference.long_attention import attend_by_kernels
from llama_scratch.model import attend, causal_mask
from tests.helpers import KERNELS

CPU = torch.device("cpu")
# (new tokens, all tokens) around the boundaries of 256-key spans and 16-token blocks.
LENGTHS = [(1, 1), (1, 255), (1, 256), (1, 257), (1, 700), (2, 257), (5, 258), (15, 15), (16, 272), (17, 300), (40, 40)]
LENGTHS += [(33, 512), (100, 131), (200, 700), (300, 300)]
HEADS = [(4, 2), (3, 3), (8, 1), (10, 2)]
HEAD_DIMS = [16, 32, 48, 64, 80, 128]


@pytest.fixture
def ops(built_kernels: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels' operators."""
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", KERNELS)
    return torch.ops.llama_scratch


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(T: int, S: int, heads: tuple[int, int], head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, n_heads, head_dim), k and v (n_kv_heads, S, head_dim)."""
    generator = torch.Generator().manual_seed(S)
    shapes = (T, heads[0]), (heads[1], S), (heads[1], S)
    q, k, v = (torch.randn(*shape, head_dim, generator=generator) for shape in shapes)
    return 3 * q, k, v  # sharp attention, so that a single extra token would be noticed


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each head separately, with all scores at once."""
    T, S, group = len(q), k.shape[1], q.shape[1] // len(k)
    k, v = (part.double().repeat_interleave(group, 0) for part in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(0, 1)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.double().norm())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_it_is_attention(ops: Any, T: int, S: int, head_dim: int) -> None:
    """Within 1e-5 of float64 and of the network's attention, with one to eight query heads per group."""
    for heads in HEADS:
        q, k, v = inputs(T, S, heads, head_dim)
        out = ops.attention(q, k, v)
        assert out.shape == q.shape
        assert relative(out, in_float64(q, k, v)) <= 1e-5
        theirs = attend(q.transpose(0, 1)[None], k[None], v[None], causal_mask(T, S, CPU))
        assert relative(out, theirs[0].transpose(0, 1)) <= 1e-5


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("start", [0, 1, 239, 255, 256, 300, 700])
@pytest.mark.usefixtures("_threads")
def test_a_token_is_the_same_alone_and_with_others(ops: Any, start: int, head_dim: int) -> None:
    """Bit-identical for any chunk sizes and numbers of threads."""
    for heads in ((4, 2), (9, 3)):
        q, k, v = inputs(50, start + 50, heads, head_dim)
        torch.set_num_threads(1)
        alone = torch.cat(
            [ops.attention(q[t : t + 1], *(part[:, : start + t + 1] for part in (k, v))) for t in range(50)]
        )
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for sizes in ([50], [16, 34], [17, 1, 32], [2, 3, 5, 40], [49, 1]):
                t, parts = 0, []
                for size in sizes:
                    end = start + t + size
                    parts.append(ops.attention(q[t : t + size], k[:, :end], v[:, :end]))
                    t += size
                assert torch.equal(torch.cat(parts), alone), (threads, sizes)


@pytest.mark.parametrize("heads", HEADS)
def test_keys_and_values_may_be_a_part_of_the_cache(ops: Any, heads: tuple[int, int]) -> None:
    """Strided views work, and memory after them is not read."""
    q, k, v = inputs(20, 300, heads)
    wide = [torch.full((heads[1], 512, 64), torch.nan) for _ in range(2)]
    for cache, part in zip(wide, (k, v), strict=True):
        cache[:, :300] = part
    assert torch.equal(ops.attention(q, *(cache[:, :300] for cache in wide)), ops.attention(q, k, v))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3, 1e18])
def test_scores_of_every_size(ops: Any, scale: float) -> None:
    """Equal weights, and single tokens with all the weight; large scores do not overflow."""
    q, k, v = inputs(5, 600, (4, 2))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = scale, torch.arange(600) % 7
    assert relative(ops.attention(q, k, v), in_float64(q, k, v)) <= 1e-5


def test_nan_stays_visible(ops: Any) -> None:
    """NaN in a query affects its head and token; in keys or values, all later tokens, if a whole span is NaN."""
    q, k, v = inputs(3, 600, (4, 2))
    usual = ops.attention(q, k, v)
    bad = q.clone()
    bad[1, 2, 5] = torch.nan
    found = ops.attention(bad, k, v)
    assert found[1, 2].isnan().all()
    bad[1, 2], found[1, 2] = q[1, 2], usual[1, 2]
    assert torch.equal(found, usual)
    for start, stop in ((7, 8), (0, 256), (256, 512), (0, 600)):
        for part in (0, 1):
            damaged = [k.clone(), v.clone()]
            damaged[part][1, start:stop, 9] = torch.nan
            found = ops.attention(q, *damaged)
            assert torch.equal(found[:, :2], usual[:, :2])
            assert (found[:, 2:].isnan().any(-1)).all(), (start, stop, part)


def test_what_does_not_fit_is_an_error(ops: Any) -> None:
    """Nothing is read out of bounds."""
    q, k, v = inputs(3, 20, (4, 2))
    wrong = [
        (q[0], k, v),
        (q.double(), k, v),
        (q, k.double(), v),
        (q, k, v.bfloat16()),
        (q.transpose(0, 1), k, v),
        (q, k[:, :19], v),
        (q, k[:, :2], v[:, :2]),  # more new tokens than tokens
        (q[..., :32].contiguous(), k, v),
        (q[:, :3].contiguous(), k, v),
        (q, k.transpose(1, 2), v.transpose(1, 2)),
        (q, k[:, ::2], v[:, ::2]),
        (q[..., :24].contiguous(), k[..., :24].contiguous(), v[..., :24].contiguous()),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="do not match"):
            ops.attention(*arguments)


# --- As the network's attention ---------------------------------------------------------------


def asked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """`attend_by_kernels`, the expected result, and the number of calls to the network's attention."""
    mask, calls = causal_mask(q.shape[2], k.shape[2], CPU), []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return attend(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "attend", counted)
        return attend_by_kernels(q, k, v, mask), attend(q, k, v, mask), len(calls)


def batch(B: int, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs(5, 40, (4, 2), head_dim)
    return tuple(part.expand(B, *part.shape) for part in (q.transpose(0, 1), k, v))  # type: ignore[return-value]


def test_one_text_goes_to_the_kernels(ops: Any) -> None:
    """With the network's shapes."""
    out, expected, calls = asked(*batch(1))
    assert calls == 0
    assert out.shape == expected.shape
    assert relative(out, expected) <= 1e-5


def test_all_else_goes_the_usual_way(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sequences, 16-bit activations, head sizes that do not fill a register, and no kernels."""
    for q, k, v in (batch(2), batch(1, 24), tuple(part.bfloat16() for part in batch(1))):
        out, expected, calls = asked(q, k, v)
        assert calls == 1
        assert torch.equal(out, expected)
    monkeypatch.setenv("LLAMA_SCRATCH_KERNELS", "0")
    out, expected, calls = asked(*batch(1))
    assert calls == 1
    assert torch.equal(out, expected)
