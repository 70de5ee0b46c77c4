"""Commands that change the text and settings, on a small model without a terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.render import reports
from llama_scratch.render.text import as_text
from llama_scratch.repl.batch import answer_all
from llama_scratch.repl.commands import COMMANDS, completions, escaped, is_command, unescaped
from llama_scratch.repl.commands.registry import by_heading, split
from llama_scratch.repl.commands.session import START_WITH
from llama_scratch.repl.commands.text import _edited
from llama_scratch.repl.conversation import Chat
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.editor import _Commands
from llama_scratch.repl.keyboard import Keyboard
from llama_scratch.repl.live import is_live
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.sampling import GREEDY
from llama_scratch.system.progress import Progress, silent
from tests.helpers.assertions import assert_rejected


@pytest.fixture(scope="module")
def llama(smollm2_fp32_path: Path) -> Llama:
    return Llama.load(smollm2_fp32_path, precision="fp32")


@pytest.fixture
def session(llama: Llama) -> Session:
    return new_session(llama)


def new_session(llama: Llama) -> Session:
    """A session without a terminal."""

    def open_other(source: str, precision: str, progress: Progress) -> Llama:
        return Llama.load(source, precision=precision, progress=progress)

    return Session(Loading.ended_with(llama), Console(file=io.StringIO(), width=80), Settings(5, 0, GREEDY), open_other)


def run(session: Session, *lines: str) -> dict[str, Any]:
    """Run lines and return the last answer. Check that each is JSON."""
    for line in lines:
        output = respond(session, line)[0]
        json.dumps(output)
    return output


def rejected(session: Session, line: str) -> str:
    """Return the error message for a line. Check that the session is unchanged."""
    before = (session.state.snapshots, vars(session.settings).copy(), session.state.turns.copy())
    message = assert_rejected(lambda: respond(session, line), LlamaScratchError, exact=False)
    assert (session.state.snapshots, vars(session.settings), session.state.turns) == before
    return message


HEADINGS = [
    *("Text", "Predictions", "Interpretability", "Interventions", "Network", "Sampling", "Chat"),
    *("Model", "Session"),
]


def test_every_command_is_listed_in_a_group_with_a_line_that_fits() -> None:
    assert list(by_heading()) == HEADINGS
    assert [command.name for group in by_heading().values() for command in group] == list(COMMANDS)
    assert {name: found.summary for name, found in COMMANDS.items() if not 10 < len(found.summary) <= 64} == {}


def test_each_object_begins_with_the_name_of_its_command(session: Session) -> None:
    run(session, "The capital of France is")
    for line in ("/top 3", "/greedy", "/context", "/memory", "/info", "/help", "/force ␣Paris", "/undo", "/history"):
        output = run(session, line)
        assert next(iter(output.items())) == ("command", line[1:].split()[0])


# --- The text ---


def test_force_takes_the_token_as_it_is_shown_quoted_or_by_its_id(session: Session) -> None:
    expected = [*run(session, "The capital of France is")["tokens"], {"id": 7042, "text": " Paris"}]
    for token in ("␣Paris", '" Paris"', "#7042"):
        run(session, "The capital of France is")
        assert run(session, f"/force {token}")["tokens"] == expected


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("␣Paris␣is", "is 2 tokens"),
        ("#99999", "not a token id"),
        ("xylophonic", "Give one token"),
        ('""', "empty text"),
    ],
)
def test_force_refuses_what_is_not_one_token(session: Session, token: str, said: str) -> None:
    run(session, "The capital of France is")
    assert said in rejected(session, f"/force {token}")


def test_force_and_generate_need_a_text(session: Session) -> None:
    for line in ("/force ␣Paris", "/generate", "/surprisal", "/undo"):
        rejected(session, line)


def test_undo_goes_back_step_by_step_and_computes_nothing(session: Session, llama: Llama) -> None:
    first = run(session, "The capital of France is")
    run(session, "/force ␣Paris", "Another text")
    cached = llama.engine.cached_tokens
    assert run(session, "/undo")["prompt"] == "The capital of France is Paris"
    assert run(session, "/undo")["next"] == first["next"]
    assert llama.engine.cached_tokens == cached
    assert "nothing to undo" in rejected(session, "/undo")


def test_an_empty_line_accepts_what_is_offered(session: Session) -> None:
    run(session, "The capital of France is")
    assert run(session, "")["prompt"] == "The capital of France is Paris"
    run(session, "/generate 3")
    assert run(session, "")["prompt"].startswith("The capital of France is Paris.")


def test_generate_draws_as_the_settings_say(session: Session, llama: Llama) -> None:
    run(session, "Once upon a time")
    greedy = run(session, "/generate 8")
    assert greedy["ids"] == list(llama.complete("Once upon a time", 8).ids)
    assert greedy["finish_reason"] == "length"
    run(session, "/temperature 1.5", "/seed 7")
    drawn = run(session, "/generate 8")
    assert drawn["ids"] == run(session, "/generate 8")["ids"]
    assert drawn["ids"] != greedy["ids"]
    run(session, "/greedy")
    assert run(session, "/generate 8") == greedy


def test_a_new_conversation_has_no_view_to_draw_yet(session: Session) -> None:
    run(session, "The capital of France is", "/tokens")
    assert session.state.page is not None
    run(session, "/system Be brief.")
    assert session.state.page is None


def test_clear_forgets_the_text(session: Session) -> None:
    run(session, "The capital of France is", "/clear")
    assert session.now is None
    assert run(session, "/context")["tokens"] == 0


def test_context_counts_the_text_and_the_cache(session: Session) -> None:
    run(session, "The capital of France is")
    assert run(session, "/context") == {
        "command": "context",
        "text": "The capital of France is",
        "tokens": 5,
        "context": 8192,
        "trained_for": 8192,
        "cached": 5,
    }


# --- Settings ---


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("/top 2", {"top": 2}),
        ("/temperature 0.5", {"temperature": 0.5}),
        ("/top-k 40", {"top_k": 40}),
        ("/top-p 0.9", {"top_p": 0.9}),
        ("/min-p 0.1", {"min_p": 0.1}),
        ("/seed 3", {"seed": 3}),
        ("/seed off", {"seed": None}),
        ("/live off", {"live": False}),
        ("/special on", {"special": True}),
    ],
)
def test_a_setting_is_changed_and_then_shown(session: Session, line: str, facts: dict[str, Any]) -> None:
    assert facts.items() <= run(session, line).items()
    assert facts.items() <= run(session, line.split()[0]).items()


def test_top_changes_the_next_answer(session: Session) -> None:
    assert len(run(session, "/top 2", "The capital of France is")["top"]) == 2


def test_special_reads_names_of_special_tokens(session: Session) -> None:
    name, id = "<|im_end|>", session.llama.tokenizer.special_tokens["<|im_end|>"]
    plain = run(session, name)
    assert len(plain["tokens"]) > 1
    assert "read as plain text" in plain["warnings"][0]
    special = run(session, "/special on", f"Hello{name}")
    assert special["tokens"][-1]["id"] == id
    assert special["warnings"] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/top", None),
        ("/top 0", "at least 1"),
        ("/top five", "whole number"),
        ("/temperature -1", "temperature is -1"),
        ("/temperature warm", "Use a number"),
        ("/temperature nan", "nan"),
        ("/top-p 2", "from 0 to 1"),
        ("/top-k -1", "at least 0"),
        ("/seed -1", "at least 0"),
        ("/live maybe", "on or off"),
        ("/generate 0", "at least 1"),
        ("/greedy now", "takes no argument"),
        ("/force", "needs an argument"),
        ("/precision fp7", "expected one of auto, fp32"),
        ("/model nowhere/at/all", "no model at"),
        ("/edit", "needs a terminal"),
        ("/serprisal", "Did you mean /surprisal"),
        ("/help serprisal", "Did you mean /surprisal"),
        ("/help me", "Unknown command /me"),
    ],
)
def test_a_command_that_cannot_be_meant_gets_a_sentence(session: Session, line: str, said: str | None) -> None:
    run(session, "The capital of France is")
    if said is None:
        run(session, line)
    else:
        assert said in rejected(session, line)


# --- Another model ---


def test_precision_answers_the_text_again_in_the_one_asked_for(session: Session) -> None:
    run(session, "The capital of France is")
    output = run(session, "/precision bf16")
    assert output["precision"] == "bf16"
    assert session.now is not None
    assert session.now.prediction.model.precision == "bf16"
    assert session.now.prediction.prompt == "The capital of France is"


def test_a_model_that_cannot_be_loaded_leaves_all_as_it_was(session: Session, tmp_path: Path) -> None:
    before = session.llama
    run(session, "The capital of France is")
    (tmp_path / "broken.gguf").write_bytes(b"not one")
    rejected(session, f"/model {tmp_path / 'broken.gguf'}")
    assert session.llama is before


def test_another_model_takes_the_text_as_characters(session: Session, tiny_dir: Path) -> None:
    run(session, "Hello", f"/model {tiny_dir}")
    assert session.llama.info.name == "Tiny-Llama"
    assert session.text_of(session.ids) == "Hello"


# --- Chat ---


def test_a_saved_chat_goes_on_after_it_is_loaded(session: Session, llama: Llama, tmp_path: Path) -> None:
    run(session, "/system Be brief.", "What is the capital of France?", "And of Italy?")
    run(session, f"/save {tmp_path / 'chat.jsonl'}")
    other = new_session(llama)
    run(other, f"/load {tmp_path / 'chat.jsonl'}")
    assert session.state.chat is not None
    assert other.state.chat is not None
    assert other.state.chat.messages(other.ids, other.llama.tokenizer) == session.state.chat.messages(
        session.ids, session.llama.tokenizer
    )
    assert [message.role for message in other.state.chat.messages(other.ids, other.llama.tokenizer)] == [
        "system",
        *["user", "assistant"] * 2,
    ]
    assert run(other, "Thanks!")["tokens"] == run(session, "Thanks!")["tokens"]


def test_another_precision_keeps_a_chat_and_another_model_ends_it(session: Session, tiny_dir: Path) -> None:
    run(session, "/chat", "What is the capital of France?")
    ids = session.ids
    run(session, "/precision fp32")
    assert session.ids == ids
    assert session.state.chat is not None
    assert len(session.state.chat.messages(session.ids, session.llama.tokenizer)) == 2
    run(session, f"/model {tiny_dir}")
    assert session.state.chat is None


# --- Completion ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/gree", ["/greedy"]),
        ("/live ", ["/live on", "/live off"]),
        ("/live of", ["/live off"]),
        ("/precision f", ["/precision fp32", "/precision fp16"]),
        ("/help top-", ["/help top-k", "/help top-p"]),
        ("/nothing ", []),
    ],
)
def test_completion(session: Session, line: str, expected: list[str]) -> None:
    assert completions(session, line) == expected


def test_force_completes_the_candidates_of_the_answer(session: Session) -> None:
    run(session, "The capital of France is")
    assert completions(session, "/force ␣P") == ["/force ␣Paris"]


# --- Warnings ---


def test_a_doubled_bos_is_explained(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir)
    assert llama.tokenizer.bos_id is not None
    name = llama.token(llama.tokenizer.bos_id).text
    warned = [str(sentence) for sentence in llama.predict(f"{name}Hello", special=True).warnings]
    assert any("twice" in sentence for sentence in warned)
    assert not any("twice" in sentence for sentence in llama.predict("Hello", special=True).warnings)


def test_more_context_than_the_model_was_trained_for_is_explained(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, context=30)
    llama.args = replace(llama.args, max_seq_len=20)
    ids = llama.encode("Hello")[-1:]
    assert llama.predict(ids * 20).warnings == ()
    beyond = llama.predict(ids * 21).warnings
    assert len(beyond) == 1
    assert "trained for up to 20" in beyond[0]
    with pytest.raises(UsageError):
        llama.predict(ids * 31)


def test_a_context_beyond_the_trained_one_can_be_asked_for(tiny_dir: Path) -> None:
    trained = Llama.load(tiny_dir).args.max_seq_len
    assert Llama.load(tiny_dir, context=trained + 1).context == trained + 1


def test_silent_progress_is_what_opening_gets(session: Session, tiny_dir: Path) -> None:
    assert session.open(str(tiny_dir), "fp32", silent).info.precision == "fp32"


# --- Failures keep the session ---


def test_a_long_number_and_a_long_name_are_refused(session: Session, tmp_path: Path) -> None:
    run(session, "The capital of France is")
    rejected(session, f"/force #{'9' * 5000}")
    rejected(session, f"/save {tmp_path / ('x' * 300)}")


def test_switching_that_is_interrupted_changes_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run(session, "The capital of France is", "/force ␣Paris")
    before = (session.state.loading, session.state.snapshots)
    closed: list[Llama] = []
    monkeypatch.setattr(Llama, "close", lambda llama: closed.append(llama))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        respond(session, "/precision bf16")
    assert (session.state.loading, session.state.snapshots) == before
    assert len(closed) == 1
    assert closed[0] is not session.llama


@pytest.mark.slow
def test_a_loaded_chat_takes_only_its_messages_as_such(session: Session, llama: Llama, tmp_path: Path) -> None:
    run(session, "/chat", "//bin is what?", "/generate 2", f"/save {tmp_path / 'chat.jsonl'}")
    other = new_session(llama)
    run(other, f"/load {tmp_path / 'chat.jsonl'}")
    assert session.state.chat is not None
    assert other.state.chat is not None
    assert other.state.chat.messages(other.ids, other.llama.tokenizer) == session.state.chat.messages(
        session.ids, session.llama.tokenizer
    )
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    damaged = [line.replace('"tokens"', '"tokenz"') for line in lines]
    (tmp_path / "damaged.jsonl").write_text("\n".join(damaged) + "\n")
    run(other, f"/load {tmp_path / 'damaged.jsonl'}")


def test_a_text_of_another_model_is_loaded_as_characters(
    session: Session, llama: Llama, tiny_dir: Path, tmp_path: Path
) -> None:
    run(session, "Hello", f"/model {tiny_dir}", "/force #5", f"/save {tmp_path / 'two.jsonl'}")
    text = session.text_of(session.ids)
    other = new_session(llama)
    assert run(other, f"/load {tmp_path / 'two.jsonl'}")["same_model"] is False
    assert other.text_of(other.ids) == text


def test_generated_text_is_not_wrapped_in_a_pipe() -> None:
    from rich.text import Text

    from llama_scratch.render.text import as_text

    assert as_text(Text("word " * 60)) == "word " * 60


@pytest.mark.parametrize("command", ["/top-k", "/seed", "/temperature"])
def test_a_number_beyond_all_bounds_is_refused_or_taken(session: Session, command: str) -> None:
    run(session, "The capital of France is")
    if command == "/top-k":
        assert run(session, f"{command} 1{'0' * 400}")["top_k"] == 10**400
    else:
        assert len(rejected(session, f"{command} 1{'0' * 400}")) < 200


def test_settings_that_nothing_can_be_answered_with_are_refused() -> None:
    for top, generate in ((0, 0), (1, -1)):
        with pytest.raises(UsageError):
            Settings(top, generate, GREEDY)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfthe nation\n", "the nation"),
        (b"the\r\nnation\r\n", "the\r\nnation"),
        (b"<html>\n", "<html>"),
        (b"caf\xe9", "caf\ufffd"),
    ],
)
def test_an_edited_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, text: str) -> None:
    """The text is read without a byte order mark and the final line break."""
    (tmp_path / "text").write_bytes(content)
    monkeypatch.setenv("VISUAL", f"cp {tmp_path / 'text'}")
    assert _edited("before") == text


def test_an_edited_text_that_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes("the nation".encode("utf-16"))
    monkeypatch.setenv("VISUAL", f"cp {tmp_path / 'text'}")
    with pytest.raises(LlamaScratchError, match="UTF-16"):
        _edited("before")
    (tmp_path / "text").write_bytes(b"a" * ((1 << 24) + 1))
    with pytest.raises(LlamaScratchError, match="bytes"):
        _edited("before")


@pytest.mark.parametrize(
    ("line", "name", "argument"),
    [
        ("/top\t3", "top", "3"),
        ("/tokens\nthe\n end", "tokens", "the\n end"),
        ("/tokens\N{IDEOGRAPHIC SPACE}the", "tokens", "the"),
        (" /top".strip(), "top", ""),
        ("/ top  3 ", "top", "3"),
    ],
)
def test_any_white_space_separates_a_command_from_its_argument(line: str, name: str, argument: str) -> None:
    assert split(line) == (name, argument)


@pytest.mark.parametrize(
    "line",
    [
        "/tree 2x2\t1",
        "/neurons 0\t3",
        "/steer 3\t2\nthe | end",
        "/patch L0@0\tThe capital of Spain is",
        "/lens ranks\t0",
    ],
)
def test_any_white_space_separates_the_parts_of_an_argument(session: Session, line: str) -> None:
    respond(session, "The capital of France is")
    respond(session, line)


def test_a_commands_argument_is_completed_after_any_white_space(session: Session) -> None:
    assert completions(session, "/live\to") == ["/live\ton", "/live\toff"]


@pytest.mark.parametrize("text", ["/usr/bin/env", "//x", "/", "the / end", "", " /x"])
def test_a_text_that_returns_to_the_line_is_escaped(text: str) -> None:
    assert unescaped(escaped(text)) == text
    assert not is_command(escaped(text))


def said(session: Session, line: str) -> str:
    """Return the text that a command shows."""
    _, reply = respond(session, line)
    assert reply
    assert reply.view is not None
    return as_text(reply.view)


def test_live_is_not_said_to_be_on_where_it_is_not(session: Session) -> None:
    assert "not available in a pipe" in said(session, "/live on")
    session.screen.keyboard = cast(Keyboard, object())
    assert said(session, "/live on") == " Live prediction is on."
    assert is_live(session)
    session.change_settings(plain=True)
    assert "not available with --plain" in said(session, "/live")
    session.change_settings(plain=False)
    session.update(chat=Chat())
    assert "not available in a chat" in said(session, "/live")
    assert "outside the chat" in said(session, "/top")
    assert "insert the text" not in said(session, "/help")
    session.update(chat=None)
    said(session, "/live off")
    assert not is_live(session)
    assert "suggested token" not in said(session, "/help")
    session.screen.keyboard = None
    assert "Alt-Enter" not in said(session, "/help")


def test_a_pipe_exports_the_lines_that_were_answered(session: Session, tmp_path: Path) -> None:
    lines = ["The capital of France is", "/top 2", "The capital of France is", f"/export {tmp_path}/x.md"]
    log = Console(file=io.StringIO())
    assert answer_all(session, lines, "lines", commands=True, log=log) == 0
    text = (tmp_path / "x.md").read_text()
    assert text.count("> The capital of France is") == 2
    assert text.count('" Paris"') == 2
    assert text.count('" the"') == 1  # /top 2 asked for it


def test_a_pipe_without_commands_keeps_nothing_for_an_export(session: Session) -> None:
    session.screen.records_turns = False
    answer_all(session, ["the"], "lines", commands=False, log=Console(file=io.StringIO()))
    assert session.screen.views == []


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_help_begins_with_commands_to_start_with(width: int) -> None:
    """It has two columns from 100 columns on, and every command at any width."""
    view = reports.Groups(
        {"Start with": {"/why": "x"}}
        | {heading: {f"/{c.name}": c.summary for c in commands} for heading, commands in by_heading().items()}
    )
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    rows = cast(io.StringIO, console.file).getvalue().splitlines()
    assert rows[0].split()[:2] == ["Start", "with"]
    assert all(len(row) <= width for row in rows)
    assert (len(rows[0].split()) > 2) is (width >= 100)
    assert {f"/{name}" for name in COMMANDS} <= set(" ".join(rows).split())


def test_the_menu_shows_the_group_and_sentence_of_each_command(session: Session) -> None:
    menu = _Commands(session).get_completions(Document("/"), CompleteEvent())
    about = {completion.display_text: completion.display_meta_text for completion in menu}
    assert about == {f"/{c.name}": f"{c.heading}: {c.summary}" for c in COMMANDS.values()}
    assert set(START_WITH) <= set(COMMANDS)
