"""Each known mistake is named, alone and inside the whole network."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from llama_scratch.learn import child, mistakes, solution
from llama_scratch.learn.exercises import EXERCISES, Exercise
from llama_scratch.learn.mistakes import MISTAKES, USES, Mistake

BY_NAME = {exercise.function: exercise for exercise in EXERCISES}
IDS = [f"{mistake.function}-{i}" for i, mistake in enumerate(MISTAKES)]


@pytest.fixture(autouse=True)
def without_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_real_inputs", lambda exercise: [])


def module_with(**functions: Any) -> ModuleType:
    """A reader's module with these functions."""
    return cast(ModuleType, SimpleNamespace(__file__="my_llama.py", **functions))


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_a_mistake_is_named(mistake: Mistake) -> None:
    exercise = BY_NAME[mistake.function]
    if exercise.function == "forward":
        module = module_with(forward=mistake.wrong, block=solution.block)
    else:
        module = module_with(**{mistake.function: mistake.wrong})
    said = child.check(exercise, module)
    assert said.startswith(mistake.sentence)


# A network whose first position is 1 is right: only distances between positions matter.
SHIFTED = next(mistake for mistake in MISTAKES if mistake.function == "rotations")
INSIDE = [mistake for mistake in MISTAKES if mistake.function in USES["forward"] and mistake is not SHIFTED]


@pytest.mark.parametrize("mistake", INSIDE, ids=[f"{m.function}-{i}" for i, m in enumerate(INSIDE)])
def test_a_mistake_is_named_inside_the_network(mistake: Mistake) -> None:
    said = child.check(BY_NAME["forward"], mistakes.solution_with(mistake))
    assert said.startswith(mistake.sentence)
    first = "The embedding differs" if mistake.function == "embed" else "The first layer that differs is layer 0"
    assert first in said


def test_the_first_position_does_not_matter() -> None:
    assert child.check(BY_NAME["forward"], mistakes.solution_with(SHIFTED)) == ""


def positions(function: str, number: int) -> str:
    """Which positions the network's check says are wrong, for one of the mistakes of a function."""
    found = [mistake for mistake in MISTAKES if mistake.function == function]
    said = child.check(BY_NAME["forward"], mistakes.solution_with(found[number]))
    return said[len(found[number].sentence) :].lower()


def test_positions_tell_mistakes_apart() -> None:
    """Rotation does not change position 0, and one token alone has no one else to attend to."""
    for function, number in (("frequencies", 0), ("rotate", 0), ("rotate", 1), ("attention", 2)):
        assert "position 0 is right" in positions(function, number)
    for function, number in (("attention", 0), ("grouped_attention", 0)):
        assert "every position differs, also the first" in positions(function, number)


@pytest.mark.parametrize("exercise", EXERCISES, ids=BY_NAME)
def test_the_solution_passes(exercise: Exercise) -> None:
    assert child.check(exercise, solution) == ""


def test_an_unknown_mistake_is_described_by_its_positions_and_its_layer() -> None:
    def block(x: Any, w: Any, freqs_cis: Any, args: Any) -> Any:
        return solution.block(x, w, freqs_cis, args) * 1.001

    wrong = mistakes.solution_with(Mistake("block", "", block))
    said = child.check(BY_NAME["forward"], wrong)
    assert "differ" in said
    assert said.endswith("The first layer that differs is layer 0.")


def test_only_the_output_is_wrong() -> None:
    def forward(ids: Any, weights: Any, args: Any) -> Any:
        return solution.forward(ids, weights, args) + 1

    said = child.check(BY_NAME["forward"], module_with(forward=forward, block=solution.block))
    assert "the first layer" not in said.lower()


@pytest.mark.parametrize(
    ("function", "returned", "said"),
    [
        ("softmax", None, "It returns None, expected a tensor of shape (7,)"),
        ("softmax", [1.0], "It returns a list, expected a tensor of shape (7,)"),
        ("entropy", "two bits", "It returns a str, expected a number"),
        ("bpe", (1, 2), "It returns a tuple, expected a list"),
        ("quantize", 3, "It returns an int, expected a tuple of 2 values"),
        ("fact_head", "L0.H0", "It returns 'L0.H0', expected"),
    ],
)
def test_results_of_a_wrong_type(function: str, returned: object, said: str) -> None:
    problem = child.check(BY_NAME[function], module_with(**{function: lambda *inputs: returned}))
    assert problem.startswith(said)


def test_functions_get_copies() -> None:
    """A function that changes its inputs does not change what the next check compares with."""

    def softmax(logits: Any) -> Any:
        result = solution.softmax(logits)
        logits.zero_()
        return result

    assert child.check(BY_NAME["softmax"], module_with(softmax=softmax)) == ""
