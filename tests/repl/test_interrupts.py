"""Ctrl-C at random moments in every stage: the session survives and answers correctly."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.terminal import Terminal, ask, candidates, start

pytestmark = pytest.mark.terminal

LONG = "word " * 700 + "end"
STAGES = {"prefill": LONG, "decode": "/generate 400", "tree": "/tree 5x4", "surprisal": f"/surprisal {LONG}"}


def elapse(session: Terminal, seconds: float) -> None:
    """Read the screen for a given time."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and session.read(min(left, 0.02)):
        pass


def answers_right(session: Terminal) -> None:
    """Clear the session and check a known answer."""
    session.type("/live off", "enter", "/clear", "enter")
    session.settle(0.5)
    assert candidates(ask(session, "The capital of France is"))[-5][0] == "␣Paris"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_any_moment_of_what_takes_long(smollm2_path: Path, tmp_path: Path, stage: str) -> None:
    """15 times per stage: the work is cancelled or complete, and the prompt returns."""
    moments = random.Random(stage)
    with start(tmp_path, "--no-live") as session:
        ask(session, "Once upon a time")
        for _ in range(15):
            if STAGES[stage].endswith(LONG):
                session.paste(STAGES[stage])
            else:
                session.type(STAGES[stage])
            elapse(session, 0.05)
            session.type("enter")
            elapse(session, moments.random() * 0.5)
            session.interrupt()
            elapse(session, 0.05)
            session.interrupt()  # the work may already be complete
            session.type("ctrl-c")  # clear the line
        session.settle(1)
        answers_right(session)
        assert session.seen("Traceback") == 0, session.written_from("Traceback")


@pytest.mark.slow
def test_ctrl_c_while_live_prediction_runs(smollm2_path: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    with start(tmp_path) as session:
        for _ in range(15):
            session.type("The quick brown fox jumps over"[: moments.randrange(4, 30)])
            elapse(session, moments.random() * 0.2)
            session.interrupt()
            session.type("ctrl-c")
        answers_right(session)
        assert session.seen("Traceback") == 0, session.written_from("Traceback")


@pytest.mark.slow
def test_ctrl_c_while_the_model_loads_keeps_the_line(tmp_path: Path) -> None:
    """15 times: Enter waits for the model, and Ctrl-C restores the line. Finally it is answered."""
    gate = tmp_path / "gate"
    program = (sys.executable, "-m", "tests.helpers.slow_llama", str(gate))
    moments = random.Random(0)
    (tmp_path / "model").mkdir()
    options = ("--model-dir", str(tmp_path / "model"))
    with Terminal(*options, program=program, env={"XDG_STATE_HOME": str(tmp_path)}) as session:
        session.wait_for("> ")
        session.type("What")
        for _ in range(15):
            elapse(session, moments.random() * 0.05)
            cancelled = session.seen("Cancelled.")
            session.type("enter")
            elapse(session, 0.05 + moments.random() * 0.2)
            while session.seen("Cancelled.") == cancelled:  # ignored between the line and its command
                session.interrupt()
                elapse(session, 0.2)
        gate.write_text("")
        session.settle(0.5)
        session.type("enter")
        session.wait_for("␣comes")
        assert session.seen("Traceback") == 0, session.written_from("Traceback")
