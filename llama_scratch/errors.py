"""The exceptions of this package: a message for the user, and the exit code of the command line.

Every message says what was found, what was expected and what to do. It names arguments of the library in backticks,
such as `context`; the command line and the session replace them by their options and commands, see render/messages.py.
"""

# What to do about a file that is damaged.
REDOWNLOAD_HINT = "fetch the file again from where the model came from."


def sanitize(value: object, limit: int = 60) -> str:
    """A value from a file as text for a sentence: short, on one line, and nothing in it that a terminal obeys."""
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        text = type(value).__name__
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def escape_controls(message: str) -> str:
    """A message with escapes for the characters that a terminal would obey, such as those in a file's name."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)


def unexpected(error: BaseException) -> str:
    """The sentence for an error that nothing foresaw."""
    return f"Something unexpected went wrong ({sanitize(repr(error), 200)}); with --debug it shows where."


class LlamaScratchError(Exception):
    """Anything that this package refuses to do; the message is one sentence for a person."""

    exit_code = 1


class UsageError(LlamaScratchError):
    """An option, a prompt or a call that cannot be meant as it stands."""

    exit_code = 2


class ContextLengthError(UsageError):
    """More tokens than the context holds."""


class ModelNotFoundError(LlamaScratchError):
    """A model, one of its files or a saved session is not where it was looked for."""

    exit_code = 3


class CheckpointError(LlamaScratchError):
    """A file of a model or a saved session that is corrupt, or of a kind that is not supported."""

    exit_code = 4


class UnsupportedError(CheckpointError):
    """A model file that is not damaged, but of a kind that this package does not run; says what to use instead."""


class OutOfMemoryError(LlamaScratchError):
    """The model or its cache does not fit into this machine's memory."""

    exit_code = 5
