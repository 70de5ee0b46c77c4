"""/picture: every view as a file."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from llama_scratch.errors import LlamaScratchError
from llama_scratch.llama import Llama
from llama_scratch.render.page import Page, Paragraph
from llama_scratch.repl.commands import COMMANDS, completions, run_command
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import GREEDY
from llama_scratch.system.progress import Progress


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture
def session(tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session without a text, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def open(source: str, precision: str, progress: Progress) -> Llama:
        return Llama.load(source, precision=precision, device="cpu", progress=progress)

    console = Console(file=io.StringIO(), width=80)
    return Session(loading=Loading.ended_with(tiny), console=console, settings=Settings(5, 0, GREEDY), open=open)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/tokens the na\x1btion", ["Tokens", "\\x1b"]),
        ("/surprisal", ["Surprisal", "perplexity"]),
        ("/tree 2x2", ["Continuation tree", "1.2", "2.1"]),
        ("/choices the | <b>", ["Choices", "&lt;b&gt;", "One of them"]),
        ("/diff the nation | the tion", ["Two texts", "after the first"]),
        ("/compare bf16", ["Two models", "KL divergence"]),
    ],
)
def test_each_view_of_a_text_can_be_drawn(session: Session, line: str, expected: list[str]) -> None:
    session.predict("the nation")
    run_command(session, line)
    reply = run_command(session, "/picture a.html")[1]
    assert reply is not None
    assert reply.note
    assert reply.facts == {"path": "a.html", "title": expected[0]}
    page = Path("a.html").read_text()
    assert page.startswith("<!doctype html>")
    for words in expected:
        assert words in page.replace("<wbr><i>␣</i>", " ")
    run_command(session, "/picture a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_view_the_answer_is_drawn(session: Session) -> None:
    prediction = session.predict("the nation")
    run_command(session, "/picture a.html")
    page = Path("a.html").read_text()
    assert "Next-token prediction" in page
    assert f"id {prediction.next.id}, log-probability" in page


def test_after_another_answer_that_one_is_drawn(session: Session, tiny_dir: Path, tmp_path: Path) -> None:
    """Every way to a new answer replaces the last view."""
    respond(session, "the")
    respond(session, f"/save {tmp_path / 'session.jsonl'}")
    for line in (
        "the nation", "/undo", "/force #60", "", "/precision bf16", "/ablate L0.H0 mean", "/undo", "/ablate L0.H0",
        "/restore", f"/load {tmp_path / 'session.jsonl'}", f"/model {tiny_dir}",
    ):  # fmt: skip
        respond(session, "/tokens")
        assert session.state.page is not None
        assert session.state.page.title == "Tokens"
        respond(session, line)
        assert (session.state.page and session.state.page.title) == (
            "Before and after" if "/ablate" in line else None
        ), line
        session.update(snapshots=session.state.snapshots * 2)
    respond(session, "/tokens")
    respond(session, "/clear")
    with pytest.raises(LlamaScratchError, match="nothing to draw yet"):
        run_command(session, "/picture a.html")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a.txt", "Invalid file name 'a.txt' for /picture. End it in .png or .html."),
        ("a", "Invalid file name 'a'"),
        ("there.html", "already exists"),
        ("link.png", "already exists"),
        ("there.html/a.png", "cannot be written"),
        ("~nobody-at-all/a.png", "cannot be resolved"),
    ],
)
def test_where_nothing_is_drawn(session: Session, argument: str, expected: str) -> None:
    Path("there.html").write_text("mine")
    Path("link.png").symlink_to("away")
    session.update(page=Page("A view", (Paragraph("x"),)))
    with pytest.raises(LlamaScratchError) as error:
        run_command(session, f"/picture {argument}")
    assert expected in str(error.value)
    assert sorted(os.listdir()) == ["link.png", "there.html"]
    assert Path("there.html").read_text() == "mine"


def test_before_anything_was_shown(session: Session) -> None:
    with pytest.raises(LlamaScratchError, match="nothing to draw yet"):
        run_command(session, "/picture a.html")
    assert not os.listdir()


def test_its_files_are_completed_and_no_replay_writes_them(session: Session) -> None:
    Path("apple.html").touch()
    assert completions(session, "/picture ap") == ["/picture apple.html"]
    assert not COMMANDS["picture"].replayed
