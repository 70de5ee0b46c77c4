"""The keyboard between two prompts: the terminal echoes nothing, and the next prompt gets the keys."""

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

# Seconds after which ESC is the Escape key, not the beginning of another key's code.
_ESCAPE_S = 0.5
# Seconds to wait for the rest of a paste at the end of an answer.
_PASTE_S = 2.0
_MARK_PASTES, _MARK_NOTHING, _SHOW_CURSOR = b"\x1b[?2004h", b"\x1b[?2004l", b"\x1b[?25h"


class KeyboardInput(Vt100Input):
    """The input of prompts that never turn the echo on, not even to print above themselves."""

    def cooked_mode(self) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def pasting(self) -> bool:
        """Whether the end of a paste has not come yet."""
        return self.vt100_parser._in_bracketed_paste


class Keyboard:
    """The terminal's keys while no prompt reads them.

    Otherwise the terminal would echo them into the answer and cut a pasted text into lines.

    Args:
        console: The terminal's screen.
    """

    def __init__(self, console: Console) -> None:
        self.input = KeyboardInput(sys.stdin)
        self._screen = None if console.is_dumb_terminal else console.file.fileno()
        self._original: list[Any] | None = None
        self._stop = -1, -1  # a pipe that ends the collecting thread
        self._thread: Thread | None = None
        self._marked = False
        self.ended = False  # whether a prompt is to end instead of waiting for the foreground

    @contextmanager
    def session(self) -> Iterator[None]:
        """Turn off the echo until the session ends, on every way out of it."""
        self._original = self._modes()
        self._stop = os.pipe()
        handler = signal.getsignal(signal.SIGTSTP)
        if handler is not signal.SIG_IGN:  # as without job control
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
        """Keep the keys that are typed in here for the next prompt. Ctrl-C and Ctrl-Z stay signals."""
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
        """Let another prompt read the keys; it gets those that were kept."""
        self._end()
        try:
            yield
        finally:
            self._start()

    @contextmanager
    def given_away(self) -> Iterator[None]:
        """Give another program the terminal as it was before the session."""
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

    # --- The thread that reads ---

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
            # In the background the keys belong to another program.
            watched = [keyboard] if self.in_foreground() else []
            ready = select.select([*watched, stop], [], [], _ESCAPE_S)[0]
            if keyboard in ready:
                # Not a late answer to an earlier prompt's question where the cursor is.
                keys = [key for key in self.input.read_keys() if key.key != Keys.CPRResponse]
                store_typeahead(self.input, keys)
            elif stop in ready:
                if not (self.input.pasting and select.select(watched, [], [], _PASTE_S)[0]):
                    return
            else:
                self.input.flush_keys()  # Escape, which would change the meaning of the next key

    # --- The terminal's modes ---

    def _take(self) -> None:
        """Have keys come one by one and without echo, as they were pressed."""
        if (modes := self._modes()) is not None:
            modes[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
            modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
            modes[3] |= termios.NOFLSH  # Ctrl-C cancels the answer, not the keys
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            self._set(modes)

    def _give_back(self) -> None:
        if self._original is not None and self.in_foreground():
            self._set(self._original)
            self._mark(False)
            self._write(_SHOW_CURSOR)  # a progress bar hides it

    def _suspend(self, number: int, _frame: FrameType | None) -> None:
        """Stop the program, with the terminal as it was before the session, and go on once it continues."""
        modes, marked = self._modes(), self._marked
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        try:
            signal.raise_signal(number)
            # A prompt that is continued in the background stops again, as any program does that reads keys there.
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
        """The terminal's modes; None in the background, where setting them would stop the program."""
        with suppress(termios.error, OSError):
            if self.in_foreground():
                return termios.tcgetattr(self.input.fileno())
        return None

    def _set(self, modes: list[Any]) -> None:
        with suppress(termios.error, OSError):  # the terminal is gone
            termios.tcsetattr(self.input.fileno(), termios.TCSANOW, modes)

    def _mark(self, on: bool) -> None:
        """Have the terminal mark pastes, or no longer."""
        if on != self._marked and self.in_foreground():
            self._marked = on
            self._write(_MARK_PASTES if on else _MARK_NOTHING)

    def _write(self, codes: bytes) -> None:
        if self._screen is not None:
            with suppress(OSError):
                os.write(self._screen, codes)  # not buffered: a signal may have come within a write to that buffer

    def in_foreground(self) -> bool:
        """Whether the terminal is this program's, and not a shell's that has suspended it."""
        with suppress(OSError):
            return os.tcgetpgrp(self.input.fileno()) == os.getpgrp()
        return False
