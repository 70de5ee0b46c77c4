"""The chapters of the textbook: outputs of cells, included source, exercises, and lines for a session."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_scratch import model
from llama_scratch.book import cells
from llama_scratch.learn.chapters import CHAPTERS
from llama_scratch.learn.exercises import exercises_of
from tests.helpers import ROOT

FILES = cells.chapters()
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FILES}


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    """The cells load the model by its name."""
    monkeypatch.setenv("XDG_DATA_HOME", str(smollm2_path.parents[3]))


def test_there_is_a_chapter_for_each_exercise() -> None:
    assert [path.name[:2] for path in FILES] == [f"{number:02}" for number in range(len(CHAPTERS))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cells_print_what_the_chapter_says(path: Path) -> None:
    text = TEXTS[path.name]
    again = cells.run(text)
    assert list(cells.differences(text, again)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_chapter_has_a_question_and_its_exercises(path: Path) -> None:
    text, number = TEXTS[path.name], int(path.name[:2])
    heading, question = text.split("\n\n")[:2]
    assert heading == f"# {number} · {CHAPTERS[number]}"
    assert re.fullmatch(r"\*\*.+\?\*\*", question, re.DOTALL)
    assert f"llama-scratch learn check {number} my_llama.py" in text
    exercise = text[text.index("## Exercise") :]
    assert [each.function for each in exercises_of(number) if f"`{each.function}(" not in exercise] == []


def test_every_part_of_the_network_is_in_a_chapter() -> None:
    included = " ".join(kind for text in TEXTS.values() for kind, _ in cells.blocks(text))
    parts = [
        name
        for name, part in vars(model).items()
        if getattr(part, "__module__", "") == model.__name__ and callable(part)
    ]
    # The cache is described in words: it is memory management.
    assert [name for name in parts if f"source=model.{name}" not in included] == ["KVCache"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a 0.25 b", "a 0.26 b", True),
        ("a 0.25 b", "a 0.27 b", False),
        ("77.3 %", "77.2 %", True),
        ("1,987", "1,988", True),
        ("1,987", "1,990", False),
        ("5 tokens", "6 tokens", True),
        ("' Paris'", "' Rome'", False),
        ("6e-08", "7e-08", True),
        ("[1.0]", "[1.0, 2.0]", False),
        ("L29", "H29", False),
        ("L29", "L31", False),
    ],
)
def test_outputs_may_differ_in_the_last_digit(old: str, new: str, expected: bool) -> None:
    assert cells.same(old, new) is expected


def test_run_rewrites_outputs_and_source() -> None:
    text = (
        "# T\n\n```python\nx = 2\nprint(x)\n```\n\n```text\nold\n```\n\n```python\nprint(x + 1)\n```\n\n"
        "```python source=model.causal_mask\nold\n```\n"
    )
    again = cells.run(text)
    assert "```text\n2\n```" in again
    assert "```text\n3\n```" in again
    assert "def causal_mask(" in again
    assert cells.run(again) == again
    assert len(list(cells.differences(again, again.replace("\n2\n", "\n9\n")))) == 1


@pytest.mark.slow
def test_the_lines_for_a_session_run(smollm2_path: Path) -> None:
    """All of them, in one session."""
    blocks = [content for text in TEXTS.values() for kind, content in cells.blocks(text) if kind == "console"]
    lines = [line for content in blocks for line in content.splitlines() if not line.startswith("$ ")]
    program = [sys.executable, "-m", "llama_scratch", "--model", "smollm2", "--precision", "fp32", "--commands"]
    result = subprocess.run(program, input="\n".join(lines), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert len(lines) > 25
