"""`llama-scratch` and `python -m llama_scratch`."""

import contextlib
import gc
import os
import signal
import sys
import threading


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        # Imported here, so that Ctrl-C is no traceback even while the program is still being read.
        from llama_scratch.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    # What is left is Python's own clean-up; Ctrl-C there would show a traceback and end nothing sooner.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threading.active_count() > 1:
        _leave_threads(code)
    # Else that clean-up searches all that torch brought for cycles, which takes most of half a second.
    gc.freeze()
    sys.exit(code)


def _leave_threads(code: int) -> None:
    """Exit while a thread still loads a model.

    Within torch's own code it cannot be told to stop; Python's clean-up would wait for it, or end what it
    works with and so crash it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal is gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
