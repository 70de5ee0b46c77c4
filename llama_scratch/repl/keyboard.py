"""Keyboard input between prompts: not echoed, but kept for the next prompt."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import Thread
from types import FrameType
from typing import Any

from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.keys import Keys
from rich.console import Console

from llama_scratch.render.progress import defer_interrupts

# Seconds to wait after ESC before it counts as the Escape key, not as the start of an escape sequence.
_ESCAPE_S = 0.5
# Seconds to wait for the rest of a paste when an answer ends.
_PASTE_S = 2.0
_MARK_PASTES, _MARK_NOTHING, _SHOW_CURSOR = b"\x1b[?2004h", b"\x1b[?2004l", b"\x1b[?25h"


class KeyboardInput(Vt100Input):
    """Terminal input that never turns the echo on.

    Otherwise, prompt_toolkit would turn it on while something is printed above the prompt.
    """

    def cooked_mode(self) -> AbstractContextManager[None]:
        """Keep the current terminal modes instead of switching to cooked mode."""
        return nullcontext()

    @property
    def pasting(self) -> bool:
        """Whether a paste is in progress."""
        return self.vt100_parser._in_bracketed_paste


class Keyboard:
    """Collect the terminal's keys while no prompt reads them.

    Otherwise the terminal would echo them into the answer and split a pasted text into lines.

    Args:
        console: The console on the terminal.
    """

    def __init__(self, console: Console) -> None:
        self.input = KeyboardInput(sys.stdin)
        self._screen = None if console.is_dumb_terminal else console.file.fileno()
        self._original: list[Any] | None = None
        self._stop = -1, -1  # the two ends of a pipe: a byte in it stops the collecting thread
        self._thread: Thread | None = None
        self._marked = False
        self.ended = False  # whether the prompt should end instead of waiting for the foreground

    @contextmanager
    def session(self) -> Iterator[None]:
        """Turn off the echo within the block.

        The terminal is restored at the end of the block, even after an exception.
        """
        self._original = self._modes()
        self._stop = os.pipe()
        handler = signal.getsignal(signal.SIGTSTP)
        if handler is not signal.SIG_IGN:  # SIG_IGN: there is no job control
            signal.signal(signal.SIGTSTP, self._suspend)
        try:
            self._take()
            yield
        finally:
            self._give_back()
            signal.signal(signal.SIGTSTP, handler)
            for descriptor in self._stop:
                os.close(descriptor)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the keys typed within the block for the next prompt.

        Ctrl-C and Ctrl-Z still send their signals.
        """
        self._take()
        self._mark(True)
        self._start()
        try:
            yield
        finally:
            self._end()
            self._mark(False)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let another prompt read the keys, including those kept so far."""
        self._end()
        try:
            yield
        finally:
            self._start()

    @contextmanager
    def given_away(self) -> Iterator[None]:
        """Give the terminal in its original modes to another program within the block."""
        self._end()
        self._give_back()
        handler = signal.getsignal(signal.SIGTSTP)
        if handler is not signal.SIG_IGN:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, handler)
            self._take()
            self._mark(True)
            self._start()

    # --- The collecting thread ---

    def _start(self) -> None:
        self._thread = Thread(target=self._collect, name="keyboard", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        if self._thread is not None:
            with defer_interrupts:
                os.write(self._stop[1], b".")
                self._thread.join()
                os.read(self._stop[0], 1)
                self._thread = None

    def _collect(self) -> None:
        keyboard, stop = self.input.fileno(), self._stop[0]
        while not self.input.closed:
            # In the background, the keys belong to another program.
            watched = [keyboard] if self.in_foreground() else []
            ready = select.select([*watched, stop], [], [], _ESCAPE_S)[0]
            if keyboard in ready:
                # Drop a late reply to an earlier prompt's cursor position request.
                keys = [key for key in self.input.read_keys() if key.key != Keys.CPRResponse]
                store_typeahead(self.input, keys)
            elif stop in ready:
                if not (self.input.pasting and select.select(watched, [], [], _PASTE_S)[0]):
                    return
            else:
                self.input.flush_keys()  # a pending ESC is the Escape key: do not combine it with the next key

    # --- Terminal modes ---

    def _take(self) -> None:
        """Turn off the terminal's echo, line buffering and line end conversion."""
        if (modes := self._modes()) is not None:
            modes[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
            modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
            modes[3] |= termios.NOFLSH  # Ctrl-C cancels the answer without discarding typed keys
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            self._set(modes)

    def _give_back(self) -> None:
        if self._original is not None and self.in_foreground():
            self._set(self._original)
            self._mark(False)
            self._write(_SHOW_CURSOR)  # a progress bar may have hidden it

    def _suspend(self, number: int, _frame: FrameType | None) -> None:
        """Handle Ctrl-Z: restore the terminal and stop the process.

        Sets the terminal modes again when the process continues.
        """
        modes, marked = self._modes(), self._marked
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        try:
            signal.raise_signal(number)
            # A prompt that is continued in the background stops again, like any program that reads from the terminal.
            while self._thread is None and not (self.ended or self.in_foreground()):
                signal.raise_signal(signal.SIGTTIN)
                time.sleep(0.05)
        finally:
            signal.signal(number, self._suspend)
            self._take()
            if modes is not None and self.in_foreground():
                self._set(modes)
            self._mark(marked)

    def _modes(self) -> list[Any] | None:
        """Return the terminal modes, or None in the background.

        Setting the modes in the background would stop the process.
        """
        with suppress(termios.error, OSError):
            if self.in_foreground():
                return termios.tcgetattr(self.input.fileno())
        return None

    def _set(self, modes: list[Any]) -> None:
        with suppress(termios.error, OSError):  # the terminal is gone
            termios.tcsetattr(self.input.fileno(), termios.TCSANOW, modes)

    def _mark(self, on: bool) -> None:
        """Turn bracketed paste on or off."""
        if on != self._marked and self.in_foreground():
            self._marked = on
            self._write(_MARK_PASTES if on else _MARK_NOTHING)

    def _write(self, codes: bytes) -> None:
        if self._screen is not None:
            with suppress(OSError):
                os.write(self._screen, codes)  # unbuffered: the signal may have interrupted a buffered write

    def in_foreground(self) -> bool:
        """Whether this process is in the terminal's foreground process group."""
        with suppress(OSError):
            return os.tcgetpgrp(self.input.fileno()) == os.getpgrp()
        return False
