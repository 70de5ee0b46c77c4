"""The learn subcommands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_scratch.learn import solution
from llama_scratch.learn.chapters import CHAPTERS
from llama_scratch.learn.exercises import EXERCISES
from tests.helpers.command_line import Runner

SOLUTION = Path(solution.__file__)


def test_the_list_has_every_chapter_and_function(llama_scratch: Runner) -> None:
    out = llama_scratch("learn").out
    assert all(title in out for title in CHAPTERS)
    assert all(exercise.function in out for exercise in EXERCISES)
    assert {exercise.chapter for exercise in EXERCISES} == set(range(len(CHAPTERS)))


def test_a_task_is_the_signature_and_the_docstring(llama_scratch: Runner) -> None:
    out = llama_scratch("learn", "task", "3").out
    assert out.startswith('def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:\n    """Divide each row')
    assert "sqrt" not in out


@pytest.mark.parametrize("chapter", range(len(CHAPTERS)))
def test_no_task_shows_the_solution(llama_scratch: Runner, chapter: int) -> None:
    out = llama_scratch("learn", "task", str(chapter)).out
    assert "return" not in out.replace("returns", "")
    assert out.count('"""') == 2 * sum(exercise.chapter == chapter for exercise in EXERCISES)


def test_a_solution_is_python_that_passes(llama_scratch: Runner, tmp_path: Path) -> None:
    file = tmp_path / "my_llama.py"
    file.write_text("from torch import Tensor\n" + llama_scratch("learn", "solution", "3").out)
    result = llama_scratch("learn", "check", "3", str(file))
    assert (result.code, result.out) == (0, "right  rms_norm\n")


def test_a_wrong_function(llama_scratch: Runner, tmp_path: Path) -> None:
    file = tmp_path / "my_llama.py"
    file.write_text("def rms_norm(x, weight, eps):\n    return x / (x * x).mean(-1, keepdim=True).sqrt()\n")
    result = llama_scratch("learn", "check", "3", str(file))
    assert result.code == 1
    assert result.out.startswith("wrong  rms_norm\n")
    as_json = llama_scratch("learn", "check", "3", str(file), "--json")
    (found,) = json.loads(as_json.out)["functions"]
    assert found["function"] == "rms_norm"
    assert "differ" in found["problem"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("task", "18"), "There is no chapter 18. Chapters go from 0 to 17."),
        (("task", "-1"), ""),
        (("check", "3", "no_such_file.py"), "no_such_file.py is not a file."),
    ],
)
def test_bad_arguments(llama_scratch: Runner, arguments: tuple[str, ...], said: str) -> None:
    result = llama_scratch("learn", *arguments)
    assert result.code == 2
    assert said in result.err
