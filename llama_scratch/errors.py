"""The exceptions of this package, with the exit codes of the command line.

Each message says what happened, then what to do. Names of the library's arguments are in backticks, such as `context`.
The command line and the session replace them with their own options and commands; see render/messages.py.
"""

# Advice for damaged files, not for unsupported ones.
REDOWNLOAD_HINT = "Fetch the file again from where the model came from."


def sanitize(value: object, limit: int = 60) -> str:
    """Make an untrusted value safe for a message: short, printable, on one line.

    Args:
        value: The value, such as a string from a file.
        limit: Maximum length.
    """
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer with thousands of digits
        text = type(value).__name__
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def escape_controls(message: str) -> str:
    """Escape control characters in a message, such as those in a file name."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)


def unexpected(error: BaseException) -> str:
    """Format an unexpected exception for the command line and the session."""
    return f"An unexpected error occurred ({sanitize(repr(error), 200)}). Run again with --debug for a traceback."


class LlamaScratchError(Exception):
    """Base class of all errors of this package. The message is for the user."""

    exit_code = 1


class UsageError(LlamaScratchError):
    """An invalid option, prompt or argument."""

    exit_code = 2


class ContextLengthError(UsageError):
    """More tokens than the context allows."""


class ModelNotFoundError(LlamaScratchError):
    """A model, one of its files or a saved session does not exist."""

    exit_code = 3


class CheckpointError(LlamaScratchError):
    """A model file or a saved session is damaged or not supported."""

    exit_code = 4


class UnsupportedError(CheckpointError):
    """A model file is undamaged but not supported.

    The message suggests an alternative.
    """


class OutOfMemoryError(LlamaScratchError):
    """The model or its cache does not fit into memory."""

    exit_code = 5
