"""`Llama`: a loaded model that answers prompts. It joins checkpoint, tokenizer and engine; the command
line is a thin caller of it."""

from __future__ import annotations

import hashlib
import math
import operator
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_scratch import calibration as calibrating
from llama_scratch.background import Background, go_on
from llama_scratch.chat import ChatFormat, Message
from llama_scratch.checkpoint import is_tied, open_checkpoint
from llama_scratch.checkpoint.find import find_model
from llama_scratch.config import ModelArgs
from llama_scratch.engine import Engine, require_room
from llama_scratch.errors import ContextLengthError, UsageError, printable
from llama_scratch.guard import Mapped
from llama_scratch.lazy import Weight
from llama_scratch.linear import weight_bytes
from llama_scratch.memory import memory_errors
from llama_scratch.model import Transformer
from llama_scratch.precision import (
    Examples,
    activation_type,
    all_known,
    build,
    check_name,
    choose,
    differentiable,
    file_type,
    find_device,
    memory_needed,
)
from llama_scratch.progress import Progress, silent
from llama_scratch.results import (
    ENDS_IN_A_WORD,
    ENDS_IN_SPACE,
    Candidate,
    Caution,
    Generated,
    ModelInfo,
    Prediction,
    Step,
    Timing,
    Token,
)
from llama_scratch.sampling import GREEDY, Sampling, sample
from llama_scratch.speculation import Drafts
from llama_scratch.taps import Tap
from llama_scratch.tokenizer import Tokenizer, replace_surrogates

if TYPE_CHECKING:
    from llama_scratch.microscope.inspection import Inspection

# Texts of up to so many characters are tokenized to the end, in half a second at most, whatever the context.
_COUNTED = 1_000_000
# More of them only stand in each other's way.
_THREADS_A_CORE = 8

Prompt = str | Sequence[int]
"""A text, which gets the beginning-of-text token where the model wants one, or token ids, which do not."""


class Llama:
    """A model in memory. Make one with `Llama.load`.

    args: its shape. tokenizer: text ↔ ids. info: name, format, precision, device, parameters. path: its directory
    or file. context: the most tokens that a prompt and its continuation may have together. engine: ids → logits, with
    what is cached. load_s: how long loading took, in seconds. chat: the format of conversations that it was trained
    for, None for a base model. speculate: whether `generate` may compute guessed tokens ahead, see `speculation`;
    what comes out is the same. warnings: messages about the model's files, which each prediction repeats. options:
    the arguments of `load` that change the model and that nothing above tells, as they were given.
    """

    speculate = True

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        info: ModelInfo,
        *,
        context: int,
        chat: ChatFormat | None = None,
        path: Path | None = None,
        load_s: float = 0.0,
        packing: Background | None = None,
        weights: Callable[[Progress], Mapping[str, Weight]] | None = None,
        files: Mapped | None = None,
        warnings: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
    ):
        self.args: ModelArgs = model.args
        self.tokenizer = tokenizer
        self.info = info
        self.path = path
        self.chat = chat
        self.context = context
        self.engine = Engine(model, context, packing, files=files)
        self.load_s = load_s
        self.warnings = warnings
        self.options: Mapping[str, Any] = options or {}
        self._weights = weights
        self._differentiable: list[Transformer] = []  # none or one; what `intervened` makes shares it

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        precision: str = "auto",
        activations: str = "auto",
        device: str = "auto",
        rope_factor: float | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        context: int | None = None,
        threads: int | None = None,
        calibration: str | os.PathLike[str] | None = None,
        progress: Progress = silent,
    ) -> Llama:
        """Load a model.

        source: a directory of Meta's or Hugging Face's files, or a .gguf file; the name of a model that
            `llama-scratch pull` fetched: "smollm2", OWNER/REPO[@REVISION] of the Hugging Face hub, or Meta's, such as
            "Llama3.2-1B"; or a directory at gs:// or az://, whose files are brought here. None looks in the usual
            places (see `find_model`).
        precision: "fp32", "bf16", "fp16", "int8", "int4", or "auto", the file's own type; see `precision`.
        activations: what goes from layer to layer: "fp32", "bf16", as Meta's own code rounds it, or "auto", float32 on
            a CPU.
        device: "cpu", "cuda", "mps", or "auto": CUDA where there is one, else the CPU.
        rope_factor: in place of the factor that Llama's RoPE scaling uses (32 for 3.2's 1B and 3B, 8 above).
        tokenizer: a tokenizer.model elsewhere.
        context: the most tokens, at most and by default what the model was trained for.
        threads: CPU threads; by default torch's choice.
        calibration: a file of text, of the kind that int4 is to be best at; by default see `calibration`.
        progress: called with a stage, how much is done and how much there is.

        Raises `ModelNotFoundError`, `CheckpointError`, `UsageError` or `OutOfMemoryError`.
        """
        start = time.perf_counter()
        path = find_model(source, progress)
        checkpoint = open_checkpoint(path, None if tokenizer is None else os.fspath(tokenizer))
        args = checkpoint.args.with_rope_factor(rope_factor)
        room = _context(context, args)
        target = find_device(device)
        check_name(precision)  # before the long part
        activation_type(activations, precision, target)
        examples = _examples(checkpoint.tokenizer, calibration) if precision == "int4" else None
        if threads is not None:
            most = _THREADS_A_CORE * (os.cpu_count() or 1)
            if not 1 <= threads <= most:
                raise UsageError(f"{printable(threads)} threads were asked for, expected 1 to {most} (--threads).")
            torch.set_num_threads(threads)
        with memory_errors(checkpoint.name):
            weights = checkpoint.load(progress)
            precision = choose(precision, stored := file_type(weights), target)
            # The cache grows as it is used; a context that was not asked for is no reason to refuse a model.
            tokens = room if context is not None else min(room, 4096)
            tied = is_tied(weights)
            needed = memory_needed(
                args,
                precision,
                stored,
                tokens,
                target,
                tied=tied,
                activations=activations,
                known=all_known(weights),
            )
            require_room(needed, f"{checkpoint.name} in {precision} with a context of {tokens:,} tokens", target)
            model, packing = build(weights, args, precision, target, checkpoint.files, examples, activations)
        info = ModelInfo(
            name=checkpoint.name,
            format=checkpoint.format,
            precision=precision,
            device=target.type,
            parameters=args.n_parameters(tied=tied),
        )
        load_s = time.perf_counter() - start
        return cls(
            model,
            checkpoint.tokenizer,
            info,
            context=room,
            chat=checkpoint.chat,
            path=path,
            load_s=load_s,
            packing=packing,
            weights=checkpoint.load,
            files=checkpoint.mapped,
            warnings=checkpoint.warnings,
            options={
                "tokenizer": tokenizer,
                "rope_factor": rope_factor,
                "context": context,
                "calibration": calibration,
                "activations": None if activations == "auto" else activations,
            },
        )

    def fingerprint(self, progress: Progress = silent) -> str:
        """Return the SHA-256 of the weight files that this model was loaded from, see `Checkpoint.fingerprint`."""
        return self.engine.files.sha256(progress)

    def prepare(self, progress: Progress = silent, *, wait: bool = True) -> None:
        """Pack weights of few bits and compile the kernels, where that was never done, and come back when it is.

        Without this the first answer in int8 or int4 waits for the packing, and nothing is compiled for the others.
        wait: False to come back at once. Raises `OutOfMemoryError`.
        """
        if wait:
            with memory_errors(self.info.name):
                self.engine.packing.wait(progress)
        else:
            self.engine.packing.start()

    @property
    def preparing(self) -> tuple[str, int, int] | None:
        """What is being done about the weights' form, how much of it is done and how much there is; None at the end."""
        packing = self.engine.packing
        return packing.progress if packing.running else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one token reads, as they are stored now."""
        return weight_bytes(self.engine.model)

    def intervened(self, taps: Mapping[str, Tap]) -> Llama:
        """The same model with taps in its network: what it answers, caches and generates is the changed network's.

        It shares the weights with this one, which stays as it was. Taps that this one has come first.
        """
        changed = copy(self)
        both = {place: _one_after_the_other(self.engine.taps.get(place), taps.get(place)) for place in taps}
        engine = self.engine
        changed.engine = Engine(engine.model, self.context, engine.packing, {**engine.taps, **both}, engine.files)
        return changed

    def inspect(self, prompt: Prompt) -> Inspection:
        """A prompt under the microscope: the residual stream, attention, lenses, attribution, interventions.

        Raises as `predict` does.
        """
        # Imported here: it lies above, and a loaded model has the microscope at hand.
        from llama_scratch.microscope.inspection import Inspection

        return Inspection(self, prompt)

    def differentiable(self, progress: Progress = silent) -> Transformer:
        """The network that gradients go through: the file's own weights, multiplied in float32.

        Read from the file at the first call and kept. Raises as `load` does, and `UsageError` where the weights lie
        in no file.
        """
        if not self._differentiable:
            model = self.engine.model
            if isinstance(model.output, nn.Linear) and model.output.weight.dtype == torch.float32:  # as it was made
                self._differentiable.append(model)
            elif self._weights is None:
                raise UsageError("The weights of this model lie in no file, expected a model that `Llama.load` loaded.")
            else:
                with memory_errors(self.info.name):
                    self._differentiable.append(differentiable(self._weights(progress), self.args))
        return self._differentiable[0]

    def close(self) -> None:
        """End the background jobs and the chat template's process. Without this they end with the program."""
        self.engine.packing.close()
        if self.chat is not None:
            self.chat.close()

    def encode(self, prompt: Prompt, *, bos: bool = True, special: bool = False) -> list[int]:
        """The ids that the model sees for a prompt.

        A text that is far too long for the context is rejected before all of it is tokenized.

        Args:
            prompt: A text, or token ids.
            bos: Begin a text with the beginning-of-text token, if the model has one.
            special: Read `<|eot_id|>` and the like in a text as the special tokens; otherwise they are plain text.

        Raises:
            UsageError: If the prompt is neither a text nor whole numbers.
            ContextLengthError: If a long text has more tokens than the context.
        """
        if isinstance(prompt, str):
            limit = _token_limit(self, len(prompt))
            ids = self.tokenizer.encode(prompt, bos=bos, special=special, limit=limit)
            if limit is not None and len(ids) > limit:
                raise _too_long(self, len(prompt))
            return ids
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise UsageError(f"The prompt is {printable(repr(prompt))}, expected a text or a sequence of token ids.")
        return [id if type(id) is int else self._id(id) for id in prompt]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, in the format that the model was trained for, up to where its answer begins.

        A message is plain text, `<|eot_id|>` and the like in it too.

        Raises:
            UsageError: If this is a base model, or its format does not accept the messages.
            ContextLengthError: If a long conversation has more tokens than the context.
            CheckpointError: If the file's own format is broken.
        """
        if self.chat is None:
            raise UsageError(
                f"{printable(self.info.name)} is a base model, which goes on with a text and was not trained for chat, "
                "expected one that was; choose an Instruct model, such as --model smollm2."
            )
        _token_limit(self, sum(len(message.content) for message in messages))
        parts = self.chat.parts(messages)
        size = sum(len(part.text) for part in parts)
        limit = _token_limit(self, size)
        bos = self.tokenizer.bos_id
        ids: list[int] = []
        for part in parts:
            id = self.tokenizer.special_tokens.get(part.text) if part.special else None
            ids += [id] if id is not None else self.tokenizer.encode(part.text, special=part.special, limit=limit)
            if limit is not None and len(ids) > limit:
                raise _too_long(self, size)
        # Some templates write the beginning of the text and some leave it to the tokenizer.
        return [*([] if bos is None else [bos]), *dropwhile(lambda id: id == bos, ids)]

    def token(self, id: int) -> Token:
        """A token of the vocabulary. Raises `UsageError` where there is none of that id."""
        return Token(id := self._id(id), self.tokenizer.token_text(id))

    def _id(self, id: object) -> int:
        if (number := whole_number(id)) is None:
            raise UsageError(
                f"{printable(repr(id))} is not a token id of this model; ids go from 0 to {self.args.vocab_size - 1}."
            )
        return number

    def candidates(self, logits: Tensor, top: int) -> tuple[Candidate, ...]:
        """The `top` most probable tokens by their logits, (vocab_size,): best first, softmax in float64."""
        logprobs = logits.double().log_softmax(-1)  # (vocab_size,)
        best = logprobs.topk(min(top, logprobs.numel()))
        return tuple(
            Candidate(id, self.tokenizer.token_text(id), logprob)
            for id, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )

    def predict(
        self, prompt: Prompt, top: int = 5, *, special: bool = False, progress: Progress = silent
    ) -> Prediction:
        """The most probable next token after a prompt, and the `top` candidates with their probabilities.

        Probabilities are the softmax of the logits, taken in float64. special: as for `encode`. `progress` is
        called while a long prompt is read, with "reading" and numbers of tokens. Raises `UsageError` for an empty
        prompt and `ContextLengthError` for one that is longer than the context.
        """
        if top < 1:
            raise UsageError(f"{top} candidates were asked for, expected at least 1 (--top).")
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
            entropy_bits=entropy_bits(logits.values),
            warnings=tuple(self._warnings(prompt, ids, candidates[0], special)),
            model=self.info,
            timing=Timing(self.load_s, len(ids), logits.reused_tokens, prefill_s),
        )

    def logits(self, prompt: Prompt) -> Tensor:
        """The logits after every token of a prompt: (T, vocab_size) float32."""
        return self.engine.all_logits(self.encode(prompt))

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 20,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[Step]:
        """Go on from a prompt, token by token; greedy unless a temperature is given.

        Stops before a stop token, after `max_new_tokens`, or where the context is full. Raises as
        `predict` does, and `UsageError` for a sampling option out of its range.
        """
        return self.continuation(prompt, max_new_tokens, Sampling(temperature, top_k, top_p, min_p, seed))

    def continuation(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling) -> Iterator[Step]:
        """`generate` with the sampling options in one value."""
        if max_new_tokens < 0:
            raise UsageError(f"{max_new_tokens} new tokens were asked for, expected at least 0 (--generate).")
        ids = self.encode(prompt)
        self.engine.check(ids)
        return self._steps(ids, max_new_tokens, sampling)

    def _steps(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> Iterator[Step]:
        generator = sampling.generator()
        stream = self.tokenizer.stream()
        end = min(len(ids) + max_new_tokens, self.context)
        drafts = Drafts()
        while len(ids) < end:
            room = min(self.engine.room(ids), end - len(ids) - 1) if self.speculate else 0
            draft = drafts.propose(ids, room) if room else []
            start = time.perf_counter()
            rows = self.engine.verify(ids, draft) if draft else self.engine.next_logits(ids).values[None]
            seconds = time.perf_counter() - start
            before = len(ids) + 1
            for logits, guess in zip(rows, [*draft, None], strict=False):
                id = sample(logits, sampling, generator)
                stop = id in self.tokenizer.stop_ids
                if stop or id != guess:
                    self.engine.trim(ids)
                if stop:
                    return
                ids = [*ids, id]
                logprob = float(logits[id] - logits.logsumexp(-1))
                yield Step(id, stream.push(id, final=len(ids) == end), logprob)
                if id != guess:
                    break
            if room:  # else it read the prompt, or waited for the weights
                drafts.book(len(draft), len(ids) - before, seconds)

    def complete(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling = GREEDY) -> Generated:
        """The whole continuation at once, with the reason for its end."""
        ids = self.encode(prompt)
        room = min(max_new_tokens, self.context - len(ids))
        start = time.perf_counter()
        steps = list(self.continuation(ids, max_new_tokens, sampling))
        new = tuple(step.id for step in steps)
        return Generated(
            text=self.tokenizer.decode(new),
            ids=new,
            logprobs=tuple(step.logprob for step in steps),
            finish_reason="stop" if len(new) < room else "length",
            decode_s=time.perf_counter() - start,
        )

    def _warnings(self, prompt: Prompt, ids: list[int], next: Token, special: bool) -> Iterator[Caution]:
        yield from (Caution(sentence, sentence) for sentence in self.warnings)
        if isinstance(prompt, str):
            yield from self.tokenizer.warnings(prompt, special=special)
            if prompt.endswith(" "):
                yield Caution(
                    ENDS_IN_SPACE,
                    "The prompt ends in a space, which became a token of its own; words bring their own space and "
                    "only numbers come after a lone one, so end the prompt with the last word.",
                )
            elif self._cut_differently(prompt, ids, next, special):
                yield Caution(
                    ENDS_IN_A_WORD,
                    f"The prompt ends inside of what is one token once {next.text!r} follows it; "
                    "the model rarely saw it cut like this, so the answer may surprise.",
                )
        bos = self.tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            yield Caution(
                "doubled BOS",
                f"The text begins with {self.token(bos).text} twice, expected once; "
                "it is put in front of each prompt, so leave it out.",
            )
        if len(ids) > self.args.max_seq_len:
            yield Caution(
                "beyond the context",
                f"The text has {len(ids):,} tokens, and the model was trained for up to {self.args.max_seq_len:,}; "
                "what it says so far out is not to be relied on.",
            )

    def _cut_differently(self, prompt: str, ids: list[int], next: Token, special: bool) -> bool:
        """Whether the prompt with the predicted text behind it would have become other tokens than `ids`."""
        if next.id in self.tokenizer.untypeable:
            return False
        try:
            text = self.tokenizer.token_bytes(next.id).decode()
        except UnicodeDecodeError:  # a part of a character
            return False
        return self.tokenizer.encode(prompt + text, bos=True, special=special)[: len(ids)] != ids


def _token_limit(llama: Llama, size: int) -> int | None:
    """The number of tokens after which a text of `size` characters need not be tokenized further; None for a short one.

    Raises `ContextLengthError` if so many characters cannot fit into the context.
    """
    if size <= _COUNTED:
        return None
    if size > llama.context * llama.tokenizer.max_token_bytes:  # no token has more characters than bytes
        raise _too_long(llama, size)
    return llama.context


def _too_long(llama: Llama, size: int) -> ContextLengthError:
    return ContextLengthError(
        f"The text has {size:,} characters, which are more than the {llama.context:,} tokens of the context. "
        "Shorten it, or raise --context if the model allows it."
    )


def _one_after_the_other(first: Tap | None, second: Tap | None) -> Tap:
    """One tap for a place that has two."""

    def both(value: Tensor, start: int) -> Tensor:
        for tap in filter(None, (first, second)):
            new = tap(value, start)
            value = value if new is None else new
        return value

    return both


def whole_number(value: Any) -> int | None:
    """A whole number of any type (NumPy's and torch's too) as Python's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _examples(tokenizer: Tokenizer, path: str | os.PathLike[str] | None) -> Examples:
    """What int4 is calibrated with, and a name for it. Raises `ModelNotFoundError` and `UsageError`."""
    if path is None:
        name = f"its own words and Python {platform.python_version()}'s"
        return Examples(name, lambda model: calibrating.examples(model, tokenizer, progress=go_on))
    text = calibrating.read_text(path)
    windows = calibrating.windows(tokenizer, text)
    return Examples(hashlib.sha256(text.encode()).hexdigest(), lambda _: windows)


def _context(context: int | None, args: ModelArgs) -> int:
    if context is None:
        return args.max_seq_len
    if context < 1:
        raise UsageError(f"A context of {context} tokens was asked for, expected at least 1 (--context).")
    return context


def entropy_bits(logits: Tensor) -> float:
    """Shannon entropy of the distribution that logits, (vocab_size,), stand for, in bits."""
    return float(torch.special.entr(logits.double().softmax(-1)).sum()) / math.log(2)
