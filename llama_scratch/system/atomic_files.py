"""Atomic writes: a new file is a locked temporary file until it is complete. Stale ones of killed programs are removed.

The lock (flock) ends with the process that holds it, however that ends, on whichever machine or in whichever
container. If the system or the file system has no locks, no file counts as stale.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Flags of os.open: no waiting where somebody put a pipe; and what lies there, not what it points to.
NO_WAIT: int = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0) | NO_WAIT


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone afterwards; those that killed programs left there go first."""
    remove_stale(parent, f"{prefix}*")
    while True:
        with _gone_afterwards(parent / f"{prefix}{secrets.token_hex(4)}") as folder:
            folder.mkdir(0o700)
            with locked(folder) as ours:
                if ours:
                    yield folder
                    return


@contextmanager
def temporary_file(parent: Path, prefix: str, mode: int = 0o600) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file in `parent`, for oneself alone, and its path; gone afterwards unless it was renamed."""
    remove_stale(parent, f"{prefix}*")
    while True:
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
        name = parent / f"{prefix}{secrets.token_hex(4)}"
        with _gone_afterwards(name) as path, open(os.open(path, new, mode), "wb") as file:
            if lock(file.fileno(), path):
                yield file, path
                return


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file in one piece: under its name there is all of it, or its content from before.

    Args:
        path: The file.
        data: Its content.
        mode: Its permissions, apart from those that the umask removes; by default they are the user's alone.

    Raises:
        OSError: If it cannot be written.
    """
    with temporary_file(path.parent, ".llama-scratch-writing-", mode) as (file, part):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        part.replace(path)


def publish(part: Path, path: Path) -> Path:
    """Give a complete file its name, once its bytes are on the disk; returns the name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    return part.replace(path)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove files and folders of our own that no program is at work on."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError), locked(path, certain=True) as ours:
            if ours:
                _remove(path)


@contextmanager
def _gone_afterwards(path: Path) -> Iterator[Path]:
    """A path at which nothing is left, not by an interrupt that falls into the removing either."""
    try:
        try:
            yield path
        finally:
            _remove(path)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def locked(path: Path, *, certain: bool = False) -> Iterator[bool]:
    """Whether it is ours alone in here; see `lock`. Raises OSError where it cannot be opened, as where it is a link."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    try:
        yield lock(descriptor, path, certain=certain)
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, certain: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another has it, or it is no longer at `path`.

    certain: False, too, where there are no locks or it is another person's.
    """
    here = os.fstat(descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return not certain
    # Whoever had it before may have renamed or removed it.
    with contextlib.suppress(OSError):
        return os.path.samestat(here, path.lstat()) and (not certain or here.st_uid == os.getuid())
    return False
