"""The exercises: one or two functions per chapter, with the inputs that check them.

By chapter 9, a reader's file is the whole network. The inputs are seeded, so every check is repeatable.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llama_scratch.config import ModelArgs, RopeScaling
from llama_scratch.learn import solution

Inputs = Sequence[tuple[Any, ...]]
"""The arguments of each call."""


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    Args:
        chapter: Number of its chapter.
        function: Its name, also in `solution`.
        inputs: Makes the arguments of each call.
    """

    chapter: int
    function: str
    inputs: Callable[[], Inputs]

    @property
    def solution(self) -> Callable[..., Any]:
        """The function in `solution`, whose docstring is the task."""
        found: Callable[..., Any] = getattr(solution, self.function)
        return found


def exercises_of(chapter: int) -> list[Exercise]:
    """The exercises of a chapter."""
    return [exercise for exercise in EXERCISES if exercise.chapter == chapter]


# --- Inputs -------------------------------------------------------------------------------------


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _logits() -> Inputs:
    return [(_random(7),), (_random(3, 5),), (torch.tensor([1000.0, 999.0, -1000.0]),)]


def _probabilities() -> Inputs:
    return [(torch.tensor([0.5, 0.25, 0.25]),), (_random(50).softmax(-1),), (torch.tensor([1.0, 0.0]),)]


def _words() -> Inputs:
    """Words and ranks in which merging by rank differs from merging left to right, and from the longest token.

    No merge leads to the token "xyz".
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"is", b"ar", b" P", b"aris", b" Paris", b"ab", b"bc", b"abc", b"cd", b"abcd", b"bcd"):
        ranks[token] = len(ranks)
    cdbc = {bytes([byte]): byte for byte in range(256)} | {b"cd": 256, b"bc": 257, b"ab": 258, b"abc": 259}
    return [(b" Paris", ranks), (b"abcd", ranks), (b"abcd", cdbc), (b"xyz", cdbc | {b"xyz": 260}), (b"", ranks)]


def _embedding() -> Inputs:
    return [(torch.tensor([3, 0, 3, 9]), _random(10, 8))]


def _vectors() -> Inputs:
    return [
        (_random(5, 16), _random(16, seed=1), 1e-5),
        (_random(5, 16, scale=1e-3) + 1e-3, _random(16, seed=1), 1e-5),
        (_random(3, 8) * torch.tensor([[1.0], [10.0], [100.0]]), torch.ones(8), 1e-6),
    ]


def _one_head() -> Inputs:
    return [tuple(_random(6, 16, seed=seed, scale=2) for seed in (0, 1, 2)), tuple(_random(1, 16) for _ in range(3))]


def _bases() -> Inputs:
    return [(64, 100_000.0), (64, 500_000.0), (16, 10_000.0)]


def _frequencies() -> Inputs:
    return [(solution.frequencies(64, 100_000.0), 9), (solution.frequencies(16, 500_000.0), 300)]


def _pairs() -> Inputs:
    freqs_cis = solution.rotations(solution.frequencies(16, 500.0), 6)
    return [(_random(6, 3, 16), freqs_cis)]


def _scaling() -> Inputs:
    freqs = solution.frequencies(64, 500_000.0)
    return [(freqs, 32.0, 1.0, 4.0, 8192), (freqs, 8.0, 1.0, 4.0, 8192)]


def _heads() -> Inputs:
    return [(_random(6, 8, 16, scale=2), _random(6, 2, 16, seed=1, scale=2), _random(6, 2, 16, seed=2))]


def _gates() -> Inputs:
    return [(_random(5, 8), _random(20, 8, seed=1), _random(8, 20, seed=2), _random(20, 8, seed=3))]


SMALL = ModelArgs(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=96, ffn_dim=128, norm_eps=1e-5, rope_theta=500_000.0,
    rope_scaling=None, max_seq_len=8192,
)  # fmt: skip
# Scaled, with a short original context, so that the scaling matters for few tokens.
SCALED = ModelArgs(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=96, ffn_dim=128, norm_eps=1e-5, rope_theta=500_000.0,
    rope_scaling=RopeScaling(32.0, original_context=64), max_seq_len=8192,
)  # fmt: skip


@cache
def small_network() -> dict[str, Tensor]:
    """Random weights for `SMALL`, large enough that each part matters."""
    weights = {}
    for seed, (name, shape) in enumerate(SMALL.weight_shapes().items()):
        if len(shape) == 1:
            weights[name] = 1 + _random(*shape, seed=seed, scale=0.5)
        else:
            sharp = 3.0 if name.endswith(("wq.weight", "wk.weight")) else 1.0
            weights[name] = _random(*shape, seed=seed, scale=sharp / math.sqrt(shape[1]))
    return weights


def _layer() -> Inputs:
    freqs_cis = solution.rotations(solution.frequencies(SMALL.head_dim, SMALL.rope_theta), 12)
    return [(_random(12, 64), solution.layer_weights(small_network(), 0), freqs_cis, SMALL)]


def _network() -> Inputs:
    ids = torch.randint(0, 96, (12,), generator=torch.Generator().manual_seed(0))
    return [(ids, small_network(), SMALL), (ids, small_network(), SCALED)]


def _cached() -> Inputs:
    return [
        (_random(3, 16, scale=2), _random(7, 16, seed=1, scale=2), _random(7, 16, seed=2)),
        (_random(1, 16, scale=2), _random(7, 16, seed=1, scale=2), _random(7, 16, seed=2)),
        tuple(_random(4, 16, seed=seed, scale=2) for seed in (0, 1, 2)),
    ]


def _sampling() -> Inputs:
    logits = _random(40, scale=3)
    return [
        (logits, 1.0, 0, 1.0, 0.0),
        (logits, 0.7, 0, 1.0, 0.0),
        (logits, 1.5, 5, 1.0, 0.0),
        (logits, 0.7, 0, 0.8, 0.0),
        (logits, 1.5, 10, 0.9, 0.0),
        (logits, 1.5, 0, 1.0, 0.05),
        (logits, 1.5, 0, 0.95, 0.1),
    ]


class _Payload:
    """Unpickling it would call print."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("this pickle ran code",)


def _pickles() -> Inputs:
    values = [{"weight": [1.0, 2.0]}, _Payload(), {"a": math.sqrt, "b": torch.float32}]
    return [(pickle.dumps(value, protocol=2),) for value in values]


def _numbers() -> Inputs:
    outlier = _random(96)
    outlier[5] = 300.0
    return [(_random(64), 32), (outlier, 32), (torch.cat([torch.zeros(32), _random(32)]), 32)]


def _correlated() -> Inputs:
    x = _random(200, 8, seed=1) @ _random(8, 8, seed=2)
    return [
        (torch.tensor([0.45, 0.45]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])),
        (_random(8, scale=3), x.T @ x / 200),
    ]


def _integers() -> Inputs:
    w, x = (torch.randint(-127, 128, (64,), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    return [(w.to(torch.int8), torch.tensor([0.01, 0.02]), x.to(torch.int8), torch.tensor([0.5, 0.3]))]


# Llama 3.2 1B.
_ONE_B = ModelArgs(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128_256, ffn_dim=8192, norm_eps=1e-5,
    rope_theta=500_000.0, rope_scaling=RopeScaling(32.0), max_seq_len=131_072,
)  # fmt: skip


def _speeds() -> Inputs:
    return [(_ONE_B, 16, 25e9, 0), (_ONE_B, 4.25, 25e9, 0), (_ONE_B, 16, 25e9, 8192), (SMALL, 8.5, 1e9, 100)]


EXERCISES = (
    Exercise(0, "softmax", _logits),
    Exercise(0, "entropy", _probabilities),
    Exercise(1, "bpe", _words),
    Exercise(2, "embed", _embedding),
    Exercise(3, "rms_norm", _vectors),
    Exercise(4, "attention", _one_head),
    Exercise(5, "frequencies", _bases),
    Exercise(5, "rotations", _frequencies),
    Exercise(5, "rotate", _pairs),
    Exercise(6, "scaled_frequencies", _scaling),
    Exercise(7, "grouped_attention", _heads),
    Exercise(8, "feed_forward", _gates),
    Exercise(9, "block", _layer),
    Exercise(9, "forward", _network),
    Exercise(10, "attend_to_cache", _cached),
    Exercise(11, "distribution", _sampling),
    Exercise(12, "fact_head", lambda: [()]),
    Exercise(13, "induction_head", lambda: [()]),
    Exercise(14, "imports_of", _pickles),
    Exercise(15, "quantize", _numbers),
    Exercise(15, "gptq", _correlated),
    Exercise(16, "block_dot", _integers),
    Exercise(17, "tokens_per_second", _speeds),
)
