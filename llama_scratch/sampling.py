"""Sample a token from logits: pure functions with an explicit random generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_scratch.errors import UsageError, sanitize

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or value == math.inf:  # math.isfinite fails for huge integers
        limits = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise UsageError(f"{name} is {sanitize(value)}, expected a number {limits}.")


@dataclass(frozen=True)
class Sampling:
    """Sampling options for the next token, greedy by default.

    The temperature is applied first, then top_k, top_p and min_p, each to the tokens that the previous filter kept.

    Attributes:
        temperature: Divisor of the logits. Values below 1 sharpen the distribution, values above 1 flatten it. 0 always
            takes the most probable token.
        top_k: Keep the k most probable tokens. 0 keeps all.
        top_p: Keep the smallest set of tokens with this total probability. 1 keeps all.
        min_p: Keep tokens with at least this fraction of the most probable token's probability. 0 keeps all.
        seed: Random seed. None chooses one at random.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, math.inf)
        _check("top-k", self.top_k, 0, math.inf)
        _check("top-p", self.top_p, 0, 1)
        _check("min-p", self.min_p, 0, 1)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**63 - 1)

    @property
    def greedy(self) -> bool:
        """Whether sampling is deterministic."""
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """Create a random generator with this seed."""
        import torch  # here, so that options are validated before torch is imported

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


GREEDY = Sampling()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id.

    Args:
        logits: The logits, (vocab_size,) float32. They are not changed.
        sampling: Temperature and filters.
        generator: The source of randomness. Not used if sampling is greedy.
    """
    if sampling.greedy:
        return int(logits.argmax())
    # Subtract the maximum first: otherwise dividing by a small temperature could overflow.
    logits = (logits.double().cpu() - logits.max().item()) / sampling.temperature
    logits = logits.masked_fill(~top_k(logits, sampling.top_k), -math.inf)
    logits = logits.masked_fill(~top_p(logits, sampling.top_p), -math.inf)
    logits = logits.masked_fill(~min_p(logits, sampling.min_p), -math.inf)
    return int(logits.softmax(-1).multinomial(1, generator=generator))


def top_k(logits: Tensor, k: int) -> Tensor:
    """Return the mask of the k most probable tokens, (vocab_size,) bool.

    Args:
        logits: The logits, (vocab_size,).
        k: Number of tokens. 0 keeps all.
    """
    if k == 0 or k >= logits.numel():
        return _all(logits)
    keep = ~_all(logits)
    keep[logits.topk(k).indices] = True
    return keep


def top_p(logits: Tensor, p: float) -> Tensor:
    """Return the mask of the nucleus, the smallest set with total probability p.

    Source: Holtzman et al. 2020, arXiv:1904.09751.

    Args:
        logits: The logits, (vocab_size,).
        p: Total probability. At least the most probable token is kept.
    """
    if p >= 1:
        return _all(logits)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # total of all more probable tokens
    in_nucleus = before < p
    in_nucleus[0] = True
    keep = ~_all(logits)
    keep[order] = in_nucleus
    return keep


def min_p(logits: Tensor, p: float) -> Tensor:
    """Return the mask of tokens with at least p times the highest probability.

    Source: Nguyen et al. 2024, arXiv:2407.01082.

    Args:
        logits: The logits, (vocab_size,).
        p: Fraction of the highest probability.
    """
    probabilities = logits.softmax(-1)
    return probabilities >= p * probabilities.max()


def _all(logits: Tensor) -> Tensor:
    import torch

    return torch.ones_like(logits, dtype=torch.bool)
