"""A pseudo-terminal that runs the program, sends keys and reads the screen."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import termios
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import pexpect
import pyte
from pyte.screens import Char
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from tests.helpers import ROOT, SMOLLM2_FP32

PROGRAM = (sys.executable, "-m", "llama_scratch")
KEYS = {
    "enter": "\r",
    "tab": "\t",
    "shift-tab": "\x1b[Z",
    "up": "\x1b[A",
    "right": "\x1b[C",
    "left": "\x1b[D",
    "alt-enter": "\x1b\r",
    "ctrl-c": "\x03",
    "ctrl-d": "\x04",
    "ctrl-l": "\x0c",
    "ctrl-r": "\x12",
    "ctrl-t": "\x14",
    "ctrl-z": "\x1a",
}


# A prompt turns on bracketed paste when it starts to read keys.
_READS_KEYS = b"\x1b[?2004h"


class _Screen(pyte.Screen):
    """A screen that answers cursor position requests of the program."""

    answer: Callable[[str], int] | None = None

    def select_graphic_rendition(self, *attrs: int) -> None:
        """Set text attributes.

        pyte has no attribute for dim text. It is stored as blinking text, which the program never writes.
        """
        codes: list[int] = []
        rest = iter(attrs)
        for code in rest:
            if code in (38, 48):  # the arguments of a color follow
                kind = next(rest, 0)
                codes += [code, kind, *islice(rest, 1 if kind == 5 else 3)]
            else:
                codes += {2: (5,), 22: (22, 25)}.get(code, (code,))
        super().select_graphic_rendition(*codes)

    def write_process_input(self, data: str) -> None:
        if self.answer:
            self.answer(data)


def _color(name: str) -> Color | None:
    """The color of a cell. pyte names the sixteen colors, and gives the others as hex digits."""
    if name == "default":
        return None
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return Color.parse(f"#{name}")
    plain = name.removeprefix("bright").replace("brown", "yellow")
    return Color.parse(f"bright_{plain}" if name.startswith("bright") else plain)


def _style(cell: Char) -> Style:
    """The style of a cell of the screen."""
    return Style(
        color=_color(cell.fg), bgcolor=_color(cell.bg), bold=cell.bold, dim=cell.blink, italic=cell.italics,
        underline=cell.underscore, reverse=cell.reverse,
    )  # fmt: skip


class Terminal:
    """One run of a program on a terminal.

    Args:
        arguments: Arguments of the program.
        program: The command, by default llama-scratch.
        columns: Width of the terminal.
        rows: Height of the terminal.
        env: Additional environment variables.
        timeout: Seconds to wait for a text or the end of the program.
    """

    def __init__(
        self,
        *arguments: str,
        program: tuple[str, ...] = PROGRAM,
        columns: int = 80,
        rows: int = 40,
        env: Mapping[str, str] | None = None,
        timeout: float = 30,
    ):
        self.timeout = timeout
        self.screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLORTERM", "COLORFGBG")}
        environment = inherited | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"} | dict(env or {})
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self._child = pexpect.spawn(
            program[0], [*program[1:], *arguments], env=environment, dimensions=(rows, columns), timeout=timeout
        )
        self._child.delaybeforesend = None
        self.screen.answer = self._child.send
        self._output = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen without trailing spaces."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """The text on the screen without empty lines at the end."""
        return "\n".join(self.lines).rstrip()

    def segments(self) -> list[list[Segment]]:
        """The lines of the screen with their styles, down to the last one that is not empty. The cursor is a block."""
        cursor = self.screen.cursor
        used = [row for row, line in enumerate(self.lines) if line or row == cursor.y]
        lines = []
        for row in range(max(used) + 1):
            cells = [self.screen.buffer[row][column] for column in range(self.screen.columns)]
            styles = [_style(cell) for cell in cells]
            if row == cursor.y and not cursor.hidden:
                styles[cursor.x] += Style(reverse=not cells[cursor.x].reverse)
            # The second half of a wide character is an empty cell.
            lines.append([Segment(cell.data, style) for cell, style in zip(cells, styles, strict=True) if cell.data])
        return [list(Segment.simplify(line)) for line in lines]

    def read(self, seconds: float = 0.05) -> bool:
        """Read the program's output; returns False after it has ended."""
        try:
            data = cast(bytes, self._child.read_nonblocking(65536, seconds))  # bytes, because no encoding is set
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self._stream.feed(data)
        self._output += data
        if b"\x1b[6n" in data:  # answer a request for the cursor position
            self._child.send(f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R")
        return True

    def settle(self, seconds: float = 0.4) -> None:
        """Read until the screen has not changed for some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = self.text
            if not self.read():
                return
            if self.text != before:
                end = time.monotonic() + seconds

    def wait_for(self, text: str) -> None:
        """Read until the screen shows a text."""
        end = time.monotonic() + self.timeout
        while text not in self.text:
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"{text!r} did not appear; the screen shows:\n{self.text}")

    def wait_for_more(self, text: str, seen: int) -> None:
        """Read until the program has written a text more than `seen` times."""
        end = time.monotonic() + self.timeout
        while self.seen(text) <= seen:
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"{text!r} did not appear again; the screen shows:\n{self.text}")

    def seen(self, text: str) -> int:
        """Count how often the program has written a text so far."""
        return self._output.count(text.encode())

    def written_from(self, text: str) -> str:
        """The program's output from the first occurrence of a text, for error messages."""
        return self._output[self._output.find(text.encode()) :][:4000].decode(errors="replace")

    def type(self, *keys: str) -> None:
        """Type texts and keys (names from `KEYS`) in sequence."""
        for key in keys:
            self._child.send(KEYS.get(key, key))

    def command(self, line: str, said: str) -> None:
        """Type a line, and wait for the text `said` and for the next prompt."""
        seen = self.seen(said)
        self.type(line, "enter")
        self.wait_for_more(said, seen)
        end = time.monotonic() + self.timeout
        while self._output.rfind(_READS_KEYS) < self._output.rfind(said.encode()):
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"no prompt after {said!r}; the screen shows:\n{self.text}")

    def paste(self, text: str) -> None:
        """Paste a text as a bracketed paste."""
        self._child.send(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, rows: int) -> None:
        """Resize the window."""
        self.screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    @property
    def echoes(self) -> bool:
        """Whether the terminal echoes and buffers lines, as a shell expects."""
        modes: int = termios.tcgetattr(self._child.child_fd)[3]
        return modes & termios.ECHO > 0 and modes & termios.ICANON > 0

    @property
    def marks_pastes(self) -> bool:
        """Whether the program has turned on bracketed paste."""
        return 2004 << 5 in self.screen.mode  # private modes are shifted

    def interrupt(self) -> None:
        """Send an interrupt, as a terminal does for Ctrl-C while a program computes."""
        self._child.sendintr()

    def signal(self, number: int) -> None:
        """Send the program a signal."""
        self._child.kill(number)

    def kill(self) -> None:
        """Kill the program immediately (`kill -9`)."""
        self._child.kill(signal.SIGKILL)

    def wait(self) -> int:
        """Read until the program ends; returns the exit code (128 + signal number)."""
        end = time.monotonic() + self.timeout
        while self.read():
            if time.monotonic() > end:
                raise AssertionError(f"the program did not end; the screen shows:\n{self.text}")
        self._child.close()
        if self._child.exitstatus is not None:
            return self._child.exitstatus
        return 128 + (self._child.signalstatus or 0)


class Slow(Terminal):
    """A session with the model of slow_llama.py.

    `let` ends its loading, and `stream` sends its tokens.
    """

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, shell: bool = False, after: str = "") -> None:
        """Start the program.

        Args:
            folder: A folder for the model and the control files.
            arguments: Arguments of the program.
            columns: Width of the terminal.
            shell: Whether to start it from an interactive shell with job control.
            after: The end of the shell's command line.
        """
        model = folder / "Slow-Llama"
        model.mkdir()
        self._gate = folder / "gate"
        self._tokens = folder / "gate.tokens"
        self._tokens.touch()
        command = [
            sys.executable,
            "-m",
            "tests.helpers.slow_llama",
            str(self._gate),
            "--model-dir",
            str(model),
            *arguments,
        ]
        program = ["/bin/sh", "-i"] if shell else command
        super().__init__(program=tuple(program), env={"PYTHONPATH": str(ROOT), "PS1": "$ ", "ENV": ""}, columns=columns)
        if shell:
            self.wait_for("$")
            self.type(f"{shlex.join(command)} {after}", "enter")

    def let(self, error: str = "") -> None:
        """Let loading end, with the error class of this name if one is given."""
        (self._gate.parent / "new").write_text(error)
        (self._gate.parent / "new").rename(self._gate)

    def stream(self, *tokens: str | None) -> None:
        """Send tokens of the continuation; None ends it."""
        with self._tokens.open("a") as file:
            file.writelines(json.dumps(token) + "\n" for token in tokens)


# Mapped float32 weights, so that a start does not dequantize.
MODEL = ("--model-dir", str(SMOLLM2_FP32))


def start(state: Path, *arguments: str, columns: int = 100, env: Mapping[str, str] | None = None) -> Terminal:
    """Start a session and wait until its model is loaded.

    Args:
        state: State folder of the session.
        arguments: Arguments of the program.
        columns: Width of the terminal.
        env: Additional environment variables.
    """
    environment = {"XDG_STATE_HOME": str(state)} | dict(env or {})
    terminal = Terminal(*MODEL, *arguments, env=environment, columns=columns)
    terminal.wait_for("lists the commands")
    terminal.settle(0.5)
    return terminal


# Shown below every answer, also in plain output ("Entropy").
ANSWERED = "ntropy "


def ask(terminal: Terminal, prompt: str) -> str:
    """Type a prompt, wait for the answer and return the screen."""
    answers = terminal.seen(ANSWERED)
    terminal.type(prompt, "enter")
    terminal.wait_for_more(ANSWERED, answers)
    terminal.settle()
    return terminal.text


def candidates(text: str) -> list[list[str]]:
    """Token, probability and % sign of each candidate on a screen, without the frame."""
    rows = (line.replace("│", " ").split() for line in text.splitlines())
    return [row[:3] for row in rows if len(row) > 2 and row[2] == "%"]
