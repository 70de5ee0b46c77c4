"""Run a network on token ids, with a KV cache that reuses common prefixes."""

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

# Longer drafts are rarely accepted.
_MAX_DRAFT_LENGTH = 15
# Positions per chunk of logits: 66 MB for a vocabulary of 128,256.
_LOGITS_PER_CHUNK = 128


@dataclass(frozen=True)
class Logits:
    """The logits for the next token.

    Attributes:
        values: Logits, (vocab_size,) float32.
        reused_tokens: Number of tokens of the prompt that were in the cache.
    """

    values: Tensor
    reused_tokens: int


class Engine:
    """Runs a `Transformer` on token ids, with one KV cache for successive prompts.

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
        # A recorded graph does not call hooks.
        self._graph = DecodeGraph(model, self._cache) if self._device.type == "cuda" and not hooks else None
        self._fused = FusedLayers(model, self._cache) if self._device.type == "cpu" and not hooks else None

    def next_logits(self, ids: Sequence[int], progress: Progress = silent) -> Logits:
        """Return the logits for the token after `ids`.

        Only the tokens after the longest cached prefix are computed.

        Args:
            ids: The tokens.
            progress: Called between the chunks of a long prompt with "reading", the tokens done and their total.

        Raises:
            ContextLengthError: If there are more ids than fit into the context.
            UsageError: If there are no ids, or an id is not in the vocabulary.
            CheckpointError: If the network computes NaN or infinity, or a weight file has changed.
        """
        self.check(ids)
        # The last token is always computed: its logits are not cached.
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
        """Wait until the weights are packed, and check their files for changes.

        The files are checked again at the end of the `with` block.
        """
        self.files.check()
        if not self.packing.done:
            with memory_errors("Packing the weights"):
                self.packing.wait(progress)
            if not self.packing.done:
                raise UsageError("The model was closed before its weights were packed. Load it again.")
        yield
        self.files.check()

    def all_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits after every token of `ids`, (T, vocab_size) float32."""
        return torch.cat(list(self.logits_from(ids, 0)))

    def logits_from(self, ids: Sequence[int], start: int, progress: Progress = silent) -> Iterator[Tensor]:
        """Yield the logits after each token from `start` on, in chunks.

        Cached tokens before `start` are not computed again. The engine must not be used for anything else before the
        iterator is exhausted.

        Args:
            ids: The tokens.
            start: Position of the first logits to return.
            progress: As for `next_logits`. It can raise to cancel between two chunks.

        Yields:
            Logits, (n, vocab_size) float32.
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
        """Return the maximum draft length for `verify` after `ids`.

        It is 0 if the cache is full, or if the result might not be bit-identical to decoding without drafts.
        """
        before = len(ids) - 1
        if self._fused is None or not self.packing.done or not self._fused.fits():
            return 0
        if self._cache.length != before or _common_prefix(self._ids, ids) < before:
            return 0
        # Do not grow the cache for tokens that may be rejected.
        return max(0, min(_MAX_DRAFT_LENGTH, self._cache.capacity - before - 1))

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> Tensor:
        """Compute the logits after `ids` and after each token of a draft in one pass.

        If `max_draft_length` allows the draft, logits and cache are bit-identical to single steps with `next_logits`,
        see `FusedLayers`.

        Args:
            ids: The tokens so far. All but the last are in the cache.
            draft: Guesses at the tokens that follow.

        Returns:
            Logits, (1 + len(draft), vocab_size), or only the first row if the draft leads to NaN.
        """
        self.check(both := [*ids, *draft])
        self._reset_to(both, len(ids) - 1)
        with self.weights():
            rows = self._forward_cached(both[len(ids) - 1 :], all_positions=True)[0]
        if math.isfinite(rows.sum()):
            return rows
        return self.next_logits(ids).values[None]

    def trim(self, ids: Sequence[int]) -> None:
        """Remove the tokens after `ids` from the cache."""
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
        """Run a batch of texts of equal length through the network with additional hooks.

        The cache is neither used nor changed. Long texts are processed in chunks, and hooks are called for each chunk
        with its position.

        Args:
            rows: Token ids, one sequence per text.
            hooks: Place → hook. The engine's own hooks run first.
            all_positions: Return the logits after every token.
            progress: As for `next_logits`.

        Returns:
            The logits after the last token, (B, 1, vocab_size) float32, or after every token, (B, T, vocab_size).

        Raises:
            ContextLengthError: As for `next_logits`.
            UsageError: As for `next_logits`, and if a place does not exist.
            ValueError: If the texts differ in length.
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
        # A graph keeps using the weights that it was recorded with, so they must be packed before.
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
        # The engine's own hooks come first, so later ones see the changed network.
        with memory_errors(text), hooked(self.model, self.hooks), hooked(self.model, hooks):
            return self.model(tokens, cache, all_positions=all_positions).cpu()

    def _finite(
        self, logits: Tensor, rows: Sequence[Sequence[int]], hooks: Mapping[str, Hook] = MappingProxyType({})
    ) -> Tensor:
        if math.isfinite(logits.sum()):  # one NaN makes the sum NaN
            return logits
        self._cache.rewind(0)  # NaN also spreads to earlier tokens of the chunk, because 0 · NaN = NaN
        if self.hooks or hooks:
            for ids in rows:  # without hooks: raises the CheckpointError below if the weights are the cause
                Engine(self.model, self.context, self.packing, files=self.files).next_logits(ids)
            raise UsageError(
                "With its interventions the network computes NaN or infinity. "
                "Remove the interventions, or choose a smaller scale."
            )
        raise CheckpointError(
            f"The network computes NaN or infinity, so its weights are damaged ({self.files}). " + REDOWNLOAD_HINT
        )

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache."""
        return self._cache.length

    @property
    def cache_bytes(self) -> int:
        """Memory of the cached keys and values in bytes."""
        return self._cache.nbytes

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of a layer's cached keys and values.

        Returns:
            Keys, rotated by their positions, and values, (n_kv_heads, tokens, head_dim) each.

        Raises:
            UsageError: If the cache is empty.
        """
        if (held := self._cache._layers[layer]) is None:
            raise UsageError("The cache holds no tokens yet. Run a prompt first.")
        keys, values = (store[0, :, : self._cache.length] for store in held)
        return keys, values

    def check(self, ids: Sequence[int]) -> None:
        """Raise `UsageError` or `ContextLengthError` if a sequence is not valid."""
        if not ids:
            raise UsageError("The prompt is empty. Pass at least one token.")
        if len(ids) > self.context:
            raise ContextLengthError(
                f"The prompt has {len(ids)} tokens, expected at most {self.context}. "
                "Shorten it, or raise `context` if the model allows it."
            )
        vocab_size = self.model.args.vocab_size
        # Built-in functions, because this checks all previous tokens for each new token.
        try:
            lowest, highest = min(ids), max(ids)
            operator.index(sum(ids))  # fails unless all ids are integers
        except TypeError:
            raise UsageError(f"Token ids of this model must be integers from 0 to {vocab_size - 1}.") from None
        for id in (lowest, highest):
            if not 0 <= id < vocab_size:
                raise UsageError(f"{id} is not a token id of this model; ids go from 0 to {vocab_size - 1}.")


def require_device_memory(needed: dict[str, int], what: str, device: torch.device) -> None:
    """Call `require_memory`, but not for a GPU, which has its own memory.

    Args:
        needed: Purpose → bytes.
        what: Subject of the error message.
        device: The device to allocate on.

    Raises:
        OutOfMemoryError: If less memory is free.
    """
    if device.type != "cuda":
        require_memory(needed, what)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # fast, because generation compares all tokens for each new one
        return n
    return next((i for i in range(n) if a[i] != b[i]), n)  # n if only the types differ: a list never equals a tuple
