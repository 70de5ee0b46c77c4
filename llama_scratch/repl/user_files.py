"""Files that the user names: a path as it is typed, and a file that is written completely or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.system.atomic_files import write_atomically


def user_path(argument: str) -> Path:
    """A path as a person writes it, with ~ for the home. Raises `UsageError` where there is no such home."""
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{sanitize(argument, 200)} cannot be resolved ({error}); name the path in full.") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file for oneself alone, in one piece: under its name there is all of it or what was there before.

    Raises `LlamaScratchError` where it cannot be written.
    """
    try:
        path = path.resolve()  # what a link points to is written, not the link
        write_atomically(path, data)
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        advice = "choose a folder that is there for you to write to."
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room on that disk, or choose a folder on another one."
        raise LlamaScratchError(f"{sanitize(path, 200)} cannot be written ({reason}); {advice}") from error
