"""The contents of the KV cache: shape, bytes, and norms of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.parts import numbered
from llama_scratch.results import JsonResult, Token
from llama_scratch.system.progress import Progress, silent


@dataclass(frozen=True)
class Norms:
    """Norms of the keys and values of one layer, averaged over heads.

    Attributes:
        layer: The layer.
        keys: Mean norm of the keys over all positions.
        values: Mean norm of the values over all positions.
        each_key: Mean norm of the keys at each position.
        each_value: Mean norm of the values at each position.
    """

    json_fields = (
        "layer",
        "keys as key_norm",
        "values as value_norm",
        "each_key as key_norms",
        "each_value as value_norms",
    )

    layer: int
    keys: float
    values: float
    each_key: tuple[float, ...]
    each_value: tuple[float, ...]


@dataclass(frozen=True)
class Cache(Displayable, JsonResult):
    """The KV cache after a text.

    Attributes:
        text: The cached tokens.
        tokens: Number of cached tokens per layer.
        heads: Number of key-value heads.
        head_dim: Dimension of each key and value vector.
        dtype: Data type of the keys and values.
        bytes_per_token: Bytes per token, over all layers.
        taken_bytes: Allocated bytes. The cache grows by doubling, so this can exceed `held_bytes`.
        layers: Norms, first layer first.
    """

    json_fields = ("text", "tokens", "shape", "dtype", "bytes_per_token", "held_bytes", "taken_bytes", "layers")

    text: tuple[Token, ...]
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    bytes_per_token: int
    taken_bytes: int
    layers: tuple[Norms, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the keys of one layer, and of its values: (heads, tokens, head_dim)."""
        return self.heads, self.tokens, self.head_dim

    @property
    def held_bytes(self) -> int:
        """Bytes of the cached keys and values."""
        return self.tokens * self.bytes_per_token


@dataclass(frozen=True)
class CachedLayer(Displayable, JsonResult):
    """Norms of the keys and values of one layer: rows are heads, columns are tokens.

    Attributes:
        layer: The layer.
        tokens: The tokens of the text.
        queries: Number of query heads that share one key-value head.
        keys: Norms of the keys.
        values: Norms of the values.
    """

    json_fields = ("layer", "tokens", "keys as key_norms", "values as value_norms")

    layer: int
    tokens: tuple[Token, ...]
    queries: int
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]


def cache(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> Cache:
    """Describe the KV cache after a text. Tokens that are not cached yet are computed.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        progress: As for `Llama.predict`.
    """
    llama.engine.next_logits(ids, progress)
    layers = [llama.engine.cached(layer) for layer in range(llama.args.n_layers)]
    keys = layers[0][0]  # (n_kv_heads, T, head_dim)
    heads, tokens, head_dim = keys.shape
    return Cache(
        text=tuple(map(llama.token, ids)),
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=str(keys.dtype).removeprefix("torch."),
        bytes_per_token=len(layers) * 2 * heads * head_dim * keys.element_size(),
        taken_bytes=llama.engine.cache_bytes,
        layers=tuple(_layer_norms(layer, *held) for layer, held in enumerate(layers)),
    )


def cached_layer(llama: LoadedModel, ids: Sequence[int], layer: int, progress: Progress = silent) -> CachedLayer:
    """Return the norms of the keys and values in one layer of the KV cache.

    RoPE does not change the norm of a key. Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layer: The layer.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the layer does not exist.
    """
    layer = numbered("layer", layer, llama.args.n_layers)
    llama.engine.next_logits(ids, progress)
    keys, values = (tuple(map(tuple, _norms(x).tolist())) for x in llama.engine.cached(layer))
    queries = llama.args.n_heads // llama.args.n_kv_heads
    return CachedLayer(layer, tuple(map(llama.token, ids)), queries, keys, values)


def _layer_norms(layer: int, keys: Tensor, values: Tensor) -> Norms:
    key_norms, value_norms = _norms(keys), _norms(values)
    each_key, each_value = (tuple(norms.mean(dim=0).tolist()) for norms in (key_norms, value_norms))
    return Norms(layer, float(key_norms.mean()), float(value_norms.mean()), each_key, each_value)


def _norms(x: Tensor) -> Tensor:
    """Norms of vectors, (heads, T, head_dim) → (heads, T) float32."""
    norms: Tensor = torch.linalg.vector_norm(x.float(), dim=-1)
    return norms.cpu()
