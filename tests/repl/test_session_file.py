"""Session files: writing, rejection of invalid files, and differences found by a replay."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.repl import session_file
from llama_scratch.repl.commands import completions
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.keyboard import Keyboard
from llama_scratch.repl.offers import offer, offer_next
from llama_scratch.repl.replay import compare
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Turn
from llama_scratch.sampling import Sampling
from tests.helpers.checkpoints import write_meta
from tests.helpers.command_line import Runner, one_sentence
from tests.helpers.session_files import edited, replayed, saved, session_of

LINES = [
    "the nation",
    "",
    "/top 3",
    "in the\nend \U0001f389",
    "/force #104",
    "/undo",
    "/generate 4",
    "",
    "/temperature 1",
    "/seed 5",
    "/generate 4",
    "/surprisal",
    "//usr/bin",
    "caf\udce9",
]


def loaded(path: Path) -> Llama:
    """Load a small model in fp32, whose weights are not repacked in the background."""
    return Llama.load(path, precision="fp32", device="cpu", context=64)


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return loaded(tiny_dir)


def is_sentence(error: LlamaScratchError) -> str:
    """Check that an error is printable, and return its text."""
    text = str(error)
    assert text.isprintable()
    assert text.endswith((".", "?"))
    return text


# --- Writing ----------------------------------------------------------------------------------


def test_a_file_holds_the_session(tiny: Llama, tiny_dir: Path, tmp_path: Path) -> None:
    session = session_of(tiny, *LINES)
    path = saved(session, tmp_path / "a.jsonl")
    header, *turns = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert header["format"] == 1
    assert header["model"] == {
        "name": tiny_dir.name,
        "format": "meta",
        "path": str(tiny_dir),
        "sha256": hashlib.sha256((tiny_dir / "consolidated.00.pth").read_bytes()).hexdigest(),
        "parameters": tiny.info.parameters,
    }
    assert (header["precision"], header["device"], header["context"]) == ("fp32", "cpu", 64)
    assert header["rope_factor"] == 32
    assert header["settings"]["top"] == 5  # the initial value
    assert header["end"]["settings"]["top"] == 3
    assert header["end"]["settings"]["sampling"]["seed"] == 5
    assert header["end"]["ids"] == session.ids
    assert header["repeatable"] is True
    assert set(header["versions"]) == {"python", "torch", "platform"}
    assert [turn["input"] for turn in turns] == [*LINES[:-1], "caf\ufffd"]
    assert turns[0]["output"] == json.loads(json.dumps(session.state.turns[0].output))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_file_is_read_as_it_was_written(tiny: Llama, tmp_path: Path) -> None:
    session = session_of(tiny, *LINES[:-1])
    path = saved(session, tmp_path / "a.jsonl")
    found = session_file.load(path)
    assert found.turns == session.state.turns[:-1]  # the last one is /save itself
    assert found.header.settings == session.state.initial_settings
    assert found.header.end.settings == session.settings


def test_a_path_from_here_is_kept_in_full(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay can then run in any folder."""
    monkeypatch.chdir(tiny_dir.parent)
    path = saved(session_of(loaded(Path(tiny_dir.name)), "the"), tmp_path / "a.jsonl")
    assert session_file.load(path).header.model.path == str(tiny_dir)


def test_numbers_that_are_none_survive(tiny: Llama, tmp_path: Path) -> None:
    session = session_of(tiny, "the")
    session.state.turns.append(Turn("/x", {"value": [float("-inf"), float("nan")]}))
    low, none = session_file.load(saved(session, tmp_path / "a.jsonl")).turns[1].output["value"]
    assert low == float("-inf")
    assert none != none


@pytest.mark.parametrize("kind", ["text", "JSON", "a folder", "a pipe", "empty"])
def test_what_is_no_session_is_not_overwritten(tiny: Llama, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.write_text({"text": "Dear diary,\n", "JSON": '{"format": 1}\n', "empty": ""}[kind])
    before = None if not path.is_file() else path.read_bytes()
    with pytest.raises(LlamaScratchError, match="is not a session file") as error:
        saved(session_of(tiny, "the"), path)
    is_sentence(error.value)
    assert before is None or path.read_bytes() == before
    assert os.listdir(tmp_path) == ["mine"]


def test_a_session_is_overwritten_and_a_link_to_one_stays_a_link(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    link = tmp_path / "link"
    link.symlink_to(path)
    saved(session_of(tiny, "in", "the"), link)
    assert link.is_symlink()
    assert [turn.input for turn in session_file.load(path).turns] == ["in", "the"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(LlamaScratchError, match="No space left") as error:
        saved(session_of(tiny, "in"), path)
    is_sentence(error.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("/nowhere/a.jsonl", "cannot be written (No such file"),
        ("a\0b", "cannot be written (embedded null"),
        ("~nobody-of-that-name/a", "cannot be resolved"),
        ("\x1b[31m/a", r"\x1b[31m/a cannot be written"),
    ],
)
def test_where_a_session_cannot_be_saved(tiny: Llama, argument: str, expected: str) -> None:
    with pytest.raises(LlamaScratchError) as error:
        respond(session_of(tiny, "the"), f"/save {argument}")
    assert expected in is_sentence(error.value)


def test_a_path_may_begin_in_the_home(tiny: Llama) -> None:
    session = session_of(tiny, "the")
    respond(session, "/save ~/a.jsonl")
    assert session_file.load(Path.home() / "a.jsonl").turns[0].input == "the"
    respond(session, "/load ~/a.jsonl")
    assert session.text_of(session.ids) == "the"


def test_there_must_be_something_to_save(tiny: Llama, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to save yet"):
        saved(session_of(tiny), tmp_path / "a.jsonl")


def test_a_session_that_no_load_would_take_is_not_written(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_file, "MAX_BYTES", 1000)
    with pytest.raises(LlamaScratchError, match="expected at most 1,000"):
        saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    assert os.listdir(tmp_path) == []


# --- Invalid files ----------------------------------------------------------------------------


def header_change(**changes: Any) -> Callable[[list[Any]], object]:
    return lambda lines: lines[0].update(changes)


def turn_change(**changes: Any) -> Callable[[list[Any]], object]:
    return lambda lines: lines[1].update(changes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (header_change(format=2), "format 2, expected 1"),
        (header_change(format="1"), "line 1: format"),
        (header_change(format=True), "line 1: format"),
        (header_change(model=None), "line 1: model"),
        (header_change(model={"name": "x"}), "line 1: model: format"),
        (header_change(context=1e400), "line 1: context"),
        (header_change(threads="2"), "line 1: threads"),
        (header_change(rope_factor="32"), "line 1: rope_factor"),
        (header_change(precision=["fp32"]), "line 1: precision"),
        (header_change(versions={"a\x1b[31m": 3}), r"line 1: versions: a\x1b[31m"),
        (header_change(end={"settings": {}, "system": None, "ids": []}), "line 1: end: settings: top"),
        (lambda lines: lines[0]["end"].update(ids=[1.5]), "line 1: end: ids: 0"),
        (lambda lines: lines[0]["end"].update(ids=[True]), "line 1: end: ids: 0"),
        (lambda lines: lines[0]["settings"].update(top="5"), "line 1: settings: top"),
        (lambda lines: lines[0]["settings"]["sampling"].update(temperature=-1), "line 1: temperature is -1"),
        (lambda lines: lines[0]["settings"]["sampling"].update(seed=2**70), "line 1:"),
        (lambda lines: lines[0].pop("system"), "line 1: system"),
        (lambda lines: lines.pop(0), "line 1: llama_scratch"),
        (turn_change(input=3), "line 2: input"),
        (turn_change(input=None), "line 2: input"),
        (turn_change(output="x"), "line 2: output"),
        (turn_change(output=[1]), "line 2: output"),
        (lambda lines: lines[1].pop("output"), "line 2: output"),
        (lambda lines: lines.insert(1, []), "line 2:"),
        (lambda lines: lines.insert(2, "x"), "line 3:"),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(
    tiny: Llama, tmp_path: Path, change: Callable[[list[Any]], object], expected: str
) -> None:
    path = edited(saved(session_of(tiny, "the"), tmp_path / "a.jsonl"), change)
    with pytest.raises(LlamaScratchError) as error:
        session_file.load(path)
    assert expected in is_sentence(error.value)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"\n", "line 2: Invalid JSON"),
        (b"{\n", "line 2: Invalid JSON"),
        (b'{"input": "\xff", "output": {}}\n', "line 2: Invalid JSON"),
        (b'{"input": "\\ud800", "output": {}}\n', "line 2: Invalid JSON"),
        (b'{"input": "x", "output": ' + b"[" * 100_000 + b"\n", "line 2: Invalid JSON"),
        (b'{"input": "x", "output": {"a": ' + b"9" * 5000 + b"}}\n", "line 2: "),
        (b"\0" * 100 + b"\n", "line 2: Invalid JSON"),
        (b'{"input": "x", "output": {}}', "truncated in line 2"),
    ],
)
def test_bytes_that_are_no_line(tiny: Llama, tmp_path: Path, line: bytes, expected: str) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + line)
    with pytest.raises(LlamaScratchError) as error:
        session_file.load(path)
    assert expected in is_sentence(error.value)


def test_the_last_of_two_equal_keys_counts(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    path.write_bytes(path.read_bytes() + b'{"input": 3, "output": {}, "input": "x"}\n')
    assert session_file.load(path).turns[-1].input == "x"


def test_a_file_beyond_all_bounds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(LlamaScratchError, match="1,073,741,824 bytes, expected at most") as error:
        session_file.load(path)
    is_sentence(error.value)


@pytest.mark.parametrize("kind", ["none", "a folder", "a pipe", "a zero byte", "empty"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "a zero byte" else "a\x1b[31m")
    if kind == "a folder":
        path.mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    if kind == "empty":
        path.touch()
    with pytest.raises(LlamaScratchError) as error:
        session_file.load(path)
    is_sentence(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("kind", "code"), [("none", 3), ("none/none", 3), ("a folder", 4), ("text", 4), ("cut", 4)])
def test_a_missing_session_and_a_damaged_one_have_their_exit_codes(
    tiny: Llama, tmp_path: Path, kind: str, code: int
) -> None:
    """Exit code 1 is reserved for a replay with differences."""
    path = tmp_path / kind
    if kind == "a folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("Dear diary\n")
    elif kind == "cut":
        path.write_bytes(saved(session_of(tiny, "the"), path).read_bytes()[:-2])
    with pytest.raises(LlamaScratchError) as error:
        session_file.load(path)
    assert error.value.exit_code == code


def test_what_is_wrong_with_the_disk_is_told_from_what_is_wrong_with_the_folder(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> str:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(LlamaScratchError) as error:
            saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
        return is_sentence(error.value)

    assert "Free space" in failing(errno.ENOSPC)
    assert "Free space" in failing(errno.EDQUOT)
    assert "Choose an existing folder" in failing(errno.EROFS)


@pytest.mark.parametrize("command", ["save", "load", "export", "picture", "report"])
def test_a_name_that_ends_in_a_slash_is_a_folder(tiny: Llama, tmp_path: Path, command: str) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        respond(session_of(tiny, "the"), f"/{command} {tmp_path}/new.html/")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ('"my file"', "my file"),
        ('"two\\nlines"', "two\nlines"),
        ("my file", "my file"),
        ('"open', '"open'),
        ('" a"', " a"),
    ],
)
def test_a_path_in_double_quotes_is_json(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, name: str
) -> None:
    """Like texts in other commands. Users quote names with spaces."""
    monkeypatch.chdir(tmp_path)
    session = session_of(tiny, "the", f"/save {argument}")
    assert os.listdir() == [name]
    respond(session, f"/load {argument}")


# --- Replay -----------------------------------------------------------------------------------


def test_a_replay_of_what_was_recorded_finds_nothing(tiny: Llama, tiny_dir: Path, tmp_path: Path) -> None:
    path = saved(session_of(tiny, *LINES), tmp_path / "a.jsonl")
    found = replayed(path, loaded(tiny_dir))
    assert found.differences == []
    assert found.notes == []
    assert found.compared == found.turns == len(LINES)


@pytest.mark.parametrize(
    ("turn", "change", "what"),
    [
        (1, lambda answer: answer["next"].update(probability=answer["next"]["probability"] + 0.01), "next.probability"),
        (1, lambda answer: answer["top"].reverse(), "top[0].id"),
        (1, lambda answer: answer["top"].pop(), "top"),
        (1, lambda answer: answer["top"][2].update(text="x"), "top[2].text"),
        (1, lambda answer: answer.update(prompt="x"), "prompt"),
        (1, lambda answer: answer.update(entropy_bits="x"), "entropy_bits"),
        (1, lambda answer: answer.update(entropy_bits=10**400), "entropy_bits"),
        (1, lambda answer: answer.update(more=1), "more"),
        (3, lambda answer: answer.update(top=4), "top"),
        (7, lambda answer: answer["ids"].append(1), "ids"),
        (11, lambda answer: answer.update(text="x"), "text"),
    ],
)
def test_what_was_tampered_with_is_named(
    tiny: Llama, tmp_path: Path, turn: int, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    path = saved(session_of(tiny, *LINES), tmp_path / "a.jsonl")
    found = replayed(edited(path, lambda lines: change(lines[turn]["output"])), tiny)
    assert (found.differences[0].turn, found.differences[0].what) == (turn, what)
    assert {difference.turn for difference in found.differences} == {turn}
    assert found.differences[0].old != found.differences[0].new


def test_another_model_and_a_line_that_fails_are_differences(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    other = loaded(write_meta(tmp_path / "Other", seed=1))
    found = replayed(path, other).differences
    assert (found[0].turn, found[0].what) == (0, "the model's weights")
    assert {difference.turn for difference in found} == {0, 1}
    found = replayed(edited(path, lambda lines: lines[1].update(input="/nonsense")), tiny).differences
    assert [difference.what for difference in found] == ["the answer"]
    assert "Unknown command /nonsense" in found[0].new


def test_numbers_are_equal_within_the_tolerance() -> None:
    assert not list(compare({"a": [1.0, 100.0]}, {"a": [1.0005, 100.05]}, 1e-3))
    assert list(compare({"a": [1.0, 100.0]}, {"a": [1.002, 100.0]}, 1e-3)) == [("a[0]", 1.0, 1.002)]
    assert list(compare(5, 6, 1.0)) == [("", 5, 6)]  # integers are ids, compared exactly
    assert list(compare({"b": True}, {"b": 0.9999}, 1e-3)) == []
    assert not list(compare(float("nan"), float("nan"), 0))
    assert list(compare({"timing": 1, "decode": {}}, {"timing": 2}, 0)) == [("decode", {}, None)]
    assert not list(compare({}, {"new": 1}, 0))


def test_a_replay_begins_with_the_settings_of_the_beginning(tiny: Llama, tmp_path: Path) -> None:
    """Not the settings at the time of /save."""
    session = session_of(tiny, "the", "/top 2", "/generate 3", top=4, sampling=Sampling(1.0, seed=3), special=True)
    path = saved(session, tmp_path / "a.jsonl")
    assert replayed(path, tiny).differences == []
    path = edited(path, lambda lines: lines[0].update(settings=lines[0]["end"]["settings"]))
    assert [difference.what for difference in replayed(path, tiny).differences] == ["top"]


def test_answers_of_another_precision_may_differ_a_little(tiny_dir: Path, tmp_path: Path) -> None:
    """The tolerance is set per turn.

    A session can switch precision, and older versions answered in fp32 while packing."""
    session = session_of(Llama.load(tiny_dir, precision="int8", device="cpu", context=64), "the", "in", "the")
    path = saved(session, tmp_path / "a.jsonl")
    assert [turn.output["model"]["precision"] for turn in session_file.load(path).turns] == ["int8"] * 3

    def load() -> Llama:
        return Llama.load(tiny_dir, precision="int8", device="cpu", context=64)

    assert replayed(path, load()).differences == []
    # Less than the tolerance between two precisions.
    path = edited(path, lambda lines: lines[3]["output"].update(entropy_bits=lines[3]["output"]["entropy_bits"] + 0.01))
    assert [difference.turn for difference in replayed(path, load()).differences] == [3]
    path = edited(path, lambda lines: lines[3]["output"]["model"].update(precision="fp32"))
    assert replayed(path, load()).differences == []


def test_the_candidate_that_was_chosen_is_chosen_again(tiny: Llama, tmp_path: Path) -> None:
    session = session_of(tiny, "the")
    offer_next(session)
    respond(session, "")
    second = session.state.turns[0].output["top"][1]["id"]
    assert session.ids[-1] == second
    assert replayed(saved(session, tmp_path / "a.jsonl"), tiny).differences == []


def test_text_drawn_without_a_seed_is_not_compared_and_that_is_said(tiny: Llama, tmp_path: Path) -> None:
    lines = ["the", "/temperature 3", "/generate 20", "", "/top 1", "in", ""]
    session = session_of(tiny, *lines)
    output, _ = respond(session, f"/save {tmp_path / 'a.jsonl'}")
    assert output["repeatable"] is False
    found = replayed(tmp_path / "a.jsonl", tiny)
    assert found.differences == []
    assert "generated in 1 turn," in found.notes[0]
    assert "without a seed" in found.notes[0]
    # The same with a seed is compared.
    path = saved(session_of(tiny, "the", "/seed 1", *lines[1:]), tmp_path / "b.jsonl")
    assert session_file.load(path).header.repeatable
    assert replayed(path, tiny).notes == []
    path = edited(path, lambda lines: lines[4]["output"].update(text="x"))
    assert [difference.what for difference in replayed(path, tiny).differences] == ["text"]


def test_what_stands_beside_drawn_text_is_compared(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "the", generate=3, sampling=Sampling(3.0)), tmp_path / "a.jsonl")
    assert replayed(path, tiny).differences == []
    path = edited(path, lambda lines: lines[1]["output"]["next"].update(id=0))
    assert [difference.what for difference in replayed(path, tiny).differences] == ["next.id"]


def test_a_byte_order_mark_before_a_session(tiny: Llama, tmp_path: Path) -> None:
    """A byte order mark added by an editor is ignored."""
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    before = session_file.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert session_file.load(path) == before
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(LlamaScratchError, match="UTF-16"):
        session_file.load(path)


def test_lines_go_on_from_the_text_that_an_editor_gave(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "in", "the nation", ""), tmp_path / "a.jsonl")
    found = replayed(edited(path, lambda lines: lines[2].update(input="/edit")), tiny)
    assert found.differences == []
    assert (found.compared, found.turns) == (2, 3)


def test_of_what_was_interrupted_the_beginning_is_compared(tiny: Llama, tmp_path: Path) -> None:
    session = session_of(tiny, "the", "/generate 8")
    whole = session.state.turns[-1].output
    cut = {key: value[:3] for key, value in whole.items() if key in ("ids", "logprobs")}
    part = whole | cut | {"text": "cut", "finish_reason": "interrupted"}
    session.state.turns[-1] = Turn("/generate 8", part)
    offer(session, part["ids"])
    respond(session, "")
    path = saved(session, tmp_path / "a.jsonl")
    assert replayed(path, tiny).differences == []
    path = edited(path, lambda lines: lines[2]["output"]["ids"].__setitem__(1, 0))
    assert [difference.what for difference in replayed(path, tiny).differences] == ["ids[1]"]


def test_a_replay_touches_no_files_and_starts_no_program(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrusted session file may contain any line."""
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setenv("EDITOR", "touch edited;")
    lines = ["/save b.jsonl", "/export b.html", "/edit", "/load ../a.jsonl", "/history", "/memory", " /save c", "/save"]

    def add(found: list[Any]) -> None:
        found.extend({"input": line, "output": {"command": "save"}} for line in lines)
        found.append({"input": "/edit", "output": {"command": "edit", **found[1]["output"]}})

    found = replayed(edited(path, add), tiny)
    assert os.listdir() == []
    assert "8 turns" in found.notes[0]
    assert [difference.turn for difference in found.differences] == [8]  # " /save c" is a prompt
    assert found.compared == 2


@pytest.mark.parametrize(
    "output",
    [
        {"tokens": "x"},
        {"tokens": []},
        {"tokens": [{}]},
        {"tokens": [{"id": "x"}]},
        {"tokens": [{"id": -1}]},
        {"tokens": [{"id": 2**80}]},
        {"tokens": [3]},
        {"model": "x", "generated": 3},
        {"generated": {"ids": 3}},
        {"model": {"precision": []}},
        {"command": []},
        {"finish_reason": "interrupted", "ids": 3},
    ],
)
@pytest.mark.parametrize("line", ["the", "", "/edit", "/generate 2", "/quit"])
def test_answers_of_every_shape_are_compared(tiny: Llama, tmp_path: Path, line: str, output: dict[str, Any]) -> None:
    """A replay completes whatever answers an untrusted file contains."""
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    found = replayed(edited(path, lambda lines: lines.append({"input": line, "output": output})), tiny)
    assert found.turns == 2
    assert all(difference.turn == 2 for difference in found.differences)
    json.dumps(found.as_json())
    assert all(text.isprintable() for text in found.lines())


def test_what_was_run_otherwise_is_said(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    changes = header_change(precision="fp16", versions={"python": "3.0\x1b[31m", "torch": "9"}, llama_scratch="7.0")
    lines = replayed(edited(path, changes), tiny).lines()
    assert 'Recorded with precision "fp16", replayed with "fp32".' in lines
    assert any(line.startswith('Recorded with llama-scratch "7.0"') for line in lines)
    assert any("torch" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_how_it_was_run_is_what_the_command_line_takes(tiny: Llama, tmp_path: Path) -> None:
    header = session_file.load(saved(session_of(tiny, "the"), tmp_path / "a.jsonl")).header
    assert header.options["model_dir"] == header.model.path
    assert (header.options["precision"], header.options["context"]) == ("fp32", 64)
    for threads in (10**9, -5):
        assert 1 <= replace(header, threads=threads).options["threads"] <= (os.cpu_count() or 1)


# --- Continuing a session --------------------------------------------------------------------


def test_load_restores_text_settings_and_lines(tiny: Llama, tmp_path: Path) -> None:
    first = session_of(tiny, "the nation", "", "/top 2", "/seed 4", top=4)
    path = saved(first, tmp_path / "a.jsonl")
    second = session_of(tiny, "something else", live=False)
    output, _ = respond(second, f"/load {path}")
    assert output["same_model"] is True
    assert second.ids == first.ids
    assert [candidate["id"] for candidate in output["top"]] == [
        c.id for c in first.state.snapshots[-1].prediction.top[:2]
    ]
    assert (second.settings.top, second.settings.sampling.seed, second.settings.live) == (2, 4, False)
    assert [turn.input for turn in second.state.turns] == ["the nation", "", "/top 2", "/seed 4", f"/load {path}"]
    respond(second, "")
    assert replayed(saved(second, tmp_path / "b.jsonl"), tiny).differences == []


def test_load_of_another_models_session_says_so(tiny: Llama, tmp_path: Path) -> None:
    path = saved(session_of(loaded(write_meta(tmp_path / "Other", seed=1)), "the"), tmp_path / "a.jsonl")
    session = session_of(tiny)
    output, reply = respond(session, f"/load {path}")
    assert output["same_model"] is False
    assert "from another model, Other" in str(reply.view if reply else "")
    assert session.text_of(session.ids) == "the"


@pytest.mark.parametrize("ids", [[10**6], [-1], [1] * 65])
def test_a_load_that_fails_changes_nothing(tiny: Llama, tmp_path: Path, ids: list[int]) -> None:
    path = saved(session_of(tiny, "the", "/top 2"), tmp_path / "a.jsonl")
    edited(path, lambda lines: lines[0]["end"].update(ids=ids))
    session = session_of(tiny, "in")
    before = (session.ids, replace(session.settings), list(session.state.turns))
    with pytest.raises(UsageError):
        respond(session, f"/load {path}")
    assert (session.ids, session.settings, session.state.turns) == before


# --- Exports and history ----------------------------------------------------------------------


def shown(llama: Llama) -> Session:
    """A session that has printed some views."""
    session = session_of(llama, interactive=True)
    for line in ("the nation", "", "``` <b> ```\x1b[31m"):
        session.screen.echo(session.state.loading.name, line)
        respond(session, line)
    return session


def test_exports_hold_what_stands_on_the_screen(tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # is about terminals
    session = shown(tiny)
    for ending in ("html", "svg", "md", "json"):
        respond(session, f"/export {tmp_path / 'a'}.{ending}")
    page, picture, text = [(tmp_path / f"a.{ending}").read_text() for ending in ("html", "svg", "md")]
    assert "the nation" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "color: #" in page
    assert "<svg" in picture
    assert "nation" in picture
    assert text.startswith("````text\n")
    assert text.endswith("\n````\n")
    assert "> the nation\n" in text
    assert "entropy" in text
    assert "\x1b" not in page + picture + text
    turns = json.loads((tmp_path / "a.json").read_text())
    assert [turn["input"] for turn in turns[:2]] == ["the nation", ""]
    assert turns[0]["output"] == json.loads(json.dumps(session.state.turns[0].output))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a.txt", "Invalid file name 'a.txt' for /export. End it in one of .html, .svg, .md, .json"),
        ("a", "Invalid file name 'a'"),
        ("there.html", "already exists"),
        ("/nowhere/a.html", "cannot be written"),
    ],
)
def test_where_nothing_is_exported(
    tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(LlamaScratchError) as error:
        respond(shown(tiny), f"/export {argument}")
    assert expected in is_sentence(error.value)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert os.listdir(tmp_path) == ["there.html"]


def test_a_session_without_a_screen_exports_json_alone(tiny: Llama, tmp_path: Path) -> None:
    session = session_of(tiny, "the")
    with pytest.raises(UsageError, match="nothing to export"):
        respond(session, f"/export {tmp_path / 'a.html'}")
    respond(session, f"/export {tmp_path / 'a.json'}")
    assert json.loads((tmp_path / "a.json").read_text())[0]["input"] == "the"


def test_history_of_a_pipe_is_that_of_the_session(tiny: Llama) -> None:
    session = session_of(tiny, "the", "", "in\x1b[31m", "/top 2")
    assert respond(session, "/history")[0]["history"] == ["the", "in\x1b[31m", "/top 2"]
    output, reply = respond(session, "/history 2")
    assert output["history"] == ["/top 2", "/history"]
    assert reply is not None
    session.screen.console.print(respond(session, "/history")[1].view)  # type: ignore[union-attr]
    assert isinstance(session.screen.console.file, io.StringIO)
    assert r"in\x1b[31m" in session.screen.console.file.getvalue()
    with pytest.raises(UsageError, match="a whole number"):
        respond(session, "/history x")


def test_history_of_a_terminal_is_that_of_earlier_sessions_too(tiny: Llama) -> None:
    from llama_scratch.repl.history import open_history

    session = session_of(tiny, interactive=True)
    session.screen.keyboard = cast(Keyboard, object())
    assert respond(session, "/history")[0]["history"] == []  # there is no file yet
    kept = open_history(session)
    for line in ("older", "two\nlines", "newer"):
        kept.append_string(line)
    assert respond(session, "/history")[0]["history"] == ["older", "two\nlines", "newer"]
    assert respond(session, "/history 1")[0]["history"] == ["newer"]


def test_file_names_are_completed(tiny: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("apple.jsonl", "apricot", ".hidden", "a\x1bb"):
        (tmp_path / name).touch()
    (tmp_path / "attic").mkdir()
    (tmp_path / "attic" / "old.jsonl").touch()
    session = session_of(tiny)
    assert completions(session, "/load a") == ["/load apple.jsonl", "/load apricot", "/load attic/"]
    assert completions(session, "/save ap") == ["/save apple.jsonl", "/save apricot"]
    assert completions(session, "/export attic/") == ["/export attic/old.jsonl"]
    assert completions(session, "/load .h") == ["/load .hidden"]
    assert completions(session, f"/load {tmp_path}/at") == [f"/load {tmp_path}/attic/"]
    assert completions(session, "/load nowhere/x") == []


# --- The command line -------------------------------------------------------------------------


@pytest.mark.slow
def test_save_and_replay_by_the_open_model(
    llama_scratch: Runner,
    smollm2_path: Path,
    tmp_path: Path,
) -> None:
    """End to end: a session in a pipe, its replay, and a replay with one changed number."""
    path = tmp_path / "a.jsonl"
    lines = ["The capital of France is", "/generate 12", "/top 3", "The opposite of hot is", f"/save {path}"]
    options = ["--model", "smollm2", "--precision", "fp32", "--commands", "--json"]
    result = llama_scratch(*options, stdin="\n".join(lines).encode())
    assert result.code == 0, result.err
    result = llama_scratch("replay", str(path))
    assert result.code == 0, result.out
    assert result.out.startswith("4 of 4 answers compared: no difference (tolerance 0.001")
    edited(path, lambda lines: lines[4]["output"]["next"].update(probability=0.5))
    result = llama_scratch("replay", str(path), "--json")
    assert result.code == 1
    (difference,) = json.loads(result.out)["differences"]
    assert (difference["turn"], difference["what"], difference["old"]) == (4, "next.probability", 0.5)


@pytest.mark.slow
def test_a_conversation_goes_on_from_the_recorded_answer(
    llama_scratch: Runner,
    smollm2_path: Path,
    tmp_path: Path,
) -> None:
    """The answer is sampled again, but the second question follows the recorded one."""
    path = tmp_path / "a.jsonl"
    options = ["--chat", "--system", "Be brief.", "--temperature", "2", "--generate", "6", "--precision", "fp32"]
    lines = ["Name a city.", "And another one?", f"/save {path}"]
    result = llama_scratch("--model", "smollm2", "--commands", "--json", *options, stdin="\n".join(lines).encode())
    assert result.code == 0, result.err
    result = llama_scratch("replay", str(path))
    assert result.code == 0, result.out
    assert "generated in 2 turns, because it was sampled without a seed" in result.out


def test_flags_go_over_the_recording_and_that_over_the_environment(
    llama_scratch: Runner,
    tiny: Llama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    monkeypatch.setenv("LLAMA_SCRATCH_MODEL_DIR", str(write_meta(tmp_path / "Other", seed=1)))
    monkeypatch.setenv("LLAMA_SCRATCH_PRECISION", "bf16")
    result = llama_scratch("replay", str(path))
    assert result.code == 0, result.out
    assert "Recorded with" not in result.out
    result = llama_scratch("--precision", "bf16", "replay", str(path))
    assert 'Recorded with precision "fp32", replayed with "bf16".' in result.out
    result = llama_scratch("replay", str(path), "--model-dir", str(tmp_path / "Other"))
    assert result.code == 1
    assert "the model's weights" in result.out


def test_what_replay_refuses(
    llama_scratch: Runner,
    tiny: Llama,
    tmp_path: Path,
) -> None:
    path = saved(session_of(tiny, "the"), tmp_path / "a.jsonl")
    assert "cannot be read" in one_sentence(llama_scratch("replay", str(tmp_path / "none")))
    edited(path, lambda lines: lines[0]["model"].update(path="/nowhere"))
    result = llama_scratch("replay", str(path))
    assert result.code == 3
    assert "/nowhere" in one_sentence(result)
    path.write_text("x\n")
    assert "line 1" in one_sentence(llama_scratch("replay", str(path)))
