"""Compare two texts token by token: where, and by how much, predictions diverge."""

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
    """A token that both texts share, and the two predictions after it.

    Attributes:
        first: Its position in the first text, from 0.
        second: Its position in the second text.
        token: The token.
        jsd_bits: Jensen–Shannon divergence of the two predictions, 0 to 1.
        first_next: The most probable next token in the first text.
        second_next: The same in the second text.
    """

    first: int
    second: int
    token: Token
    jsd_bits: float
    first_next: Candidate
    second_next: Candidate


@dataclass(frozen=True)
class Diff(JsonResult):
    """Two aligned texts and the predictions along them.

    Attributes:
        first: The tokens of the first text.
        second: The tokens of the second text.
        shared: Length of their common prefix in tokens.
        pairs: The tokens that both texts share.
        first_top: The most probable tokens after the first text, best first.
        second_top: The same for the second text.
        jsd_bits: Jensen–Shannon divergence of the predictions after the texts, 0 to 1.
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
        """The first pair with different most probable next tokens, if any."""
        return next((pair for pair in self.pairs if pair.first_next.id != pair.second_next.id), None)


def diff(
    llama: LoadedModel, first: Sequence[int], second: Sequence[int], top: int = 5, progress: Progress = silent
) -> Diff:
    """Compare the predictions along two texts.

    The common prefix is computed once. Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        first: The token ids of the first text.
        second: The token ids of the second text.
        top: Number of candidates after each text.
        progress: As for `Llama.predict`, once per text.

    Raises:
        OutOfMemoryError: If the predictions do not fit into memory.
    """
    for ids in (first, second):
        llama.engine.check(ids)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    aligned = dict(_aligned(first, second, shared))
    # Positions of the first text whose logits are needed for the comparison.
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
    """Yield positions of equal tokens after the common prefix, as (second, first)."""
    matcher = SequenceMatcher(None, first[shared:], second[shared:], autojunk=False)
    for block in matcher.get_matching_blocks():
        for k in range(shared, shared + block.size):
            yield block.b + k, block.a + k


def _rows(pieces: Iterable[Tensor], start: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each position from `start` on with its logits, (vocab_size,)."""
    return enumerate((row for piece in pieces for row in piece), start)


def _divergence(a: Tensor, b: Tensor) -> float:
    """Jensen–Shannon divergence of two predictions, given as logits, in bits."""
    return float(jensen_shannon_bits(a.double().log_softmax(-1), b.double().log_softmax(-1)))
