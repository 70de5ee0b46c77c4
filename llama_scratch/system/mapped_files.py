"""Files that are mapped: what happens to them happens to the program that reads them.

A file that was removed, or replaced by another of its name, stays as it was for whoever has it open. One that is
written to changes the weights, and where one became shorter the system sends SIGBUS, which ends a program without a
word and leaves the terminal as it was being drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llama_scratch.errors import CheckpointError, sanitize

_EXPECTED = "expected it to stay as it was; load the model again."
_UNKNOWN = f"A file could not be read on while it was in use (it became shorter, or its disk failed), {_EXPECTED}"
# Bytes that are hashed between two reports of progress.
_BLOCK = 4 << 20
# Pastes unmarked, the cursor shown, no color, a line of its own.
_RESTORE = b"\x1b[?2004l\x1b[?25h\x1b[0m\n"


class MappedFiles:
    """Files that are mapped, held open so that it shows whether they are still what they were."""

    def __init__(self, paths: Iterable[Path]):
        self._files: dict[int, tuple[Path, os.stat_result]] = {}  # by descriptor
        self._digests: dict[str | None, str] = {}
        weakref.finalize(self, _close, self._files)
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            self._files[descriptor] = path, os.fstat(descriptor)
        _MAPPED.add(self)

    def __str__(self) -> str:
        return " and ".join(sanitize(path.name) for path, _ in self._files.values()) or "in no file"

    def check(self) -> None:
        """Raise `CheckpointError` where a file was written to or became shorter. Takes a microsecond a file."""
        for descriptor, (path, before) in self._files.items():
            now = os.fstat(descriptor)
            if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                how = "it was written to"
                if now.st_size != before.st_size:
                    how = f"it has {now.st_size:,} bytes and had {before.st_size:,}"
                raise CheckpointError(f"{sanitize(path, 200)} changed while it was in use ({how}), {_EXPECTED}")

    @property
    def names(self) -> list[str]:
        """The files' names, in alphabetical order."""
        return sorted(path.name for path, _ in self._files.values())

    def sha256(self, progress: Callable[[str, int, int], None], name: str | None = None) -> str:
        """Return the SHA-256 of the files' bytes in hexadecimal, as `cat FILES | sha256sum` prints it.

        It is computed once, from the files as they were opened. A file that has replaced one of them since, under the
        same name, does not count.

        Args:
            progress: Called with "checking", the bytes read so far and all bytes.
            name: Hash only the file of this name. By default all of them, in the order of `names`.

        Raises:
            CheckpointError: If a file was written to before its digest was computed.
        """
        if name not in self._digests:
            self.check()
            files = sorted((path.name, file, status.st_size) for file, (path, status) in self._files.items())
            files = [entry for entry in files if name in (None, entry[0])]
            total, done, digest = sum(size for *_, size in files), 0, hashlib.sha256()
            for _, file, _ in files:
                offset = 0
                while block := os.pread(file, _BLOCK, offset):
                    digest.update(block)
                    offset, done = offset + len(block), done + len(block)
                    progress("checking", done, total)
            self.check()
            self._digests[name] = digest.hexdigest()
        return self._digests[name]


_MAPPED: weakref.WeakSet[MappedFiles] = weakref.WeakSet()


def _close(files: dict[int, Any]) -> None:
    for descriptor in files:
        with contextlib.suppress(OSError):
            os.close(descriptor)


# --- SIGBUS -----------------------------------------------------------------------------------

# The signals of a crash, after which the program ends as it would have, but for the terminal.
_CRASHES = [getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE") if hasattr(signal, name)]
# What the system calls must stay where it is; and the terminal as it was found, by its descriptor.
_handler: Any = None
_terminal: tuple[int, list[Any]] | None = None


def install() -> None:
    """From now on SIGBUS is one sentence, the terminal as it is now, and the exit code of a damaged file.

    A crash on a terminal gives that back too, and then goes on as it would have.
    For the command line alone: a library leaves its host's signals as they are. Nothing is done where the system has
    no such signal, or `faulthandler` was asked to show where it came from.
    """
    global _handler, _terminal
    import faulthandler

    if not hasattr(signal, "SIGBUS") or faulthandler.is_enabled() or _handler:
        return
    import ctypes  # torch imports it too

    _terminal = _found_terminal()
    # Python's own handlers run when the reading goes on, and it cannot: it would raise the signal for ever. This one
    # is called where it was raised, within a read of a mapping, so that Python is as whole as at any other call.
    with contextlib.suppress(AttributeError, OSError, MemoryError):  # a system that lets no program do this
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        system_signal = ctypes.CDLL(None).signal
        system_signal.argtypes, system_signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
        _handler = kind(_leave)
        for number in [signal.SIGBUS, *(_CRASHES if _terminal else [])]:
            system_signal(number, _handler)


def _found_terminal() -> tuple[int, list[Any]] | None:
    with contextlib.suppress(ImportError):
        import termios

        for descriptor in (0, 1, 2):
            with contextlib.suppress(termios.error, OSError):
                return descriptor, termios.tcgetattr(descriptor)
    return None


def _leave(number: int) -> None:
    """End the program, from whichever thread it was."""
    try:
        restore_terminal()
        if number in _CRASHES:
            _end_by(number)
        os.write(2, f"llama-scratch: {_sentence()}\n".encode())
    finally:
        os._exit(CheckpointError.exit_code)


def _end_by(number: int) -> None:
    """What the system does about a signal that nobody handles."""
    import ctypes

    ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; Python's own may be set by its main thread alone
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


def restore_terminal() -> None:
    """Give the terminal back as `install` found it."""
    if _terminal is None:
        return
    import termios

    # A program in the background is stopped when it sets the terminal, unless it blocks the signal for that.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    with contextlib.suppress(termios.error, OSError):
        termios.tcsetattr(_terminal[0], termios.TCSANOW, _terminal[1])
    screen = next((descriptor for descriptor in (2, 1) if os.isatty(descriptor)), None)
    if screen is not None and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(OSError):
            os.write(screen, _RESTORE)


def _sentence() -> str:
    for mapped in list(_MAPPED):
        try:
            mapped.check()
        except CheckpointError as error:
            return str(error)
    return _UNKNOWN
