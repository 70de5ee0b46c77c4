"""The layers for a few tokens as one call, see kernels.cpp: the readable network's steps without its operators' calls.

A small model's token is not bound by reading weights but by asking for some thousand operators, one by one. And as
each row is computed by itself there, several tokens at once come out to the bit as if they had come one by one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama_scratch import kernels
from llama_scratch.linear import Panels, Projection, SharedProjection
from llama_scratch.model import KVCache, Transformer, TransformerBlock, rotations

# Attention is computed here one row at a time; for more rows than a few in a longer text the network's own is faster.
LONG, FEW = 1024, 16
# Sizes of heads that the kernels know.
_HEADS = (16, 32, 64, 128)


class Step:
    """Runs a network for a few tokens behind what `cache` holds, once its weights lie in panels."""

    def __init__(self, model: Transformer, cache: KVCache):
        self._model = model
        self._cache = cache
        self._weights: list[Tensor] | None = None
        self._freqs = torch.empty(0, 0)

    def fits(self, count: int) -> bool:
        """Whether `count` further tokens can be run so."""
        if (count > FEW and self._cache.length + count > LONG) or not kernels.ready():
            return False
        if self._weights is None:
            self._weights = self._collected()
        return bool(self._weights)

    def __call__(self, tokens: Tensor, *, all_positions: bool) -> Tensor:
        """As the network's own call, for one text: (1, T) → (1, T or 1, vocab_size)."""
        model, cache, args, T = self._model, self._cache, self._model.args, tokens.shape[1]
        end = cache.length + T
        x = model.tok_embeddings(tokens[0])  # (T, dim), a copy
        like = x.new_empty(1, args.n_kv_heads, 0, args.head_dim)
        # An interrupted text may have made room in the first layers only; none has more than the first.
        room = max(end, cache.capacity)
        held = [store[0] for i in range(args.n_layers) for store in cache.reserve(i, room, like)]
        if len(self._freqs) < end:
            turned = rotations(model.freqs, torch.arange(cache.capacity))
            self._freqs = torch.view_as_real(turned).flatten(1)  # (capacity, head_dim): cosine and sine in turn
        freqs = self._freqs[cache.length : end]
        torch.ops.llama_scratch.layers(x, self._weights, freqs, held, cache.length, args.n_heads, args.norm_eps)
        cache.advance(T)
        return model.output(model.norm(x if all_positions else x[-1:]))[None]

    def _collected(self) -> list[Tensor]:
        """Norms and panels of all layers, in the order of `Layer`; none where some weight does not lie in panels."""
        found: list[Tensor] = []
        for module in self._model.layers:
            block = cast(TransformerBlock, module)
            attention, feed_forward = block.attention, block.feed_forward
            found += [block.attention_norm.weight, block.ffn_norm.weight]
            for projection in (attention.wq, attention.wo, feed_forward.w1, feed_forward.w2):
                panels = _panels(projection)
                if panels is None or self._model.args.head_dim not in _HEADS:
                    return []
                found += [panels.values, panels.scales]
        output = self._model.output
        if not (isinstance(output, Projection) and all(isinstance(form, Panels) for form in output.stack.forms)):
            return []
        return found


def _panels(projection: object) -> Panels | None:
    """The one form of a projection where it is in panels that nothing fills up."""
    if isinstance(projection, SharedProjection):
        stack = projection.shared.stack
    elif isinstance(projection, Projection):
        stack = projection.stack
    else:
        return None
    form = stack.forms[0]
    return form if len(stack.forms) == 1 and isinstance(form, Panels) and form.whole else None
