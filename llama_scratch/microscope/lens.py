"""The logit lens: what the network would say if it ended behind one of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.parts import numbered
from llama_scratch.results import Candidate, JsonResult, Token, to_json
from llama_scratch.system.progress import Progress, silent

# Positions that are looked at unless asked for others, and unembedded at a time: 33 MB of logits for a vocabulary of
# 128,256.
LENS_POSITIONS = 64


@dataclass(frozen=True)
class Guess(Candidate):
    """The best guess at one layer and position, with its probability there.

    rank_of_answer: where the answer stands among all tokens there, that is what the whole network says after this
    position; 1 where it is the best guess.
    """

    json_fields = (*Candidate.json_fields, "rank_of_answer")

    rank_of_answer: int


@dataclass(frozen=True)
class Layer:
    """The guesses behind one layer, one for each position. layer: −1 for the embedding, before the first layer."""

    layer: int
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Lens(Displayable, JsonResult):
    """What stands behind each layer, read as the network reads the last one.

    tokens: those of the positions that were looked at; the first of them stands at position `first` of the text.
    length: tokens of the text in all. layers: from the embedding to the last one, whose guesses are the network's own
    answers.
    """

    tokens: tuple[Token, ...]
    first: int
    length: int
    layers: tuple[Layer, ...]

    @property
    def answers(self) -> tuple[Guess, ...]:
        """What the network says after each position."""
        return self.layers[-1].guesses

    def first_layer(self, index: int = -1) -> int:
        """The first layer at which the answer is the best guess. index: of the position among those looked at."""
        return next(row.layer for row in self.layers if row.guesses[index].rank_of_answer == 1)

    def stays_from(self, index: int = -1) -> int:
        """The layer from which on it is the best guess up to the last one."""
        others = [row.layer for row in self.layers if row.guesses[index].rank_of_answer > 1]
        return others[-1] + 1 if others else -1

    def as_json(self) -> dict[str, Any]:
        """As `/lens` prints it; the first layer and the one from which on it stays are those of the last position."""
        return {
            "first": self.first,
            "tokens": to_json(self.tokens),
            "layers": to_json(self.layers),
            "answer": to_json(self.answers[-1]),
            "first_layer": self.first_layer(),
            "stays_from": self.stays_from(),
        }


def lens(
    llama: LoadedModel,
    ids: Sequence[int],
    first: int | None = None,
    count: int = LENS_POSITIONS,
    progress: Progress = silent,
) -> Lens:
    """The best guess behind every layer, at `count` positions from `first` on, by default the last ones.

    It passes the residual stream behind each layer through the final norm and the unembedding: the layers all add to
    one stream, so that each can be read as if it were the last. Early layers need not speak that language yet; what
    they say is what is to be seen there, not what the network "thinks".

    progress: "reading" while the text is read, then "layer" for each unembedding. Raises `UsageError` for a position
    that there is not, and as `Llama.predict` does.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    *_, complete = growing(llama, ids, first, count, progress)
    return complete


def growing(
    llama: LoadedModel,
    ids: Sequence[int],
    first: int | None = None,
    count: int = LENS_POSITIONS,
    progress: Progress = silent,
) -> Iterator[Lens]:
    """`lens` as it comes: first with the last layer alone, which has the answers, then with one more each time."""
    llama.engine.check(ids)
    if count < 1:
        raise UsageError(f"{count} positions were asked for, expected at least 1.")
    begin = numbered("position", max(0, len(ids) - count) if first is None else first, len(ids), " in this text")
    end = min(begin + count, len(ids))
    stream = _stream(llama, ids[:end], begin, progress)  # what comes later has no say in what stood before
    last = Layer(len(stream) - 2, guesses(llama, stream.pop(), None))
    answers = torch.tensor([guess.id for guess in last.guesses])
    tokens = tuple(map(llama.token, ids[begin:end]))
    layers: list[Layer] = []
    for x in stream:
        yield Lens(tokens, begin, len(ids), (*layers, last))
        progress("layer", len(layers) + 1, len(stream) + 1)
        layers.append(Layer(len(layers) - 1, guesses(llama, x, answers)))
    yield Lens(tokens, begin, len(ids), (*layers, last))


def _stream(llama: LoadedModel, ids: Sequence[int], first: int, progress: Progress) -> list[Tensor]:
    """The embedding and the stream behind each layer from position `first` on: (T - first, dim) each."""
    pieces: dict[str, list[Tensor]] = {"embedding": []}
    pieces |= {f"layers.{layer}.resid_post": [] for layer in range(llama.args.n_layers)}

    def kept(place: str) -> Hook:
        return lambda value, start: pieces[place].append(value[0, max(0, first - start) :].clone())

    llama.engine.forward_with_hooks([ids], {place: kept(place) for place in pieces}, progress=progress)
    return [torch.cat(piece) for piece in pieces.values()]


@torch.inference_mode()
def guesses(llama: LoadedModel, x: Tensor, answers: Tensor | None) -> tuple[Guess, ...]:
    """The best guesses of vectors of the stream, (n, dim), and the ranks of `answers`, (n,), or else of their own."""
    model, found = llama.engine.model, []
    for i in range(0, len(x), LENS_POSITIONS):
        logits = model.output(model.norm(x[i : i + LENS_POSITIONS])).float()  # (m, vocab_size)
        best = logits.max(-1, keepdim=True)
        answer_ids = best.indices if answers is None else answers[i : i + LENS_POSITIONS, None].to(x.device)  # (m, 1)
        ranks = (logits > logits.gather(-1, answer_ids)).sum(-1) + 1  # (m,)
        # The others' shares of the best one's, without its own 1, in which those of a sure guess would be lost.
        others = logits.sub_(best.values).exp_().scatter_(-1, best.indices, 0).sum(-1)  # (m,)
        logprobs = -others.double().log1p()  # (m,)
        columns = (best.indices[:, 0].tolist(), logprobs.tolist(), ranks.tolist())
        found += [Guess(id, llama.token(id).text, logprob, rank) for id, logprob, rank in zip(*columns, strict=True)]
    return tuple(found)
