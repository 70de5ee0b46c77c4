"""Probabilities of alternative continuations of a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.distributions import log_softmax
from llama_scratch.results import Candidate, JsonResult
from llama_scratch.system.progress import Progress, silent


@dataclass(frozen=True)
class Choice:
    """One continuation.

    Attributes:
        text: The continuation.
        tokens: Its tokens, each with its probability given the prompt and the tokens before it.
        normalized: Softmax of the log-probability over all choices.
        by_length: Softmax of the mean log-probability per token over all choices. It does not favor short choices.
    """

    json_fields = ("text", "tokens", "logprob", "probability", "normalized", "by_length")

    text: str
    tokens: tuple[Candidate, ...]
    normalized: float
    by_length: float

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of the whole continuation."""
        return sum(token.logprob for token in self.tokens)

    @property
    def probability(self) -> float:
        """Probability of the whole continuation, 0 to 1."""
        return math.exp(self.logprob)


@dataclass(frozen=True)
class Choices(JsonResult):
    """The continuations, in the order given."""

    json_fields = ("choices", "probability")

    choices: tuple[Choice, ...]

    @property
    def ranked(self) -> tuple[Choice, ...]:
        """The choices, most probable first."""
        return tuple(sorted(self.choices, key=lambda choice: -choice.logprob))

    @property
    def probability(self) -> float:
        """Probability that the text continues with one of the choices.

        A choice that starts with another choice is a special case of it, and is not counted again.
        """
        by_ids = {tuple(token.id for token in choice.tokens): choice.probability for choice in self.choices}
        return sum(
            probability
            for ids, probability in by_ids.items()
            if not any(ids[:length] in by_ids for length in range(len(ids)))
        )


def choices(llama: LoadedModel, ids: Sequence[int], texts: Sequence[str], progress: Progress = silent) -> Choices:
    """Compute the probabilities of texts as continuations of a prompt.

    Each text is tokenized separately, exactly as given: words need a leading space. Raises the same errors as
    `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the prompt.
        texts: The continuations.
        progress: As for `Llama.predict`, once per text.

    Raises:
        UsageError: If a text is empty.
    """
    llama.engine.check(ids)
    scored = [_scored(llama, list(ids), text, progress) for text in texts]
    sums = [sum(token.logprob for token in tokens) for tokens in scored]
    means = [total / len(tokens) for total, tokens in zip(sums, scored, strict=True)]
    shares = zip(texts, scored, _softmax(sums), _softmax(means), strict=True)
    return Choices(tuple(Choice(*values) for values in shares))


def _scored(llama: LoadedModel, ids: list[int], text: str, progress: Progress) -> tuple[Candidate, ...]:
    new = llama.encode(text, bos=False)
    if not new:
        raise UsageError("A choice is empty. Give each choice a text.")
    # The prediction after the last token is not needed.
    pieces = llama.engine.logits_from([*ids, *new[:-1]], len(ids) - 1, progress)
    rows = (logprobs for piece in log_softmax(pieces) for logprobs in piece)  # (vocab_size,) each
    return tuple(
        Candidate(id, llama.token(id).text, float(logprobs[id])) for id, logprobs in zip(new, rows, strict=True)
    )


def _softmax(values: list[float]) -> list[float]:
    shares: list[float] = torch.tensor(values, dtype=torch.float64).softmax(-1).tolist()
    return shares
