"""Read small files: regular, bounded, and UTF-8 without a byte order mark.

Every small file that the program reads comes through here. A FIFO therefore never hangs it, /dev/zero or a sparse file
of many gigabytes never fills the memory, and a file that only stands in for a model's file is named for what it is.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from typing import BinaryIO

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, LlamaScratchError, sanitize

START = 512
"""Bytes at the beginning of a file that show its kind."""

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# A descriptor that the program inherited, as for `--config <(…)`: its writer is at work, so it is read like a file.
_INHERITED = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# Files that hold something else than their names promise, which is common after a download.
_POINTER = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/|/annex/objects/")
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
# The plain text that the Hugging Face hub sends with the statuses 401, 403 and 404.
_REFUSAL = re.compile(rb"(Access to (model|dataset) |Invalid username or password|(Entry|Repository) not found)")


def read_bytes(
    path: str | os.PathLike[str],
    limit: int,
    *,
    error: type[LlamaScratchError] = CheckpointError,
    any_content: bool = False,
) -> bytes:
    """Read a small file.

    Args:
        path: A regular file, or a pipe that this process inherited (/dev/stdin, /dev/fd/N).
        limit: Maximum size in bytes.
        error: What to raise for a file that cannot be meant.
        any_content: Whether git-lfs pointers and web pages are content like any other.

    Raises:
        OSError: If the system does not give the file out.
        LlamaScratchError: `error`, if the file is a pipe or a device, larger than `limit`, a git-lfs pointer or a
            web page.
    """
    with _open(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(limit, size or limit) + 1)  # the files of /proc say that they have 0 bytes
    if not any_content:
        reject_stand_in(data, path, error)
    if len(data) > limit:
        has = f"has {size:,} bytes" if size > limit else "is longer"
        raise error(f"{sanitize(path, 200)} {has}, expected at most {limit:,} bytes; check that it is the right file.")
    return data


def read_text(
    path: str | os.PathLike[str],
    limit: int,
    *,
    error: type[LlamaScratchError] = CheckpointError,
    any_content: bool = False,
) -> str:
    """Read a small UTF-8 file without its byte order mark; see `read_bytes`.

    Raises:
        OSError: If the system does not give the file out.
        LlamaScratchError: `error`, also if the file is not UTF-8.
    """
    return decode(read_bytes(path, limit, error=error, any_content=any_content), sanitize(path, 200), error)


def read_remote(address: str, limit: int) -> bytes:
    """Read a small file from gs:// or az:// through blobfile, which raises errors of many kinds."""
    import blobfile

    with blobfile.BlobFile(address, "rb") as file:
        data: bytes = file.read(limit + 1)
    reject_stand_in(data, address)
    if len(data) > limit:
        raise CheckpointError(f"{address} is longer than {limit:,} bytes, expected far less; {REDOWNLOAD_HINT}")
    return data


def read_start(
    path: str | os.PathLike[str],
    limit: int = START,
    *,
    error: type[LlamaScratchError] = CheckpointError,
    any_content: bool = False,
) -> bytes:
    """Read at most `limit` bytes from the beginning of a file of any size; otherwise like `read_bytes`."""
    with _open(path, error) as file:
        start = file.read(limit)
    if not any_content:
        reject_stand_in(start, path, error)
    return start


def _open(path: str | os.PathLike[str], error: type[LlamaScratchError]) -> BinaryIO:
    """Open a file for reading without waiting for another process.

    Raises:
        OSError: If the system refuses, or for a directory.
        LlamaScratchError: `error`, for a named pipe, a device or a socket.
    """
    try:
        _require_content(os.stat(path), path, error)  # before opening, which can already act on a device
    except ValueError:  # a zero byte: there is no file of such a name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from None
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        _require_content(os.fstat(descriptor), path, error)
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_content(status: os.stat_result, path: str | os.PathLike[str], error: type[LlamaScratchError]) -> None:
    """Raise unless this is a file whose end a reader reaches."""
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG or (kind == stat.S_IFIFO and _INHERITED.fullmatch(os.fspath(path))):
        return
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind == stat.S_IFCHR and status.st_rdev == os.stat(os.devnull).st_rdev:  # the usual name of an empty file
        return
    raise error(
        f"{sanitize(path, 200)} is not a file but {_KINDS.get(kind, 'something else')}; "
        "write its content to a file and name that."
    )


def reject_stand_in(
    start: bytes, path: str | os.PathLike[str], error: type[LlamaScratchError] = CheckpointError
) -> None:
    """Raise for a file that only stands in for another one.

    Args:
        start: At least the first `START` bytes, or all of a shorter file.
        path: The name for the message.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, for the pointer of git-lfs or git-annex, a web page, or a server's refusal.
    """
    reject_pointer(start, path, error)
    name = sanitize(path, 200)
    if is_web_page(start):
        raise error(f"{name} is a web page, so the server did not give the file out; {REDOWNLOAD_HINT}")
    if _REFUSAL.match(start):
        answer = start.partition(b"\n")[0].decode("utf-8", errors="replace")
        raise error(f"{name} is a server's refusal ('{sanitize(answer)}'), expected the file; {REDOWNLOAD_HINT}")


def reject_pointer(
    start: bytes, path: str | os.PathLike[str], error: type[LlamaScratchError] = CheckpointError
) -> None:
    """Raise `error` for the pointer that a clone without git-lfs, or git-annex, has in place of a file."""
    if _POINTER.match(start):
        raise error(
            f"{sanitize(path, 200)} is a git-lfs pointer, expected the file that it stands for; "
            "run 'git lfs pull' beside it."
        )


def is_web_page(start: bytes) -> bool:
    """Whether data begins like HTML or XML."""
    return _PAGE.match(start[:START]) is not None


def decode(data: bytes, name: str, error: type[LlamaScratchError] = CheckpointError) -> str:
    """UTF-8 → text without its byte order mark.

    Args:
        data: The content of a file.
        name: The name for messages.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, if it is UTF-16 or not text.
    """
    try:
        return without_mark(data, name, error).decode()
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise error(
            f"{name} is not UTF-8: line {line} has the byte {problem.object[problem.start]:#04x}; save it as UTF-8."
        ) from problem


def without_mark(data: bytes, name: str, error: type[LlamaScratchError] = CheckpointError) -> bytes:
    """Remove the byte order mark that some editors put at the beginning of UTF-8.

    Args:
        data: The beginning of a text, or all of it.
        name: The name for messages.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, if it is UTF-16 or UTF-32.
    """
    if _is_wide(data[:START]):
        raise error(f"{name} is encoded in UTF-16 or UTF-32, expected UTF-8; save it as UTF-8.")
    return data.removeprefix(codecs.BOM_UTF8)


def _is_wide(start: bytes) -> bool:
    """Whether a text has two or four bytes per character: by its mark, or because every other byte is zero."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return True
    halves = start[::2], start[1::2]
    return len(start) >= 4 and any(not any(half) for half in halves) and any(map(any, halves))


def without_line_end(text: str) -> str:
    """Remove one line end, \\n or \\r\\n, from the end of a text."""
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text
