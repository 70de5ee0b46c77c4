"""Surprisal: how improbable each token of a text was to the model, when it had read those before it."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel, entropy_bits
from llama_scratch.inference.prompt_text import Prompt
from llama_scratch.microscope.distributions import log_softmax
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.progress import Progress, silent


@dataclass(frozen=True)
class Scored(Token):
    """A token of a text and what was predicted in its place; None for the first token, which nothing predicts.

    logprob: natural logarithm of its probability. rank: 1 where it was the most probable one.
    entropy_bits: how open the prediction was.
    """

    json_fields = ("id", "text", "probability", "logprob", "bits", "rank", "entropy_bits")

    logprob: float | None
    rank: int | None
    entropy_bits: float | None

    @property
    def probability(self) -> float | None:
        """Between 0 and 1."""
        return None if self.logprob is None else math.exp(self.logprob)

    @property
    def bits(self) -> float | None:
        """The surprisal: 0 for what was certain, one more for each halving of the probability."""
        return None if self.logprob is None else -self.logprob / math.log(2)


@dataclass(frozen=True)
class Surprisal(JsonResult):
    """The tokens of a text with their scores, and what comes next.

    next: the most probable tokens after the last one, best first. entropy_bits: how open that question is.
    """

    json_fields = ("tokens", "bits", "perplexity", "next", "entropy_bits")

    tokens: tuple[Scored, ...]
    next: tuple[Candidate, ...]
    entropy_bits: float

    @property
    def bits(self) -> float:
        """The surprisal of the whole text: so many bits would store it, given the model and its first token."""
        return sum(token.bits or 0.0 for token in self.tokens)

    @property
    def perplexity(self) -> float | None:
        """Among how many equally probable tokens the model chose each time, as it were.

        e to the mean negative log-probability; None where nothing was scored, or beyond the range of a float.
        """
        logprobs = [token.logprob for token in self.tokens if token.logprob is not None]
        mean = -sum(logprobs) / len(logprobs) if logprobs else math.inf
        return math.exp(mean) if mean < 700 else None


class Scorer:
    """Scores one text after another; of one that only changed at its end it computes what is new."""

    def __init__(self, llama: LoadedModel):
        self.llama = llama
        # Each is right for those that stand before it, at any moment: an interruption cannot spoil them.
        self._scored: list[Scored] = []

    def __call__(self, ids: Sequence[int], top: int = 5, progress: Progress = silent) -> Surprisal:
        """The scores of each token, and the `top` candidates for the next one.

        progress: as for `Llama.predict`; what it raises ends the work, and what was scored by then is kept.
        Raises `UsageError` for no tokens or unknown ones, and `ContextLengthError` for too many.
        """
        if top < 1:
            raise UsageError(f"{top} candidates were asked for, expected at least 1.")
        llama, scored = self.llama, self._scored
        llama.engine.check(ids)
        known = sum(1 for _ in takewhile(lambda pair: pair[0].id == pair[1], zip(scored, ids, strict=False)))
        del scored[known:]
        if not scored:
            first = llama.token(ids[0])
            scored.append(Scored(first.id, first.text, None, None, None))
        # From the last known token on: what the model said after it is not kept, and scores the first new one.
        for logprobs in log_softmax(llama.engine.logits_from(ids, len(scored) - 1, progress)):
            scored += self._scores(logprobs, ids[len(scored) : len(scored) + len(logprobs)])
        last = logprobs[-1]  # (vocab_size,)
        return Surprisal(tuple(scored), llama.candidates(last, top), float(entropy_bits(last)))

    def _scores(self, logprobs: Tensor, ids: Sequence[int]) -> list[Scored]:
        """Scores of the tokens that came where `logprobs`, (n, vocab_size), were predicted; behind the last is none."""
        logprobs = logprobs[: len(ids)]
        token_logprobs = logprobs.gather(-1, torch.tensor(ids, dtype=torch.long)[:, None])  # (n, 1)
        ranks = (logprobs > token_logprobs).sum(-1) + 1  # (n,)
        columns = (token_logprobs[:, 0].tolist(), ranks.tolist(), entropy_bits(logprobs).tolist())
        return [
            Scored(id, self.llama.token(id).text, logprob, rank, entropy)
            for id, logprob, rank, entropy in zip(ids, *columns, strict=True)
        ]


def surprisal(llama: LoadedModel, prompt: Prompt, top: int = 5, progress: Progress = silent) -> Surprisal:
    """The scores of a prompt's tokens, and what comes next. Raises as `Llama.predict` does."""
    return Scorer(llama)(llama.encode(prompt), top, progress)


def per_character(llama: LoadedModel, scored: Sequence[Scored]) -> list[float | None]:
    """Bits for each character of the tokens' decoded text, without the beginning-of-text token.

    Each character has the bits of its token, or the sum of them where it spans several; None where one of them
    was not predicted by anything.
    """
    begin = 1 if scored and scored[0].id == llama.tokenizer.bos_id else 0
    bits: list[float | None] = []
    for tokens in _characters(llama, scored[begin:]):
        parts = [token.bits for token in tokens]
        bits.append(None if None in parts else sum(part or 0.0 for part in parts))
    return bits


def _characters(llama: LoadedModel, scored: Iterable[Scored]) -> Iterator[list[Scored]]:
    """For each character the tokens that hold its bytes; a part of a character counts as the U+FFFD it decodes to."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held: list[Scored] = []  # the token of each byte that no character has come of yet
    for token in scored:
        for byte in llama.tokenizer.token_bytes(token.id):
            n_characters = len(utf8.decode(bytes([byte])))
            held.append(token)
            waiting = len(utf8.getstate()[0])
            done, held = held[: len(held) - waiting], held[len(held) - waiting :]
            yield from _split(done, n_characters)
    yield from _split(held, len(utf8.decode(b"", final=True)))


def _split(tokens: list[Scored], count: int) -> Iterator[list[Scored]]:
    """Divide the tokens of consecutive bytes among the `count` characters that the bytes decode to.

    Broken bytes are one U+FFFD together, or one each if they begin a surrogate, such as ED A0.
    """
    if count == len(tokens):
        yield from ([token] for token in tokens)
        return
    if count == 2:  # a character that the next one broke off
        yield _each_once(tokens[:-1])
        tokens = tokens[-1:]
    if count:
        yield _each_once(tokens)


def _each_once(tokens: list[Scored]) -> list[Scored]:
    return [token for i, token in enumerate(tokens) if i == 0 or token is not tokens[i - 1]]
