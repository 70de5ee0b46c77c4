"""Entry point of `llama-scratch` and `python -m llama_scratch`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
# Signals received so far.
_received: list[int] = []
# Seconds after a signal until its exception is raised again, in case a library swallowed it.
EXIT_GRACE_S = 5


def main() -> None:
    """Run the command line and exit with its exit code."""
    sys.unraisablehook = _raise_again_if_lost
    for number in (signal.SIGINT, *_SIGNALS):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not if ignored, as under nohup
            signal.signal(number, _leave)
    try:
        # Imported here so that Ctrl-C during the import does not print a traceback.
        from llama_scratch.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except MemoryError:  # raised before the command line was parsed
        os.write(2, b"llama-scratch: The memory limit is too low to start the program. Raise it (ulimit -v).\n")
        code = 5
    except SystemExit as error:
        code = int(error.code or 0)
    if _received:  # even if a library swallowed the exception
        code = 128 + _received[0]
    # Only Python's cleanup remains. Ctrl-C there would print a traceback without exiting sooner.
    for number in (signal.SIGINT, *_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    _raise_again(0, 0)
    if threading.active_count() > 1 or code > 128:
        _leave_threads(code)
    # Without this, the final garbage collection visits all of torch's objects, which takes almost half a second.
    gc.freeze()
    sys.exit(code)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by raising an exception, so that cleanup code still runs.

    It removes partial files and restores the terminal. After a termination signal, further ones are ignored, because a
    closing window sends several. A library may swallow the exception, so it is raised again after `EXIT_GRACE_S`.
    """
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    _raise_again(number, EXIT_GRACE_S)
    raise SystemExit(128 + number)  # asyncio propagates it, as it does KeyboardInterrupt


def _raise_again_if_lost(lost: sys.UnraisableHookArgs) -> None:
    """Raise an exit again that was lost in a finalizer, where Python ignores exceptions."""
    if _received and isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
        _raise_again(_received[-1], 0.1)
    else:
        sys.__unraisablehook__(lost)


def _raise_again(number: int, seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, frame: _leave(number, frame))
        signal.setitimer(signal.ITIMER_REAL, seconds, EXIT_GRACE_S)  # repeats in case that one is lost too


def _leave_threads(code: int) -> None:
    """Exit without Python's cleanup, for instance while a thread is loading a model.

    A thread inside torch's code cannot be stopped. Python's cleanup would wait for it, or crash it by freeing objects
    that it uses.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal was closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
