"""`llama-scratch` and `python -m llama_scratch`."""

import signal
import sys


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
    sys.exit(code)


if __name__ == "__main__":
    main()
