"""The key-value cache as it stands: what each layer holds of the text, its bytes, and how long its vectors are."""

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
    """Mean length ‖·‖ of the keys and of the values of one layer, over heads and positions."""

    json_fields = ("layer", "keys as key_norm", "values as value_norm")

    layer: int
    keys: float
    values: float


@dataclass(frozen=True)
class Cache(Displayable, JsonResult):
    """What the cache holds of a text.

    tokens: held in each layer. heads, head_dim: shape of a token's keys, and of its values, in a layer. dtype: their
    type. bytes_per_token: of all layers. taken_bytes: memory that is taken; it grows in doubling steps, so this is
    more than what is held. layers: norms, first layer first.
    """

    json_fields = ("tokens", "shape", "dtype", "bytes_per_token", "held_bytes", "taken_bytes", "layers")

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    bytes_per_token: int
    taken_bytes: int
    layers: tuple[Norms, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the keys of a layer, and of its values."""
        return self.heads, self.tokens, self.head_dim

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return self.tokens * self.bytes_per_token


@dataclass(frozen=True)
class CachedLayer(Displayable, JsonResult):
    """The lengths of one layer's keys and values: a row for each head, in it a number for each token.

    queries: how many query heads share a head's keys and values.
    """

    json_fields = ("layer", "tokens", "keys as key_norms", "values as value_norms")

    layer: int
    tokens: tuple[Token, ...]
    queries: int
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]


def cache(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> Cache:
    """What the cache holds after a text; what it lacks of it is read first. Raises as `Llama.predict` does."""
    llama.engine.next_logits(ids, progress)
    layers = [llama.engine.cached(layer) for layer in range(llama.args.n_layers)]
    keys = layers[0][0]  # (n_kv_heads, T, head_dim)
    heads, tokens, head_dim = keys.shape
    return Cache(
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=str(keys.dtype).removeprefix("torch."),
        bytes_per_token=len(layers) * 2 * heads * head_dim * keys.element_size(),
        taken_bytes=llama.engine.cache_bytes,
        layers=tuple(Norms(layer, *(float(_norms(x).mean()) for x in held)) for layer, held in enumerate(layers)),
    )


def cached_layer(llama: LoadedModel, ids: Sequence[int], layer: int, progress: Progress = silent) -> CachedLayer:
    """What one layer of the cache holds after a text, head by head and token by token.

    The length of a key is that before its rotation, which turns and does not stretch. Raises `UsageError` for a layer
    that there is not, and as `cache` does.
    """
    layer = numbered("layer", layer, llama.args.n_layers)
    llama.engine.next_logits(ids, progress)
    keys, values = (tuple(map(tuple, _norms(x).tolist())) for x in llama.engine.cached(layer))
    queries = llama.args.n_heads // llama.args.n_kv_heads
    return CachedLayer(layer, tuple(map(llama.token, ids)), queries, keys, values)


def _norms(x: Tensor) -> Tensor:
    """Lengths of vectors, (heads, T, head_dim) → (heads, T) float32."""
    norms: Tensor = torch.linalg.vector_norm(x.float(), dim=-1)
    return norms.cpu()
