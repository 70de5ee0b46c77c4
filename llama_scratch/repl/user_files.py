"""Files named by the user: path expansion and atomic writes."""

from __future__ import annotations

import errno
from pathlib import Path

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.system.atomic_files import write_atomically


def user_path(argument: str) -> Path:
    """Expand ~ in a path. Raises `UsageError` if that user has no home folder."""
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{sanitize(argument, 200)} cannot be resolved ({error}). Give the full path.") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically, readable only by the user.

    Args:
        path: The file. If it is a symbolic link, the link's target is written.
        data: The contents.

    Raises:
        LlamaScratchError: If it cannot be written.
    """
    try:
        path = path.resolve()  # write the target of a link, not the link
        write_atomically(path, data)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte in the name; a loop of symlinks
        reason = getattr(error, "strerror", None) or error
        advice = "Choose an existing folder with write permission."
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free space on that disk, or choose a folder on another one."
        raise LlamaScratchError(f"{sanitize(path, 200)} cannot be written ({reason}). {advice}") from error
