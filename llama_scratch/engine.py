"""Token ids in, logits out: one cache, of which every new prompt reuses the longest common prefix. Knows no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from llama_scratch.errors import FETCH_AGAIN, CheckpointError, ContextLengthError, UsageError
from llama_scratch.memory import memory_errors
from llama_scratch.model import KVCache, Transformer
from llama_scratch.progress import Progress, silent

# Prompts go through the network in pieces, so that Ctrl-C is heard between them and the attention
# mask stays small.
CHUNK = 512


@dataclass(frozen=True)
class Logits:
    """What the network says after the last token: (vocab_size,) float32; and how much of the prompt was cached."""

    values: Tensor
    reused_tokens: int


class Engine:
    """Runs a `Transformer` over sequences of ids; `context` is the most tokens that one may have.

    An interruption at any point leaves it whole: the cache's `length` moves on only when a piece is
    done, and `_ids[:length]` always names what the cache holds.
    """

    def __init__(self, model: Transformer, context: int):
        self.model = model
        self.context = context
        self._cache = KVCache(model.args, context)
        self._ids: list[int] = []
        self._device = model.tok_embeddings.weight.device

    def next_logits(self, ids: Sequence[int], progress: Progress = silent) -> Logits:
        """Logits of the token after `ids`. Computes only what does not share a prefix with the cache.

        progress: called between the pieces of a long prompt with "reading" and numbers of tokens.

        Raises `ContextLengthError` where ids are too many, `UsageError` where there are none or one is unknown.
        """
        self.check(ids)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids, strict=False)))
        # The last token is always computed: its logits are not kept.
        reused = min(common, self._cache.length, len(ids) - 1)
        self._start(ids, reused)
        *first, last = self._chunks(ids, reused)
        for chunk in first:
            progress("reading", self._cache.length - reused, len(ids) - reused)
            self._forward(chunk)
        return Logits(_finite(self._forward(last)[0, -1]), reused)

    def all_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of `ids`, (T, vocab_size) float32."""
        self.check(ids)
        self._start(ids, 0)
        return torch.cat([_finite(self._forward(chunk, all_positions=True)[0]) for chunk in self._chunks(ids, 0)])

    def _start(self, ids: Sequence[int], length: int) -> None:
        self._cache.rewind(length)
        self._ids = list(ids)

    def _chunks(self, ids: Sequence[int], start: int) -> Iterator[Sequence[int]]:
        for i in range(start, len(ids), CHUNK):
            yield ids[i : i + CHUNK]

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int], *, all_positions: bool = False) -> Tensor:
        tokens = torch.tensor([ids], device=self._device)  # (1, T)
        with memory_errors(f"A text of {self._cache.length + len(ids):,} tokens"):
            return self.model(tokens, self._cache, all_positions=all_positions).cpu()

    def check(self, ids: Sequence[int]) -> None:
        """Raise `UsageError` or `ContextLengthError` where a sequence cannot be run."""
        if not ids:
            raise UsageError("The prompt is empty, expected at least one token.")
        if len(ids) > self.context:
            raise ContextLengthError(
                f"The prompt has {len(ids)} tokens, expected at most {self.context}; "
                "shorten it, or raise --context where the model allows it."
            )
        vocab_size = self.model.args.vocab_size
        for id in (min(ids), max(ids)):  # this runs for each new token, over all that came before it
            if not 0 <= id < vocab_size:
                raise UsageError(f"{id} is not a token id of this model; ids go from 0 to {vocab_size - 1}.")


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"The network computed values that are not numbers, so its weights are damaged; {FETCH_AGAIN}"
        )
    return logits
