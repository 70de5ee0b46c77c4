"""The user's folders for caches, models and history, as the system has them: XDG on Linux."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal


def user_folder(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """The program's own folder of a kind. Raises FileNotFoundError where there is no home, as in some containers."""
    import platformdirs

    try:
        path = getattr(platformdirs, f"user_{kind}_path")("llama-scratch", appauthor=False)
        if path.is_absolute():  # older versions of platformdirs leave "~" as it is
            return Path(path)
    except RuntimeError:
        pass
    raise FileNotFoundError(errno.ENOENT, f"no home folder, set HOME or XDG_{kind.upper()}_HOME")


def is_ours(status: os.stat_result) -> bool:
    """Whether a file or folder is this person's, and nobody else can write to it."""
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
