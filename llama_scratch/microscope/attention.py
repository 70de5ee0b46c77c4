"""Attention maps of heads, and the kind of each head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from llama_scratch.microscope.interventions import ablate
from llama_scratch.microscope.parts import NetworkPart, numbered
from llama_scratch.results import Candidate, JsonResult, Token, merged, to_json
from llama_scratch.system.progress import Progress, silent

# Minimum score at which a head counts as one of `KINDS`.
THRESHOLD = 0.4
KINDS = ("previous token", "first token", "duplicate token", "induction")

# Length of the random sequence, in tokens, before it is repeated.
_REPEATED = 50
_SEED = 0
# Maximum number of rows and columns of a small map.
_SMALL = 24
# Number of queries in a map, and of most-attended tokens listed for the last query.
MAP_POSITIONS = 64
_LINKS = 8

Reduce = Callable[[int, Tensor, int], None]
"""Reads attention probabilities: the layer, (n_heads, t, S) float32, and the position of the first query."""


@dataclass(frozen=True)
class Scores(JsonResult):
    """Four scores of a head, 0 to 1, measured on a random sequence repeated once.

    Each score is the mean share of attention that goes to one position. The last two are means over the second half.

    Attributes:
        layer: The layer.
        head: The head within the layer.
        previous: Attention to the previous token.
        first: Attention to the first token.
        duplicate: Attention to the same token in the first half.
        induction: Attention to the token after that earlier occurrence, which is also the token that comes next.
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
        """The name of the head, such as L5.H3."""
        return f"L{self.layer}.H{self.head}"

    @property
    def best(self) -> tuple[str, float]:
        """The kind with the highest score, and that score."""
        values = (self.previous, self.first, self.duplicate, self.induction)
        return max(zip(KINDS, values, strict=True), key=lambda pair: pair[1])

    @property
    def kind(self) -> str | None:
        """The kind of the head, one of `KINDS`, if its score reaches `THRESHOLD`."""
        kind, score = self.best
        return kind if score >= THRESHOLD else None


@dataclass(frozen=True)
class SmallMap:
    """A downsampled attention map of one head.

    Attributes:
        scores: The scores of the head.
        step: Number of queries per row and of keys per column.
        values: The maximum probability in each block, (P, P) with P at most 24. None for future keys.
    """

    scores: Scores
    step: int
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Heads(Displayable, JsonResult):
    """The heads of one layer, or of all layers in order, with their attention maps.

    Attributes:
        layer: The layer, or None for all layers.
        tokens: The tokens of the text.
        maps: One map per head.
    """

    layer: int | None
    tokens: tuple[Token, ...]
    maps: tuple[SmallMap, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the scores, as `/attention` and `/attention LAYER` print them."""
        return {"layer": self.layer, "heads": to_json([each.scores for each in self.maps])}


@dataclass(frozen=True)
class Head(Displayable, JsonResult):
    """The attention map of one head, and the answer without the head.

    Attributes:
        scores: The scores of the head.
        tokens: The tokens of the text.
        first: Position of the first query in `probs`.
        probs: One row per query with a probability for each token of the text. Rows sum to 1; future tokens have 0.
        links: The positions with the highest attention from the last token, with their probabilities, best first.
        answer: The most probable next token.
        ablated: The same token with the head zero-ablated.
    """

    scores: Scores
    tokens: tuple[Token, ...]
    first: int
    probs: tuple[tuple[float, ...], ...]
    links: tuple[tuple[int, float], ...]
    answer: Candidate
    ablated: Candidate

    def as_json(self) -> dict[str, Any]:
        """Return the map as JSON values, as `/attention LAYER.HEAD` prints it."""
        scores = self.scores.as_json()
        place = {key: scores.pop(key) for key in ("layer", "head", "kind")}
        return merged(
            place,
            {
                "scores": scores,
                "answer": to_json(self.answer),
                "ablated": to_json(self.ablated),
                "tokens": to_json(self.tokens),
                "first": self.first,
                "probs": to_json(self.probs),
                "links": [{"position": position, "probability": share} for position, share in self.links],
            },
        )


def attention_map(
    llama: LoadedModel, ids: Sequence[int], layer: int, head: int | None = None, progress: Progress = silent
) -> Tensor:
    """Return the attention probabilities of a layer or of one head.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layer: The layer.
        head: The head, by default all heads of the layer.
        progress: As for `Llama.predict`.

    Returns:
        (n_heads, T, T) float32, or (T, T) for one head. Row t is the query at position t. Rows sum to 1.

    Raises:
        UsageError: If the layer or head does not exist.
    """
    args, T = llama.args, len(ids)
    layer = numbered("layer", layer, args.n_layers)
    head = None if head is None else numbered("head", head, args.n_heads)
    heads = slice(None) if head is None else slice(head, head + 1)
    shares = torch.zeros(len(range(args.n_heads)[heads]), T, T)
    read_attention(llama, ids, [layer], _keep(shares, heads), progress)
    return shares if head is None else shares[0]


def _keep(shares: Tensor, heads: slice) -> Reduce:
    """Return a function that copies attention of `heads` to `shares`, (heads, T, T)."""

    def keep(_layer: int, probs: Tensor, start: int) -> None:
        shares[:, start : start + probs.shape[1], : probs.shape[2]] = probs[heads]

    return keep


def head(
    llama: LoadedModel,
    ids: Sequence[int],
    layer: int,
    head: int,
    first: int | None = None,
    progress: Progress = silent,
    answer: Candidate | None = None,
) -> Head:
    """Return the attention map of one head, and the answer without the head.

    The map has up to `MAP_POSITIONS` queries. One pass with the head ablated gives both, because the attention of a
    head does not depend on its own output. Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layer: The layer.
        head: The head within the layer.
        first: Position of the first query. By default the map ends at the last token.
        progress: As for `Llama.predict`.
        answer: The most probable next token, if it is already known. Otherwise it is computed.

    Raises:
        UsageError: If the layer, head or position does not exist.
    """
    T = len(ids)
    layer, head = numbered("layer", layer, llama.args.n_layers), numbered("head", head, llama.args.n_heads)
    llama.engine.check(ids)
    begin = numbered("position", max(0, T - MAP_POSITIONS) if first is None else first, T, " in this text")
    probs = torch.zeros(1, T, T)
    hooks = ablate(llama, NetworkPart(layer, "head", head)).hooks
    logits = read_attention(llama, ids, [layer], _keep(probs, slice(head, head + 1)), progress, hooks)
    if answer is None:
        answer = llama.candidates(llama.engine.next_logits(ids, progress).values, 1)[0]
    best = probs[0, -1].topk(min(_LINKS, T))
    return Head(
        next(scores for scores in head_scores(llama, progress) if (scores.layer, scores.head) == (layer, head)),
        tuple(map(llama.token, ids)),
        begin,
        tuple(map(tuple, probs[0, begin : begin + MAP_POSITIONS].tolist())),
        tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        answer,
        Candidate(answer.id, answer.text, float(logits.double().log_softmax(-1)[answer.id])),
    )


def heads(llama: LoadedModel, ids: Sequence[int], layer: int | None = None, progress: Progress = silent) -> Heads:
    """Return all heads, or the heads of one layer, with their scores and small maps.

    Each map is downsampled before the next layer runs, so only one layer of full-size maps is in memory at a time.
    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layer: The layer, by default all layers.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the layer does not exist.
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

    read_attention(llama, ids, layers, pool, progress)
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


# Scores are cached per engine: measuring them takes a forward pass, and they do not change.
_known: WeakKeyDictionary[Engine, tuple[Scores, ...]] = WeakKeyDictionary()


def head_scores(llama: LoadedModel, progress: Progress = silent) -> tuple[Scores, ...]:
    """Return the scores of all heads, layer by layer, on tokens from `repeated`.

    The second half can be predicted only by looking back at the first half. The result is cached for each network.
    Sources: Olsson et al. 2022, arXiv:2209.11895; the head detector of TransformerLens.

    Args:
        llama: The model.
        progress: As for `Llama.predict`.
    """
    if llama.engine not in _known:
        _known[llama.engine] = _measured(llama, progress)
    return _known[llama.engine]


def repeated(llama: LoadedModel) -> list[int]:
    """Return distinct random tokens followed by the same tokens again.

    The beginning-of-text token comes first, if the tokenizer has one. Each half has 50 tokens, or fewer if the context
    or the vocabulary is small. The tokens depend only on the vocabulary.

    Raises:
        UsageError: If the context has no room for one token twice, or the vocabulary has no ordinary tokens.
    """
    ordinary = torch.tensor(sorted(llama.tokenizer.ranks.values()))
    begin = _begin(llama)
    n = min(_REPEATED, (llama.context - len(begin)) // 2)
    if not n or not len(ordinary):
        raise UsageError(
            f"Head scores need room for one random token twice: the context is {llama.context} tokens, and the "
            f"vocabulary has {len(ordinary)} ordinary tokens. If the context is too short, raise `context`."
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
            """Mean attention to the key `back` tokens earlier, (n_heads,)."""
            return probs.diagonal(-back, 1, 2)[:, first - back :].mean(-1)

        again = begin + n  # start of the second half
        four = torch.stack([mean(1, 1), probs[:, 1:, 0].mean(-1), mean(n, again), mean(n - 1, again)], dim=-1)
        scores.extend(Scores(layer, head, *values) for head, values in enumerate(four.tolist()))

    read_attention(llama, ids, range(llama.args.n_layers), measure, progress)
    return tuple(scores)


def read_attention(
    llama: LoadedModel,
    ids: Sequence[int],
    layers: Iterable[int],
    reduce: Reduce,
    progress: Progress,
    hooks: Mapping[str, Hook] | None = None,
) -> Tensor:
    """Run the network, and call `reduce` with the attention of each layer.

    Args:
        llama: The model.
        ids: The token ids of the text.
        layers: The layers.
        reduce: Called with the attention probabilities of each layer, and for each chunk of a long text: t queries
            that attend to S tokens. The probabilities are freed after the call.
        progress: As for `Llama.predict`.
        hooks: Additional hooks for this forward pass.

    Returns:
        The logits of the next token, (vocab_size,).
    """

    def hook(layer: int) -> Hook:
        return lambda probs, start: reduce(layer, probs[0].float(), start)

    reading = {f"layers.{layer}.attention.probs": hook(layer) for layer in layers}
    return llama.engine.forward_with_hooks([ids], {**reading, **(hooks or {})}, progress=progress)[0, 0]
