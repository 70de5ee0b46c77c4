"""Attention over long contexts on an x86 CPU: the same numbers as the network's own, in the time that they need.

Fused attention asks MKL for its float32 products, see `linear.product`. Here a few rows of scores at a time go through
oneDNN, small enough to stay in the CPU's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_scratch.linear import product
from llama_scratch.model import attend

# Positions at a time, with all query heads of a group, and the scores (16 MB) that they may have.
_ROWS = 32
_SCORES = 1 << 22
# Numbers of keys are rounded up to a multiple of it or more: oneDNN makes code for each number that it sees, and keeps
# it, which takes milliseconds and a MB.
_GRAIN = 128
# Bytes that this keeps for each token of a long context, as measured by tests/trust/memory.py.
KEPT = 14_000
# Below this many tokens the fused operator is as fast.
LONG = 1024


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` computes, for one sequence and a mask that is `causal_mask`'s or none."""
    (B, n_heads, T, head_dim), (_, n_kv_heads, S, _) = q.shape, k.shape
    if B > 1 or T < _ROWS or S < LONG:
        return attend(q, k, v, mask)
    groups = q[0].reshape(n_kv_heads, -1, T, head_dim) / math.sqrt(head_dim)  # (n_kv_heads, group, T, head_dim)
    out = torch.empty_like(groups)
    step = min(_ROWS, max(8, _SCORES // (groups.shape[1] * S)))
    future = torch.full((step, T), -math.inf).triu(1)
    grain = max(_GRAIN, 1 << S.bit_length() - 6)  # at most a 16th of S
    for head in range(n_kv_heads):
        keys, values = k[0, head], v[0, head].T  # (S, head_dim), (head_dim, S)
        for begin in range(0, T, step):
            rows = groups[head, :, begin : begin + step]  # (group, rows, head_dim)
            count = rows.shape[1]
            first = S - T + begin
            seen = min(S, -(-(first + count) // grain) * grain)  # what lies further behind is never computed
            scores = product(rows.flatten(0, 1), keys[:seen]).unflatten(0, (-1, count))  # (group, rows, seen)
            scores[:, :, first:] += future[:count, : seen - first]
            shares = scores.softmax(-1).flatten(0, 1)
            out[head, :, begin : begin + count] = product(shares, values[:, :seen]).unflatten(0, (-1, count))
    return out.reshape(1, n_heads, T, head_dim)
