"""Attention by the kernels in place of the network's own: the same result, and memory-bound for long contexts.

It is bit-identical to the attention of the fused layers, so hooks do not change an answer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch.model import Transformer, TransformerBlock, attend
from llama_scratch.precision import kernels
from llama_scratch.precision.panels import PANEL


def use_kernels(model: Transformer) -> None:
    """Replace the attention of a network on a CPU by that of the kernels."""
    for block in model.layers:
        cast(TransformerBlock, block).attention.attend = attend_by_kernels


def attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the same as `attend`, for one text with the mask of `causal_mask`."""
    if not kernels.ready() or len(q) > 1 or q.dtype != torch.float32 or q.shape[-1] % PANEL:
        return attend(q, k, v, mask)
    tokens = q[0].transpose(0, 1).contiguous()  # (T, n_heads, head_dim)
    out = torch.ops.llama_scratch.attention(tokens, k[0], v[0])
    return cast(Tensor, out).transpose(0, 1)[None]  # (1, n_heads, T, head_dim)
