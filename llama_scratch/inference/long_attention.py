"""Attention by the kernels, in the place of the network's own: the same numbers, long contexts at the memory's speed.

To the bit what the fused layers compute, so that a network that is looked into answers as one that is not.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch.model import Transformer, TransformerBlock, attend
from llama_scratch.precision import kernels
from llama_scratch.precision.panels import PANEL


def use_kernels(model: Transformer) -> None:
    """Let a network on a CPU attend by the kernels."""
    for block in model.layers:
        cast(TransformerBlock, block).attention.attend = attend_by_kernels


def attend_by_kernels(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` computes, for one text and a mask that is `causal_mask`'s or none."""
    if not kernels.ready() or len(q) > 1 or q.dtype != torch.float32 or q.shape[-1] % PANEL:
        return attend(q, k, v, mask)
    tokens = q[0].transpose(0, 1).contiguous()  # (T, n_heads, head_dim)
    out = torch.ops.llama_scratch.attention(tokens, k[0], v[0])
    return cast(Tensor, out).transpose(0, 1)[None]  # (1, n_heads, T, head_dim)
