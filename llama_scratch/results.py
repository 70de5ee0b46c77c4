"""What the engine's answers look like: plain, frozen values without torch, and their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self


def to_json(value: Any) -> Any:
    """A value as `json.dumps` takes it: dataclasses as objects, tuples as lists, bytes as hexadecimal digits.

    An object has the fields of its dataclass in their order, or the attributes that its class lists as `json_fields`;
    there "theta as rope_theta" is the attribute `theta` under the key "rope_theta".
    """
    if isinstance(value, JsonResult):
        return value.as_json()
    if is_dataclass(value):
        return _object(value)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


class JsonResult:
    """A dataclass whose JSON a user can ask for. A class whose JSON is not a list of attributes overrides `as_json`."""

    json_fields: ClassVar[tuple[str, ...]] = ()

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return _object(self)


def _object(value: Any) -> dict[str, Any]:
    names = getattr(value, "json_fields", ()) or [field.name for field in fields(value)]
    pairs = (name.split(" as ") for name in names)
    return {key: to_json(getattr(value, attribute)) for attribute, key in ((pair[0], pair[-1]) for pair in pairs)}


@dataclass(frozen=True)
class Token:
    r"""One token: its id, which is exact, and its text, in which bytes that are not UTF-8 read `\xNN`."""

    id: int
    text: str


@dataclass(frozen=True)
class Candidate(Token):
    """A token that may come next, with the natural logarithm of its probability."""

    json_fields: ClassVar[tuple[str, ...]] = ("id", "text", "probability", "logprob")

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
class Prediction(JsonResult):
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
class Generated(JsonResult):
    """A continuation. `finish_reason`: "stop" before a stop token, "length" where the number of tokens ran out."""

    json_fields = ("text", "ids", "logprobs", "finish_reason")

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    decode_s: float


def as_json(prediction: Prediction, generated: Generated | None = None) -> dict[str, Any]:
    """One answer as the object that `--json` prints."""
    answer = prediction.as_json()
    if generated is None:
        return answer
    rest = {key: answer.pop(key) for key in ("warnings", "model", "timing")}
    rest["timing"]["decode_s"] = generated.decode_s
    return answer | {"generated": generated.as_json()} | rest
