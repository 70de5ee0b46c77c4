"""Compute attention with the C++ kernels, at memory bandwidth in long contexts.

The result is bit-identical to the attention of the fused layers. So hooks that only read values do not change answers.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch.model import Transformer, TransformerBlock, attend
from llama_scratch.precision import kernels
from llama_scratch.precision.panels import PANEL


def use_kernels(model: Transformer) -> None:
    """Make a network on a CPU compute attention with the kernels."""
    for block in model.layers:
        cast(TransformerBlock, block).attention.attend = attend_by_kernels


def attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute `attend` with the kernels, or with torch for unsupported inputs.

    Args:
        q: Queries, (B, n_heads, T, head_dim).
        k: Keys, (B, n_kv_heads, S, head_dim).
        v: Values, (B, n_kv_heads, S, head_dim).
        mask: The `causal_mask`. The kernels apply it without reading this argument, so they support no other mask.
    """
    if not kernels.ready() or len(q) > 1 or q.dtype != torch.float32 or q.shape[-1] % PANEL:
        return attend(q, k, v, mask)
    tokens = q[0].transpose(0, 1).contiguous()  # (T, n_heads, head_dim)
    out = torch.ops.llama_scratch.attention(tokens, k[0], v[0])
    return cast(Tensor, out).transpose(0, 1)[None]  # (1, n_heads, T, head_dim)
