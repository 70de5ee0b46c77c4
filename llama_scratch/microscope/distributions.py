"""Distributions over the vocabulary: logits as log-probabilities, and how far two are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Positions whose log-probabilities are there at a time: 16 MB of them for a vocabulary of 128,256.
_POSITIONS = 16


def log_softmax(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits in pieces of (n, vocab_size) → natural logarithms of the probabilities in smaller ones, float64."""
    for piece in pieces:
        for i in range(0, len(piece), _POSITIONS):
            yield piece[i : i + _POSITIONS].double().log_softmax(-1)


def kl_bits(p: Tensor, q: Tensor) -> Tensor:
    """Kullback–Leibler divergence of q from p, (…, vocab_size) log-probabilities → (…) bits, at least 0."""
    return ((p.exp() * (p - q)).sum(-1) / math.log(2)).clamp(min=0)


def jensen_shannon_bits(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, (…, vocab_size) log-probabilities → (…) bits: 0 for equal ones, at most 1."""
    mean = torch.logaddexp(p, q) - math.log(2)
    return ((kl_bits(p, mean) + kl_bits(q, mean)) / 2).clamp(max=1)
