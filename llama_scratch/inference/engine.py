"""Token ids in, logits out: one cache, of which every new prompt reuses the longest common prefix. Knows no text."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, ContextLengthError, UsageError
from llama_scratch.hooks import Hook, hooked
from llama_scratch.inference.cuda_graph import DecodeGraph
from llama_scratch.inference.fused_layers import FusedLayers
from llama_scratch.model import KVCache, Transformer
from llama_scratch.precision.memory_estimate import CHUNK
from llama_scratch.system.jobs import BackgroundJobs
from llama_scratch.system.mapped_files import MappedFiles
from llama_scratch.system.memory import memory_errors, require_memory
from llama_scratch.system.progress import Progress, silent

# More guessed tokens are rarely right.
_MAX_DRAFT_LENGTH = 15
# Positions whose logits are in memory at a time: 66 MB for a vocabulary of 128,256.
_LOGITS_PER_CHUNK = 128


@dataclass(frozen=True)
class Logits:
    """What the network says after the last token: (vocab_size,) float32; and how much of the prompt was cached."""

    values: Tensor
    reused_tokens: int


class Engine:
    """Run a `Transformer` on token ids, with one KV cache that successive prompts reuse.

    The engine stays consistent if it is interrupted: `cache.length` advances only after a complete chunk, and
    `_ids[:cache.length]` are always the tokens in the cache.

    Args:
        model: The network.
        context: Maximum number of tokens in a sequence.
        packing: Background jobs that pack the weights. The first answer waits for them.
        hooks: Hooks for every forward pass. The cache then belongs to the hooked network.
        files: The mapped weight files. If one has changed on disk, answers raise `CheckpointError`.
    """

    def __init__(
        self,
        model: Transformer,
        context: int,
        packing: BackgroundJobs | None = None,
        hooks: Mapping[str, Hook] = MappingProxyType({}),
        files: MappedFiles | None = None,
    ):
        self.model = model
        self.files = files or MappedFiles([])
        self.context = context
        self.packing = packing or BackgroundJobs("packing", [])
        self.hooks = hooks
        self._cache = KVCache(model.args, context)
        self._ids: list[int] = []
        self._device = model.tok_embeddings.weight.device
        # A graph replays what was recorded, without hooks.
        self._graph = DecodeGraph(model, self._cache) if self._device.type == "cuda" and not hooks else None
        self._fused = FusedLayers(model, self._cache) if self._device.type == "cpu" and not hooks else None

    def next_logits(self, ids: Sequence[int], progress: Progress = silent) -> Logits:
        """Logits of the token after `ids`. Computes only what does not share a prefix with the cache.

        progress: called between the pieces of a long prompt with "reading" and numbers of tokens.

        Raises `ContextLengthError` where ids are too many, `UsageError` where there are none or one is unknown.
        """
        self.check(ids)
        # The last token is always computed: its logits are not kept.
        reused = min(_common_prefix(self._ids, ids), self._cache.length, len(ids) - 1)
        self._reset_to(ids, reused)
        *first, last = self._chunks(ids, reused, CHUNK)
        with self.weights(progress):
            for chunk in first:
                progress("reading", self._cache.length - reused, len(ids) - reused)
                self._forward_cached(chunk)
            values = self._finite(self._forward_cached(last)[0, -1], [ids])
        return Logits(values, reused)

    @contextmanager
    def weights(self, progress: Progress = silent) -> Iterator[None]:
        """Make sure the weights are ready for the next answer: in few bits, wait until they are packed."""
        self.files.check()
        if not self.packing.done:
            with memory_errors("Packing the weights"):
                self.packing.wait(progress)
            if not self.packing.done:
                raise UsageError("The model was closed before its weights were packed; load it again.")
        yield
        self.files.check()

    def all_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token of `ids`, (T, vocab_size) float32."""
        return torch.cat(list(self.logits_from(ids, 0)))

    def logits_from(self, ids: Sequence[int], start: int, progress: Progress = silent) -> Iterator[Tensor]:
        """Logits after each token from position `start` on: pieces of (n, vocab_size) float32, first to last.

        What stands before `start` is not computed again where the cache holds it. The engine is in use until
        the last piece was taken. progress: as for `next_logits`; what it raises ends the work between two pieces.
        """
        self.check(ids)
        reused = min(_common_prefix(self._ids, ids), self._cache.length, start)
        self._reset_to(ids, reused)
        with self.weights(progress):
            for chunk in self._chunks(ids[:start], reused, CHUNK):
                progress("reading", self._cache.length - reused, len(ids) - reused)
                self._forward_cached(chunk)
            for chunk in self._chunks(ids, start, min(CHUNK, _LOGITS_PER_CHUNK)):
                progress("reading", self._cache.length - reused, len(ids) - reused)
                yield self._finite(self._forward_cached(chunk, all_positions=True)[0], [ids])

    def max_draft_length(self, ids: Sequence[int]) -> int:
        """How many tokens `verify` takes behind `ids`: none where bits could differ, or where the cache lacks more."""
        before = len(ids) - 1
        if self._fused is None or not self.packing.done or not self._fused.fits():
            return 0
        if self._cache.length != before or _common_prefix(self._ids, ids) < before:
            return 0
        # The cache does not grow for what may be thrown away.
        return max(0, min(_MAX_DRAFT_LENGTH, self._cache.capacity - before - 1))

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> Tensor:
        """Logits after `ids` and after each token of a draft behind it, in one pass: (1 + len(draft), vocab_size).

        To the bit those of `next_logits` for each of these texts in turn, and so is what the cache holds then, as long
        as `max_draft_length` allows the draft, see `FusedLayers`. Only the first row if a draft leads to NaN.
        """
        self.check(both := [*ids, *draft])
        self._reset_to(both, len(ids) - 1)
        with self.weights():
            rows = self._forward_cached(both[len(ids) - 1 :], all_positions=True)[0]
        if math.isfinite(rows.sum()):
            return rows
        return self.next_logits(ids).values[None]

    def trim(self, ids: Sequence[int]) -> None:
        """Forget what the cache holds behind `ids`."""
        if self._cache.length > len(ids) == _common_prefix(self._ids, ids):
            self._reset_to(ids, len(ids))

    def forward_with_hooks(
        self,
        rows: Sequence[Sequence[int]],
        hooks: Mapping[str, Hook],
        *,
        all_positions: bool = False,
        progress: Progress = silent,
    ) -> Tensor:
        """Run texts of equal length through the network with further hooks, from the first token on.

        What is cached is neither used nor changed. Long texts go in pieces, so that a hook is called for each piece,
        with its position. progress: as for `next_logits`. Returns the logits after the last token, (B, 1, vocab_size)
        float32, or after every one, (B, T, vocab_size). Raises as `next_logits` does, `UsageError` for a place that
        there is not, and ValueError for texts of different lengths.
        """
        for ids in rows:
            self.check(ids)
        cache = KVCache(self.model.args, len(rows[0]))
        size = max(1, CHUNK // len(rows))
        logits: list[Tensor] = []
        with self.weights(progress):
            for start in range(0, len(rows[0]), size):
                progress("reading", start, len(rows[0]))
                piece = [ids[start : start + size] for ids in rows]
                new_logits = self._forward(piece, cache, hooks, all_positions=all_positions)
                logits = [*logits, new_logits] if all_positions else [new_logits]
        return self._finite(torch.cat(logits, dim=1), rows, hooks)

    def _reset_to(self, ids: Sequence[int], length: int) -> None:
        self._cache.rewind(length)
        self._ids = list(ids)

    def _chunks(self, ids: Sequence[int], start: int, size: int) -> Iterator[Sequence[int]]:
        for i in range(start, len(ids), size):
            yield ids[i : i + size]

    @torch.inference_mode()
    def _forward_cached(self, ids: Sequence[int], *, all_positions: bool = False) -> Tensor:
        # A graph holds on to the weights that it was recorded with.
        if self._graph and len(ids) == 1 and not all_positions and self._graph.fits() and self.packing.done:
            return self._graph(ids[0]).cpu()
        return self._forward([ids], self._cache, {}, all_positions=all_positions)

    @torch.inference_mode()
    def _forward(
        self, rows: Sequence[Sequence[int]], cache: KVCache, hooks: Mapping[str, Hook], *, all_positions: bool
    ) -> Tensor:
        tokens = torch.tensor(rows, device=self._device)  # (B, T)
        length = cache.length + tokens.shape[1]
        text = f"A text of {length:,} tokens"
        growth = cache.growth(length)
        if growth:
            require_device_memory({"KV cache": growth}, text, self._device)
        if self._fused and cache is self._cache and not hooks and self.packing.done and self._fused.fits():
            with memory_errors(text):
                return self._fused(tokens, all_positions=all_positions)
        # What looks at a changed network sees what the changes left.
        with memory_errors(text), hooked(self.model, self.hooks), hooked(self.model, hooks):
            return self.model(tokens, cache, all_positions=all_positions).cpu()

    def _finite(
        self, logits: Tensor, rows: Sequence[Sequence[int]], hooks: Mapping[str, Hook] = MappingProxyType({})
    ) -> Tensor:
        if math.isfinite(logits.sum()):  # one value that is not a number makes the sum none
            return logits
        self._cache.rewind(0)  # within a piece they reach the tokens in front of them too: 0 times such a value is one
        if self.hooks or hooks:
            for ids in rows:  # hooks that only look are not at fault: without any it raises what is below
                Engine(self.model, self.context, self.packing, files=self.files).next_logits(ids)
            raise UsageError(
                "With its interventions the network computes values that are not numbers, expected smaller changes; "
                "take them off, or choose a smaller scale."
            )
        raise CheckpointError(
            f"The network computed values that are not numbers, so its weights are damaged ({self.files}); "
            + REDOWNLOAD_HINT
        )

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self._cache.length

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values have taken."""
        return self._cache.nbytes

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys, turned by their positions, and the values that a layer holds: (n_kv_heads, tokens, head_dim) each.

        Views of what the next answer reads. Raises `UsageError` where nothing was read yet.
        """
        if (held := self._cache._layers[layer]) is None:
            raise UsageError("The cache holds no tokens yet, expected a text before it is looked into.")
        keys, values = (store[0, :, : self._cache.length] for store in held)
        return keys, values

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
        # This runs for each new token, over all that came before it: at the speed of C.
        try:
            lowest, highest, _ = (
                min(ids),
                max(ids),
                operator.index(sum(ids)),
            )  # of integers only
        except TypeError:
            raise UsageError(
                f"A token id is no whole number; ids of this model go from 0 to {vocab_size - 1}."
            ) from None
        for id in (lowest, highest):
            if not 0 <= id < vocab_size:
                raise UsageError(f"{id} is not a token id of this model; ids go from 0 to {vocab_size - 1}.")


def require_device_memory(needed: dict[str, int], what: str, device: torch.device) -> None:
    """`require_memory`, but on a GPU, which has a memory of its own and says by itself when that is full."""
    if device.type != "cuda":
        require_memory(needed, what)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # at the speed of C: generation comes here for each token, with all that were before it
        return n
    return next((i for i in range(n) if a[i] != b[i]), n)  # a list and a tuple never are equal as a whole
