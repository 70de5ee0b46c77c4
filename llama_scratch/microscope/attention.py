"""What attention heads look at: maps of their probabilities, and what kind of head each one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.hooks import Hook
from llama_scratch.inference.engine import Engine
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.parts import numbered
from llama_scratch.results import JsonResult, Token, to_json
from llama_scratch.system.progress import Progress, silent

# A head whose attention goes less than this to where its kind looks is of none.
THRESHOLD = 0.4
KINDS = ("previous token", "first token", "duplicate token", "induction")

# Tokens of the random sequence, which comes twice.
_REPEATED = 50
_SEED = 0
# Rows and columns of a small map, at most.
_SMALL = 24
# Queries whose attention is shown, and the tokens that one of them looks at most.
MAP_POSITIONS = 64
_LINKS = 8


@dataclass(frozen=True)
class Scores(JsonResult):
    """How much of a head's attention goes to each of four places, 0 to 1, in a random sequence that comes twice.

    previous: to the token before. first: to the first token. duplicate: to the same token in the first half.
    induction: to the token after that one, which is the one that comes next. The last two are of the second half.
    """

    json_fields = ("layer", "head", "previous", "first", "duplicate", "induction", "kind")

    layer: int
    head: int
    previous: float
    first: float
    duplicate: float
    induction: float

    @property
    def name(self) -> str:
        """L5.H3"""
        return f"L{self.layer}.H{self.head}"

    @property
    def best(self) -> tuple[str, float]:
        """The kind of the highest score, and that score."""
        values = (self.previous, self.first, self.duplicate, self.induction)
        return max(zip(KINDS, values, strict=True), key=lambda pair: pair[1])

    @property
    def kind(self) -> str | None:
        """What kind of head it looks like, one of `KINDS`; None where no score reaches `THRESHOLD`."""
        kind, score = self.best
        return kind if score >= THRESHOLD else None


@dataclass(frozen=True)
class SmallMap:
    """A head's attention to a text, small: a row for each `step` queries, in it a value for each `step` keys.

    values: the highest probability among them, (P, P) with P at most 24; None where all keys come later.
    """

    scores: Scores
    step: int
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Heads(Displayable, JsonResult):
    """The heads of one layer, or of all layers in their order where that is None, with their maps of a text."""

    layer: int | None
    tokens: tuple[Token, ...]
    maps: tuple[SmallMap, ...]

    def as_json(self) -> dict[str, Any]:
        """As `/attention` and `/attention LAYER` print it: the scores."""
        return {"layer": self.layer, "heads": to_json([each.scores for each in self.maps])}


@dataclass(frozen=True)
class Head(Displayable, JsonResult):
    """What one head looks at in a text.

    tokens: all of the text. probs: a row for each query from position `first` on, in it the share of each token of the
    text: it adds up to 1, and what comes later has 0. links: the tokens that the text's last one looks at most, each
    position with its share, best first.
    """

    scores: Scores
    tokens: tuple[Token, ...]
    first: int
    probs: tuple[tuple[float, ...], ...]
    links: tuple[tuple[int, float], ...]

    def as_json(self) -> dict[str, Any]:
        """As `/attention LAYER.HEAD` prints it."""
        return self.scores.as_json() | {
            "tokens": to_json(self.tokens),
            "first": self.first,
            "probs": to_json(self.probs),
            "links": [{"position": position, "probability": share} for position, share in self.links],
        }


def attention_map(
    llama: LoadedModel, ids: Sequence[int], layer: int, head: int | None = None, progress: Progress = silent
) -> Tensor:
    """What share of its attention each token of a text gives to each: (n_heads, T, T) float32, or (T, T) of one head.

    Row t is the query at position t; rows add up to 1. Raises `UsageError` for a layer or head that there is not, and
    as `Llama.predict` does.
    """
    args, T = llama.args, len(ids)
    layer = numbered("layer", layer, args.n_layers)
    head = None if head is None else numbered("head", head, args.n_heads, " in a layer")
    heads = slice(None) if head is None else slice(head, head + 1)
    shares = torch.zeros(len(range(args.n_heads)[heads]), T, T)

    def keep(_layer: int, probs: Tensor, start: int) -> None:
        shares[:, start : start + probs.shape[1], : probs.shape[2]] = probs[heads]

    _read(llama, ids, [layer], keep, progress)
    return shares if head is None else shares[0]


def head(
    llama: LoadedModel, ids: Sequence[int], layer: int, head: int, first: int | None = None, progress: Progress = silent
) -> Head:
    """What one head looks at: the map of `MAP_POSITIONS` queries from position `first` on, by default the last ones.

    Raises `UsageError` for a layer, head or position that there is not, and as `Llama.predict` does.
    """
    begin = max(0, len(ids) - MAP_POSITIONS) if first is None else first
    probs = attention_map(llama, ids, layer, head, progress)  # (T, T)
    begin = numbered("position", begin, len(ids), " in this text")
    best = probs[-1].topk(min(_LINKS, len(ids)))
    return Head(
        next(scores for scores in head_scores(llama, progress) if (scores.layer, scores.head) == (layer, head)),
        tuple(map(llama.token, ids)),
        begin,
        tuple(map(tuple, probs[begin : begin + MAP_POSITIONS].tolist())),
        tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )


def heads(llama: LoadedModel, ids: Sequence[int], layer: int | None = None, progress: Progress = silent) -> Heads:
    """All heads, or those of a layer, with their scores and small maps of a text.

    A layer's maps are made small before the next layer runs: what is held does not grow with the layers.
    Raises `UsageError` for a layer that there is not, and as `Llama.predict` does.
    """
    args, T = llama.args, len(ids)
    layers = range(args.n_layers) if layer is None else [numbered("layer", layer, args.n_layers)]
    step = max(1, math.ceil(T / _SMALL))
    P = math.ceil(T / step)
    small = {layer: torch.zeros(args.n_heads, P, P) for layer in layers}

    def pool(layer: int, probs: Tensor, start: int) -> None:
        n_heads, t, S = probs.shape
        groups = F.pad(probs, (0, P * step - S)).view(n_heads, t, P, step).amax(-1).cpu()  # (n_heads, t, P)
        rows = torch.arange(start, start + t)[None, :, None] // step
        small[layer].scatter_reduce_(1, rows.expand_as(groups), groups, "amax")

    _read(llama, ids, layers, pool, progress)
    maps = [
        SmallMap(
            scores,
            step,
            tuple(
                tuple(value if key <= query else None for key, value in enumerate(row))
                for query, row in enumerate(small[scores.layer][scores.head].tolist())
            ),
        )
        for scores in head_scores(llama, progress)
        if scores.layer in small
    ]
    return Heads(layer, tuple(map(llama.token, ids)), tuple(maps))


# A network's scores cost a pass through it, and do not change.
_known: WeakKeyDictionary[Engine, tuple[Scores, ...]] = WeakKeyDictionary()


def head_scores(llama: LoadedModel, progress: Progress = silent) -> tuple[Scores, ...]:
    """The scores of all heads, layer by layer, on `repeated` random tokens, where nothing can be known but by looking.

    Source: Olsson et al. 2022, arXiv:2209.11895; the head detector of TransformerLens.
    """
    if llama.engine not in _known:
        _known[llama.engine] = _measured(llama, progress)
    return _known[llama.engine]


def repeated(llama: LoadedModel) -> list[int]:
    """Random ordinary tokens, all different, and the same ones again; in front the beginning-of-text token, if any.

    50 of them, or fewer where the context has no room; always the same ones for the same vocabulary. Raises
    `UsageError` where there is none, or no room for one.
    """
    ordinary = torch.tensor(sorted(llama.tokenizer.ranks.values()))
    begin = _begin(llama)
    n = min(_REPEATED, (llama.context - len(begin)) // 2)
    if not n or not len(ordinary):
        raise UsageError(
            f"What kind a head is shows on a random token that comes twice, found a context of {llama.context} and "
            f"{len(ordinary)} ordinary tokens, expected room for one; raise `context` where that is what it lacks."
        )
    half = ordinary[torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(_SEED))[:n]].tolist()
    return [*begin, *half, *half]


def _begin(llama: LoadedModel) -> list[int]:
    bos = llama.tokenizer.bos_id
    return [] if bos is None else [bos]


def _measured(llama: LoadedModel, progress: Progress) -> tuple[Scores, ...]:
    ids, begin = repeated(llama), len(_begin(llama))
    n = (len(ids) - begin) // 2
    scores: list[Scores] = []

    def measure(layer: int, probs: Tensor, _start: int) -> None:
        def mean(back: int, first: int) -> Tensor:
            """Of all queries from `first` on, what goes to the token so far back: (n_heads,)."""
            return probs.diagonal(-back, 1, 2)[:, first - back :].mean(-1)

        again = begin + n  # where the second half begins
        four = torch.stack([mean(1, 1), probs[:, 1:, 0].mean(-1), mean(n, again), mean(n - 1, again)], dim=-1)
        scores.extend(Scores(layer, head, *values) for head, values in enumerate(four.tolist()))

    _read(llama, ids, range(llama.args.n_layers), measure, progress)
    return tuple(scores)


def _read(
    llama: LoadedModel,
    ids: Sequence[int],
    layers: Iterable[int],
    reduce: Callable[[int, Tensor, int], None],
    progress: Progress,
) -> None:
    """Hand over each layer's number, its probabilities, (n_heads, t, S) float32, and the position of the first query.

    A long text comes in pieces of t queries that see S tokens. What `reduce` does not keep is gone when it is done.
    """

    def hook(layer: int) -> Hook:
        return lambda probs, start: reduce(layer, probs[0].float(), start)

    llama.engine.forward_with_hooks(
        [ids], {f"layers.{layer}.attention.probs": hook(layer) for layer in layers}, progress=progress
    )
