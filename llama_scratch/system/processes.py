"""Child processes: ending them reliably."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its process group, which it must lead, and wait for it.

    If the process has already ended, this kills the child processes that it left.
    """
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
