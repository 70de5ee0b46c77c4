"""How what takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` for callers that show none."""
