"""Mapped files and imported modules of a process, and waiting for another thread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_scratch


def mappings(path: Path) -> Iterator[tuple[range, dict[str, int]]]:
    """Address ranges of a file's mappings, with the kernel's counters in KiB."""
    found: range | None = None
    figures: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) .*? (/.*)?$", line):
            if found is not None:
                yield found, figures
            found, figures = None, {}
            if match[3] == str(path.resolve()):
                found = range(int(match[1], 16), int(match[2], 16))
        elif match := re.match(r"(\w+): +(\d+) kB", line):
            figures[match[1]] = int(match[2])
    if found is not None:
        yield found, figures


SOON = 10.0  # maximum seconds to wait


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fails if it does not within `SOON` seconds."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def loaded_after(code: str) -> set[str]:
    """Names of the imported modules after some code in a new Python process."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    # Use the package under test, not one that is installed elsewhere.
    environment = os.environ | {"PYTHONPATH": str(Path(llama_scratch.__file__).parent.parent)}
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    return set(json.loads(output.stdout.splitlines()[-1]))
