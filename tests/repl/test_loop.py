"""The session on a real pseudo-terminal, with the open model's real weights."""

from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import SMOLLM2_FP32
from tests.helpers.terminal import ANSWERED, Terminal, ask, candidates

pytestmark = pytest.mark.terminal

# Memory-mapped float32, which starts faster than converting 4-bit weights.
MODEL = ("--model-dir", str(SMOLLM2_FP32), "--precision", "fp32")


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty folder for the history."""
    return {"XDG_STATE_HOME": str(tmp_path)}


@pytest.fixture(scope="module")
def shared(smollm2_fp32_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with start({"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}) as terminal:
        yield terminal


@pytest.fixture
def session(shared: Terminal) -> Terminal:
    """The shared session, reset: an empty line, no text, a cleared screen."""
    shared.type("ctrl-c", "/live on", "enter", "/clear", "enter")
    shared.settle()
    return shared


def start(state: dict[str, str], *arguments: str, columns: int = 80) -> Terminal:
    """Start a session and wait until its model is loaded."""
    terminal = Terminal(*MODEL, *arguments, env=state, columns=columns)
    terminal.wait_for("lists the commands")
    terminal.wait_for("\n\n")  # the line below the banner
    terminal.wait_for(">")
    return terminal


def test_a_prompt_is_answered_with_the_token_and_its_probability(session: Terminal) -> None:
    assert "SmolLM2-135M-Instruct> " in session.text + " "
    text = ask(session, "The capital of France is")
    rows = candidates(text)
    assert rows[0] in (["␣Paris", "77.3", "%"], ["␣Paris", "77.2", "%"])  # depends on the order of summation
    assert rows[1] in (["␣the", "6.5", "%"], ["␣the", "6.4", "%"])
    assert len(rows) == 5


def test_enter_on_an_empty_line_accepts_the_token_and_goes_on(session: Terminal) -> None:
    ask(session, "The capital of France is")
    session.type("enter")
    session.wait_for("The capital of France is Paris\n")
    session.settle()
    assert "6 tokens, 5 cached" in session.text
    session.type("enter")
    session.wait_for("The capital of France is Paris.\n")
    session.settle()
    assert r" \n" in session.text  # the next token is a line break, and can be seen


def test_enter_on_an_empty_line_before_any_answer_does_nothing(session: Terminal) -> None:
    session.type("enter", "enter")
    session.settle()
    assert "%" not in session.text
    assert "␣Paris" in ask(session, "The capital of France is")


def test_ctrl_c_clears_the_line_and_never_ends_the_program(session: Terminal) -> None:
    session.type("half a thou")
    session.wait_for("half a thou")
    session.type("ctrl-c")
    session.settle()
    assert "half a thou" not in session.text
    session.type("ctrl-c")
    session.wait_for("press Ctrl-D or enter /quit")
    session.type("ctrl-c", "ctrl-c")
    assert "␣Paris" in ask(session, "The capital of France is")


@pytest.mark.slow
def test_ctrl_c_at_any_moment_never_ends_the_program(session: Terminal) -> None:
    """During computation, printing or the return to the prompt, the session survives and stays correct."""
    moments = random.Random(0)
    for _ in range(60):
        session.type(moments.choice(["The capital", "", "/help"]), "enter")
        session.settle(moments.random() * 0.1)
        for _ in range(6):
            session.interrupt()
            session.read(moments.random() * 0.02)
    session.settle(1)
    assert "␣Paris" in ask(session, "The capital of France is")
    assert candidates(session.text)[-5][0] == "␣Paris"
    assert session.seen("Traceback") == 0, session.written_from("Traceback")


def test_ctrl_c_cancels_what_is_running(smollm2_fp32_path: Path, state: dict[str, str]) -> None:
    with start(state, "--generate", "2000") as session:
        session.type("Once upon a time", "enter")
        session.wait_for("…, the")
        session.interrupt()
        session.wait_for("stopped")
        session.settle()
        shown = session.text
        session.type("ctrl-d")
        assert session.wait() == 0
        assert "Traceback" not in shown


def test_ctrl_c_during_a_long_prompt_leaves_the_session_answering(session: Terminal) -> None:
    session.command("/live off", "is off")  # otherwise the live thread may read it before Enter
    session.paste("word " * 6000 + "end")
    session.settle()
    session.type("enter")
    session.wait_for("Reading")
    session.interrupt()
    session.wait_for("Cancelled.")
    session.command("/live on", "is on")
    assert "␣Paris" in ask(session, "The capital of France is")
    assert candidates(session.text)[-5][0] == "␣Paris"


def test_ctrl_d_and_quit_end_it(smollm2_fp32_path: Path, state: dict[str, str]) -> None:
    for keys in (["ctrl-d"], ["/quit", "enter"]):
        with start(state) as session:
            session.type(*keys)
            assert session.wait() == 0


def test_the_history_is_kept_between_sessions_and_for_oneself(
    smollm2_fp32_path: Path, state: dict[str, str], tmp_path: Path
) -> None:
    with start(state) as session:
        ask(session, "The capital of France is")
        session.type("ctrl-d")
        assert session.wait() == 0
    history = tmp_path / "llama-scratch" / "history"
    assert "The capital of France is" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with start(state) as session:
        session.type("up")
        session.wait_for("> The capital of France is")


def test_ctrl_r_searches_the_history_and_enter_asks_again(session: Terminal) -> None:
    ask(session, "The capital of France is")
    ask(session, "Once upon a time")
    session.type("ctrl-r", "capital")
    session.wait_for("I-search backward: capital")
    session.settle()
    assert "(Enter accepts)" not in session.text  # a search does not find the hint of an empty line
    session.type("ctrl-c")  # ends the search only
    session.settle()
    session.type("ctrl-r", "capital", "enter")
    session.settle()
    answers = session.seen(ANSWERED)
    session.type("enter")
    session.wait_for_more(ANSWERED, answers)
    session.settle()
    assert [row[0] for row in candidates(session.text)].count("␣Paris") == 2


def test_a_history_that_cannot_be_kept_is_said_and_nothing_else_fails(
    smollm2_fp32_path: Path, state: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "llama-scratch").write_text("a file where the folder should be")
    with start(state) as session:
        assert "history cannot be saved" in session.text
        assert "␣Paris" in ask(session, "The capital of France is")


def test_a_paste_of_several_lines_is_one_prompt(session: Terminal) -> None:
    session.type("/live off", "enter")
    session.wait_for("is off")
    session.paste("One line\nand 日本語 🎉 another")
    session.wait_for("another")
    session.settle()
    assert "entropy" not in session.text
    session.type("enter")
    session.wait_for("entropy")
    assert session.text.count("entropy") == 1


def test_help_lists_the_commands_and_a_mistyped_one_names_the_nearest(session: Terminal) -> None:
    session.type("/help", "enter")
    session.wait_for("Begin a prompt with a slash")
    assert "/quit" in session.text
    assert "Ctrl-C" in session.text
    session.type("/qiut", "enter")
    session.wait_for("Did you mean /quit?")
    session.type("/quit now", "enter")
    session.wait_for("takes no argument")
    assert "entropy" in ask(session, "//usr/bin")


def test_a_prompt_beyond_the_context_is_a_sentence_and_the_session_goes_on(
    smollm2_fp32_path: Path, state: dict[str, str]
) -> None:
    with start(state, "--context", "6") as session:
        session.type("one two three four five six seven eight", "enter")
        session.wait_for("expected at most 6")
        assert "␣Paris" in ask(session, "The capital of France is")
        session.type("enter")
        session.wait_for("France is Paris\n")
        session.settle()
        session.type("enter")  # the seventh token
        session.wait_for("The prompt has 7 tokens")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_nothing_is_wider_than_the_terminal(smollm2_fp32_path: Path, state: dict[str, str], columns: int) -> None:
    """A line that wrapped by mistake would put a bar at the start of a line."""
    with start(state, columns=columns) as session:
        text = ask(session, "The capital of France is")
    assert len(candidates(text)) == 5
    assert all(len(line) <= columns for line in text.splitlines())
    assert not any(line.strip().startswith("█") for line in text.splitlines())


def test_plain_has_no_bars_and_no_colors(smollm2_fp32_path: Path, state: dict[str, str]) -> None:
    with start(state, "--plain") as session:
        text = ask(session, "The capital of France is")
        assert 'Next token: " Paris", 77.' in text
        assert "█" not in text
        cells = [session.screen.buffer[row][column] for row in range(40) for column in range(80)]
        assert {(cell.fg, cell.bg) for cell in cells} == {("default", "default")}


def test_a_dumb_terminal_works(smollm2_fp32_path: Path, state: dict[str, str]) -> None:
    with start(state | {"TERM": "dumb"}) as session:
        assert "␣Paris" in ask(session, "The capital of France is")
        session.type("ctrl-d")
        assert session.wait() == 0


def test_the_first_start_asks_before_it_fetches(tmp_path: Path) -> None:
    environment = {"XDG_DATA_HOME": str(tmp_path), "HOME": os.environ["HOME"]}
    with Terminal(env=environment) as terminal:
        terminal.wait_for("Download SmolLM2-135M-Instruct")
        terminal.wait_for("93 MB, license: Apache-2.0")
        terminal.type("n", "enter")
        assert terminal.wait() == 3
        assert "llama-scratch pull smollm2" in " ".join(terminal.text.split())


def test_a_terminal_to_type_on_and_a_file_to_print_to(
    smollm2_fp32_path: Path, state: dict[str, str], tmp_path: Path
) -> None:
    """If standard output is a file, typed lines are prompts and the file gets one line each."""
    out = tmp_path / "out"
    command = f"{sys.executable} -m llama_scratch --model smollm2 --quiet > {out}"
    with Terminal(program=("/bin/sh", "-c", command), env=state) as terminal:
        terminal.type("The capital of France is", "enter")
        terminal.type("ctrl-d")
        assert terminal.wait() == 0
    assert out.read_text() == '" Paris"\t0.7727\t7042\n'


@pytest.mark.slow
def test_a_session_that_is_killed_in_the_middle_of_a_turn_loses_no_line(
    smollm2_fp32_path: Path, state: dict[str, str], tmp_path: Path
) -> None:
    with start(state) as session:
        ask(session, "The capital of France is")
        session.type("/generate 2000", "enter")
        session.wait_for("…")
        session.kill()
        session.wait()
    lines = (tmp_path / "llama-scratch" / "history").read_text().splitlines()
    assert [line for line in lines if line.startswith("+")] == ["+The capital of France is", "+/generate 2000"]
    with start(state) as session:
        session.type("up")
        session.wait_for("/generate 2000")


@pytest.mark.slow
def test_a_window_that_is_resized_while_text_streams(session: Terminal) -> None:
    ask(session, "Once upon a time")
    session.type("/generate 120", "enter")
    session.wait_for("…")
    for columns, rows in ((50, 20), (120, 40), (80, 40)):
        session.resize(columns, rows)
        session.read(0.3)
    session.wait_for("⏎")
    session.type("/clear", "enter")
    assert candidates(ask(session, "The capital of France is"))[-5][0] == "␣Paris"


SLOWLY = """
import time
from llama_scratch.precision import packing
pack = packing.to_panels
def slowly(*arguments):
    time.sleep(0.25)
    return pack(*arguments)
packing.to_panels = slowly
from llama_scratch.__main__ import main
main()
"""


def test_ctrl_c_while_an_answer_waits_for_packed_weights_leaves_the_session_answering(
    tiny_dir: Path, state: dict[str, str]
) -> None:
    """Packing continues in the background, and the next line is answered."""
    options = ("--model-dir", str(tiny_dir), "--precision", "int8", "--no-live")
    with Terminal(*options, program=(sys.executable, "-c", SLOWLY), env=state) as session:
        session.wait_for("lists the commands")
        session.type("the nation", "enter")
        session.wait_for("Packing ━")
        session.interrupt()
        session.wait_for("Cancelled.")
        session.command("in the end", "entropy")
        assert "int8" in session.text
        assert session.seen("Traceback") == 0
        session.type("ctrl-d")
        assert session.wait() == 0
