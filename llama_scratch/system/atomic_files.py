"""Atomic writes: a new file is a locked temporary file until it is complete.

A temporary file without a lock is stale: its process was killed. The next process removes it. The lock (flock) ends
with the process that holds it, even if that process is killed or runs in another container. If the system or the file
system does not support locks, no file counts as stale.
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

# Flags of os.open. NO_WAIT does not block on a named pipe. NO_LINK, in addition, does not follow a symlink.
NO_WAIT: int = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK: int = getattr(os, "O_NOFOLLOW", 0) | NO_WAIT


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a temporary folder, and remove it after the `with` block.

    Args:
        parent: The folder to create it in. Stale temporary folders there are removed first.
        prefix: The beginning of its name.

    Yields:
        The path of the folder.
    """
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
    """Create a temporary file, and remove it after the `with` block unless renamed.

    Args:
        parent: The folder to create it in. Stale temporary files there are removed first.
        prefix: The beginning of its name.
        mode: Its permissions, before the umask. By default, only the user can access it.

    Yields:
        The open file and its path.
    """
    remove_stale(parent, f"{prefix}*")
    while True:
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
        name = parent / f"{prefix}{secrets.token_hex(4)}"
        with _gone_afterwards(name) as path, open(os.open(path, new, mode), "wb") as file:
            if lock(file.fileno(), path):
                yield file, path
                return


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file atomically: it has its old content until it has its new content.

    Args:
        path: The file.
        data: The new content.
        mode: The permissions, before the umask. By default, only the user can access it.

    Raises:
        OSError: If the file cannot be written.
    """
    with temporary_file(path.parent, ".llama-scratch-writing-", mode) as (file, part):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        part.replace(path)


def publish(part: Path, path: Path) -> Path:
    """Flush a complete file to disk and rename it.

    Args:
        part: The temporary file.
        path: The final path.

    Returns:
        The final path.
    """
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    return part.replace(path)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove the user's temporary files and folders that no process has locked.

    Args:
        folder: The folder to search.
        pattern: A glob pattern for their names.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError), locked(path, certain=True) as ours:
            if ours:
                _remove(path)


@contextmanager
def _gone_afterwards(path: Path) -> Iterator[Path]:
    """Remove a path after the `with` block, even if Ctrl-C interrupts the removal once."""
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
    """Lock a file or folder during the `with` block.

    Args:
        path: The file or folder.
        certain: See `lock`.

    Yields:
        Whether this process has the lock.

    Raises:
        OSError: If the path cannot be opened, or is a symlink.
    """
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    try:
        yield lock(descriptor, path, certain=certain)
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, certain: bool = False) -> bool:
    """Lock an open file or folder until it is closed.

    Args:
        descriptor: Its descriptor.
        path: Its path.
        certain: Also return False if locks are not supported or the file belongs to another user.

    Returns:
        Whether to treat the file as locked by this process. False if another process has the lock, or if the file is no
        longer at `path`.
    """
    here = os.fstat(descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return not certain
    # The previous owner of the lock may have renamed or removed the file.
    with contextlib.suppress(OSError):
        return os.path.samestat(here, path.lstat()) and (not certain or here.st_uid == os.getuid())
    return False
