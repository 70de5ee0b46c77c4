"""End child processes reliably."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its process group, and wait for the process.

    The process must be the leader of its group. If it has already ended, this kills the child processes that it left.
    """
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
