"""The shape of a network: Meta's `params.json` → a validated, frozen `ModelArgs`. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, UnsupportedError, UsageError, sanitize

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
"""The two weights that many models share, by Meta's names."""

# The context that Llama 3 was trained with before 3.1 stretched it, and the one after.
ORIGINAL_CONTEXT = 8192
SCALED_CONTEXT = 131_072


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary embedding: slow pairs turn `factor` times slower.

    A pair that makes fewer than `low_freq_factor` full turns within `original_context` tokens is
    slowed down by `factor`, one that makes more than `high_freq_factor` turns is left alone, and
    those between are blended. Source: `apply_scaling` in Meta's llama-models, with the factor that
    each release was trained with (8 for 3.1 and 3.3, 32 for 3.2), which Meta's code fixes at 8.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = ORIGINAL_CONTEXT


@dataclass(frozen=True)
class ModelArgs:
    """Everything that is needed to build the network; field names are Meta's.

    Attributes:
        ffn_dim: Width of the feed-forward layer.
        max_seq_len: The longest context, in tokens.
        rope_scaling: None if the rotary embedding is not scaled. A factor of 1 becomes None.
        rope_divisors: One divisor per pair's frequency, head_dim/2 numbers, instead of `rope_scaling`.
        head_dim: Width of one attention head. 0 becomes dim / n_heads, as in most models.
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
        if self.head_dim < 0 or self.head_dim % 2:  # the rotary embedding turns pairs
            raise CheckpointError(f"head_dim is {self.head_dim}, expected an even number.")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"{self.n_heads} query heads (n_heads) do not divide among {self.n_kv_heads} (n_kv_heads)."
            )

    def with_rope_factor(self, factor: float | None) -> ModelArgs:
        """The same shape with another RoPE factor; 1 turns the scaling off, None changes nothing."""
        if factor is None:
            return self
        if not (math.isfinite(factor) and factor >= 1):
            raise UsageError(f"The RoPE factor is {factor:g}, expected a number of at least 1 (`rope_factor`).")
        if factor == 1:
            return replace(self, rope_scaling=None, rope_divisors=None)
        scaling = replace(self.rope_scaling or RopeScaling(factor), factor=factor)
        return replace(self, rope_scaling=scaling, rope_divisors=None)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every weight, under the names of Meta's checkpoints."""
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
        """Number of weights; a `tied` output shares the embedding's and is not counted again."""
        shapes = self.weight_shapes()
        if tied:
            del shapes["output.weight"]
        return sum(math.prod(shape) for shape in shapes.values())

    def linear_parameters(self) -> int:
        """Weights of all linear layers, the output projection among them: one decoded token reads each."""
        shapes = self.weight_shapes()
        del shapes["tok_embeddings.weight"]
        return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)

    def kv_bytes_per_token(self, bytes_each: int) -> int:
        """Bytes that the cache holds for one token: a key and a value in each layer, of numbers of so many bytes."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_each

    @classmethod
    def from_params_json(cls, text: str, path: str = "params.json") -> ModelArgs:
        """Read the text of Meta's `params.json`; `path` is the name that errors give.

        Raises `CheckpointError` where it is not JSON, lacks a field or holds an impossible value.
        """
        try:
            params = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({sanitize(error)}); {REDOWNLOAD_HINT}") from error
        if not isinstance(params, dict):
            raise CheckpointError(
                f"{path} holds a JSON {type(params).__name__}, expected an object with the shape; {REDOWNLOAD_HINT}"
            )
        if "quantization_args" in params:
            raise UnsupportedError(
                f"{path} is of Meta's quantized release {_release(params)}, expected bf16 weights; "
                "use the release without that in its name."
            )
        try:
            return cls._from_params(Fields(params))
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {str(error).removesuffix('.')}; {REDOWNLOAD_HINT}") from error

    @classmethod
    def _from_params(cls, fields: Fields) -> ModelArgs:
        if other := next((field for field in _OTHER_NETWORKS if fields.values.get(field)), None):
            raise UnsupportedError(f"{other} belongs to another network than Llama 3's; use a Llama 3 text model.")
        dim = fields.integer("dim")
        n_heads = fields.integer("n_heads")
        scaling = None
        if fields.boolean("use_scaled_rope", default=False):
            # Meta's file does not hold the factor. The 3.2 models (1B: dim 2048, 3B: 3072) were
            # trained with 32, the larger ones with 8.
            factor = fields.number("rope_scaling_factor", default=32.0 if dim <= 3072 else 8.0)
            if factor < 1:
                raise CheckpointError(f"rope_scaling_factor is {factor:g}, expected at least 1.")
            scaling = RopeScaling(factor)
        return cls(
            dim=dim,
            n_layers=fields.integer("n_layers", most=1024),
            n_heads=n_heads,
            n_kv_heads=fields.integer("n_kv_heads"),
            vocab_size=fields.integer("vocab_size"),
            ffn_dim=ffn_dim(
                dim,
                multiple_of=fields.integer("multiple_of"),
                multiplier=fields.number("ffn_dim_multiplier", default=None),
            ),
            norm_eps=fields.number("norm_eps"),
            rope_theta=fields.number("rope_theta"),
            rope_scaling=scaling,
            # Not Meta's: `convert` writes these two if the rules do not give them.
            max_seq_len=fields.integer("context_length", default=SCALED_CONTEXT if scaling else ORIGINAL_CONTEXT),
            head_dim=fields.integer("head_dim", default=0),
        )


# Fields of Meta's params.json that change the network: Llama 4's, and those of the vision models.
_OTHER_NETWORKS = (
    "moe_args",
    "use_qk_norm",
    "nope_layer_interval",
    "attention_chunk_size",
    "vision_args",
    "vision_chunk_size",
    "vision_num_cross_attention_layers",
)


def _release(params: Mapping[str, Any]) -> str:
    """What Meta calls the quantized release that a params.json is of."""
    arguments = params["quantization_args"]
    if "lora_args" in params:
        return "int4-qlora-eo8"
    if isinstance(arguments, dict) and arguments.get("spinquant"):
        return "int4-spinquant-eo8"
    if isinstance(arguments, dict) and arguments.get("scheme") is None:
        return "in int4"
    return f"'{sanitize(arguments['scheme'] if isinstance(arguments, dict) else arguments)}'"


def ffn_dim(dim: int, *, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer: 2/3 of 4·dim, stretched, rounded up to `multiple_of`.

    Both truncations matter (1B: 5461 → 8191 → 8192). Source: `FeedForward` in Meta's llama-models.

    >>> ffn_dim(2048, multiple_of=256, multiplier=1.5)
    8192
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


_REQUIRED: Any = object()
# Larger than any model's, and small enough that no product of two overflows a tensor's size.
_LARGEST = 1 << 24


@dataclass(frozen=True)
class Fields:
    """What a model file says of itself, field by field with its type; each refusal is one sentence."""

    values: Mapping[str, Any]

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"the field {name} is missing.")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, most: int = _LARGEST) -> int:
        """A whole number, which some programs write as a float (8192.0)."""
        if (value := self._get(name, default)) is default:
            return cast(int, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected a whole number from 1 to {most}.")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._get(name, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected a positive number.")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"the field {name} is {sanitize(value)}, expected true or false.")
        return value


def is_tied(weights: Mapping[str, object]) -> bool:
    """Whether the output projection is the embedding itself."""
    return weights[OUTPUT] is weights[EMBEDDING]
