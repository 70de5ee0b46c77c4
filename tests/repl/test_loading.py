"""Startup: the prompt appears at once, and the model loads while the user types."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.base import name_of
from llama_scratch.errors import CheckpointError
from llama_scratch.repl.loading import Loading
from llama_scratch.system.progress import Progress
from tests.helpers.terminal import Slow, Terminal

pytestmark = pytest.mark.terminal

LOADING = "No torch yet 42 %"
BANNER = "1 M parameters"
ANSWER = "␣comes"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    """A session at its first prompt, while its model is loading."""
    with Slow(tmp_path) as terminal:
        terminal.wait_for("Slow-Llama>")
        terminal.wait_for(LOADING)
        yield terminal


def waiting(slow: Slow) -> None:
    """Send a prompt before the model is loaded."""
    slow.type("What", "enter")
    slow.wait_for("━")


def last_line(terminal: Terminal) -> str:
    return terminal.text.splitlines()[-1]


def test_the_prompt_comes_before_torch_and_the_model(slow: Slow) -> None:
    """The prompt shows the loading stage. Then the banner replaces it."""
    assert BANNER not in slow.text
    slow.let()
    slow.wait_for(BANNER)
    slow.settle(0.2)
    assert "42 %" not in slow.text
    assert last_line(slow).startswith("Slow-Llama> ")
    assert slow.text.count("Slow-Llama>") == 1


def test_what_is_typed_survives_the_end_of_loading(slow: Slow) -> None:
    slow.type("Wh")
    slow.wait_for("> Wh")
    slow.let()
    slow.wait_for(BANNER)
    slow.wait_for("> Wh")
    slow.type("at")
    slow.wait_for("> What")
    assert last_line(slow) == "Slow-Llama> What"
    assert slow.text.count("Wh") == 1
    slow.type("enter")
    slow.wait_for(ANSWER)


def test_enter_before_the_model_is_there_is_answered_once_it_is(slow: Slow) -> None:
    waiting(slow)
    slow.let()
    slow.wait_for(ANSWER)
    slow.wait_for("(Enter accepts)")
    assert "━" not in slow.text
    assert slow.text.index("> What") < slow.text.index(BANNER) < slow.text.index(ANSWER)
    assert slow.seen(BANNER) == 1


def test_ctrl_c_cancels_the_waiting_alone_and_offers_the_prompt_again(slow: Slow) -> None:
    waiting(slow)
    slow.interrupt()
    slow.wait_for("Cancelled.")
    slow.wait_for(LOADING)
    assert last_line(slow).startswith("Slow-Llama> What ")
    slow.let()
    slow.wait_for(BANNER)
    slow.type("enter")
    slow.wait_for(ANSWER)
    assert slow.seen("Traceback") == 0


def test_a_prompt_that_was_cancelled_is_offered_only_once(slow: Slow) -> None:
    waiting(slow)
    slow.interrupt()
    slow.wait_for("Cancelled.")
    slow.wait_for(LOADING)
    slow.type("ctrl-c", "ctrl-c")
    slow.wait_for("press Ctrl-D or enter /quit")
    slow.settle(0.2)
    assert "What" not in last_line(slow)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [("ModelNotFoundError", 3), ("CheckpointError", 4), ("OutOfMemoryError", 5), ("ZeroDivisionError", 1)],
)
def test_a_loading_that_fails_ends_the_session_with_its_code(slow: Slow, error: str, code: int, asked: bool) -> None:
    """Covers an idle prompt and an answer that waits for the model."""
    if asked:
        waiting(slow)
    else:
        slow.type("What")
        slow.wait_for("> What")
    slow.let(error)
    assert slow.wait() == code
    shown = "".join(slow.lines)
    assert shown.count("The model fell over.") == 1
    assert shown.count("llama-scratch: ") == 1
    assert slow.seen("Traceback") == 0
    assert slow.seen("\x1b[?2004h") == slow.seen("\x1b[?2004l")  # bracketed paste is turned off again


@pytest.mark.parametrize("keys", [["ctrl-d"], ["/quit", "enter"]])
def test_leaving_does_not_wait_for_the_model(slow: Slow, keys: list[str]) -> None:
    """The model never loads, so a program that waited for the thread would hang."""
    slow.type(*keys)
    assert slow.wait() == 0
    assert slow.seen("Traceback") == 0


def test_leaving_while_torch_is_imported_is_quiet(smollm2_path: Path) -> None:
    with Terminal("--model", "smollm2") as terminal:
        terminal.wait_for("Starting torch")
        terminal.type("ctrl-d")
        assert terminal.wait() == 0
        assert terminal.seen("Traceback") == 0


def test_commands_that_need_no_model_work_while_it_loads(slow: Slow) -> None:
    slow.type("/help", "enter")
    slow.wait_for("Exit the session.")
    slow.type("/hlep", "enter")
    slow.wait_for("Did you mean /help?")
    slow.type("enter")
    slow.wait_for(LOADING)
    slow.let()
    slow.wait_for(BANNER)
    assert slow.seen(BANNER) == 1


def test_plain_shows_no_number_that_changes(tmp_path: Path) -> None:
    with Slow(tmp_path, "--plain") as slow:
        slow.wait_for("No torch yet …")
        assert "%" not in slow.text


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--model-dir", "/nowhere/at/all"], 3, "There is no model at"),
        (["--model-dir", "/nowhere", "--temperature", "-1"], 2, "temperature is -1"),
        (["--model-dir", "/nowhere", "--model", "smollm2"], 2, "Both --model and --model-dir"),
    ],
)
def test_what_is_known_to_be_wrong_is_said_before_the_prompt(arguments: list[str], code: int, sentence: str) -> None:
    with Terminal(*arguments) as terminal:
        assert terminal.wait() == code
        assert sentence in terminal.text
        assert ">" not in terminal.text


def test_the_name_on_the_prompt_is_the_models(tiny_dir: Path, smollm2_path: Path, tmp_path: Path) -> None:
    """The name derived from the path equals the loaded model's name."""
    copy = tmp_path / "Llama3.2-1B" / "original"
    shutil.copytree(tiny_dir, copy)
    (tmp_path / "link").symlink_to(copy)
    for path in (tiny_dir, smollm2_path, copy, tmp_path / "link", Path(os.path.relpath(tiny_dir))):
        assert name_of(path) == open_checkpoint(path).name


def test_waiting_reports_the_stage_and_raises_what_loading_raised() -> None:
    stages: list[str] = []

    def load(progress: Progress) -> None:
        progress("reading", 1, 2)
        while "reading" not in stages:
            pass
        raise CheckpointError("damaged")

    loading = Loading("name", load)  # type: ignore[arg-type]
    assert not loading.ended
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            loading.wait(lambda stage, done, total: stages.append(stage))
    assert loading.ended
    assert loading.name == "name"
    assert "reading" in stages
