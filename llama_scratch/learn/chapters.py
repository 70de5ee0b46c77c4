"""The chapters of the textbook. Does not import torch."""

from __future__ import annotations

CHAPTERS = (
    "What a language model computes",
    "Text to ids",
    "The embedding and the residual stream",
    "RMSNorm",
    "Queries, keys, values",
    "RoPE",
    "The factor of 32",
    "Many heads, few keys",
    "SwiGLU",
    "The output, and the whole forward pass",
    "The KV cache and the prefix",
    "Sampling",
    "A fact on its way through the layers",
    "An induction head",
    "Reading untrusted files",
    "Eight and four bits",
    "The kernels beside their Python twins",
    "What it costs",
)
"""The title of each chapter."""
