"""The state of a session after /load, compared with the state before /save.

The lists below name every property. A new property fails the tests until it is in a list.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llama_scratch.cli.options import ModelOptions
from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.repl import recording, session_file
from llama_scratch.repl.conversation import Chat, Question
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.replay import Report, run_again
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import InitialModel, Past, Settings, Snapshot
from llama_scratch.sampling import Sampling
from llama_scratch.system.progress import Progress
from tests.helpers.checkpoints import tokenizer_file, write_meta
from tests.helpers.command_line import Runner
from tests.helpers.session_files import edited

# Properties that /load restores.
RESTORED = {
    "settings",
    "snapshots",
    "past",
    "turns",
    "chat",
    "interventions",
    "changed",
    "initial_model",
    "initial_settings",
    "initial_system",
}
# Properties that keep their value, each with the reason.
KEPT = {
    "loading": "the current model stays loaded; /load reports how it differs",
    "open": "the options of this command line",
    "console": "this terminal",
    "interactive": "this terminal",
    "keyboard": "this terminal",
    "lists_candidates": "this command line (--top)",
    "records_turns": "this command line (--commands)",
    "debug": "this command line",
    "ended": "/quit ends this session",
    "views": "the screen of this terminal, for /export; /load adds the answer",
    "explained": "the warnings that this screen has explained",
}
# Properties that are reset, because neither session's value applies.
BEGUN_ANEW = {
    "page": "the last view was on another screen; /picture draws the answer",
    "walk": "/step recomputes the forward pass and starts at its first stop",
}
SETTINGS = {"top", "generate", "sampling", "special"}
SETTINGS_KEPT = {
    "plain": "belongs to the user at this terminal",
    "live": "belongs to this terminal, unless /live changed it in the saved session",
}
# Options that a replay does not read from the file.
OPTIONS_KEPT = {"model": "the path that the name stands for is saved"}

TEXT_LINES = [
    "/top 7",
    "/temperature 0.5",
    "/top-k 9",
    "/top-p 0.8",
    "/min-p 0.01",
    "/seed 5",
    "/live off",
    "/special on",
    "the nation ",  # ends in a space, which causes a warning
    "",
    "in the<|eot_id|>",
    "/force #104",
    "/ablate L0.H1",
    "/ablate L1.ffn mean",
    "/patch L1@2 an other text",
    "/steer 1 2 the | in",
    "/steer 1 2 the nation | in nation",
    "/undo",
    "/restore -L0.H1",
    "/generate 4",
]
CHAT_LINES = ["/system Be brief.", "/generate 1", "a city?", "//and \U0001f389", "and another?", "/undo", "/undo"]


def load(path: Path, **options: Any) -> Llama:
    chosen: dict[str, Any] = {"precision": "fp32", "device": "cpu", "context": 1024} | options
    return Llama.load(path, **chosen)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model by its name. Tests must not write to it."""
    return write_meta(tmp_path_factory.mktemp("instruct") / "Tiny-Instruct")


@pytest.fixture(scope="module")
def llama(directory: Path) -> Llama:
    return load(directory)


def no_other(_source: str, _precision: str, _progress: Progress) -> Llama:
    raise UsageError("There is no other model here.")


def session_of(
    llama: Llama, *lines: str, open: Callable[[str, str, Progress], Llama] = no_other, **settings: Any
) -> Session:
    session = Session(
        Loading.ended_with(llama),
        Console(file=io.StringIO(), width=60),
        replace(Settings(5, 0, Sampling()), **settings),
        open,
    )
    for line in lines:
        if line.startswith("/system") or not session.ended:
            respond_or_skip(session, line)
    return session


def respond_or_skip(session: Session, line: str) -> None:
    """Run a line. /generate may fail before the first text."""
    try:
        respond(session, line)
    except UsageError:
        if line != "/generate 1":
            raise


def save_and_load(session: Session, into: Session, path: Path) -> None:
    respond(session, f"/save {path}")
    session.state.turns.pop()  # /save itself, which is not in the file
    respond(into, f"/load {path}")
    into.state.turns.pop()


def replayed(path: Path, llama: Llama) -> Report:
    return run_again(session_file.load(path), llama, no_other, Console(file=io.StringIO()))


def texts(session: Session) -> list[Any]:
    """All texts that /undo can restore, with their interventions."""
    return [
        (text.ids, text.prompt, tuple(text.offered or ()), [(i.label, i.meaning, i.recipe) for i in text.interventions])
        for text in session.state.texts
    ]


def attributes(session: Session) -> dict[str, Any]:
    """All attributes of a session, its screen and its state by name."""
    owners = [vars(session), vars(session.screen), vars(session.state)]
    together = {name: value for owner in owners for name, value in owner.items()}
    assert len(together) == sum(map(len, owners))
    return {name: value for name, value in together.items() if name not in ("screen", "state")}


def origin(found: InitialModel | None) -> dict[str, Any]:
    assert found is not None
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    computed = {"tokenizer": found.tokenizer(), "sha256": found.sha256(lambda *_: None)}
    shape = json.loads(json.dumps(found.shape))  # JSON turns tuples into lists
    return values | computed | {"options": dict(found.options), "shape": shape}


def state(session: Session) -> dict[str, Any]:
    """All restored properties, as comparable values."""
    now = session.now
    # /load answers the newest text with the current number of candidates.
    best = session.llama.predict(now.ids, top=session.settings.top) if now else None
    found = {
        "settings": {name: getattr(session.settings, name) for name in SETTINGS},
        "snapshots": (texts(session), best and [(c.id, round(c.logprob, 4)) for c in best.top]),
        "past": None,  # with the snapshots
        "turns": [(turn.input, json.loads(json.dumps(turn.output))) for turn in session.state.turns],
        "chat": session.state.chat
        and (
            session.state.chat.system,
            [q for q in session.state.chat.questions if any(q.ids == i[: len(q.ids)] for i, *_ in texts(session))],
        ),
        "interventions": [(i.label, i.meaning, i.recipe) for i in session.state.interventions],
        "changed": None if session.state.changed is None else sorted(session.state.changed.engine.hooks),
        "initial_model": origin(session.state.initial_model),
        "initial_settings": replace(session.state.initial_settings, live=True, plain=False),
        "initial_system": session.state.initial_system,
    }
    assert found.keys() == RESTORED
    return found


# --- Every property is listed -----------------------------------------------------------------


def test_every_property_has_a_decision(llama: Llama) -> None:
    assert set(attributes(session_of(llama))) == RESTORED | KEPT.keys() | BEGUN_ANEW.keys()
    assert {field.name for field in fields(Settings)} == SETTINGS | SETTINGS_KEPT.keys()
    # Saved as a whole, with all fields.
    assert {field.name for field in fields(Chat)} == {"system", "questions"}
    assert {field.name for field in fields(Question)} == {"messages", "ids"}
    assert {field.name for field in fields(Snapshot)} == {"prediction", "offered", "interventions"}
    assert {field.name for field in fields(Past)} == {"ids", "prompt", "top", "offered", "interventions"}
    # The model's only state is its command line options.
    assert vars(llama).keys() == {
        *("args", "tokenizer", "info", "path", "chat", "context", "engine", "load_s", "options"),
        *("_weights", "_differentiable", *(["warnings"] if hasattr(llama, "warnings") else [])),
    }


@pytest.mark.parametrize(("lines", "generate"), [(TEXT_LINES, 3), ([*TEXT_LINES, *CHAT_LINES], 3)])
def test_nothing_is_as_it_would_be_without_a_file(llama: Llama, lines: list[str], generate: int) -> None:
    """Ensures that the test below detects each property that /load does not restore."""
    session, fresh = session_of(llama, *lines, generate=generate), session_of(llama, "the")
    for field in fields(Settings):
        if field.name != "plain":
            assert getattr(session.settings, field.name) != getattr(fresh.settings, field.name), field.name
    for field in fields(Sampling):
        assert getattr(session.settings.sampling, field.name) != getattr(Sampling(), field.name), field.name
    ours, theirs = state(session), state(fresh)
    same = {name for name in RESTORED if ours[name] == theirs[name]} - {"past", "initial_model"}
    assert same == {"initial_system"} | ({"chat"} if lines is TEXT_LINES else set())


# --- Save, load, compare ----------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("lines", [TEXT_LINES, [*TEXT_LINES, *CHAT_LINES], ["/top 3"], [*TEXT_LINES, "/clear"]])
def test_the_state_after_load_is_the_one_before_save(
    llama: Llama, tmp_path: Path, lines: list[str], dirty: bool
) -> None:
    first = session_of(llama, *lines, generate=3, top=4)
    before = state(first)
    second = session_of(llama)
    if dirty:  # all of it is replaced
        second = session_of(
            llama, "/system Rhyme.", "x", "/ablate L2", "/seed 9", "/chat off", "in", "/step", "/tokens"
        )
        assert second.state.walk is not None
        assert second.state.page is not None
    kept = {name: attributes(second)[name] for name in KEPT}
    save_and_load(first, second, tmp_path / "a.jsonl")
    assert state(second) == before
    assert {name: attributes(second)[name] for name in KEPT} == kept
    assert {name: attributes(second)[name] for name in BEGUN_ANEW} == {"page": None, "walk": None}


def test_what_the_next_lines_do_is_the_same_too(llama: Llama, tmp_path: Path) -> None:
    """Undoes through all texts and interventions, then continues with the seed."""
    rest = ["", "/undo", "/undo", "/undo", "/ablate", "/undo", "/undo", "/generate 3", "", "/tree 2x2 ..", "/undo"]
    first = session_of(llama, *TEXT_LINES, generate=3)
    second = session_of(llama)
    save_and_load(first, second, tmp_path / "a.jsonl")
    for line in rest:
        ours, theirs = (respond(session, line)[0] for session in (first, second))
        for answer in (ours, theirs):
            answer.pop("timing", None)
            answer.pop("entropy_bits", None)
        assert summary(ours) == summary(theirs), line


def summary(answer: dict[str, Any]) -> Any:
    """Round the numbers in an answer."""
    rounded: Any = json.loads(json.dumps(answer), parse_float=lambda digits: round(float(digits), 3))
    return rounded


def test_a_conversation_goes_on(llama: Llama, tmp_path: Path) -> None:
    first, second = session_of(llama, *CHAT_LINES, generate=3), session_of(llama)
    save_and_load(first, second, tmp_path / "a.jsonl")
    assert first.state.chat
    assert second.state.chat
    assert second.state.chat.messages(second.ids, second.llama.tokenizer) == first.state.chat.messages(
        first.ids, first.llama.tokenizer
    )
    roles = [message.role for message in second.state.chat.messages(second.ids, second.llama.tokenizer)]
    assert roles == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("lines", [TEXT_LINES, CHAT_LINES])
def test_a_loaded_session_is_saved_and_run_again(llama: Llama, tmp_path: Path, lines: list[str]) -> None:
    """Two replays give the same report, without differences."""
    first, second = session_of(llama, *lines, generate=3), session_of(llama, "in", "/ablate L2")
    save_and_load(first, second, tmp_path / "a.jsonl")
    respond(second, f"/load {tmp_path / 'a.jsonl'}")
    for line in ["", "/undo", "/generate 3", "", "/top 2", "the", "/undo", "/kv"]:
        respond(second, line)
    respond(second, f"/save {tmp_path / 'b.jsonl'}")
    reports = [json.dumps(replayed(tmp_path / "b.jsonl", llama).as_json()) for _ in range(2)]
    assert reports[0] == reports[1]
    assert json.loads(reports[0])["differences"] == []
    assert json.loads(reports[0])["compared"] > len(lines)


def test_a_file_that_is_saved_again_is_the_same(llama: Llama, tmp_path: Path) -> None:
    first, second = session_of(llama, *TEXT_LINES, generate=3), session_of(llama)
    save_and_load(first, second, tmp_path / "a.jsonl")
    session_file.save(recording.record(second), tmp_path / "b.jsonl")
    a, b = (json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0]) for name in "ab")
    a["end"]["settings"]["live"] = a["settings"]["live"] = b["settings"]["live"] = b["end"]["settings"]["live"]
    a["end"]["more"]["texts"][-1]["top"] = b["end"]["more"]["texts"][-1]["top"]
    assert a == b


def test_live_follows_a_command_and_else_this_terminal(llama: Llama, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for started, command, here, expected in [
        (True, "/live off", True, False),
        (False, "/live on", False, True),
        (True, "/top 5", False, False),
        (False, "/top 5", True, True),
    ]:
        second = session_of(llama, f"/live {'off' if expected else 'on'}", live=here)
        save_and_load(session_of(llama, "the", command, live=started), second, path)
        assert second.settings.live is expected
        third = session_of(llama, live=here)  # and from there
        save_and_load(second, third, path)
        assert third.settings.live is expected


# --- The model's options ----------------------------------------------------------------------


def test_a_replay_runs_the_model_with_the_options_that_it_had(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay runs from another working directory."""
    (tmp_path / "own.model").write_bytes(tokenizer_file())
    (tmp_path / "own.txt").write_text("the nation in the rain " * 50)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    llama = load(
        directory,
        tokenizer="own.model",
        calibration="own.txt",
        rope_factor=8.0,
        context=100,
        precision="bf16",
        activations="bf16",
        threads=1,
    )
    torch.set_num_threads(threads)
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, "the"), f"/save {path}")
    options = session_file.load(path).header.options
    assert options == {
        "model_dir": str(directory),
        "tokenizer": str(tmp_path / "own.model"),
        "calibration": str(tmp_path / "own.txt"),
        "rope_factor": 8.0,
        "context": 100,
        "precision": "bf16",
        "activations": "bf16",
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    assert {field.name for field in fields(ModelOptions)} == options.keys() | OPTIONS_KEPT.keys()


def test_a_context_that_nobody_asked_for_is_not_asked_for_by_a_replay(directory: Path, tmp_path: Path) -> None:
    """A context given as an option must fit into memory, so the model could be rejected."""
    path = tmp_path / "a.jsonl"
    respond(session_of(load(directory, context=None), "the"), f"/save {path}")
    options = session_file.load(path).header.options
    assert (options["context"], options["rope_factor"], options["activations"]) == (None, None, None)


def test_a_replay_rounds_activations_as_the_session_did(
    llama_scratch: Runner,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file overrides the environment. Older files do not contain the option."""
    path = tmp_path / "a.jsonl"
    respond(session_of(load(directory, precision="bf16", activations="bf16"), "the nation"), f"/save {path}")
    monkeypatch.setenv("LLAMA_SCRATCH_ACTIVATIONS", "fp32")
    result = llama_scratch("replay", str(path))
    assert (result.code, "no difference" in result.out) == (0, True), result.out + result.err
    assert llama_scratch("replay", "--activations", "fp32", str(path)).code == 1
    edited(path, lambda lines: lines[0]["asked"].pop("activations"))
    assert session_file.load(path).header.options["activations"] is None
    assert llama_scratch("replay", str(path)).code == 1
    assert llama_scratch("replay", "--activations", "bf16", str(path)).code == 0


def test_options_that_were_not_given_are_not_taken_from_the_environment(
    llama_scratch: Runner,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(load(directory, context=None), "the nation"), f"/save {path}")
    monkeypatch.setenv("LLAMA_SCRATCH_CONTEXT", "2")
    monkeypatch.setenv("LLAMA_SCRATCH_ROPE_FACTOR", "8")
    monkeypatch.setenv("LLAMA_SCRATCH_TOKENIZER", "/nowhere")
    monkeypatch.setenv("LLAMA_SCRATCH_ACTIVATIONS", "bf16")
    result = llama_scratch("replay", str(path))
    assert (result.code, "no difference" in result.out) == (0, True), result.out + result.err
    # A named model uses its own tokenizer.
    edited(path, change_of("asked", "tokenizer", to="/nowhere"))
    assert llama_scratch("replay", str(path), "--model-dir", str(directory)).code == 0


def test_another_model_has_its_own_tokenizer_and_rope(
    llama_scratch: Runner,
    directory: Path,
    other: Llama,
    tmp_path: Path,
) -> None:
    """--tokenizer and --rope-factor apply only to their own model, in every precision."""
    copy = tmp_path / "Copy"
    shutil.copytree(directory, copy)
    (copy / "tokenizer.model").rename(tmp_path / "own.model")
    lines = [
        "the",
        "/info",
        "/precision bf16",
        f"/model {other.path}",
        "/info",
        "/precision bf16",
        f"/model {copy}",
        "/info",
    ]
    options = ["--model-dir", str(copy), "--tokenizer", str(tmp_path / "own.model"), "--rope-factor", "8", "--json"]
    result = llama_scratch(*options, "--commands", "--no-input", stdin="\n".join(lines).encode())
    assert result.code == 0, result.err
    found = [json.loads(line) for line in result.out.splitlines()]
    infos = [answer for answer in found if answer.get("command") == "info"]
    assert [answer["rope"]["scaling"]["factor"] for answer in infos] == [8, 32, 8]


def test_load_says_how_the_model_is_run_otherwise(llama: Llama, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, "the"), f"/save {path}")
    other = load(directory, precision="bf16", rope_factor=8.0)
    reply = respond(session_of(other), f"/load {path}")[1]
    text = str(reply.view if reply else "")
    assert "/precision fp32" in text
    assert "rope_scaling" in text
    notes = replayed(path, other).notes
    assert any("rope_scaling" in line for line in notes)


def test_a_file_from_another_machine_is_loaded_and_saved_again(llama: Llama, directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, "the"), f"/save {path}")

    def elsewhere(lines: list[Any]) -> None:
        lines[0]["model"]["path"] = lines[0]["end"]["more"]["model"]["path"] = "/elsewhere/Tiny-Instruct"

    session = session_of(llama)
    respond(session, f"/load {edited(path, elsewhere)}")
    respond(session, f"/save {path}")
    assert session_file.load(path).header.model.path == str(directory)


# --- Another model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(write_meta(tmp_path_factory.mktemp("other") / "Other", seed=1))


def test_another_models_session_gives_its_text_and_says_what_is_off(llama: Llama, other: Llama, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, *CHAT_LINES, "/ablate L1", generate=3), f"/save {path}")
    session = session_of(other, "/ablate L0")
    output, reply = respond(session, f"/load {path}")
    text = str(reply.view if reply else "")
    assert output["same_model"] is False
    assert "another model, Tiny-Instruct" in text
    assert "Chat is off" in text
    assert "The interventions are off" in text
    assert (session.state.chat, session.state.labels, session.state.past) == (None, [], ())


def test_the_model_at_the_end_counts(llama: Llama, other: Llama, tmp_path: Path) -> None:
    """/model changes the model, and a replay of /load switches to it."""
    path, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def open(source: str, _precision: str, _progress: Progress) -> Llama:
        return load(Path(source))

    respond(session_of(llama, "the", f"/model {other.path}", "in", open=open), f"/save {path}")
    output, reply = respond(session_of(llama), f"/load {path}")
    assert output["same_model"] is False
    assert "another model, Other" in str(reply.view if reply else "")
    session = session_of(load(other.path or Path()))
    assert respond(session, f"/load {path}")[0]["same_model"] is True
    session = session_of(load(other.path or Path()))
    respond(session_of(llama, "the nation"), f"/save {path}")
    for line in [f"/load {path}", "", "in", f"/save {again}"]:
        respond(session, line)
    found = run_again(session_file.load(again), load(llama.path or Path()), open, Console(file=io.StringIO()))
    assert [difference for difference in found.differences if difference.turn] == []


def test_a_chat_in_a_directory_that_does_not_say_so_is_off(llama: Llama, directory: Path, tmp_path: Path) -> None:
    """Meta's files do not identify a chat model; only the directory name does."""
    (tmp_path / "Base").symlink_to(directory)
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, *CHAT_LINES, generate=3), f"/save {path}")
    base = load(write_meta(tmp_path / "Plain"))
    session = session_of(base)
    output, reply = respond(session, f"/load {path}")
    assert output["same_model"] is True
    assert "Chat is off" in str(reply.view if reply else "")
    respond(session, "the")


# --- A load that fails ------------------------------------------------------------------------


def change_of(*keys: str | int, to: Any) -> Callable[[list[Any]], object]:
    """Set a value deep in the header."""

    def change(lines: list[Any]) -> None:
        at = lines[0]
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_of("end", "ids", to=[10**6]),
        change_of("end", "more", "texts", 0, "ids", to=[10**6]),
        change_of("end", "more", "texts", 0, "ids", to="x"),
        change_of("end", "more", "texts", -1, "offered", to=[-1]),
        change_of("end", "more", "texts", 0, "changes", to=[99]),
        change_of("end", "more", "on", to=[-1]),
        change_of("end", "more", "changes", 0, "recipe", "kind", to="__import__"),
        change_of("end", "more", "changes", 0, "recipe", "part", to="L99"),
        change_of("end", "more", "changes", 1, "recipe", "ids", to=[10**6]),
        change_of("end", "more", "changes", 2, "recipe", "positions", to=[[0, 99]]),
        change_of("end", "more", "changes", 3, "recipe", "scale", to=1e400),
        change_of("end", "more", "changes", 3, "recipe", "away", to=[]),
        change_of("end", "more", "model", to=None),
        change_of("details", "shape", to=3),
        change_of("asked", to={}),
        change_of("turns", to=10**6),
        change_of("turns", to="3"),
        lambda lines: lines.pop(),
    ],
)
@pytest.mark.parametrize("mode", [["in", "/ablate L0"], ["/system Rhyme.", "x"]])
def test_a_load_that_fails_changes_nothing(
    llama: Llama, tmp_path: Path, change: Callable[[list[Any]], object], mode: list[str]
) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, *TEXT_LINES), f"/save {path}")
    session = session_of(llama, *mode, generate=2)
    before, settings = attributes(session), asdict(session.settings)
    turns, questions = list(session.state.turns), list(session.state.chat.questions) if session.state.chat else []
    with pytest.raises(LlamaScratchError):
        respond(session, f"/load {edited(path, change)}")
    assert attributes(session) == before
    assert asdict(session.settings) == settings
    assert session.state.turns == turns
    assert (session.state.chat.questions if session.state.chat else []) == questions


@pytest.mark.parametrize("stage", ["checking", "reading"])
def test_an_interrupted_load_changes_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    llama, path = load(directory), tmp_path / "a.jsonl"
    respond(session_of(load(directory), *TEXT_LINES), f"/save {path}")
    session = session_of(llama, "in", "/ablate L0")
    before = attributes(session)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    owner, name = (os, "pread") if stage == "checking" else (Llama, "predict")
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        respond(session, f"/load {path}")
    assert attributes(session) == before


@pytest.mark.parametrize("cut", ["in a line", "between two lines", "after the header"])
def test_a_file_that_was_cut_is_named(llama: Llama, tmp_path: Path, cut: str) -> None:
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, "the", "in", "/top 3"), f"/save {path}")
    lines = path.read_bytes().splitlines(keepends=True)
    kept = {"in a line": b"".join(lines)[:-9], "between two lines": b"".join(lines[:3]), "after the header": lines[0]}
    path.write_bytes(kept[cut])
    with pytest.raises(LlamaScratchError, match="is truncated"):
        session_file.load(path)


# --- Files of version 0.1.0 -------------------------------------------------------------------


@pytest.fixture
def released(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with session files of this model written by version 0.1.0."""
    digest = hashlib.sha256((directory / "consolidated.00.pth").read_bytes()).hexdigest()
    for file in (Path(__file__).parent / "sessions").iterdir():
        text = file.read_text(encoding="utf-8").replace('"PATH"', json.dumps(str(directory)))
        (tmp_path / file.name).write_text(text.replace('"SHA256"', json.dumps(digest)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["first", "second", "chat"])
def test_an_old_file_is_run_again(llama: Llama, released: Path, name: str) -> None:
    """Includes a session with /load, which removed interventions in version 0.1.0."""
    found = replayed(released / f"{name}.jsonl", llama)
    assert found.differences == []
    assert found.compared >= found.turns - 1


@pytest.mark.parametrize("name", ["first", "second", "chat"])
def test_an_old_file_is_loaded_and_saved_in_the_new_format(llama: Llama, released: Path, name: str) -> None:
    recorded = session_file.load(released / f"{name}.jsonl")
    session = session_of(llama)
    output, reply = respond(session, f"/load {name}.jsonl")
    assert output["same_model"] is True
    assert session.ids == recorded.header.end.ids
    assert replace(session.settings, live=False) == replace(recorded.header.end.settings, live=False)
    assert ("are off" in str(reply.view if reply else "")) is (name == "first")
    if name == "chat":
        assert session.state.chat
        messages = session.state.chat.messages(session.ids, session.llama.tokenizer)
        assert [message.content for message in messages][:2] == ["Be brief.", "a city?"]
    respond(session, "")
    respond(session, "/save new.jsonl")
    assert replayed(released / "new.jsonl", llama).differences == []


def test_a_new_file_can_be_read_by_version_0_1_0(llama: Llama, tmp_path: Path) -> None:
    """Existing fields keep their place and type. The old version ignores new fields."""
    path = tmp_path / "a.jsonl"
    respond(session_of(llama, "the"), f"/save {path}")
    new = json.loads(path.read_text().splitlines()[0])
    old = json.loads((Path(__file__).parent / "sessions" / "first.jsonl").read_text().splitlines()[0])
    for new_part, old_part in [(new, old), (new["model"], old["model"]), (new["end"], old["end"])]:
        assert new_part.keys() >= old_part.keys()
        assert {type(new_part[name]) for name in old_part} <= {type(value) for value in old_part.values()}
