"""Signal handlers for SIGBUS (a mapped file that changed) and for crashes.

By default, SIGBUS ends a process without a message and leaves the terminal in its current mode. This handler prints a
message and restores the terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from llama_scratch.errors import CheckpointError
from llama_scratch.system import mapped_files

_UNKNOWN = (
    "A file became unreadable while it was in use (it was truncated, or the disk failed). "
    + mapped_files.EXPECTED_UNCHANGED
)
# Escape sequences: turn off bracketed paste, show the cursor, reset the color, start a new line.
_RESTORE = b"\x1b[?2004l\x1b[?25h\x1b[0m\n"
# Crash signals: the handler restores the terminal, then the signal takes its default action.
_CRASHES = [getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE") if hasattr(signal, name)]
_handler: Any = None  # the C callback, which must not be garbage-collected
_terminal: tuple[int, list[Any]] | None = None  # the terminal's descriptor and original settings


def install() -> None:
    """Install the handlers for SIGBUS and for crashes.

    On SIGBUS, the handler restores the terminal, prints a message and exits with `CheckpointError.exit_code`. On a
    crash, it restores the terminal, then the signal takes its default action. Does nothing if the system has no SIGBUS
    or `faulthandler` is on. Only the command line calls this function: a library must not change the signal handlers of
    its host.
    """
    global _handler, _terminal
    import faulthandler

    if not hasattr(signal, "SIGBUS") or faulthandler.is_enabled() or _handler:
        return
    import ctypes  # torch imports it too

    _terminal = _read_terminal()
    # A Python handler would run only after the failed read returns, but the read never returns: it raises the signal
    # again and again. A C handler runs during the read, when Python's state is as consistent as in any other C call.
    with contextlib.suppress(AttributeError, OSError, MemoryError):  # not supported on this system
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
    """Handle a signal: end the process. Any thread can call this."""
    try:
        restore_terminal()
        if number in _CRASHES:
            _end_by(number)
        os.write(2, f"llama-scratch: {mapped_files.changed_file() or _UNKNOWN}\n".encode())
    finally:
        os._exit(CheckpointError.exit_code)


def _end_by(number: int) -> None:
    """Restore a signal's default action and raise it."""
    import ctypes

    ctypes.CDLL(None).signal(number, 0)  # SIG_DFL; `signal.signal` only works in the main thread
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


def restore_terminal() -> None:
    """Restore the terminal settings that `install` saved."""
    if _terminal is None:
        return
    import termios

    # Changing the terminal's settings stops a background process unless it blocks SIGTTOU.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    with contextlib.suppress(termios.error, OSError):
        termios.tcsetattr(_terminal[0], termios.TCSANOW, _terminal[1])
    screen = next((descriptor for descriptor in (2, 1) if os.isatty(descriptor)), None)
    if screen is not None and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(OSError):
            os.write(screen, _RESTORE)
