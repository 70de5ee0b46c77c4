"""Keys between prompts: typing and pasting during an answer, Ctrl-C, Ctrl-Z, and exits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.terminal import Slow, Terminal

pytestmark = pytest.mark.terminal

PROMPT = "Slow-Llama> "


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    """A session in the middle of an answer."""
    with Slow(tmp_path, "--no-live") as terminal:
        answering(terminal)
        yield terminal


def answering(terminal: Slow) -> None:
    """Load the model and start a continuation; wait for its first token."""
    terminal.let()
    terminal.wait_for("lists the commands")
    terminal.command("What", "entropy")
    terminal.type("/generate 100", "enter")
    terminal.stream(" one")
    terminal.wait_for(" … one")


def until(terminal: Terminal, condition: Callable[[], bool]) -> None:
    """Read until a condition holds."""
    end = time.monotonic() + terminal.timeout
    while not condition():
        assert time.monotonic() < end, terminal.text
        terminal.read()


def line(terminal: Terminal) -> str:
    """The newest prompt and the text after it."""
    return "\n".join(terminal.text.rpartition(PROMPT)[1:])


def test_keys_during_an_answer_are_not_echoed_and_come_to_the_next_prompt(slow: Slow) -> None:
    slow.type("typed ahead")
    slow.stream(" two", None)
    slow.wait_for("> typed ahead")
    assert " … one two\n" in slow.text
    assert slow.text.count("typed ahead") == 1


def test_enter_during_an_answer_sends_the_line_after_it(slow: Slow) -> None:
    slow.type("/help top", "enter", "/help seed", "enter", "draft")
    slow.stream(" two", None)
    slow.wait_for("> draft")
    assert " … one two\n" in slow.text
    assert slow.text.index("> /help top") < slow.text.index("Show N candidates")
    assert slow.text.index("Show N candidates") < slow.text.index("> /help seed")


def test_a_paste_of_several_lines_during_an_answer_stays_in_one_piece(slow: Slow) -> None:
    answers = slow.seen("entropy")
    slow.paste("first line\nsecond line\nthird line")
    slow.stream(" two", None)
    slow.wait_for("… third line")
    assert slow.text.count("first line") == 1
    assert slow.text.splitlines()[-3:] == [f"{PROMPT}first line", "… second line", "… third line"]
    assert slow.seen("entropy") == answers


def test_a_paste_that_the_end_of_the_answer_cuts_stays_in_one_piece(slow: Slow) -> None:
    slow.type("\x1b[200~first line\n")
    slow.stream(" two", None)
    slow.wait_for(" two")
    slow.type("second line\x1b[201~")
    slow.wait_for("… second line")
    assert slow.text.splitlines()[-2:] == [f"{PROMPT}first line", "… second line"]


def test_ctrl_c_is_heard_behind_a_paste_that_fills_the_terminals_buffer(slow: Slow) -> None:
    """A full terminal buffer (about 4,096 bytes) would block Ctrl-C too."""
    slow.paste("word " * 4000 + "end")
    slow.settle(0.1)
    slow.interrupt()
    slow.wait_for("stopped")
    slow.wait_for("word end")


def test_a_key_that_nothing_is_bound_to_and_a_lone_escape_do_no_harm(slow: Slow) -> None:
    slow.type("\x1b")
    slow.settle(0.7)
    slow.type("a")
    slow.stream(None)
    slow.wait_for("> a")


@pytest.mark.parametrize("by", ["ctrl-d", "sigterm", "sighup"])
def test_the_terminal_is_given_back_however_the_session_ends(slow: Slow, by: str) -> None:
    assert not slow.echoes
    assert slow.marks_pastes
    if by == "ctrl-d":
        slow.type("ctrl-d")
        slow.stream(None)
    else:
        slow.signal(signal.SIGTERM if by == "sigterm" else signal.SIGHUP)
    until(slow, lambda: slow.echoes)
    assert slow.wait() == {"ctrl-d": 0, "sigterm": 143, "sighup": 129}[by]
    assert not slow.marks_pastes


def test_another_program_gets_the_terminal_as_a_shell_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nstty -a | grep -o '.echo ' | tr -d '\\n'; read -r answer; echo got:$answer\n")
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(editor))
    with Slow(tmp_path, "--no-live") as slow:
        slow.let()
        slow.wait_for("lists the commands")
        slow.type("/edit", "enter")
        slow.wait_for(" echo")
        slow.type("typed", "enter")
        slow.wait_for("got:typed")
        slow.wait_for("The text is unchanged")
        slow.type("on")
        slow.wait_for(f"{PROMPT}on")


# --- Ctrl-Z -----------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Slow]:
    """A session in the middle of an answer, started from a shell."""
    with Slow(tmp_path, "--no-live", shell=True) as terminal:
        answering(terminal)
        yield terminal


def to_shell(job: Slow) -> None:
    """Press Ctrl-Z and wait until the shell runs a command."""
    job.type("ctrl-z")
    job.wait_for("Stopped")
    until(job, lambda: job.lines[job.screen.cursor.y].startswith("$"))
    assert job.echoes or "bash" in job.text  # a shell with line editing echoes by itself
    assert not job.marks_pastes
    job.type("echo sh''ell", "enter")
    job.wait_for("\nshell")


def test_ctrl_z_during_an_answer_suspends_and_fg_goes_on(job: Slow) -> None:
    job.type("typed ahead")
    to_shell(job)
    job.type("fg", "enter")
    until(job, lambda: not job.echoes)
    job.stream(" two", None)
    job.wait_for(f"{PROMPT}typed ahead")
    assert job.text.count("typed ahead") == 1
    assert job.seen(" two") == 1
    job.type("ctrl-c", "ctrl-d")
    until(job, lambda: job.echoes)


def test_ctrl_z_at_the_prompt_suspends_and_fg_shows_the_line_again(job: Slow) -> None:
    job.stream(None)
    job.wait_for("␣one")
    job.type("half a line")
    job.wait_for("> half a line")
    to_shell(job)
    assert "^Z" not in job.text
    seen = job.seen("half a line")
    job.type("fg", "enter")
    job.wait_for_more("half a line", seen)
    job.type(", whole")
    job.wait_for(f"{PROMPT}half a line, whole")
    job.type("ctrl-c", "/quit", "enter")
    until(job, lambda: job.echoes)


@pytest.mark.parametrize("at", ["the prompt", "an answer"])
def test_a_suspended_session_can_be_ended(job: Slow, at: str) -> None:
    """It does not set terminal modes in the background, which would stop it again."""
    if at == "the prompt":
        job.stream(None)
        job.wait_for("␣one")
    to_shell(job)
    asked = job.seen("\x1b[6n")
    job.type("kill %1; kill -CONT %1; while kill -0 %1 2>/dev/null; do sleep 0.1; done; echo en''ded", "enter")
    job.wait_for("ended")
    assert job.echoes
    assert job.seen("\x1b[6n") == asked  # the reply would go to the shell


def test_a_prompt_that_is_continued_in_the_background_stops_again(job: Slow, tmp_path: Path) -> None:
    job.stream(None)
    job.wait_for("␣one")
    to_shell(job)
    job.type(
        f"bg; while jobs >{tmp_path}/jobs; ! grep -q Stopped {tmp_path}/jobs; do sleep 0.1; done; echo ag''ain", "enter"
    )
    job.wait_for("again")
    job.type("fg", "enter")
    until(job, lambda: not job.echoes)
    job.type("here", "enter")
    job.wait_for(f"{PROMPT}here")


# --- Restored text, and a terminal without a screen -------------------------------------------


def test_a_text_that_begins_with_a_slash_comes_back_as_it_is_typed(tmp_path: Path) -> None:
    with Slow(tmp_path, "--no-live") as slow:
        slow.let()
        slow.wait_for("lists the commands")
        slow.command("//usr/bin/env", "entropy")
        slow.type("tab")
        slow.wait_for(f"{PROMPT}//usr/bin/env comes")
        slow.type("enter")
        slow.wait_for_more("entropy", slow.seen("entropy"))
        assert "Unknown command" not in slow.text


@pytest.mark.parametrize(("option", "said"), [("", "prompts, one per line"), ("--prompt -", "the prompt")])
def test_a_terminal_whose_output_is_a_pipe_is_told_to_type(tmp_path: Path, option: str, said: str) -> None:
    with Slow(tmp_path, *option.split(), shell=True, after="2>&1 | cat") as slow:
        slow.let()
        slow.wait_for(f"Reading {said}")
        slow.wait_for("Ctrl-D ends")
