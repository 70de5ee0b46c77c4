"""Read small files: regular files of limited size, as bytes or as UTF-8.

All small files are read with these functions. Therefore, a FIFO never blocks the program, and /dev/zero or a huge
sparse file never fills the memory. A placeholder for a model's file, such as a git-lfs pointer, has its own error.
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
"""Number of bytes at the beginning of a file that identify its type."""

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
# Inherited descriptors, as in `--config <(…)`. Their writers are running, so reading does not block forever.
_INHERITED = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# Beginnings of placeholders and error pages, which failed downloads often leave in place of a file.
_POINTER = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/|/annex/objects/")
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
# Plain text that the Hugging Face Hub sends with status 401, 403 or 404.
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
        error: The class to raise for a file that cannot be the right one.
        any_content: Accept git-lfs pointers and web pages like any other content.

    Raises:
        OSError: If the file cannot be read.
        LlamaScratchError: `error`, if the file is a pipe or a device, larger than `limit`, a git-lfs pointer or a
            web page.
    """
    with _open(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(limit, size or limit) + 1)  # files in /proc report a size of 0
    if not any_content:
        reject_stand_in(data, path, error)
    if len(data) > limit:
        has = f"has {size:,} bytes" if size > limit else "is longer"
        raise error(f"{sanitize(path, 200)} {has}, expected at most {limit:,} bytes. Check that it is the right file.")
    return data


def read_text(
    path: str | os.PathLike[str],
    limit: int,
    *,
    error: type[LlamaScratchError] = CheckpointError,
    any_content: bool = False,
) -> str:
    """Read a small UTF-8 file without its byte order mark.

    Args:
        path: A regular file, or a pipe that this process inherited.
        limit: Maximum size in bytes.
        error: The class to raise for a file that cannot be the right one.
        any_content: Accept git-lfs pointers and web pages like any other content.

    Raises:
        OSError: If the file cannot be read.
        LlamaScratchError: `error`, also if the file is not UTF-8.
    """
    return decode(read_bytes(path, limit, error=error, any_content=any_content), sanitize(path, 200), error)


def read_remote(address: str, limit: int) -> bytes:
    """Read a small file from gs:// or az:// with blobfile.

    Args:
        address: The address.
        limit: Maximum size in bytes.

    Raises:
        CheckpointError: If the file is longer than `limit`, a git-lfs pointer or a web page.
        Exception: Any error of blobfile. They have no common base class.
    """
    import blobfile

    with blobfile.BlobFile(address, "rb") as file:
        data: bytes = file.read(limit + 1)
    reject_stand_in(data, address)
    if len(data) > limit:
        raise CheckpointError(f"{address} is longer than {limit:,} bytes. Check that it is the right file.")
    return data


def read_start(
    path: str | os.PathLike[str],
    limit: int = START,
    *,
    error: type[LlamaScratchError] = CheckpointError,
    any_content: bool = False,
) -> bytes:
    """Read the beginning of a file of any size. Otherwise like `read_bytes`.

    Args:
        path: A regular file, or a pipe that this process inherited.
        limit: Maximum number of bytes to read.
        error: The class to raise for a file that cannot be the right one.
        any_content: Accept git-lfs pointers and web pages like any other content.
    """
    with _open(path, error) as file:
        start = file.read(limit)
    if not any_content:
        reject_stand_in(start, path, error)
    return start


def _open(path: str | os.PathLike[str], error: type[LlamaScratchError]) -> BinaryIO:
    """Open a file for reading without waiting for another process.

    Raises:
        OSError: If the file cannot be opened or is a directory.
        LlamaScratchError: `error`, for a named pipe, a device or a socket.
    """
    try:
        _require_content(os.stat(path), path, error)  # before opening, which can have side effects on a device
    except ValueError:  # a zero byte, which no file name contains
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
    """Raise an error unless this is a file that can be read to its end."""
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG or (kind == stat.S_IFIFO and _INHERITED.fullmatch(os.fspath(path))):
        return
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind == stat.S_IFCHR and status.st_rdev == os.stat(os.devnull).st_rdev:  # /dev/null counts as an empty file
        return
    raise error(
        f"{sanitize(path, 200)} is {_KINDS.get(kind, 'not a regular file')}, expected a file. "
        "Write its content to a file and use that file."
    )


def reject_stand_in(
    start: bytes, path: str | os.PathLike[str], error: type[LlamaScratchError] = CheckpointError
) -> None:
    """Reject a placeholder for a file, or an error page that was saved in its place.

    Args:
        start: At least the first `START` bytes, or a whole shorter file.
        path: The name for the message.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, for a git-lfs or git-annex pointer, a web page, or a server's error message.
    """
    reject_pointer(start, path, error)
    name = sanitize(path, 200)
    if is_web_page(start):
        raise error(f"{name} is a web page, which the server sent instead of the file. {REDOWNLOAD_HINT}")
    if _REFUSAL.match(start):
        answer = start.partition(b"\n")[0].decode("utf-8", errors="replace")
        raise error(f"{name} is a server's error message ('{sanitize(answer)}') instead of the file. {REDOWNLOAD_HINT}")


def reject_pointer(
    start: bytes, path: str | os.PathLike[str], error: type[LlamaScratchError] = CheckpointError
) -> None:
    """Reject a git-lfs or git-annex pointer.

    In a clone that was made without these programs, each large file is replaced by a pointer.

    Args:
        start: At least the first `START` bytes, or a whole shorter file.
        path: The name for the message.
        error: The class to raise.
    """
    if _POINTER.match(start):
        raise error(
            f"{sanitize(path, 200)} is a git-lfs pointer instead of the file itself. "
            "Run `git lfs pull` in its directory."
        )


def is_web_page(start: bytes) -> bool:
    """Whether data begins like HTML or XML."""
    return _PAGE.match(start[:START]) is not None


def decode(data: bytes, name: str, error: type[LlamaScratchError] = CheckpointError) -> str:
    """Decode UTF-8, and remove a byte order mark.

    Args:
        data: The content of a file.
        name: The name for messages.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, if the content is not UTF-8.
    """
    try:
        return without_mark(data, name, error).decode()
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise error(
            f"{name} is not UTF-8: line {line} has the byte {problem.object[problem.start]:#04x}. Save it as UTF-8."
        ) from problem


def without_mark(data: bytes, name: str, error: type[LlamaScratchError] = CheckpointError) -> bytes:
    """Remove the byte order mark that some editors write at the beginning of UTF-8.

    Args:
        data: The beginning of a text, or the whole text.
        name: The name for messages.
        error: The class to raise.

    Raises:
        LlamaScratchError: `error`, if the text is UTF-16 or UTF-32.
    """
    if _is_wide(data[:START]):
        raise error(f"{name} is encoded in UTF-16 or UTF-32. Save it as UTF-8.")
    return data.removeprefix(codecs.BOM_UTF8)


def _is_wide(start: bytes) -> bool:
    """Whether a text has the byte order mark of UTF-16 or UTF-32, or zeros in every other byte."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return True
    halves = start[::2], start[1::2]
    return len(start) >= 4 and any(not any(half) for half in halves) and any(map(any, halves))


def without_line_end(text: str) -> str:
    """Remove one \\n or \\r\\n from the end of a text."""
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text
