"""Run all layers for a few tokens in one C++ call, without per-operator overhead.

The computation is the same as in model.py. Decoding with a small model is not memory-bound, because the overhead of
over a thousand operator calls per token dominates. cpp/layer.h computes each row independently, so the results for
several tokens at once are bit-identical to those for one token at a time.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch.model import KVCache, Transformer, TransformerBlock, rotations
from llama_scratch.precision import kernels
from llama_scratch.precision.linear import format_of
from llama_scratch.precision.panels import PANEL, Panels


class FusedLayers:
    """Runs a network in C++ for new tokens, with the earlier tokens in a cache.

    The kernels must support the formats of all weights.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self._model = model
        self._cache = cache
        self._norms: list[Tensor] | None = None
        self._weights: list[Tensor] = []
        self._types: list[str] = []
        self._parts: list[int] = []
        self._freqs = torch.empty(0, 0)

    def fits(self) -> bool:
        """Whether the kernels can run this network."""
        if not kernels.ready():
            return False
        if self._norms is None:
            self._norms = []
            self._collect()
        return bool(self._norms)

    def __call__(self, tokens: Tensor, *, all_positions: bool) -> Tensor:
        """Run the network with a batch size of 1.

        Args:
            tokens: New token ids, (1, T) int64.
            all_positions: Return the logits after every token instead of only the last.

        Returns:
            Logits, (1, T or 1, vocab_size) float32.
        """
        model, cache, args, T = self._model, self._cache, self._model.args, tokens.shape[1]
        end = cache.length + T
        x = model.tok_embeddings(tokens[0])  # (T, dim), a copy
        like = x.new_empty(1, args.n_kv_heads, 0, args.head_dim)
        # An interrupted run may have grown the caches of the first layers only. No layer has more capacity than the
        # first.
        room = max(end, cache.capacity)
        held = [store[0] for i in range(args.n_layers) for store in cache.reserve(i, room, like)]
        if len(self._freqs) < end:
            turned = rotations(model.freqs, torch.arange(cache.capacity))
            self._freqs = torch.view_as_real(turned).flatten(1)  # (capacity, head_dim): alternating cosine and sine
        freqs = self._freqs[cache.length : end]
        weights = self._weights, self._types, self._parts
        torch.ops.llama_scratch.layers(x, self._norms, *weights, freqs, held, cache.length, args.n_heads, args.norm_eps)
        cache.advance(T)
        return model.output(model.norm(x if all_positions else x[-1:]))[None]

    def _collect(self) -> None:
        """Collect norms and weights in the order of `Layer` in cpp/layer.h.

        `_norms` stays empty if the kernels do not support a weight.
        """
        args = self._model.args
        if args.dim % PANEL or args.head_dim % PANEL or args.ffn_dim % PANEL:
            return
        norms: list[Tensor] = []
        for module in self._model.layers:
            block = cast(TransformerBlock, module)
            norms += [block.attention_norm.weight, block.ffn_norm.weight]
            attention, feed_forward = block.attention, block.feed_forward
            for first in (attention.wq, attention.wo, feed_forward.w1, feed_forward.w2):
                weight = format_of(first)
                if weight is None or (isinstance(weight, Panels) and not weight.whole):
                    return
                operands = weight.kernel_operands
                if not operands:
                    return
                self._weights += [tensor for tensors, _ in operands for tensor in tensors]
                self._types += [name for _, name in operands]
                self._parts.append(len(operands))
        if norms[0].dtype == torch.float32:
            self._norms = norms
