"""Sampling, against plain Python implementations of the definitions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_scratch.errors import UsageError
from llama_scratch.sampling import Sampling, min_p, sample, top_k, top_p

many = settings(max_examples=300, deadline=None, derandomize=True)
# Far enough apart for rounding not to change the order.
distinct = st.lists(st.integers(-400, 400), min_size=1, max_size=30, unique=True).map(lambda xs: [x / 20 for x in xs])
probability = st.integers(0, 1000).map(lambda n: n / 1000)

PROBABILITIES = [0.5, 0.2, 0.15, 0.1, 0.04, 0.01]
# Shuffled, because the order of the vocabulary must differ from the order of probabilities.
ORDER = [3, 0, 5, 2, 4, 1]
SHUFFLED = [PROBABILITIES[i] for i in ORDER]
LOGITS = torch.tensor(SHUFFLED).log() + 7


def softmax(logits: Sequence[float]) -> list[float]:
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / math.fsum(exponentials) for x in exponentials]


def kept(mask: torch.Tensor) -> set[float]:
    """Probabilities of the tokens of `LOGITS` that a filter keeps."""
    return {p for p, keep in zip(SHUFFLED, mask.tolist(), strict=True) if keep}


def draws(n: int, logits: torch.Tensor = LOGITS, **options: Any) -> list[int]:
    sampling = Sampling(**({"temperature": 1.0, "seed": 0} | options))
    generator = sampling.generator()
    return [sample(logits, sampling, generator) for _ in range(n)]


# --- Filters ----------------------------------------------------------------------------------


def test_top_k_keeps_the_k_most_probable() -> None:
    """0 and numbers beyond the vocabulary size keep all tokens."""
    for k in range(1, 8):
        assert kept(top_k(LOGITS, k)) == set(PROBABILITIES[:k])
    assert kept(top_k(LOGITS, 0)) == set(PROBABILITIES)


@pytest.mark.parametrize(
    ("p", "n"), [(0.0, 1), (0.3, 1), (0.499, 1), (0.501, 2), (0.699, 2), (0.701, 3), (0.96, 5), (0.995, 6), (1.0, 6)]
)
def test_top_p_keeps_the_fewest_that_reach_it(p: float, n: int) -> None:
    """The token that reaches p is kept, and at least one token always is."""
    assert kept(top_p(LOGITS, p)) == set(PROBABILITIES[:n])


@pytest.mark.parametrize(("p", "n"), [(0.0, 6), (0.019, 6), (0.021, 5), (0.21, 3), (0.39, 2), (0.41, 1), (1.0, 1)])
def test_min_p_keeps_those_with_a_share_of_the_best(p: float, n: int) -> None:
    """A probability of 0.01 is 0.02 of the best, 0.04 is 0.08 of it, and so on."""
    assert kept(min_p(LOGITS, p)) == set(PROBABILITIES[:n])


@many
@given(logits=distinct, k=st.integers(0, 40))
def test_top_k_is_its_definition(logits: list[float], k: int) -> None:
    """The first k tokens in sorted order."""
    best = sorted(logits, reverse=True)[: k or None]
    assert top_k(torch.tensor(logits), k).tolist() == [x in best for x in logits]


@many
@given(logits=distinct, p=probability)
def test_top_p_is_its_definition(logits: list[float], p: float) -> None:
    """Add probabilities from the best token on until they reach p."""
    by_size = sorted(range(len(logits)), key=lambda i: -logits[i])
    expected, total = set(), 0.0
    for i in by_size:
        expected.add(i)
        total += softmax(logits)[i]
        assume(abs(total - p) > 1e-9)
        if total > p:
            break
    mask = top_p(torch.tensor(logits, dtype=torch.float64), p)
    assert {i for i, keep in enumerate(mask.tolist()) if keep} == expected


@many
@given(logits=distinct, p=probability)
def test_min_p_is_its_definition(logits: list[float], p: float) -> None:
    """At least p times the best token's probability."""
    shares = [math.exp(x - max(logits)) for x in logits]
    assume(all(abs(share - p) > 1e-9 or p == share == 1 for share in shares))
    assert min_p(torch.tensor(logits, dtype=torch.float64), p).tolist() == [share >= p for share in shares]


# --- Sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_probable(temperature: float) -> None:
    """20,000 draws at p^(1/T): a deviation of over five sigma has a probability of one in a million."""
    n = 20_000
    powers = np.array(SHUFFLED) ** (1 / temperature)
    expected = powers / powers.sum()
    counts = Counter(draws(n, temperature=temperature))
    frequencies = np.array([counts[id] / n for id in range(6)])
    assert (np.abs(frequencies - expected) < 5 * np.sqrt(expected * (1 - expected) / n)).all()


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"top_k": 2}, 2),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.0}, 1),
        ({"min_p": 0.35}, 2),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.001}, 3),
        ({"top_k": 1, "top_p": 1.0}, 1),
        ({"top_k": 5, "min_p": 0.25}, 3),
    ],
)
def test_only_tokens_that_stay_are_drawn_and_share_what_the_others_had(options: dict[str, Any], n: int) -> None:
    """Single and combined filters; the kept probabilities are renormalized."""
    counts = Counter(SHUFFLED[id] for id in draws(4000, **options))
    assert set(counts) == set(PROBABILITIES[:n])
    assert counts[0.5] / 4000 == pytest.approx(0.5 / sum(PROBABILITIES[:n]), abs=0.04)


def test_temperature_comes_before_top_p() -> None:
    """At temperature 0.5 the best token has 0.76, enough for top-p 0.7; without it, only 0.5."""
    assert set(draws(500, temperature=0.5, top_p=0.7)) == {SHUFFLED.index(0.5)}
    assert len(set(draws(500, temperature=1.0, top_p=0.7 + 1e-6))) > 1


def test_zero_temperature_takes_the_best_whatever_the_seed() -> None:
    """Of two equal tokens the first one, like argmax."""
    assert Sampling().greedy
    for seed in range(20):
        assert draws(1, temperature=0.0, seed=seed, top_p=0.1, top_k=3) == [SHUFFLED.index(0.5)]
    assert draws(1, torch.tensor([0.0, 3.0, 3.0]), temperature=0.0) == [1]


@pytest.mark.parametrize("temperature", [1e-9, 1e-300])
def test_a_tiny_temperature_is_as_good_as_zero(temperature: float) -> None:
    """Nothing overflows, even with filters and large logits."""
    assert set(draws(200, temperature=temperature)) == {SHUFFLED.index(0.5)}
    options = {"top_k": 3, "top_p": 0.9, "min_p": 0.1}
    assert set(draws(50, torch.tensor([-3e38, 3e38, 2e38]), temperature=temperature, **options)) == {1}


def test_a_large_temperature_makes_all_equal() -> None:
    """1,000 draws per token are expected, with a standard deviation of 29."""
    counts = Counter(draws(6000, temperature=1e9))
    assert min(counts[id] for id in range(6)) > 800


def test_a_seed_reproduces_and_another_does_not() -> None:
    """100 draws with each seed."""
    assert draws(100, seed=3) == draws(100, seed=3)
    assert draws(100, seed=3) != draws(100, seed=4)


def test_without_a_seed_each_time_is_different() -> None:
    """Generators that agree on 100 draws would have the same seed."""
    assert draws(100, seed=None) != draws(100, seed=None)


def test_chance_comes_from_the_generator_alone() -> None:
    """torch's global random state is neither used nor changed."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws(50, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draws(50, seed=3) == first


def test_drawing_leaves_the_logits_alone() -> None:
    """The caller still displays them."""
    logits = LOGITS.clone()
    draws(5, logits, top_k=2, top_p=0.5, min_p=0.1)
    assert torch.equal(logits, LOGITS)


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1, expected a number of at least 0"),
        ({"top_p": -0.1}, "top-p is -0.1, expected a number from 0 to 1"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"top_p": math.nan}, "top-p is nan"),
        ({"top_p": math.inf}, "top-p is inf"),
        ({"min_p": -0.1}, "min-p is -0.1"),
        ({"min_p": 1.1}, "min-p is 1.1"),
        ({"min_p": math.nan}, "min-p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    """The error names the option and its limits."""
    with pytest.raises(UsageError, match=f"^{says}"):
        Sampling(**options)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_that_is_accepted_works(seed: int) -> None:
    """The smallest and the largest seed."""
    assert draws(3, seed=seed) == draws(3, seed=seed)
