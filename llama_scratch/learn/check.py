"""Check the functions that a reader has written, in a process of its own. Does not import torch.

The process has a time limit, and whatever the file does, the caller goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_scratch.errors import LlamaScratchError, UsageError, sanitize
from llama_scratch.system.processes import end_group

SECONDS = 60.0
"""Time limit of a check. Importing torch and reading SmolLM2 take most of the seconds that it needs."""


@dataclass(frozen=True)
class Checked:
    """The check of one function.

    Args:
        function: Its name.
        problem: What is wrong, in one or two sentences; "" if it is right.
    """

    function: str
    problem: str


def check(chapter: int, path: Path, seconds: float = SECONDS) -> Sequence[Checked]:
    """Check the functions of a chapter, up to the first one that is wrong.

    Args:
        chapter: Number of the chapter, from 0.
        path: The reader's Python file.
        seconds: Time limit.

    Raises:
        UsageError: If there is no such file.
        LlamaScratchError: If the process ended without a result, or not in time.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"{sanitize(path, 200)} is not a file. Write your functions into a Python file.")
    command = [sys.executable, "-P", "-m", "llama_scratch.learn.child", str(chapter), str(path.resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise LlamaScratchError(
            f"The check of chapter {chapter} did not end within {seconds:.0f} seconds. Look for an endless loop in "
            f"{sanitize(path.name)}."
        ) from None
    finally:
        end_group(process)  # also processes that the file has started
    try:
        found = json.loads(out)
        return [Checked(str(function), str(problem)) for function, problem in found]
    except (ValueError, TypeError):
        raise LlamaScratchError(
            f"The check of chapter {chapter} ended without a result (exit code {process.returncode}). "
            f"{sanitize(path.name)} may end the process."
        ) from None
