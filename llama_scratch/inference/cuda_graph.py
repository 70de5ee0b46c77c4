"""Decoding on an NVIDIA GPU: one step, recorded once as a CUDA graph and replayed for each token.

A GPU multiplies one row faster than Python can ask it to; a graph asks for the whole network at once. It
replays the same kernels on the same addresses, so whatever changes from token to token (the token, its
position) must lie in a tensor, and the cache may not grow under it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_scratch.model import KVCache, Transformer


class StaticCache(KVCache):
    """The memory of another cache, all of it, with the position in a tensor: for one new token at a time.

    Tokens after `position` are masked instead of cut off, so no shape depends on the number of tokens.
    """

    def __init__(self, cache: KVCache, device: torch.device):
        self._layers = list(cache._layers)
        for held in self._layers:
            for store in held or ():  # unwritten memory may be NaN, and 0 · NaN = NaN
                store[:, :, cache.length :] = 0
        self.max_seq_len = self.length = cache.capacity
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def positions(self, T: int, device: torch.device) -> Tensor:
        return self.position  # (1,)

    def mask(self, T: int, device: torch.device) -> Tensor:
        return (torch.arange(self.length, device=device) <= self.position)[None]  # (1, capacity)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._layers[layer]
        if held is None:
            raise ValueError("a static cache needs the memory of one that was used")
        for store, new in zip(held, (k, v), strict=True):
            store.index_copy_(2, self.position, new)
        return held

    def advance(self, T: int) -> None:
        """The position is set from outside."""


class DecodeGraph:
    """Runs a network for one token after those in `cache`; records the graph again if the cache has grown."""

    def __init__(self, model: Transformer, cache: KVCache):
        self._model = model
        self._cache = cache
        self._capacity = 0

    def fits(self) -> bool:
        """Whether the next token fits into the cache as it is. Otherwise the network runs without a graph."""
        return 0 < self._cache.length < self._cache.capacity

    def __call__(self, id: int) -> Tensor:
        """Logits after one more token, (1, 1, vocab_size) float32; they are overwritten by the next call."""
        if self._capacity != self._cache.capacity:
            self._record()
        self._token.fill_(id)
        self._static.position.fill_(self._cache.length)
        self._graph.replay()
        self._cache.advance(1)
        return self._logits

    def _record(self) -> None:
        device = self._model.tok_embeddings.weight.device
        self._static = StaticCache(self._cache, device)
        self._static.position.fill_(self._cache.length)  # what warming up writes there is overwritten by the replay
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries that set themselves up must not do so while recording
            for _ in range(2):
                self._model(self._token, self._static)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._model(self._token, self._static)
        self._capacity = self._cache.capacity
