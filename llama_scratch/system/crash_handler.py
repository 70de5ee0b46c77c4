"""What the program says and does when the system ends it: SIGBUS for a mapped file that changed, and crashes.

SIGBUS ends a program without a word and leaves the terminal as it was being drawn. With this handler it is one message,
and the terminal is as it was before.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from llama_scratch.errors import CheckpointError
from llama_scratch.system import mapped_files

_UNKNOWN = (
    "A file could not be read on while it was in use (it became shorter, or its disk failed), "
    + mapped_files.EXPECTED_UNCHANGED
)
# Pastes unmarked, the cursor shown, no color, a line of its own.
_RESTORE = b"\x1b[?2004l\x1b[?25h\x1b[0m\n"
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

    _terminal = _read_terminal()
    # Python's own handlers run when the reading goes on, and it cannot: it would raise the signal for ever. This one
    # is called where it was raised, within a read of a mapping, so that Python is as whole as at any other call.
    with contextlib.suppress(AttributeError, OSError, MemoryError):  # a system that lets no program do this
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        system_signal = ctypes.CDLL(None).signal
        system_signal.argtypes, system_signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
        _handler = kind(_leave)
        for number in [signal.SIGBUS, *(_CRASHES if _terminal else [])]:
            system_signal(number, _handler)


def _read_terminal() -> tuple[int, list[Any]] | None:
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
        os.write(2, f"llama-scratch: {mapped_files.changed_file() or _UNKNOWN}\n".encode())
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
