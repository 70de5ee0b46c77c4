"""Two models, or one in two precisions, after the same text."""

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
    """What one model saw and predicts; `model.precision` is the one that answered."""

    model: ModelInfo
    tokens: tuple[Token, ...]
    top: tuple[Candidate, ...]
    entropy_bits: float


@dataclass(frozen=True)
class ComparedToken:
    """A token that at least one of the models has among its best; None in a model whose vocabulary lacks it."""

    text: str
    first: Candidate | None
    second: Candidate | None


@dataclass(frozen=True)
class Comparison(JsonResult):
    """Both predictions, and what each model says of the other's best tokens: `tokens`, the first model's best first.

    kl_bits: Kullback–Leibler divergence of the second from the first; None where their vocabularies differ.
    """

    json_fields = ("first", "second", "tokens as compared", "kl_bits")

    first: ModelPrediction
    second: ModelPrediction
    tokens: tuple[ComparedToken, ...]
    kl_bits: float | None


def compare(
    llama: LoadedModel, other: LoadedModel, ids: Sequence[int], top: int = 5, progress: Progress = silent
) -> Comparison:
    """What two models predict after the same prompt.

    ids: of the first model; where the other's vocabulary differs, the other reads their text. Raises as
    `Llama.predict` does.
    """
    if top < 1:
        raise UsageError(f"{top} candidates were asked for, expected at least 1.")
    words, others = _vocabulary(llama.tokenizer), _vocabulary(other.tokenizer)
    same = words == others
    first, p = _side(llama, ids, top, progress)
    second, q = _side(other, ids if same else other.encode(_text(llama, ids)), top, progress)
    there = {id: id for id in words} if same else _by_text(words, others)
    here = {id: id for id in words} if same else _by_text(others, words)
    compared = [ComparedToken(c.text, c, _candidate(other, q, there.get(c.id))) for c in first.top]
    seen = {token.second.id for token in compared if token.second}
    compared += [ComparedToken(c.text, _candidate(llama, p, here.get(c.id)), c) for c in second.top if c.id not in seen]
    return Comparison(first, second, tuple(compared), float(kl_bits(p, q)) if same else None)


def _side(llama: LoadedModel, ids: Sequence[int], top: int, progress: Progress) -> tuple[ModelPrediction, Tensor]:
    """A model's answer, and the log-probabilities of all tokens, (vocab_size,) float64."""
    logits = llama.engine.next_logits(ids, progress)
    tokens = tuple(map(llama.token, ids))
    side = ModelPrediction(llama.info, tokens, llama.candidates(logits.values, top), float(entropy_bits(logits.values)))
    return side, logits.values.double().log_softmax(-1)


def _candidate(llama: LoadedModel, logprobs: Tensor, id: int | None) -> Candidate | None:
    return None if id is None else Candidate(id, llama.token(id).text, float(logprobs[id]))


def _text(llama: LoadedModel, ids: Sequence[int]) -> str:
    begin = 1 if ids and ids[0] == llama.tokenizer.bos_id else 0
    return llama.tokenizer.decode(ids[begin:])


def _vocabulary(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of each token."""
    vocabulary = {}
    for id in range(tokenizer.n_vocab):
        try:
            vocabulary[id] = tokenizer.token_bytes(id)
        except UsageError:  # an id that is left out
            continue
    return vocabulary


def _by_text(words: dict[int, bytes], others: dict[int, bytes]) -> dict[int, int]:
    """Ids of one vocabulary → ids of the other that stand for the same bytes."""
    # Backwards, so that of two tokens with the same bytes the ordinary one, the lower id, is meant.
    ids = {token: id for id, token in reversed(others.items())}
    return {id: ids[token] for id, token in words.items() if token in ids}
