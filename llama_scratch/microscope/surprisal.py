"""Surprisal: −log₂ of the probability of each token, given the tokens before it."""

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
    """A token of a text with its score.

    The first token is not predicted, so it has no score.

    Attributes:
        logprob: Natural logarithm of its probability.
        rank: Its rank; 1 if it was the most probable token.
        entropy_bits: Entropy of the prediction at its position.
    """

    json_fields = ("id", "text", "probability", "logprob", "bits", "rank", "entropy_bits")

    logprob: float | None
    rank: int | None
    entropy_bits: float | None

    @property
    def probability(self) -> float | None:
        """Probability of the token, 0 to 1, if it was predicted."""
        return None if self.logprob is None else math.exp(self.logprob)

    @property
    def bits(self) -> float | None:
        """Surprisal: −log₂ of the probability, if the token was predicted."""
        return None if self.logprob is None else -self.logprob / math.log(2)


@dataclass(frozen=True)
class Surprisal(JsonResult):
    """The tokens of a text with their scores, and the next-token prediction.

    Attributes:
        tokens: The tokens.
        next: The most probable next tokens, best first.
        entropy_bits: Entropy of the next-token prediction.
    """

    json_fields = ("tokens", "bits", "perplexity", "next", "entropy_bits")

    tokens: tuple[Scored, ...]
    next: tuple[Candidate, ...]
    entropy_bits: float

    @property
    def bits(self) -> float:
        """Surprisal of the whole text.

        An arithmetic coder with this model would need that many bits, given the first token.
        """
        return sum(token.bits or 0.0 for token in self.tokens)

    @property
    def perplexity(self) -> float | None:
        """Perplexity: e to the mean negative log-probability.

        None if no token was scored, or if it is too large for a float.
        """
        logprobs = [token.logprob for token in self.tokens if token.logprob is not None]
        mean = -sum(logprobs) / len(logprobs) if logprobs else math.inf
        return math.exp(mean) if mean < 700 else None


class Scorer:
    """Scores texts, reusing the scores of the common prefix with the previous text.

    Args:
        llama: The model.
    """

    def __init__(self, llama: LoadedModel):
        self.llama = llama
        # Each score depends only on earlier tokens, so the scores stay valid after an interruption.
        self._scored: list[Scored] = []

    def __call__(self, ids: Sequence[int], top: int = 5, progress: Progress = silent) -> Surprisal:
        """Score each token, and predict the next one.

        Args:
            ids: The token ids of the text.
            top: Number of candidates for the next token.
            progress: As for `Llama.predict`. If it raises an exception, the scores so far are kept.

        Raises:
            UsageError: If there are no ids, an id is unknown, or `top` is less than 1.
            ContextLengthError: If there are more ids than fit into the context.
        """
        if top < 1:
            raise UsageError(f"The number of candidates (`top`) must be at least 1, not {top}.")
        llama, scored = self.llama, self._scored
        llama.engine.check(ids)
        known = sum(1 for _ in takewhile(lambda pair: pair[0].id == pair[1], zip(scored, ids, strict=False)))
        del scored[known:]
        if not scored:
            first = llama.token(ids[0])
            scored.append(Scored(first.id, first.text, None, None, None))
        # Start at the last known token: the prediction after it, which was not kept, scores the first new token.
        for logprobs in log_softmax(llama.engine.logits_from(ids, len(scored) - 1, progress)):
            scored += self._scores(logprobs, ids[len(scored) : len(scored) + len(logprobs)])
        last = logprobs[-1]  # (vocab_size,)
        return Surprisal(tuple(scored), llama.candidates(last, top), float(entropy_bits(last)))

    def _scores(self, logprobs: Tensor, ids: Sequence[int]) -> list[Scored]:
        """Score tokens with the predictions for their positions, (n, vocab_size).

        A prediction after the last token has no token to score, and is ignored.
        """
        logprobs = logprobs[: len(ids)]
        token_logprobs = logprobs.gather(-1, torch.tensor(ids, dtype=torch.long)[:, None])  # (n, 1)
        ranks = (logprobs > token_logprobs).sum(-1) + 1  # (n,)
        columns = (token_logprobs[:, 0].tolist(), ranks.tolist(), entropy_bits(logprobs).tolist())
        return [
            Scored(id, self.llama.token(id).text, logprob, rank, entropy)
            for id, logprob, rank, entropy in zip(ids, *columns, strict=True)
        ]


def surprisal(llama: LoadedModel, prompt: Prompt, top: int = 5, progress: Progress = silent) -> Surprisal:
    """Score the tokens of a prompt, and predict the next one.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        prompt: The prompt.
        top: Number of candidates for the next token.
        progress: As for `Llama.predict`.
    """
    return Scorer(llama)(llama.encode(prompt), top, progress)


def per_character(llama: LoadedModel, scored: Sequence[Scored]) -> list[float | None]:
    """Return the bits of each character of the decoded text.

    A character has the bits of its token, or the sum if it spans several tokens. The value is None if one of these
    tokens was not predicted. The beginning-of-text token is left out.

    Args:
        llama: The model.
        scored: The scored tokens.
    """
    begin = 1 if scored and scored[0].id == llama.tokenizer.bos_id else 0
    bits: list[float | None] = []
    for tokens in _characters(llama, scored[begin:]):
        parts = [token.bits for token in tokens]
        bits.append(None if None in parts else sum(part or 0.0 for part in parts))
    return bits


def _characters(llama: LoadedModel, scored: Iterable[Scored]) -> Iterator[list[Scored]]:
    """Yield for each character the tokens that contain its bytes.

    Invalid bytes belong to the U+FFFD that they decode to.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held: list[Scored] = []  # one token per byte of an incomplete character
    for token in scored:
        for byte in llama.tokenizer.token_bytes(token.id):
            n_characters = len(utf8.decode(bytes([byte])))
            held.append(token)
            waiting = len(utf8.getstate()[0])
            done, held = held[: len(held) - waiting], held[len(held) - waiting :]
            yield from _split(done, n_characters)
    yield from _split(held, len(utf8.decode(b"", final=True)))


def _split(tokens: list[Scored], count: int) -> Iterator[list[Scored]]:
    """Assign the tokens of consecutive bytes to the characters that they decode to.

    `count` is the number of these characters. Invalid bytes decode to one U+FFFD together, or to one each if they
    begin a surrogate, such as ED A0.
    """
    if count == len(tokens):
        yield from ([token] for token in tokens)
        return
    if count == 2:  # an incomplete character, then the next one
        yield _each_once(tokens[:-1])
        tokens = tokens[-1:]
    if count:
        yield _each_once(tokens)


def _each_once(tokens: list[Scored]) -> list[Scored]:
    return [token for i, token in enumerate(tokens) if i == 0 or token is not tokens[i - 1]]
