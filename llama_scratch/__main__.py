"""`llama-scratch` and `python -m llama_scratch`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
# The signals that asked the program to end.
_received: list[int] = []
# Seconds that leaving may take before the signal is raised again.
EXIT_GRACE_S = 5


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.unraisablehook = _raise_again_if_lost
    for number in (signal.SIGINT, *_SIGNALS):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not under nohup
            signal.signal(number, _leave)
    try:
        # Imported here, so that Ctrl-C is no traceback even while the program is still being read.
        from llama_scratch.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except MemoryError:  # before the command line itself was read
        os.write(2, b"llama-scratch: The limit of memory is too low to start the program; raise it (ulimit -v).\n")
        code = 5
    except SystemExit as error:
        code = int(error.code or 0)
    if _received:  # whatever a library has made of it
        code = 128 + _received[0]
    # What is left is Python's own clean-up; Ctrl-C there would show a traceback and end nothing sooner.
    for number in (signal.SIGINT, *_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    _raise_again(0, 0)
    if threading.active_count() > 1 or code > 128:
        _leave_threads(code)
    # Else that clean-up searches all that torch brought for cycles, which takes most of half a second.
    gc.freeze()
    sys.exit(code)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End by the way of Ctrl-C: what was being written is removed, and the terminal is as it was.

    A window that closes sends more than one signal, so the next ones are ignored. But a library may have swallowed
    this one, so it is raised once more after a while.
    """
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _raise_again(number, EXIT_GRACE_S)
    raise SystemExit(128 + number)  # which asyncio lets through, as it does Ctrl-C


def _raise_again_if_lost(lost: sys.UnraisableHookArgs) -> None:
    """What told us to end fell into a finalizer, where nothing can be raised: it is raised again in a moment."""
    if _received and isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
        _raise_again(_received[-1], 0.1)
    else:
        sys.__unraisablehook__(lost)


def _raise_again(number: int, seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, frame: _leave(number, frame))
        signal.setitimer(signal.ITIMER_REAL, seconds, EXIT_GRACE_S)  # again where that is lost, too


def _leave_threads(code: int) -> None:
    """Exit without Python's clean-up, as where a thread still loads a model.

    Within torch's own code it cannot be told to stop; Python's clean-up would wait for it, or end what it
    works with and so crash it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal is gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
