"""What the engine's answers look like: plain, frozen values without torch, and their JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Token:
    r"""One token: its id, which is exact, and its text, in which bytes that are not UTF-8 read `\xNN`."""

    id: int
    text: str


@dataclass(frozen=True)
class Candidate(Token):
    """A token that may come next, with the natural logarithm of its probability."""

    logprob: float

    @property
    def probability(self) -> float:
        """Between 0 and 1."""
        return math.exp(self.logprob)


@dataclass(frozen=True)
class Step(Token):
    """One generated token. `text` is what it adds in whole characters, so it can be empty; a character
    that is incomplete where a stop token follows is dropped.

    `logprob` is the model's own, before temperature and the other sampling options.
    """

    logprob: float


@dataclass(frozen=True)
class ModelInfo:
    """The model that gave an answer. `format` is "meta" or "gguf", `parameters` counts each weight once."""

    name: str
    format: str
    precision: str
    device: str
    parameters: int


@dataclass(frozen=True)
class Timing:
    """Where the time went, in seconds. `reused_tokens` of the prompt's tokens came from the cache."""

    load_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class PromptWarning(str):
    """A sentence for a person about a prompt. `cause`: what kind of thing it is about, to explain each only once."""

    cause: str

    def __new__(cls, cause: str, sentence: str) -> Self:
        """A sentence, and its cause."""
        caution = super().__new__(cls, sentence)
        caution.cause = cause
        return caution


# Causes that lie in how a prompt ends: it can be measured what difference that makes.
ENDS_IN_SPACE, ENDS_IN_A_WORD = "ends in a space", "ends inside of a word"


@dataclass(frozen=True)
class Prediction:
    """What a model says would come next after a prompt.

    tokens: what the model saw, the beginning-of-text token included.
    top: the most probable tokens, best first; `next` is the first of them.
    entropy_bits: how open the question is; 0 where one token has all the probability.
    warnings: messages for the user about this prompt, and about the model's files.
    """

    prompt: str
    tokens: tuple[Token, ...]
    next: Candidate
    top: tuple[Candidate, ...]
    entropy_bits: float
    warnings: tuple[PromptWarning, ...]
    model: ModelInfo
    timing: Timing


@dataclass(frozen=True)
class Generated:
    """A continuation. `finish_reason`: "stop" before a stop token, "length" where the number of tokens ran out."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    decode_s: float


def as_json(prediction: Prediction, generated: Generated | None = None) -> dict[str, Any]:
    """One answer as the object that `--json` prints."""
    timing = vars(prediction.timing)
    result: dict[str, Any] = {
        "prompt": prediction.prompt,
        "tokens": [vars(token) for token in prediction.tokens],
        "next": candidate_json(prediction.next),
        "top": [candidate_json(candidate) for candidate in prediction.top],
        "entropy_bits": prediction.entropy_bits,
    }
    if generated is not None:
        timing = timing | {"decode_s": generated.decode_s}
        result["generated"] = generated_json(generated)
    return result | {"warnings": list(prediction.warnings), "model": vars(prediction.model), "timing": timing}


def generated_json(generated: Generated) -> dict[str, Any]:
    """A continuation as it stands in that object."""
    return {
        "text": generated.text,
        "ids": list(generated.ids),
        "logprobs": list(generated.logprobs),
        "finish_reason": generated.finish_reason,
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A token with its probability as it stands in that object."""
    return {
        "id": candidate.id,
        "text": candidate.text,
        "probability": candidate.probability,
        "logprob": candidate.logprob,
    }
