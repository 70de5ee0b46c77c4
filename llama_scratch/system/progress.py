"""Progress callbacks for long-running work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the total work."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that does nothing.

    Args:
        stage: The name of the stage.
        done: The work done.
        total: The total work.
    """
