"""Results as frozen dataclasses, and their conversion to JSON, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self


def to_json(value: Any) -> Any:
    """Convert a value for `json.dumps`.

    Dataclasses become objects, tuples become lists, and bytes become hexadecimal digits. An object has one key per
    field of its dataclass, in order. If the class defines `json_fields`, the object has those attributes instead. The
    entry "theta as rope_theta" means the attribute `theta` under the key "rope_theta".
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


def merged(*objects: Mapping[str, Any]) -> dict[str, Any]:
    """Join JSON objects into one. Raises `ValueError` if two of them have the same key.

    Use it instead of `|`, which would silently keep only the last value.
    """
    return _unique((key, value) for each in objects for key, value in each.items())


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in pairs:
        if key in whole:
            raise ValueError(f"a JSON object has the key {key!r} twice")
        whole[key] = value
    return whole


class JsonResult:
    """Base class of results with a JSON form.

    `json_fields` lists the attributes to include. Override `as_json` for any other form.
    """

    json_fields: ClassVar[tuple[str, ...]] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return _object(self)


def _object(value: Any) -> dict[str, Any]:
    names = getattr(value, "json_fields", ()) or [field.name for field in fields(value)]
    pairs = (name.split(" as ") for name in names)
    return _unique((pair[-1], to_json(getattr(value, pair[0]))) for pair in pairs)


@dataclass(frozen=True)
class Token:
    r"""A token: its id and its text, with `\xNN` for invalid UTF-8."""

    id: int
    text: str


@dataclass(frozen=True)
class Candidate(Token):
    """A candidate for the next token, with the natural logarithm of its probability."""

    json_fields: ClassVar[tuple[str, ...]] = ("id", "text", "probability", "logprob")

    logprob: float

    @property
    def probability(self) -> float:
        """The probability, between 0 and 1."""
        return math.exp(self.logprob)


@dataclass(frozen=True)
class Step(Token):
    """One generated token.

    `text` contains the characters that this token completes, so it can be empty. An incomplete character before a stop
    token is dropped. `logprob` is the logarithm of the model's probability, before temperature and other sampling
    options.
    """

    logprob: float


@dataclass(frozen=True)
class ModelInfo:
    """The model that was used.

    `format` is "meta", "huggingface" or "gguf". `parameters` counts tied weights once.
    """

    name: str
    format: str
    precision: str
    device: str
    parameters: int


@dataclass(frozen=True)
class Timing:
    """Durations in seconds, and the number of prompt tokens from the prefix cache."""

    load_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class PromptWarning(str):
    """A warning for the user about a prompt.

    `cause` identifies the kind of the warning. A session shows each kind only once.
    """

    cause: str

    def __new__(cls, cause: str, message: str) -> Self:
        """Create a warning from its cause and its message."""
        warning = super().__new__(cls, message)
        warning.cause = cause
        return warning


# Causes at the end of a prompt. A session shows their effect by predicting without the last token.
ENDS_IN_SPACE, ENDS_IN_A_WORD = "ends in a space", "ends inside of a word"


@dataclass(frozen=True)
class Prediction(JsonResult):
    """A model's prediction of the next token after a prompt.

    Attributes:
        prompt: The prompt.
        tokens: The model's input, including the beginning-of-text token.
        next: The most probable token.
        top: The most probable tokens, best first.
        entropy_bits: Entropy of the distribution in bits; 0 if one token has all the probability.
        warnings: Messages for the user about this prompt and about the model's files.
        model: The model.
        timing: Durations.
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
    """A continuation.

    `finish_reason` is "stop" for a stop token, or "length" if the maximum length was reached.
    """

    json_fields = ("text", "ids", "logprobs", "finish_reason")

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    decode_s: float


def as_json(prediction: Prediction, generated: Generated | None = None) -> dict[str, Any]:
    """Return the object that `--json` prints.

    Args:
        prediction: The prediction.
        generated: Its continuation, if any.
    """
    answer = prediction.as_json()
    if generated is None:
        return answer
    rest = {key: answer.pop(key) for key in ("warnings", "model", "timing")}
    rest["timing"]["decode_s"] = generated.decode_s
    return merged(answer, {"generated": generated.as_json()}, rest)
