"""What this machine's memory can take."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llama_scratch.errors import OutOfMemoryError


def available() -> int:
    """Bytes of this machine's memory that a program can still take."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident() -> int:
    """Bytes of this program that are in memory, pages of mapped files among them."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def require_memory(needed: int | dict[str, int], what: str) -> None:
    """Raise `OutOfMemoryError` where more bytes are needed than this machine has free.

    needed: bytes, or bytes by what they are for, which the error then lists.
    """
    parts = needed if isinstance(needed, dict) else {}
    total = sum(parts.values()) if isinstance(needed, dict) else needed
    free = available()
    if total > free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        raise OutOfMemoryError(
            f"{what} needs {total / 1e9:.1f} GB of memory{f' ({listed})' if listed else ''} and {free / 1e9:.1f} GB "
            "are free; close other programs, or choose a smaller model, context or precision."
        )


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn an allocation that failed, on the CPU or a GPU, into an `OutOfMemoryError` about `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)):
            raise OutOfMemoryError(
                f"{what} does not fit into this machine's memory; choose a smaller model, context or precision."
            ) from error
        raise


def give_back() -> None:
    """Return to the system what was freed: glibc keeps it for each thread, some hundred MB after packing."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
