"""Signals in a session: Ctrl-C, SIGTERM and SIGHUP.

At the prompt, Ctrl-C is an ordinary key. During work, it cancels the work. At any other time it is ignored. SIGTERM and
SIGHUP first end the prompt, which restores the terminal, and then the program.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llama_scratch.render.progress import defer_interrupts


class Interrupts:
    """Handle Ctrl-C: raise KeyboardInterrupt once, and only if work is running.

    At the prompt, Ctrl-C is an ordinary key and does not send a signal. Between the prompt and the work it is ignored,
    because an exception there would end the program.
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
        """Let Ctrl-C raise KeyboardInterrupt within the block."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Call `end` on SIGTERM or SIGHUP within the block, and handle the signal later.

        The signal is handled after the block, a second signal at once. It is deferred because the prompt editor
        restores the terminal only if it ends normally, not if an exception interrupts it.
        """
        told: list[int] = []

        def leave(number: int, frame: FrameType | None) -> None:
            told.append(number)
            if len(told) == 1:
                # In the background, setting the terminal modes sends SIGTTOU, which stops the process. With a handler,
                # setting them only fails.
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
        """Report exceptions in finalizers, except KeyboardInterrupt.

        An exception cannot propagate from a finalizer.
        """
        if unraisable.exc_type is not KeyboardInterrupt:
            self._report(unraisable)
