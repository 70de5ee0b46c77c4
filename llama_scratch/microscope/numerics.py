"""The same text in each precision, and with another RoPE factor: how far the answers are from fp32's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.errors import OutOfMemoryError, UsageError, sanitize
from llama_scratch.inference.engine import Engine
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.distributions import kl_bits, log_softmax
from llama_scratch.model import Transformer, rope_frequencies
from llama_scratch.precision import PRECISIONS
from llama_scratch.results import Candidate, JsonResult, Token, to_json
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress, silent

REFERENCE = "fp32"
ROPE = "rope"
VARIANTS = (*PRECISIONS[1:], ROPE)
USUAL = tuple(name for name in VARIANTS if name != "int4")
"""Those that take seconds: int4 is calibrated for minutes when it is made for the first time."""
# Positions that are compared: their logits are 131 MB for a vocabulary of 128,256.
_POSITIONS = 256

Open = Callable[[str, Progress], LoadedModel]
"""Opens the same model in the precision of that name."""


@dataclass(frozen=True)
class Distance:
    """How far one network is from the reference, over all positions that were compared.

    answer: its most probable token after the last one. mean_kl_bits, max_kl_bits: Kullback-Leibler divergence from the
    reference; worst: the position where it is largest. changed: positions with another most probable token.
    """

    answer: Candidate
    mean_kl_bits: float
    max_kl_bits: float
    worst: int
    changed: int


@dataclass(frozen=True)
class Row(JsonResult):
    """One network. distance: None where it does not fit into memory, which `error` says in a sentence."""

    name: str
    distance: Distance | None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """As it stands in `Numerics.as_json`."""
        return {"name": self.name} | (to_json(self.distance) if self.distance else {"error": self.error})


@dataclass(frozen=True)
class Numerics(Displayable, JsonResult):
    """The reference's answer, and a row for each other network. Compared are the positions from `first` to the end."""

    tokens: tuple[Token, ...]
    first: int
    reference: Candidate
    rows: tuple[Row, ...]

    @property
    def positions(self) -> int:
        """How many were compared."""
        return len(self.tokens) - self.first

    def as_json(self) -> dict[str, Any]:
        """As `/numerics` prints it."""
        return {
            "tokens": to_json(self.tokens),
            "first": self.first,
            "positions": self.positions,
            "reference": {"name": REFERENCE, "answer": to_json(self.reference)},
            "rows": to_json(self.rows),
        }


def numerics(
    llama: LoadedModel,
    ids: Sequence[int],
    open: Open,
    variants: Sequence[str] = USUAL,
    progress: Progress = silent,
) -> Numerics:
    """What some of `VARIANTS` make of a text: the precisions, and "rope", fp32 with another RoPE factor.

    The reference is `Llama.differentiable`: the weights of the file, multiplied in float32. Every network runs without
    hooks, and others than the session's own are opened one at a time and closed again. Of a long text the last
    positions are compared. progress: as for `Llama.predict`. Raises `UsageError` for a variant that there is not,
    `OutOfMemoryError` where the reference itself does not fit, and as `Llama.predict` does.
    """
    for name in variants:
        if name not in VARIANTS:
            raise UsageError(f"'{sanitize(name)}' is nothing to compare, expected one of {', '.join(VARIANTS)}.")
    llama.engine.check(ids)
    first = max(0, len(ids) - _POSITIONS)
    needed = (len(ids) - first) * llama.args.vocab_size * torch.float32.itemsize
    require_memory(needed, f"Comparing {len(ids) - first} positions")
    plain = llama.differentiable(progress)
    reference = torch.cat(list(_logits(plain, llama, ids, first, progress)))  # (positions, vocab_size)

    def measured(name: str) -> Distance:
        if name == ROPE:
            model = with_frequencies(plain, other_factor(llama.args))
            return _distance(llama, reference, _logits(model, llama, ids, first, progress), first)
        # What answers in this precision already is not loaded again.
        other = llama if name == llama.info.precision else open(name, progress)
        try:
            other.prepare(progress)
            return _distance(llama, reference, _logits(other.engine.model, llama, ids, first, progress), first)
        finally:
            if other is not llama:
                other.close()

    rows = []
    for name in dict.fromkeys(variants):
        title = f"RoPE {_factor(other_factor(llama.args)):g}" if name == ROPE else name
        try:
            rows.append(Row(title, measured(name)))
        except OutOfMemoryError as error:
            rows.append(Row(title, None, str(error)))
    answer = llama.candidates(reference[-1], 1)[0]
    return Numerics(tuple(map(llama.token, ids)), first, answer, tuple(rows))


def other_factor(args: ModelArgs) -> ModelArgs:
    """The same shape with the other of the two RoPE factors that Llama models were trained with: 8 and 32."""
    return args.with_rope_factor(8.0 if _factor(args) == 32.0 else 32.0)


def with_frequencies(model: Transformer, args: ModelArgs) -> Transformer:
    """A network with the same weights, not copied, that turns by the frequencies of other args."""
    changed = copy(model)
    changed.freqs = rope_frequencies(args).to(model.freqs.device)
    return changed


def _factor(args: ModelArgs) -> float:
    return args.rope_scaling.factor if args.rope_scaling else 1.0


def _logits(
    model: Transformer, llama: LoadedModel, ids: Sequence[int], first: int, progress: Progress
) -> Iterator[Tensor]:
    """The logits from position `first` on, in pieces of (n, vocab_size), from an engine of its own."""
    return Engine(model, llama.context).logits_from(ids, first, progress)


def _distance(llama: LoadedModel, reference: Tensor, pieces: Iterator[Tensor], first: int) -> Distance:
    divergences: list[Tensor] = []
    changed = done = 0
    for piece in pieces:  # (n, vocab_size)
        expected = reference[done : done + len(piece)]
        divergences += [kl_bits(p, q) for p, q in zip(log_softmax([expected]), log_softmax([piece]), strict=True)]
        changed += int((expected.argmax(-1) != piece.argmax(-1)).sum())
        done += len(piece)
    kl = torch.cat(divergences)  # (positions,)
    return Distance(
        answer=llama.candidates(piece[-1], 1)[0],
        mean_kl_bits=float(kl.mean()),
        max_kl_bits=float(kl.max()),
        worst=first + int(kl.argmax()),
        changed=changed,
    )
