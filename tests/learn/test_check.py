"""Checks of files in a process of their own, with every way to fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.learn import solution
from llama_scratch.learn.check import Checked, check

SOLUTION = Path(solution.__file__)
RIGHT = "import torch\ndef softmax(x):\n    return x.softmax(-1)\ndef entropy(p):\n    return 0.0\n"


def problem(tmp_path: Path, source: str, chapter: int = 0) -> str:
    """The first problem of a file."""
    file = tmp_path / "my_llama.py"
    file.write_text(source)
    return next((checked.problem for checked in check(chapter, file) if checked.problem), "")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "The file has no function softmax. Write it."),
        ("def softmax(x)\n", "Line 1 is not Python: "),
        ("import no_such_module\n", "Line 1 raises ModuleNotFoundError: "),
        ("def softmax(x):\n    return 1 / 0\n", "Line 2 raises ZeroDivisionError: division by zero."),
        ("def softmax(x):\n    exit()\n", "It calls exit."),
        ("raise SystemExit(0)\n", "It calls exit."),
        ("raise KeyboardInterrupt\n", "Line 1 raises KeyboardInterrupt."),
        ("def softmax(x, y):\n    return x\n", "It raises TypeError: "),
        ("def softmax(x):\n    return softmax(x)\n", "Line 2 raises RecursionError: "),
    ],
)
def test_files_that_fail(tmp_path: Path, source: str, said: str) -> None:
    assert problem(tmp_path, source).startswith(said)


def test_checks_end_at_the_first_problem(tmp_path: Path) -> None:
    file = tmp_path / "my_llama.py"
    file.write_text(RIGHT)
    first, second = check(0, file)
    assert first == Checked("softmax", "")
    assert second.function == "entropy"
    assert "expected 1.5" in second.problem


def test_printing_does_not_matter(tmp_path: Path) -> None:
    noisy = "import os\nprint('[]')\nos.write(1, b'[]')\n" + RIGHT.replace("return x", "print('{}'); return x")
    assert "entropy" in [checked.function for checked in check(0, _written(tmp_path, noisy))]


@pytest.mark.parametrize(
    "source", ["import os\nos._exit(0)\n", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"]
)
def test_a_file_that_ends_the_process(tmp_path: Path, source: str) -> None:
    with pytest.raises(LlamaScratchError, match=re.escape("chapter 0 ended without a result")):
        check(0, _written(tmp_path, source))


def test_an_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(LlamaScratchError, match="did not end within 3 seconds"):
        check(0, _written(tmp_path, "while True: pass\n"), seconds=3)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        check(0, tmp_path / "none.py")


def test_the_whole_network_on_the_real_model(smollm2_path: Path) -> None:
    """Chapter 9 of the solution, and of a file that forgets the rotation: it still predicts " Paris"."""
    assert [checked.problem for checked in check(9, SOLUTION)] == ["", ""]


def _written(folder: Path, source: str) -> Path:
    file = folder / "my_llama.py"
    file.write_text(source)
    return file
