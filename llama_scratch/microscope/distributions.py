"""Distributions over the vocabulary: log-softmax, and divergences in bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Positions per chunk of log-probabilities: 16 MB for a vocabulary of 128,256.
_POSITIONS = 16


def log_softmax(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Turn chunks of logits into natural log-probabilities.

    The chunks are (n, vocab_size). The results are float64, in smaller chunks to save memory.
    """
    for piece in pieces:
        for i in range(0, len(piece), _POSITIONS):
            yield piece[i : i + _POSITIONS].double().log_softmax(-1)


def kl_bits(p: Tensor, q: Tensor) -> Tensor:
    """Return the Kullback–Leibler divergence of q from p in bits, at least 0.

    Args:
        p: Log-probabilities, (…, vocab_size).
        q: Log-probabilities, (…, vocab_size).
    """
    return ((p.exp() * (p - q)).sum(-1) / math.log(2)).clamp(min=0)


def jensen_shannon_bits(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen–Shannon divergence in bits, from 0 for equal inputs to 1.

    Args:
        p: Log-probabilities, (…, vocab_size).
        q: Log-probabilities, (…, vocab_size).
    """
    mean = torch.logaddexp(p, q) - math.log(2)
    return ((kl_bits(p, mean) + kl_bits(q, mean)) / 2).clamp(max=1)
