"""`ModelArgs`, the validated hyperparameters of a network. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llama_scratch.errors import CheckpointError, UsageError

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
"""Meta's names of the two weights that are tied in many models."""

# Context lengths in tokens: of Llama 3, and of Llama 3.1 and later, which use RoPE scaling.
ORIGINAL_CONTEXT = 8192
SCALED_CONTEXT = 131_072


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's RoPE scaling: slowly rotating pairs become `factor` times slower.

    A pair is two adjacent numbers of a query or key. If it makes fewer than `low_freq_factor` full turns within
    `original_context` tokens, its frequency is divided by `factor`. If it makes more than `high_freq_factor` turns, its
    frequency is unchanged. In between, the frequency is interpolated.

    Meta's code always uses the factor 8. Here, the factor depends on the release: 8 for 3.1 and 3.3, 32 for 3.2.
    Source: `apply_scaling` in Meta's llama-models.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = ORIGINAL_CONTEXT


@dataclass(frozen=True)
class ModelArgs:
    """The hyperparameters of the network. Field names are Meta's.

    Attributes:
        ffn_dim: Width of the feed-forward layer.
        max_seq_len: Maximum context in tokens.
        rope_scaling: RoPE scaling, if any. A factor of 1 becomes None.
        rope_divisors: One divisor per frequency, (head_dim/2,), instead of `rope_scaling`.
        head_dim: Width of one attention head. 0 means dim / n_heads, as in most models.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_seq_len: int
    rope_divisors: tuple[float, ...] | None = None
    head_dim: int = 0

    def __post_init__(self) -> None:
        if self.rope_scaling and self.rope_scaling.factor == 1:
            object.__setattr__(self, "rope_scaling", None)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if not self.head_dim:
            if self.dim % (2 * self.n_heads):
                raise CheckpointError(
                    f"dim {self.dim} does not divide into {self.n_heads} heads of an even size (n_heads)."
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim < 0 or self.head_dim % 2:  # RoPE rotates pairs
            raise CheckpointError(f"head_dim is {self.head_dim}, expected an even number.")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"{self.n_heads} query heads (n_heads) are not a multiple of {self.n_kv_heads} KV heads (n_kv_heads)."
            )

    def with_rope_factor(self, factor: float | None) -> ModelArgs:
        """Replace the RoPE factor. 1 turns scaling off, None changes nothing."""
        if factor is None:
            return self
        if not (math.isfinite(factor) and factor >= 1):
            raise UsageError(f"The RoPE factor is {factor:g}, expected a number of at least 1 (`rope_factor`).")
        if factor == 1:
            return replace(self, rope_scaling=None, rope_divisors=None)
        scaling = replace(self.rope_scaling or RopeScaling(factor), factor=factor)
        return replace(self, rope_scaling=scaling, rope_divisors=None)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each weight, with the names in Meta's checkpoints."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            shapes |= {
                f"layers.{layer}.attention_norm.weight": (self.dim,),
                f"layers.{layer}.attention.wq.weight": (q_dim, self.dim),
                f"layers.{layer}.attention.wk.weight": (kv_dim, self.dim),
                f"layers.{layer}.attention.wv.weight": (kv_dim, self.dim),
                f"layers.{layer}.attention.wo.weight": (self.dim, q_dim),
                f"layers.{layer}.ffn_norm.weight": (self.dim,),
                f"layers.{layer}.feed_forward.w1.weight": (self.ffn_dim, self.dim),
                f"layers.{layer}.feed_forward.w2.weight": (self.dim, self.ffn_dim),
                f"layers.{layer}.feed_forward.w3.weight": (self.ffn_dim, self.dim),
            }
        return shapes | {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}

    def n_parameters(self, *, tied: bool) -> int:
        """Number of parameters.

        If the output is `tied` to the embedding, their shared weight counts once.
        """
        shapes = self.weight_shapes()
        if tied:
            del shapes["output.weight"]
        return sum(math.prod(shape) for shape in shapes.values())

    def linear_parameters(self) -> int:
        """Number of parameters in all linear layers, including the output.

        Decoding one token reads all of them.
        """
        shapes = self.weight_shapes()
        del shapes["tok_embeddings.weight"]
        return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)

    def kv_bytes_per_token(self, bytes_each: int) -> int:
        """Bytes per token in the KV cache, with `bytes_each` bytes per element.

        Each layer has a key and a value per token.
        """
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_each


def is_tied(weights: Mapping[str, object]) -> bool:
    """Whether the output projection shares the embedding's tensor."""
    return weights[OUTPUT] is weights[EMBEDDING]
