"""Live prediction: the colors, the bottom line and the gray token, on a real pseudo-terminal with real weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyte.screens import Char

from llama_scratch.render import colors
from tests.helpers.terminal import Terminal, start

pytestmark = pytest.mark.terminal

PROMPT = "SmolLM2-135M-Instruct> "
# Appears only on the bottom line.
BELOW = "· entropy"


@pytest.fixture(scope="module")
def shared(smollm2_fp32_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with start(tmp_path_factory.mktemp("state")) as terminal:
        yield terminal


@pytest.fixture
def session(shared: Terminal) -> Terminal:
    """The shared session, reset: no text, an empty line, a cleared screen."""
    shared.type("ctrl-c", "/clear", "enter")
    shared.settle()
    return shared


def typed(terminal: Terminal, text: str, following: str) -> str:
    """Type a text and return the screen once the bottom line shows the token that follows it."""
    terminal.type(text)
    bottom(terminal, following)
    return terminal.text


def bottom(terminal: Terminal, token: str) -> None:
    """Wait until the bottom line shows a token for the current line, in bold, and the screen is complete."""
    end = time.monotonic() + terminal.timeout
    while terminal.lines[-1].split()[:1] != [token] or not terminal.screen.buffer[39][1].bold:
        if time.monotonic() > end or not terminal.read():
            raise AssertionError(f"{token} did not come; the screen shows:\n{terminal.text}")
    terminal.settle()


def line(terminal: Terminal) -> str:
    """The input line with the gray suggestion."""
    return next(line for line in reversed(terminal.lines) if line.startswith(PROMPT.rstrip()))


def styles(terminal: Terminal) -> dict[str, Char]:
    """The last cell of each word on the input line."""
    row = next(row for row in reversed(range(40)) if terminal.lines[row].startswith(PROMPT))
    cells = [terminal.screen.buffer[row][column] for column in range(len(PROMPT), 100)]
    found: dict[str, Char] = {}
    word = ""
    for cell in cells:
        if cell.data == " ":
            word = ""
        else:
            found.pop(word, None)
            word += cell.data
            found[word] = cell
    return found


def test_the_bottom_line_shows_the_next_token_its_probability_and_the_entropy(session: Terminal) -> None:
    text = typed(session, "The capital of France is", "␣Paris")
    below = session.lines[-1]
    assert below.split()[:3] in (["␣Paris", "77.3", "%"], ["␣Paris", "77.2", "%"])
    assert "entropy 2.1" in below
    assert "5 tokens" in below
    assert "%" not in text.replace(below, "")  # no answer yet


def test_the_gray_token_behind_the_cursor_is_the_next_one_and_tab_accepts_it(session: Terminal) -> None:
    typed(session, "The capital of France is", "␣Paris")
    assert line(session) == f"{PROMPT}The capital of France is Paris"
    assert session.screen.cursor.x == len(f"{PROMPT}The capital of France is")
    session.type("tab")
    bottom(session, ".")
    assert session.screen.cursor.x == len(f"{PROMPT}The capital of France is Paris")
    assert "6 tokens" in session.lines[-1]
    session.type("enter")
    session.wait_for("6 tokens,")
    session.settle()
    assert "│ . │" in session.text  # the answer to the accepted text


def test_the_right_arrow_accepts_it_too_and_only_at_the_end_of_the_line(session: Terminal) -> None:
    typed(session, "The capital of France is", "␣Paris")
    session.type("left", "right")
    session.settle(0.5)
    assert session.screen.cursor.x == len(f"{PROMPT}The capital of France is")
    session.type("right")
    bottom(session, ".")
    assert line(session).startswith(f"{PROMPT}The capital of France is Paris")
    assert session.screen.cursor.x == len(f"{PROMPT}The capital of France is Paris")


def test_shift_tab_offers_the_runner_up(session: Terminal) -> None:
    typed(session, "The capital of France is", "␣Paris")
    session.type("shift-tab")
    bottom(session, "␣the")
    assert line(session) == f"{PROMPT}The capital of France is the"
    session.type("tab")
    session.settle()
    assert session.screen.cursor.x == len(f"{PROMPT}The capital of France is the")


def test_on_an_empty_line_shift_tab_offers_the_runner_up_and_enter_accepts_that(session: Terminal) -> None:
    session.type("The capital of France is", "enter")
    session.wait_for("␣Paris  (Enter accepts)")
    session.type("shift-tab")
    session.wait_for("␣the  (Enter accepts)")
    session.type("enter")
    session.wait_for("The capital of France is the\n")


def test_on_an_empty_line_tab_brings_the_text_back_with_what_was_offered(session: Terminal) -> None:
    session.type("The capital of France is", "enter")
    session.wait_for("␣Paris  (Enter accepts)")
    session.type("tab")
    session.settle()
    assert line(session).startswith(f"{PROMPT}The capital of France is Paris")


def test_what_surprises_the_model_has_another_style(session: Terminal) -> None:
    """Without 24-bit color, a surprising token is reversed."""
    typed(session, "The capital of France is", "␣Paris")
    found = styles(session)
    assert found["capital"].reverse  # over eight bits
    assert not found["of"].reverse  # under one bit
    assert not found["The"].reverse  # not predicted


def test_what_surprises_the_model_has_another_background_in_24_bit_color(tmp_path: Path) -> None:
    with start(tmp_path, env={"COLORTERM": "truecolor"}) as session:
        typed(session, "The capital of France is", "␣Paris")
        found = styles(session)
    assert f"#{found['capital'].bg}" == colors.SURPRISE["dark"][3]
    assert found["of"].bg == found["The"].bg == "default"


def test_a_line_that_changes_is_read_anew(session: Terminal) -> None:
    typed(session, "The capital of France is", "␣Paris")
    session.type(*["\x7f"] * len("France is"))
    typed(session, "Germany is", "␣Berlin")


def test_live_off_and_no_live_show_nothing(session: Terminal, tmp_path: Path) -> None:
    session.type("/live off", "enter")
    session.wait_for("Live prediction is off")
    session.type("The capital of France is")
    session.settle(1)
    assert BELOW not in session.text
    session.type("ctrl-c")
    session.type("/live on", "enter")
    session.wait_for("Live prediction is on")
    typed(session, "The capital of France is", "␣Paris")
    with start(tmp_path, "--no-live") as other:
        other.type("The capital of France is")
        other.settle(1)
        assert BELOW not in other.text


def test_plain_output_has_no_live_prediction(smollm2_fp32_path: Path, tmp_path: Path) -> None:
    with start(tmp_path, "--plain") as session:
        session.type("The capital of France is")
        session.settle(1)
        assert session.text.endswith("The capital of France is")


def test_a_command_is_not_read_by_the_model_and_its_end_is_offered(session: Terminal) -> None:
    session.type("/gree")
    session.settle(0.5)
    assert line(session) == f"{PROMPT}/greedy"
    assert BELOW not in session.text
    session.type("right", "enter")
    session.wait_for("always the most probable token")


def test_tab_completes_a_command_and_its_argument(session: Terminal) -> None:
    session.type("/liv", "tab")
    session.settle(0.5)
    assert line(session).startswith(f"{PROMPT}/live")
    session.type(" of", "tab")
    session.settle(0.5)
    assert line(session).startswith(f"{PROMPT}/live off")


@pytest.mark.slow
def test_enter_does_not_wait_for_a_long_paste_to_be_read(session: Terminal) -> None:
    """Pastes and sends 10,000 characters. The answer reuses the live thread's tokens."""
    session.paste("word " * 2000 + "end")
    session.type("enter")
    begin = time.monotonic()
    session.wait_for("· 2001 tokens, ")
    assert time.monotonic() - begin < 20


@pytest.mark.slow
def test_a_paste_of_10000_characters_is_read_live_and_can_be_left(session: Terminal) -> None:
    session.paste("word " * 2000 + "end")
    session.settle(1)
    session.type("ctrl-c")
    session.settle(0.5)
    assert line(session).startswith(PROMPT.rstrip())
    assert session.lines[-1].split()[:1] != ["word"]
    session.type("The capital of France is", "enter")
    session.wait_for("Paris")


@pytest.mark.parametrize("columns", [40, 60])
def test_the_bottom_line_fits_a_narrow_terminal(smollm2_fp32_path: Path, tmp_path: Path, columns: int) -> None:
    with start(tmp_path, columns=columns) as session:
        session.type("The capital of France is")
        bottom(session, "␣Paris")
        assert "77." in session.lines[-1]
        assert not session.lines[-2]  # the line did not wrap


@pytest.mark.slow
def test_resizing_while_a_line_is_typed_keeps_it(session: Terminal) -> None:
    typed(session, "The capital of France is", "␣Paris")
    try:
        session.resize(60, 30)
        session.settle(0.5)
        session.type(" Paris")
        session.settle(1)
        assert "The capital of France is Paris" in session.text.replace("\n", "")
        session.type("enter")
        session.wait_for("6 tokens,")
    finally:
        session.resize(100, 40)
        session.settle()
