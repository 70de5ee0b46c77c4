"""Compare two models, or one model in two precisions, on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel, entropy_bits
from llama_scratch.microscope.distributions import kl_bits
from llama_scratch.results import Candidate, JsonResult, ModelInfo, Token
from llama_scratch.system.progress import Progress, silent
from llama_scratch.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelPrediction:
    """The prediction of one model.

    Attributes:
        model: The model. `model.precision` is the precision of this prediction.
        tokens: The text as tokens of this model.
        top: The most probable next tokens, best first.
        entropy_bits: Entropy of the prediction.
    """

    model: ModelInfo
    tokens: tuple[Token, ...]
    top: tuple[Candidate, ...]
    entropy_bits: float


@dataclass(frozen=True)
class ComparedToken:
    """A token among the most probable ones of at least one model.

    Attributes:
        text: The token.
        first: Its id and probability in the first model, if the token is in its vocabulary.
        second: The same for the second model.
    """

    text: str
    first: Candidate | None
    second: Candidate | None


@dataclass(frozen=True)
class Comparison(JsonResult):
    """The predictions of two models.

    Attributes:
        first: The first prediction.
        second: The second prediction.
        tokens: The most probable tokens of both models, those of the first model first.
        kl_bits: Kullback–Leibler divergence of the second prediction from the first; None if the vocabularies differ.
    """

    json_fields = ("first", "second", "tokens as compared", "kl_bits")

    first: ModelPrediction
    second: ModelPrediction
    tokens: tuple[ComparedToken, ...]
    kl_bits: float | None


def compare(
    llama: LoadedModel, other: LoadedModel, ids: Sequence[int], top: int = 5, progress: Progress = silent
) -> Comparison:
    """Compare the predictions of two models after the same prompt.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The first model.
        other: The second model.
        ids: Token ids of the first model. If the vocabularies differ, the second model tokenizes the text.
        top: Number of candidates of each model.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If `top` is less than 1.
    """
    if top < 1:
        raise UsageError(f"The number of candidates (`top`) must be at least 1, not {top}.")
    words, others = _vocabulary(llama.tokenizer), _vocabulary(other.tokenizer)
    same = words == others
    first, p = _side(llama, ids, top, progress)
    second, q = _side(other, ids if same else other.encode(llama.text_of(ids)), top, progress)
    there = {id: id for id in words} if same else _by_text(words, others)
    here = {id: id for id in words} if same else _by_text(others, words)
    compared = [ComparedToken(c.text, c, _candidate(other, q, there.get(c.id))) for c in first.top]
    seen = {token.second.id for token in compared if token.second}
    compared += [ComparedToken(c.text, _candidate(llama, p, here.get(c.id)), c) for c in second.top if c.id not in seen]
    return Comparison(first, second, tuple(compared), float(kl_bits(p, q)) if same else None)


def _side(llama: LoadedModel, ids: Sequence[int], top: int, progress: Progress) -> tuple[ModelPrediction, Tensor]:
    """Return a model's prediction, and all log-probabilities, (vocab_size,) float64."""
    logits = llama.engine.next_logits(ids, progress)
    tokens = tuple(map(llama.token, ids))
    side = ModelPrediction(llama.info, tokens, llama.candidates(logits.values, top), float(entropy_bits(logits.values)))
    return side, logits.values.double().log_softmax(-1)


def _candidate(llama: LoadedModel, logprobs: Tensor, id: int | None) -> Candidate | None:
    return None if id is None else Candidate(id, llama.token(id).text, float(logprobs[id]))


def _vocabulary(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Map each id to the bytes of its token."""
    vocabulary = {}
    for id in range(tokenizer.n_vocab):
        try:
            vocabulary[id] = tokenizer.token_bytes(id)
        except UsageError:  # an unused id
            continue
    return vocabulary


def _by_text(words: dict[int, bytes], others: dict[int, bytes]) -> dict[int, int]:
    """Map ids of one vocabulary to ids of the other with the same bytes."""
    # In reverse order: if two tokens have the same bytes, the lower id wins, which is the ordinary token.
    ids = {token: id for id, token in reversed(others.items())}
    return {id: ids[token] for id, token in words.items() if token in ids}
