"""Damaged files, and mapped files that change on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_scratch.checkpoint import Checkpoint, open_checkpoint
from llama_scratch.checkpoint.checksums import write_checksums
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.findings import CheckResult
from llama_scratch.checkpoint.verify import verify
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError
from llama_scratch.llama import Llama
from llama_scratch.system.mapped_files import MappedFiles
from tests.helpers import ROOT
from tests.helpers.terminal import Terminal
from tests.trust import damage

WEIGHTS = "consolidated.00.pth"


# --- On the disk ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", damage.FORMS)
def test_every_damage_is_refused_or_found_or_changes_nothing(tmp_path: Path, form: str) -> None:
    """A short version of the recorded run: no findings, and all expected outcomes."""
    found = damage.run(tmp_path, form, {"truncated": 5, "flipped": 24}, seed=7)
    outcomes = [outcome for kinds in found.values() for outcome in kinds.values()]
    assert [outcome.findings for outcome in outcomes] == [[]] * len(outcomes)
    assert sum(outcome.named for outcome in outcomes) > 10
    # Only a checksum detects a flipped bit in a weight, and only Meta's format has checksums in the file.
    weights = found[next(name for name in found if name.endswith((".pth", ".safetensors", ".gguf")))]
    assert weights["truncated"].named == 5
    assert (weights["flipped"].unnoticed > 10) == (form != "meta")
    assert weights["flipped"].found == weights["flipped"].unnoticed
    assert weights["flipped"].found_alone < 3


def test_what_is_compared_is_the_whole_model(tiny_dir: Path, tmp_path: Path) -> None:
    """One changed bit of a weight or one changed token is a different model."""
    whole = damage.loaded(tiny_dir)
    assert damage.loaded(tiny_dir) == whole
    path = tmp_path / "m.gguf"
    convert(tiny_dir, path, "gguf")
    assert damage.loaded(path)["weights"] == whole["weights"]
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    now = damage.loaded(path)
    assert [part for part in ("weights", "logits") if now[part] != whole[part]] == ["weights", "logits"]
    path.write_bytes(data.replace(b"reserved_special_token_9|", b"reserved_special_token_X|", 1))
    assert damage.loaded(path)["tokenizer"] != whole["tokenizer"]


def test_the_checksums_are_those_of_md5sum(tiny_dir: Path, tmp_path: Path) -> None:
    """For a directory and a file; an invalid checksum file is reported by name."""
    directory, file = tmp_path / "d", tmp_path / "m.gguf"
    convert(tiny_dir, directory, "hf")
    convert(tiny_dir, file, "gguf")
    for path, name in ((directory, "checklist.chk"), (file, "m.gguf.md5")):
        sums = write_checksums(path)
        assert sums.name == name
        if shutil.which("md5sum"):
            subprocess.run(["md5sum", "--check", "--quiet", "--strict", name], cwd=sums.parent, check=True)
        found = verify(path)
        assert not found.wrong
        checked = {finding.part for finding in found.findings if finding.check == "MD5"}
        assert checked == ({each.name for each in path.iterdir()} - {name} if path.is_dir() else {"m.gguf"})
        assert not any(finding.result == "note" for finding in found.findings)
        sums.write_text("no sum\n")
        (wrong,) = [finding for finding in verify(path).findings if finding.result == "wrong"]
        assert wrong.part == name
        assert wrong.sentence.startswith(f"Line 1 of {name} is 'no sum', expected")
        sums.unlink()
        (note,) = [finding for finding in verify(path).findings if finding.result == "note"]
        assert f"{' > '.join(['md5sum ' + ('*' if path.is_dir() else name[:-4]), name])}' beside it" in note.sentence


def test_a_list_that_does_not_name_its_file(tiny_dir: Path, tmp_path: Path) -> None:
    """A checksum file that lists only another file does not verify this one."""
    convert(tiny_dir, tmp_path / "m.gguf", "gguf")
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "m.gguf.md5").write_text("d41d8cd98f00b204e9800998ecf8427e  other\n")
    notes = [finding.sentence for finding in verify(tmp_path / "m.gguf").findings if finding.result == "note"]
    assert "m.gguf.md5 does not list it." in notes


# --- While it is mapped -----------------------------------------------------------------------


def shrink(file: Path) -> None:
    os.truncate(file, 1000)


def overwrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-5000, os.SEEK_END)
        stream.write(b"\1")


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\1")


def replace(file: Path) -> None:
    file.rename(file.with_name("old"))
    file.write_bytes(b"another")


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model that tests may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "Tiny-Llama"))


@pytest.mark.parametrize("change", [shrink, overwrite, grow])
def test_a_file_that_changed_gives_no_answer(model: Path, change: Callable[[Path], None]) -> None:
    """The next prompt or token, a view and a modified network raise an error."""
    llama = Llama.load(model, precision="bf16")
    llama.predict("the")
    steps = llama.generate("the", 5)
    next(steps)
    change(model / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} changed while .* \(.*\)\. Load the model"):
        llama.predict("the one")
    for ask in (lambda: next(steps), lambda: llama.logits("on"), lambda: llama.intervened({}).predict("the")):
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            ask()


def test_a_file_that_changes_while_an_answer_is_computed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer may contain changed weights, so it is an error too."""
    llama = Llama.load(model, precision="bf16")
    forward = llama.engine._forward_cached

    def late(*arguments: object, **options: object) -> object:
        logits = forward(*arguments, **options)  # type: ignore[arg-type]
        grow(model / WEIGHTS)
        return logits

    monkeypatch.setattr(llama.engine, "_forward_cached", late)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        llama.predict("the")


@pytest.mark.parametrize("change", [Path.unlink, replace])
def test_a_file_that_was_removed_or_replaced_still_answers(model: Path, change: Callable[[Path], None]) -> None:
    """The mapping keeps the opened file."""
    llama = Llama.load(model, precision="bf16")
    before = llama.logits("the one")
    change(model / WEIGHTS)
    fresh = llama.intervened({})
    assert fresh.logits("the one").equal(before)


def test_files_are_held_open_only_as_long_as_the_model_lives(model: Path) -> None:
    """A session that loads many models does not run out of file descriptors."""
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        open_checkpoint(model)
    checkpoint = open_checkpoint(model)
    assert len(os.listdir("/dev/fd")) == before + 1
    del checkpoint
    assert len(os.listdir("/dev/fd")) == before
    with pytest.raises(FileNotFoundError):
        MappedFiles([model / WEIGHTS, model / "none"])
    assert len(os.listdir("/dev/fd")) == before


def test_a_model_that_changes_while_it_is_verified(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changed file is reported as wrong."""
    from llama_scratch.checkpoint import verify as module

    facts = module._facts

    def late(checkpoint: Checkpoint, args: ModelArgs) -> list[CheckResult]:
        grow(model / WEIGHTS)
        return facts(checkpoint, args)

    monkeypatch.setattr(module, "_facts", late)
    found = verify(model)
    assert [finding.part for finding in found.findings if finding.result == "wrong"] == [WEIGHTS]


# --- SIGBUS -----------------------------------------------------------------------------------

SENTENCE = "changed while it was in use"


def shrinking(file: Path, place: str, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program without a terminal and truncate a mapped file at `place`."""
    command = [sys.executable, "-m", "tests.helpers.shrinking", str(file), place, *options]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def read_to_the_end(terminal: Terminal) -> None:
    """Read until the program ends; its terminal stays open."""
    end = time.monotonic() + terminal.timeout
    while terminal.read():
        assert time.monotonic() < end, terminal.text


def said(result: subprocess.CompletedProcess[str], name: str) -> None:
    """Check that the program exited with an error message about the file."""
    assert result.returncode == 4, result
    (line,) = result.stderr.splitlines()[-1:]
    assert line.startswith("llama-scratch: ")
    assert f"{name} {SENTENCE} (from " in line
    assert " to 0 bytes)" in line
    assert "Traceback" not in result.stderr


def test_a_file_that_shrinks_in_a_pipe(model: Path) -> None:
    """Between two answers, in the library's own threads."""
    place = "llama_scratch.inference.engine:Engine._reset_to"
    options = ("--model-dir", str(model), "--precision", "bf16", "--quiet")
    result = shrinking(model / WEIGHTS, place, *options, stdin="the\n")
    said(result, WEIGHTS)
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["verify", "convert"])
def test_a_file_that_shrinks_under_a_command(model: Path, tmp_path: Path, command: str) -> None:
    """In a worker thread, and while writing: the error names the source."""
    if command == "verify":
        said(shrinking(model / WEIGHTS, "llama_scratch.checkpoint.verify:_scan", "verify", str(model)), WEIGHTS)
        return
    target = tmp_path / "out" / "m.gguf"
    target.parent.mkdir()
    place = "llama_scratch.checkpoint.convert:_require_space!"
    said(shrinking(model / WEIGHTS, place, "convert", str(model), str(target), "--to", "gguf"), WEIGHTS)
    assert not target.exists()


def test_a_session_survives_what_it_can_and_leaves_the_terminal_whole(model: Path) -> None:
    """A file that is truncated at the prompt gives an error; the session continues."""
    options = ("--model-dir", str(model), "--precision", "bf16", "--no-live")
    with Terminal(*options) as terminal:
        terminal.wait_for("Tiny-Llama>")
        assert not terminal.echoes
        terminal.command("the", "%")
        shrink(model / WEIGHTS)
        terminal.command("one", "changed while")
        terminal.type("ctrl-d")
        read_to_the_end(terminal)
        assert terminal.echoes
        assert terminal.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "llama_scratch.precision.packing:to_panels",
        "llama_scratch.inference.loading:build",
        "llama_scratch.inference.generation:sample",
    ],
)
def test_a_bus_error_leaves_the_terminal_as_it_was(model: Path, place: str) -> None:
    """While weights are packed, while the model loads, and while text streams."""
    precision = {"build": "fp32", "sample": "bf16", "to_panels": "int8"}[place.partition(":")[2]]
    program = (sys.executable, "-m", "tests.helpers.shrinking", str(model / WEIGHTS), place)
    options = ("--model-dir", str(model), "--precision", precision, "--no-live", "--generate", "20")
    with Terminal(*options, program=program, env={"PYTHONPATH": str(ROOT)}) as terminal:
        terminal.wait_for("Tiny-Llama>")
        if precision == "bf16":
            terminal.type("the", "enter")
        read_to_the_end(terminal)
        assert terminal.echoes
        assert not terminal.screen.cursor.hidden
        assert not terminal.marks_pastes
        assert terminal.wait() == 4
        assert SENTENCE in " ".join(terminal.text.split())


@pytest.mark.slow
def test_a_library_has_no_handler() -> None:
    """SIGBUS belongs to the host program; an active faulthandler stays active."""
    code = (
        "import os, signal, sys\n"
        "import llama_scratch.llama\n"
        "from llama_scratch.system import crash_handler\n"
        "if len(sys.argv) > 1: crash_handler.install()\n"
        "os.kill(os.getpid(), signal.SIGBUS)\n"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, check=False, cwd=ROOT, capture_output=True).returncode < 0
    guarded = subprocess.run([*run, "x"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert guarded.returncode == 4
    assert guarded.stderr.startswith("llama-scratch: A file became unreadable")
    traced = [sys.executable, "-X", "faulthandler", "-c", code, "x"]
    assert subprocess.run(traced, check=False, cwd=ROOT, capture_output=True).returncode < 0
