"""Two texts side by side: where the model's predictions part, and how far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile

from torch import Tensor

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.distributions import jensen_shannon_bits
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress, silent


@dataclass(frozen=True)
class Pair:
    """A token that stands in both texts, at the positions `first` and `second` (from 0), and what follows it.

    jsd_bits: Jensen–Shannon divergence of the two predictions, 0 to 1. first_next, second_next: the best token of each.
    """

    first: int
    second: int
    token: Token
    jsd_bits: float
    first_next: Candidate
    second_next: Candidate


@dataclass(frozen=True)
class Diff(JsonResult):
    """Two texts' tokens, those that stand in both, and what comes after each text.

    shared: how many tokens they begin with in common. first_top, second_top: the most probable tokens after the
    last one, best first. jsd_bits: Jensen–Shannon divergence of those two predictions, 0 to 1.
    """

    json_fields = ("first", "second", "shared", "pairs", "parting", "first_top", "second_top", "jsd_bits")

    first: tuple[Token, ...]
    second: tuple[Token, ...]
    shared: int
    pairs: tuple[Pair, ...]
    first_top: tuple[Candidate, ...]
    second_top: tuple[Candidate, ...]
    jsd_bits: float

    @property
    def parting(self) -> Pair | None:
        """The first pair after which another token is the most probable one; None where there is none."""
        return next((pair for pair in self.pairs if pair.first_next.id != pair.second_next.id), None)


def diff(
    llama: LoadedModel, first: Sequence[int], second: Sequence[int], top: int = 5, progress: Progress = silent
) -> Diff:
    """Compare what a model predicts along two texts, given as ids.

    What they begin with in common is computed once. progress: as for `Llama.predict`, for each text.
    Raises as `Llama.predict` does, and `OutOfMemoryError` where the predictions cannot be kept.
    """
    for ids in (first, second):
        llama.engine.check(ids)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    aligned = dict(_aligned(first, second, shared))
    # Those of the first text that are compared with the second's.
    kept = {*aligned.values(), len(first) - 1} | ({shared - 1} if shared == len(second) else set())
    what = f"Comparing texts of {len(first):,} and {len(second):,} tokens"
    require_memory({"predictions": 4 * llama.args.vocab_size * len(kept)}, what)

    logits: dict[int, Tensor] = {}  # (vocab_size,) each
    best: dict[int, Candidate] = {}
    for i, row in _rows(llama.engine.logits_from(first, 0, progress), 0):
        if i < shared or i in kept:
            best[i] = llama.candidates(row, 1)[0]
        if i in kept:
            logits[i] = row.clone()
    pairs = [Pair(i, i, llama.token(first[i]), 0.0, best[i], best[i]) for i in range(shared)]

    if shared == len(second):
        last = logits[shared - 1]
    else:
        for j, last in _rows(llama.engine.logits_from(second, shared, progress), shared):
            if j in aligned:
                i = aligned[j]
                token, following = llama.token(second[j]), llama.candidates(last, 1)[0]
                pairs.append(Pair(i, j, token, _divergence(logits[i], last), best[i], following))
    ends = logits[len(first) - 1], last
    return Diff(
        first=tuple(map(llama.token, first)),
        second=tuple(map(llama.token, second)),
        shared=shared,
        pairs=tuple(pairs),
        first_top=llama.candidates(ends[0], top),
        second_top=llama.candidates(ends[1], top),
        jsd_bits=0.0 if shared == len(first) == len(second) else _divergence(*ends),
    )


def _aligned(first: Sequence[int], second: Sequence[int], shared: int) -> Iterator[tuple[int, int]]:
    """Positions behind what is shared at the beginning at which both texts have the same token: (second, first)."""
    matcher = SequenceMatcher(None, first[shared:], second[shared:], autojunk=False)
    for block in matcher.get_matching_blocks():
        for k in range(shared, shared + block.size):
            yield block.b + k, block.a + k


def _rows(pieces: Iterable[Tensor], start: int) -> Iterator[tuple[int, Tensor]]:
    """Each position from `start` on with its logits, (vocab_size,)."""
    return enumerate((row for piece in pieces for row in piece), start)


def _divergence(a: Tensor, b: Tensor) -> float:
    """Of two predictions, given as logits, in bits."""
    return float(jensen_shannon_bits(a.double().log_softmax(-1), b.double().log_softmax(-1)))
