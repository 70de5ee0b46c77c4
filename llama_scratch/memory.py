"""What this machine's memory can take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from llama_scratch.errors import OutOfMemoryError


def require_memory(needed: int, what: str) -> None:
    """Raise `OutOfMemoryError` where `needed` bytes are more than this machine has free."""
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise OutOfMemoryError(
            f"{what} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "close other programs, or choose a smaller model or precision."
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
