"""Small files: regular, bounded, UTF-8 without a byte order mark, and not a placeholder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_scratch.errors import CheckpointError, LlamaScratchError, UsageError
from llama_scratch.system.small_files import decode, read_bytes, read_start, read_text, without_line_end
from llama_scratch.tokenizer import Tokenizer
from tests.helpers.checkpoints import PAGE, POINTER, tokenizer_file

MARK = b"\xef\xbb\xbf"

Reader = Callable[[Path], object]
READERS: dict[str, Reader] = {
    "bytes": lambda path: read_bytes(path, 100),
    "text": lambda path: read_text(path, 100),
    "start": read_start,
    "tokenizer": lambda path: Tokenizer.from_meta(str(path)),
}


@pytest.fixture(params=READERS.values(), ids=list(READERS))
def reader(request: pytest.FixtureRequest) -> Reader:
    """Each function that reads a small file."""
    read: Reader = request.param
    return read


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path, reader: Reader) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe"):
        reader(tmp_path / "pipe")


def test_a_device_is_not_read(reader: Reader) -> None:
    """/dev/zero is endless."""
    with pytest.raises(CheckpointError, match="device"):
        reader(Path("/dev/zero"))


def test_what_is_missing_or_a_directory_is_the_systems_error(tmp_path: Path) -> None:
    """Callers add their own message. No file has a name with a zero byte."""
    for path, error in [(tmp_path / "no", FileNotFoundError), (tmp_path, IsADirectoryError)]:
        with pytest.raises(error):
            read_bytes(path, 100)
    with pytest.raises(FileNotFoundError):
        read_bytes("a\0b", 100)


def test_the_null_device_is_an_empty_file() -> None:
    assert read_bytes("/dev/null", 100) == b""


def test_a_pipe_that_the_process_inherited_is_read(tmp_path: Path) -> None:
    """As in `--config <(…)`, whose path is /dev/fd/63, even if the writer is slow."""
    reading, writing = os.pipe()

    def write() -> None:
        os.write(writing, b"top = 3")
        os.close(writing)

    threading.Timer(0.05, write).start()
    try:
        assert read_text(f"/dev/fd/{reading}", 100) == "top = 3"
    finally:
        os.close(reading)


@pytest.mark.parametrize("size", [101, 1 << 30, 20 << 30])
def test_a_large_file_is_not_read(tmp_path: Path, size: int) -> None:
    """The size is checked first, so a sparse file of 20 GB takes no memory."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    with pytest.raises(UsageError, match=f"{size:,} bytes"):
        read_bytes(tmp_path / "sparse", 100, error=UsageError)
    assert read_start(tmp_path / "sparse", 10) == bytes(10)


def test_a_file_that_does_not_know_its_size_is_bounded() -> None:
    """Files in /proc report a size of 0 bytes."""
    assert read_bytes("/proc/self/status", 1 << 16).startswith(b"Name:")
    with pytest.raises(CheckpointError, match="100 bytes"):
        read_bytes("/proc/self/status", 100)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "git-lfs"),
        (b"version https://hawser.github.com/spec/v1\n", "git-lfs"),
        (b"/annex/objects/SHA256E-s2471676205--aa.pth\n", "git-lfs"),
        (PAGE, "web page"),
        (MARK + b"\n <HTML>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"Access to model meta-llama/Llama-3.2-1B is restricted.", "restricted"),
        (b"Entry not found", "Entry not found"),
    ],
)
def test_a_stand_in_is_named(tmp_path: Path, reader: Reader, content: bytes, says: str) -> None:
    """git-lfs pointers, and error pages that were saved in place of the file."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        reader(tmp_path / "file")


def test_where_any_text_is_welcome_a_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(PAGE)
    assert read_bytes(tmp_path / "file", 100, any_content=True) == PAGE


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(MARK + "é".encode())
    assert read_text(tmp_path / "file", 100) == "é"
    (tmp_path / "tokenizer.model").write_bytes(MARK + tokenizer_file())
    assert Tokenizer.from_meta(str(tmp_path / "tokenizer.model")).n_vocab == 556


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("error", [UsageError, CheckpointError])
def test_wide_text_is_named(encoding: str, error: type[LlamaScratchError]) -> None:
    """With and without a byte order mark."""
    with pytest.raises(error, match=r"UTF-16.*UTF-8"):
        decode("top = 10\n".encode(encoding), "config.toml", error)


def test_other_bytes_are_named_with_their_line() -> None:
    with pytest.raises(CheckpointError, match="line 2 has the byte 0xe9"):
        decode(b"a\nb\xe9", "params.json")


@pytest.mark.parametrize(
    ("text", "without"), [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a\r", "a\r"), ("\r\n", "")]
)
def test_one_line_end_is_removed(text: str, without: str) -> None:
    assert without_line_end(text) == without


def test_a_directory_means_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file())
    assert Tokenizer.from_meta(str(tmp_path)).n_vocab == 556


def test_another_kind_of_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_meta(str(tmp_path / "tokenizer.json"))
