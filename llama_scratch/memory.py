"""What this machine's memory can take."""

from __future__ import annotations

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
