"""Decode on an NVIDIA GPU with a CUDA graph, recorded once and then replayed.

For a single token, launching the kernels from Python takes longer than running them. A graph launches all of them at
once. A replay uses the recorded memory addresses. Therefore, all values that change from token to token (the token and
its position) must be in tensors, and the cache must not be reallocated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_scratch.model import KVCache, Transformer


class StaticCache(KVCache):
    """A KV cache of fixed shape, for one new token at a time.

    It uses the memory of another cache. The position is a tensor. Later tokens are masked instead of cut off, so no
    shape depends on the number of tokens.
    """

    def __init__(self, cache: KVCache, device: torch.device):
        self._layers = list(cache._layers)
        for held in self._layers:
            for store in held or ():  # masking does not help against NaN in uninitialized memory: 0 · NaN = NaN
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
            raise ValueError("the original cache has no memory yet; run the network with it first")
        for store, new in zip(held, (k, v), strict=True):
            store.index_copy_(2, self.position, new)
        return held

    def advance(self, T: int) -> None:
        """Do nothing: `DecodeGraph` sets the position."""


class DecodeGraph:
    """Runs a network for one new token per call, with the earlier tokens in a cache.

    If the cache has grown, the graph is recorded again.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self._model = model
        self._cache = cache
        self._capacity = 0

    def fits(self) -> bool:
        """Whether the next token fits into the allocated cache.

        Otherwise the network has to run without a graph.
        """
        return 0 < self._cache.length < self._cache.capacity

    def __call__(self, id: int) -> Tensor:
        """Return the logits after one more token, (1, 1, vocab_size) float32.

        The next call overwrites them.
        """
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
        self._static.position.fill_(self._cache.length)  # the replay overwrites the values from the warm-up
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # warm-up: libraries must not initialize while recording
            for _ in range(2):
                self._model(self._token, self._static)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._model(self._token, self._static)
        self._capacity = self._cache.capacity
