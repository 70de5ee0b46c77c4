"""Ctrl-C in a session: a key at the prompt, an exception where there is something to cancel, nothing in between."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llama_scratch.render.progress import undisturbed


class Interrupts:
    """Ctrl-C as an exception only while there is something to cancel, and only once.

    At the prompt it is a key. Between the two it is nothing: an exception there would end the program.
    """

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGINT, self._handle)
        sys.unraisablehook = _report_unless_interrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            if undisturbed.on:
                undisturbed.waiting = True
            else:
                raise KeyboardInterrupt

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Where Ctrl-C cancels."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False


def _report_unless_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """An interrupt that fell into a finalizer, where nothing can be raised, is lost without a word."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
