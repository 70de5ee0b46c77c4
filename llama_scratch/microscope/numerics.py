"""Compare each precision, and another RoPE factor, with fp32."""

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
from llama_scratch.results import Candidate, JsonResult, Token, merged, to_json
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress, silent

REFERENCE = "fp32"
ROPE = "rope"
VARIANTS = (*PRECISIONS[1:], ROPE)
USUAL = tuple(name for name in VARIANTS if name != "int4")
"""The default variants. int4 is left out: its first use takes minutes of calibration."""
# Maximum number of compared positions: 131 MB of logits for a vocabulary of 128,256.
_POSITIONS = 256

Open = Callable[[str, Progress], LoadedModel]
"""Opens the same model in the precision with the given name."""


@dataclass(frozen=True)
class Distance:
    """The divergence of one network from the reference over all compared positions.

    Attributes:
        answer: Its most probable token after the last position.
        mean_kl_bits: Mean Kullback–Leibler divergence from the reference.
        max_kl_bits: Maximum Kullback–Leibler divergence.
        worst: The position of the maximum.
        changed: Number of positions with a different most probable token.
    """

    answer: Candidate
    mean_kl_bits: float
    max_kl_bits: float
    worst: int
    changed: int


@dataclass(frozen=True)
class Row(JsonResult):
    """The result for one network.

    Attributes:
        name: Its precision, or its RoPE factor.
        distance: Its divergence, if the network fits into memory.
        error: The error message, if it does not fit.
    """

    name: str
    distance: Distance | None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as part of `Numerics.as_json`."""
        return merged({"name": self.name}, to_json(self.distance) if self.distance else {"error": self.error})


@dataclass(frozen=True)
class Numerics(Displayable, JsonResult):
    """The prediction of the reference, and one row for each other network.

    Attributes:
        tokens: The tokens of the text.
        first: The first compared position.
        reference: The most probable token of the reference after the last position.
        rows: The other networks.
    """

    tokens: tuple[Token, ...]
    first: int
    reference: Candidate
    rows: tuple[Row, ...]

    @property
    def positions(self) -> int:
        """Number of compared positions."""
        return len(self.tokens) - self.first

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values, as `/numerics` prints it."""
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
    """Compare precisions, and another RoPE factor in fp32, with the fp32 reference.

    The reference is `Llama.differentiable`: the weights of the file, multiplied in float32. All networks run without
    hooks. Networks other than `llama` are opened one at a time and closed afterwards. Only the last 256 positions of a
    long text are compared. Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        open: Opens the model in another precision.
        variants: Some of `VARIANTS`.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If a variant does not exist.
        OutOfMemoryError: If the reference does not fit into memory.
    """
    for name in variants:
        if name not in VARIANTS:
            raise UsageError(f"'{sanitize(name)}' cannot be compared. Choose from {', '.join(VARIANTS)}.")
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
        # For the precision that `llama` already has, `llama` itself is used.
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
    """Return the hyperparameters with a RoPE factor of 32, or 8 if it is already 32."""
    return args.with_rope_factor(8.0 if _factor(args) == 32.0 else 32.0)


def with_frequencies(model: Transformer, args: ModelArgs) -> Transformer:
    """Return a network with the RoPE frequencies of other hyperparameters.

    Args:
        model: The network, whose weights are shared.
        args: The hyperparameters.
    """
    changed = copy(model)
    changed.freqs = rope_frequencies(args).to(model.freqs.device)
    return changed


def _factor(args: ModelArgs) -> float:
    return args.rope_scaling.factor if args.rope_scaling else 1.0


def _logits(
    model: Transformer, llama: LoadedModel, ids: Sequence[int], first: int, progress: Progress
) -> Iterator[Tensor]:
    """Yield the logits from position `first` on in chunks of (n, vocab_size).

    They are computed by a new engine, which has no hooks.
    """
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
