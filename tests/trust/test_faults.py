"""Short fault injection (the long run is tests.trust.faults) and atomic writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_scratch.repl.history import FileHistory
from llama_scratch.system.atomic_files import lock, locked, remove_stale, temporary_file, temporary_folder
from tests.helpers import ROOT
from tests.helpers.terminal import Terminal


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Figures of a short run of all parts.

    It runs in a process without threads, because it forks.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.trust.faults", "--count", "24"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- The long run, shortened ------------------------------------------------------------------


@pytest.mark.slow
def test_told_to_end_at_any_moment(figures: dict[str, Any]) -> None:
    """Every file is the complete old or new version, and no temporary files are left."""
    found = figures["signals"]
    assert found["by_signal"] == {"SIGINT": 8, "SIGTERM": 8, "SIGHUP": 8}
    assert len(found["by_stage"]) == 8
    assert found["ended_by_it"] > 12


@pytest.mark.slow
def test_killed_at_any_moment(figures: dict[str, Any]) -> None:
    """The same, except for files that the next run removes or resumes."""
    assert figures["kill"]["ended_by_it"] > 12


@pytest.mark.slow
def test_full_disks_and_homes_that_are_none(figures: dict[str, Any]) -> None:
    """An error if the command needs the disk or the home, otherwise an answer."""
    assert figures["full_disk"]["refused_in_a_sentence"] > 0
    assert figures["no_home"] == {"homes": 7, "runs": 28}


@pytest.mark.slow
def test_several_programs_at_once(figures: dict[str, Any]) -> None:
    """Three concurrent processes of each kind lose none of each other's data."""
    assert figures["together"]["history_entries"] == 36


# --- Exit on signals --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("when", ["loading", "typing", "computing"])
def test_a_session_that_is_told_to_end_gives_the_terminal_back(
    tiny_dir: Path, when: str, number: int, code: int
) -> None:
    """The exit code is the signal's, and the terminal is restored.

    Keys, cursor and paste mode are as before, and nothing is printed.
    """
    with Terminal("--model-dir", str(tiny_dir), "--no-live") as session:
        device = os.dup(session._child.fileno())
        before = termios.tcgetattr(device)
        session.wait_for(">" if when == "loading" else "lists the commands")
        if when == "typing":
            session.type("the cat")
            session.wait_for("the cat")
        if when == "computing":
            session.type("the cat", "enter")
            session.wait_for("ntropy")
            session.type("/generate 2000", "enter")
            session.read(0.1)
        session._child.kill(number)
        assert session.wait() == code, session.text
        assert termios.tcgetattr(device) == before
        os.close(device)
        assert session.seen("\x1b[?2004h") == session.seen("\x1b[?2004l")
        assert session.seen("Traceback") + session.seen("Exception") == 0, session.text
        assert not session.screen.cursor.hidden


def program(code: str, *before: str) -> subprocess.Popen[str]:
    """Start a program whose command line is `code`, and wait until it calls `runs()`."""
    whole = (
        "import sys, time, os, signal\n"
        "from llama_scratch import __main__ as program, cli\n"
        "runs = lambda: print('runs', flush=True)\n"
        f"def run(arguments):\n    {code}\n    return 0\n"
        "cli.run = run\nprogram.main()\n"
    )
    process = subprocess.Popen(
        [*before, sys.executable, "-c", whole], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    return process


def test_told_twice_it_finishes_its_leaving() -> None:
    """Cleanup finishes although a closing window sends SIGHUP more than once."""
    code = "\n    ".join(["try: runs(); time.sleep(20)", "finally: time.sleep(0.3); print('left', flush=True)"])
    process = program(code)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "left\n"
    assert process.returncode == 129


def test_told_where_a_library_swallows_it() -> None:
    """The exception is raised again."""
    swallow = ["try: runs(); time.sleep(20)", "except BaseException: print('swallowed', flush=True)"]
    code = "\n    ".join(["program.EXIT_GRACE_S = 1", *swallow, "time.sleep(20)"])
    process = program(code)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "swallowed\n"
    assert process.returncode == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_told_while_a_finalizer_runs(number: int, code: int) -> None:
    """A finalizer cannot raise, so the exception is raised after it, without output."""
    fall = f"lambda self: (os.kill(os.getpid(), {number}), [0] * 9)"
    there = f"there = type('F', (), dict(__del__={fall}))()"
    process = program("\n    ".join([there, "runs()", "del there", "time.sleep(60)"]))
    assert process.communicate(timeout=40)[0] == ""
    assert process.returncode == code


def test_under_nohup_it_goes_on() -> None:
    """SIGHUP stays ignored."""
    process = program("runs(); time.sleep(0.3); print('done', flush=True)", "nohup")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0].endswith("done\n")
    assert process.returncode == 0


# --- Temporary files --------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path) -> Iterator[list[Path]]:
    """Leftovers of killed programs, next to files that must stay."""
    (tmp_path / ".x-file").write_bytes(b"left")
    (tmp_path / ".x-folder/inner").mkdir(parents=True)
    (tmp_path / ".x-folder/inner/file").write_bytes(b"left")
    (tmp_path / ".other").write_bytes(b"stays")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/file").write_bytes(b"stays")
    (tmp_path / ".x-link").symlink_to("target")
    yield [tmp_path / name for name in (".x-file", ".x-folder")]
    assert (tmp_path / ".other").exists()
    assert (tmp_path / "target/file").exists()
    assert (tmp_path / ".x-link").is_symlink()


def test_what_was_left_is_removed(tmp_path: Path, left: list[Path]) -> None:
    """Leftovers are removed, but not the target of a link."""
    with temporary_folder(tmp_path, ".x-") as folder:
        assert folder.is_dir()
        assert not any(path.exists() for path in left)
    assert not folder.exists()


@pytest.mark.parametrize("which", [0, 1])
def test_what_somebody_is_at_work_on_stays(tmp_path: Path, left: list[Path], which: int) -> None:
    with locked(left[which]) as ours:
        assert ours
        with temporary_file(tmp_path, ".x-") as (file, path):
            file.write(b"x")
            assert [path.exists() for path in left] == [i == which for i in range(2)]
    assert not path.exists()


def test_two_at_work_keep_out_of_each_others_way(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, ".x-") as first, temporary_folder(tmp_path, ".x-") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert not list(tmp_path.iterdir())


def test_what_somebody_else_owns_stays(tmp_path: Path, left: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    remove_stale(tmp_path, ".x-*")
    assert all(path.exists() for path in left)


def test_without_locks_nothing_is_taken_for_left(
    tmp_path: Path, left: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no locks; files are still written there."""

    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with temporary_folder(tmp_path, ".x-") as folder:
        assert folder.is_dir()
    assert all(path.exists() for path in left)


def test_a_file_that_was_renamed_in_between_is_not_ours(tmp_path: Path) -> None:
    """The name may now belong to another program's file.

    The locked file itself may be complete and renamed by then.
    """
    path = tmp_path / "part"
    with path.open("wb") as file:
        path.rename(tmp_path / "whole")
        assert not lock(file.fileno(), path)
        path.write_bytes(b"")
        assert not lock(file.fileno(), path)


# --- History ----------------------------------------------------------------------------------


def loaded(path: Path) -> list[str]:
    return list(FileHistory(path).load_history_strings())[::-1]


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "history"
    path.touch()
    for text in ("first", "two\nlines\n", "", "nach größerem 🙂 \x1c Text\r", "last"):
        FileHistory(path).store_string(text)
    return path


def test_the_history_as_prompt_toolkit_reads_it(history: Path) -> None:
    """Both read the same entries, and old entries of prompt_toolkit are read too."""
    from prompt_toolkit.history import FileHistory as Theirs

    assert loaded(history) == ["first", "two\nlines\n", "", "nach größerem 🙂 \x1c Text\r", "last"]
    assert list(Theirs(str(history)).load_history_strings())[::-1] == loaded(history)
    Theirs(str(history)).store_string("of an\nolder version")
    assert loaded(history)[-1] == "of an\nolder version"


def test_a_history_cut_anywhere_loses_the_last_entry_alone(history: Path) -> None:
    """The next entry after the cut is complete."""
    data, entries = history.read_bytes(), loaded(history)
    for cut in range(len(data)):
        history.write_bytes(data[:cut])
        whole = loaded(history)
        assert whole == entries[: len(whole)]
        FileHistory(history).store_string("next\nline")
        after = loaded(history)
        assert after[-1] == "next\nline"
        assert after[: len(whole)] == whole
        assert after[:-1] in (whole, entries[: len(whole) + 1])  # the second if only the newline was missing


@pytest.mark.parametrize("junk", [b"\0" * 5000, bytes(range(256)) * 20, b"\n#\n+", b"# a b 99999999999999999999\n+x\n"])
def test_junk_in_a_history_spoils_nothing_else(history: Path, junk: bytes) -> None:
    """Junk between entries or at the end does not affect the entries."""
    entries = loaded(history)
    history.write_bytes(history.read_bytes() + junk)
    assert loaded(history)[: len(entries)] == entries
    FileHistory(history).store_string("next")
    assert loaded(history)[-1] == "next"


def test_a_pipe_for_a_history_is_not_waited_for(tmp_path: Path) -> None:
    """The session reports that history cannot be kept."""
    from rich.console import Console

    from llama_scratch.repl import history as room

    os.environ["XDG_STATE_HOME"] = str(tmp_path)  # an automatic fixture restores it
    (tmp_path / "llama-scratch").mkdir()
    os.mkfifo(tmp_path / "llama-scratch/history")

    console = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    session = SimpleNamespace(screen=SimpleNamespace(console=console))
    assert not isinstance(room.open_history(session), FileHistory)  # type: ignore[arg-type]
    assert "cannot be saved" in console.export_text()
