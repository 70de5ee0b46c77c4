"""Ctrl-C in a session: a key at the prompt, an exception where there is something to cancel, nothing in between.

What ends the program, SIGTERM and SIGHUP, ends a prompt first.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llama_scratch.render.progress import defer_interrupts


class Interrupts:
    """Ctrl-C as an exception only while there is something to cancel, and only once.

    At the prompt it is a key. Between the two it is nothing: an exception there would end the program.
    """

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGINT, self._handle)
        self._report = sys.unraisablehook
        sys.unraisablehook = self._report_unless_interrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            if defer_interrupts.on:
                defer_interrupts.waiting = True
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

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Where what ends the program calls `end` and waits for it; told twice, it does not wait.

        An editor gives the terminal back where it ends, not where an exception falls into it.
        """
        told: list[int] = []

        def leave(number: int, frame: FrameType | None) -> None:
            told.append(number)
            if len(told) == 1:
                # In the background, setting the terminal's modes would stop the program. Now that just fails.
                signal.signal(signal.SIGTTOU, lambda *_: None)
                end()
            else:
                handlers[number](number, frame)

        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
        for number in handlers:
            signal.signal(number, leave)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if told:
                handlers[told[0]](told[0], None)

    def _report_unless_interrupt(self, unraisable: sys.UnraisableHookArgs) -> None:
        """An interrupt that fell into a finalizer, where nothing can be raised, is lost without a word."""
        if unraisable.exc_type is not KeyboardInterrupt:
            self._report(unraisable)
