"""The logit lens: the next-token prediction after each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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

# Default number of positions, and number unembedded at a time: 33 MB of logits for a vocabulary of 128,256.
LENS_POSITIONS = 64


@dataclass(frozen=True)
class Guess(Candidate):
    """The top prediction at one layer and position.

    Attributes:
        rank_of_answer: Rank at this layer of the token that the whole network predicts; 1 if it is the top prediction.
    """

    json_fields = (*Candidate.json_fields, "rank_of_answer")

    rank_of_answer: int


@dataclass(frozen=True)
class Layer:
    """The top predictions after one layer.

    Attributes:
        layer: The layer, or −1 for the embedding.
        guesses: One per position.
    """

    layer: int
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Lens(Displayable, JsonResult):
    """The top predictions after each layer.

    Attributes:
        tokens: The tokens at the selected positions.
        first: The first of these positions.
        length: Number of tokens in the whole text.
        layers: From the embedding to the last layer, whose top predictions are those of the whole network.
    """

    tokens: tuple[Token, ...]
    first: int
    length: int
    layers: tuple[Layer, ...]

    @property
    def answers(self) -> tuple[Guess, ...]:
        """The predictions of the network, one per position."""
        return self.layers[-1].guesses

    def first_layer(self, index: int = -1) -> int:
        """The first layer at which the final prediction has rank 1.

        Args:
            index: One of the positions.
        """
        return next(row.layer for row in self.layers if row.guesses[index].rank_of_answer == 1)

    def stays_from(self, index: int = -1) -> int:
        """The first layer from which the final prediction keeps rank 1 to the end."""
        others = [row.layer for row in self.layers if row.guesses[index].rank_of_answer > 1]
        return others[-1] + 1 if others else -1

    def rank_falls(self, index: int = -1) -> tuple[tuple[int, int, int], ...]:
        """The layers at which the final prediction's rank improves, largest factor first.

        Args:
            index: One of the positions.

        Returns:
            For each layer: the layer, the rank before it, and the rank after it.
        """
        ranks = [(row.layer, row.guesses[index].rank_of_answer) for row in self.layers]
        falls = [(layer, before, after) for (_, before), (layer, after) in pairwise(ranks) if after < before]
        return tuple(sorted(falls, key=lambda fall: -fall[1] / fall[2]))

    def as_json(self) -> dict[str, Any]:
        """Return the lens as JSON values, as `/lens` prints it.

        `first_layer` and `stays_from` describe the last position.
        """
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
    """Return the top prediction after every layer.

    The residual stream after each layer goes through the final norm and the unembedding, as if that layer were the
    last. Early layers may not represent information in that basis yet, so their predictions show only what can be read
    from them this way, not what the network "thinks". Raises the same errors as `Llama.predict`. Source: nostalgebraist
    2020, "interpreting GPT: the logit lens".

    Args:
        llama: The model.
        ids: The token ids of the text.
        first: The first position. By default the last positions are selected.
        count: Maximum number of positions.
        progress: Called with "reading" while the text is read, then with "layer" for each unembedding.

    Raises:
        UsageError: If the position does not exist.
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
    """Yield partial results of `lens`: the last layer, then one more layer each time.

    Args:
        llama: The model.
        ids: The token ids of the text.
        first: As for `lens`.
        count: As for `lens`.
        progress: As for `lens`.
    """
    llama.engine.check(ids)
    if count < 1:
        raise UsageError(f"The number of positions must be at least 1, not {count}.")
    begin = numbered("position", max(0, len(ids) - count) if first is None else first, len(ids), " in this text")
    end = min(begin + count, len(ids))
    stream = _stream(llama, ids[:end], begin, progress)  # later tokens do not affect earlier positions
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
    """Return the embedding and the stream after each layer, from position `first` on.

    Each tensor is (T - first, dim).
    """
    pieces: dict[str, list[Tensor]] = {"embedding": []}
    pieces |= {f"layers.{layer}.resid_post": [] for layer in range(llama.args.n_layers)}

    def kept(place: str) -> Hook:
        return lambda value, start: pieces[place].append(value[0, max(0, first - start) :].clone())

    llama.engine.forward_with_hooks([ids], {place: kept(place) for place in pieces}, progress=progress)
    return [torch.cat(piece) for piece in pieces.values()]


@torch.inference_mode()
def guesses(llama: LoadedModel, x: Tensor, answers: Tensor | None) -> tuple[Guess, ...]:
    """Unembed vectors of the residual stream.

    Args:
        llama: The model.
        x: The vectors, (n, dim).
        answers: The tokens whose ranks are returned, (n,); by default the top predictions themselves.

    Returns:
        The top prediction for each vector.
    """
    model, found = llama.engine.model, []
    for i in range(0, len(x), LENS_POSITIONS):
        logits = model.output(model.norm(x[i : i + LENS_POSITIONS])).float()  # (m, vocab_size)
        best = logits.max(-1, keepdim=True)
        answer_ids = best.indices if answers is None else answers[i : i + LENS_POSITIONS, None].to(x.device)  # (m, 1)
        ranks = (logits > logits.gather(-1, answer_ids)).sum(-1) + 1  # (m,)
        # The sum excludes the top token's exp(0) = 1. Added to 1 in float32, a tiny rest would be lost.
        others = logits.sub_(best.values).exp_().scatter_(-1, best.indices, 0).sum(-1)  # (m,)
        logprobs = -others.double().log1p()  # (m,)
        columns = (best.indices[:, 0].tolist(), logprobs.tolist(), ranks.tolist())
        found += [Guess(id, llama.token(id).text, logprob, rank) for id, logprob, rank in zip(*columns, strict=True)]
    return tuple(found)
