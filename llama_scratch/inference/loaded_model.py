"""`LoadedModel`, a network with its tokenizer: the base class of `Llama`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from llama_scratch.config import ModelArgs
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.hooks import Hook
from llama_scratch.inference.engine import Engine
from llama_scratch.inference.prompt_text import Prompt, encode_text, whole_number
from llama_scratch.inference.prompt_warnings import prompt_warnings
from llama_scratch.model import Transformer
from llama_scratch.precision.lazy_weight import Weight
from llama_scratch.precision.linear import weight_bytes
from llama_scratch.precision.network import differentiable
from llama_scratch.results import Candidate, ModelInfo, Prediction, PromptWarning, Timing, Token
from llama_scratch.system.memory import memory_errors
from llama_scratch.system.progress import Progress, silent
from llama_scratch.tokenizer import Tokenizer, replace_surrogates


class LoadedModel:
    """A network and its tokenizer.

    Args:
        tokenizer: Text ↔ ids.
        info: Name, format, precision, device and number of parameters.
        engine: Ids → logits, with the KV cache.
        load_s: Loading time in seconds.
        warnings: Messages about the model's files. Every prediction includes them.
        weights: Function that reads the file's weights again, for gradients.

    Attributes:
        args: Dimensions of the network.
        context: Maximum number of tokens of a prompt and its continuation together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: ModelInfo,
        engine: Engine,
        *,
        load_s: float = 0.0,
        warnings: tuple[str, ...] = (),
        weights: Callable[[Progress], Mapping[str, Weight]] | None = None,
    ):
        self.args: ModelArgs = engine.model.args
        self.tokenizer = tokenizer
        self.info = info
        self.context = engine.context
        self.engine = engine
        self.load_s = load_s
        self.warnings = warnings
        self._weights = weights
        self._differentiable: list[Transformer] = []  # at most one; `intervened` shares the list with its copies

    def prepare(self, progress: Progress = silent, *, wait: bool = True) -> None:
        """Pack int8 and int4 weights and compile the kernels, if not cached.

        Without this call, the first answer in int8 or int4 does both. In other precisions, the kernels are then not
        compiled.

        Args:
            progress: Called with the stage, the amount done and the total.
            wait: Whether to wait until everything is done. Otherwise, the work continues in the background.

        Raises:
            OutOfMemoryError: If there is not enough memory to pack the weights.
        """
        if wait:
            with memory_errors(self.info.name):
                self.engine.packing.wait(progress)
        else:
            self.engine.packing.start()

    @property
    def preparing(self) -> tuple[str, int, int] | None:
        """Stage, amount done and total of the running background jobs, if any."""
        packing = self.engine.packing
        return packing.progress if packing.running else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that decoding one token reads, in their current format."""
        return weight_bytes(self.engine.model)

    def intervened(self, hooks: Mapping[str, Hook]) -> Self:
        """Return a copy of this model with additional hooks.

        The copy shares the weights, but not the KV cache. This model is not changed, and its own hooks run first.
        """
        changed = copy(self)
        both = {place: _one_after_the_other(self.engine.hooks.get(place), hooks.get(place)) for place in hooks}
        engine = self.engine
        changed.engine = Engine(engine.model, self.context, engine.packing, {**engine.hooks, **both}, engine.files)
        return changed

    def differentiable(self, progress: Progress = silent) -> Transformer:
        """Return a network for gradients, with the file's own weights, in float32.

        The first call reads the weights from the file. The network then stays in memory.

        Raises:
            UsageError: If the weights are not from a file.
            CheckpointError: If the file is damaged.
            OutOfMemoryError: If the network does not fit into memory.
        """
        if not self._differentiable:
            model = self.engine.model
            if isinstance(model.output, nn.Linear) and model.output.weight.dtype == torch.float32:  # not replaced
                self._differentiable.append(model)
            elif self._weights is None:
                raise UsageError("The weights of this model are not from a file. Load a model with `Llama.load`.")
            else:
                with memory_errors(self.info.name):
                    self._differentiable.append(differentiable(self._weights(progress), self.args))
        return self._differentiable[0]

    def close(self) -> None:
        """End the background jobs. Otherwise, they end with the program."""
        self.engine.packing.close()

    def encode(self, prompt: Prompt, *, bos: bool = True, special: bool = False) -> list[int]:
        """Convert a prompt to token ids.

        A text that is far too long for the context is rejected before it is tokenized completely.

        Args:
            prompt: A text, or token ids.
            bos: Prepend the BOS token to a text, if the model has one.
            special: Parse names of special tokens in a text, such as `<|eot_id|>`. Otherwise, they are plain text.

        Raises:
            UsageError: If the prompt is neither a text nor a sequence of integers.
            ContextLengthError: If a long text has more tokens than the context.
        """
        if isinstance(prompt, str):
            return encode_text(self.tokenizer, prompt, self.context, bos=bos, special=special)
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise UsageError(f"The prompt is {sanitize(repr(prompt))}, expected a text or a sequence of token ids.")
        return [id if type(id) is int else self._id(id) for id in prompt]

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode ids, without the beginning-of-text token."""
        start = 1 if ids and ids[0] == self.tokenizer.bos_id else 0
        return self.tokenizer.decode(ids[start:])

    def token(self, id: int) -> Token:
        """Return a token of the vocabulary. Raises `UsageError` if the id does not exist."""
        return Token(id := self._id(id), self.tokenizer.token_text(id))

    def _id(self, id: object) -> int:
        if (number := whole_number(id)) is None:
            raise UsageError(
                f"{sanitize(repr(id))} is not a token id of this model; ids go from 0 to {self.args.vocab_size - 1}."
            )
        return number

    def candidates(self, logits: Tensor, top: int) -> tuple[Candidate, ...]:
        """Return the most probable tokens, best first, from a softmax in float64.

        Args:
            logits: Logits, (vocab_size,).
            top: Number of tokens.
        """
        logprobs = logits.double().log_softmax(-1)  # (vocab_size,)
        best = logprobs.topk(min(top, logprobs.numel()))
        return tuple(
            Candidate(id, self.tokenizer.token_text(id), logprob)
            for id, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )

    def predict(
        self, prompt: Prompt, top: int = 5, *, special: bool = False, progress: Progress = silent
    ) -> Prediction:
        """Predict the next token: the most probable candidates with their probabilities.

        Probabilities are the softmax of the logits in float64.

        Args:
            prompt: A text, or token ids.
            top: Number of candidates.
            special: As for `encode`.
            progress: As for `Engine.next_logits`.

        Raises:
            UsageError: If the prompt is empty, or an id is not in the vocabulary.
            ContextLengthError: If it is longer than the context.
            CheckpointError: If the weights are damaged, or their file has changed.
        """
        if top < 1:
            raise UsageError(f"{top} candidates were requested, expected at least 1 (`top`).")
        ids = self.encode(prompt, special=special)
        start = time.perf_counter()
        logits = self.engine.next_logits(ids, progress)
        candidates = self.candidates(logits.values, top)
        prefill_s = time.perf_counter() - start
        return Prediction(
            prompt=replace_surrogates(prompt) if isinstance(prompt, str) else self.tokenizer.decode(ids),
            tokens=tuple(map(self.token, ids)),
            next=candidates[0],
            top=candidates,
            entropy_bits=float(entropy_bits(logits.values)),
            warnings=self._warnings(prompt, ids, candidates[0], special),
            model=self.info,
            timing=Timing(self.load_s, len(ids), logits.reused_tokens, prefill_s),
        )

    def logits(self, prompt: Prompt) -> Tensor:
        """Return the logits after every token of a prompt, (T, vocab_size) float32."""
        return self.engine.all_logits(self.encode(prompt))

    def _warnings(self, prompt: Prompt, ids: Sequence[int], next: Token, special: bool) -> tuple[PromptWarning, ...]:
        return (
            *(PromptWarning(message, message) for message in self.warnings),
            *prompt_warnings(self.tokenizer, prompt, ids, next, self.args.max_seq_len, special=special),
        )


def _one_after_the_other(first: Hook | None, second: Hook | None) -> Hook:
    """Combine two hooks for the same place."""

    def both(value: Tensor, start: int) -> Tensor:
        for hook in filter(None, (first, second)):
            new = hook(value, start)
            value = value if new is None else new
        return value

    return both


def entropy_bits(logits: Tensor) -> Tensor:
    """Shannon entropy in bits: (…, vocab_size) logits or log-probabilities → (…)."""
    nats: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return nats / math.log(2)
