"""A pseudo-terminal with a screen: runs the real program, types keys and reads what a person would see."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import pexpect
import pyte

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
    "ctrl-r": "\x12",
    "ctrl-t": "\x14",
    "ctrl-z": "\x1a",
}


# What a prompt writes when it begins to read keys: it asks for marked pastes.
_READS_KEYS = b"\x1b[?2004h"


class _Screen(pyte.Screen):
    """A screen that answers when the program asks where the cursor is."""

    answer: Callable[[str], int] | None = None

    def write_process_input(self, data: str) -> None:
        if self.answer:
            self.answer(data)


class Terminal:
    """One run of a program on a terminal of `columns` × `rows`."""

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
        environment = dict(os.environ) | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"} | dict(env or {})
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
        """What the screen shows, without trailing blanks."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """The lines of the screen that are not empty at the end."""
        return "\n".join(self.lines).rstrip()

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the program wrote; False once it has ended."""
        try:
            data = cast(bytes, self._child.read_nonblocking(65536, seconds))  # without an encoding it is bytes
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self._stream.feed(data)
        self._output += data
        if b"\x1b[6n" in data:  # the program asks where the cursor is, and a terminal answers
            self._child.send(f"\x1b[{self.screen.cursor.y + 1};{self.screen.cursor.x + 1}R")
        return True

    def settle(self, seconds: float = 0.4) -> None:
        """Read until the screen has not changed for a while."""
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
        """Read until the program has written a text more often than it had before."""
        end = time.monotonic() + self.timeout
        while self.seen(text) <= seen:
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"{text!r} did not come again; the screen shows:\n{self.text}")

    def seen(self, text: str) -> int:
        """How often the program has written a text since it began."""
        return self._output.count(text.encode())

    def written_from(self, text: str) -> str:
        """What the program wrote from the first such text on, for messages."""
        return self._output[self._output.find(text.encode()) :][:4000].decode(errors="replace")

    def type(self, *keys: str) -> None:
        """Type texts and keys (names of `KEYS`), one after the other."""
        for key in keys:
            self._child.send(KEYS.get(key, key))

    def command(self, line: str, said: str) -> None:
        """Type a line, and wait for what is said to it and for the prompt behind that, which reads keys."""
        seen = self.seen(said)
        self.type(line, "enter")
        self.wait_for_more(said, seen)
        end = time.monotonic() + self.timeout
        while self._output.rfind(_READS_KEYS) < self._output.rfind(said.encode()):
            if time.monotonic() > end or not self.read():
                raise AssertionError(f"no prompt came behind {said!r}; the screen shows:\n{self.text}")

    def paste(self, text: str) -> None:
        """Paste a text in one piece, as terminals mark it."""
        self._child.send(f"\x1b[200~{text}\x1b[201~")

    def resize(self, columns: int, rows: int) -> None:
        """Give the window another size."""
        self.screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed and gives it out by lines, as a shell expects it."""
        modes: int = termios.tcgetattr(self._child.child_fd)[3]
        return modes & termios.ECHO > 0 and modes & termios.ICANON > 0

    @property
    def marks_pastes(self) -> bool:
        """Whether the program has asked the terminal to mark pastes."""
        return 2004 << 5 in self.screen.mode  # private modes are shifted

    def interrupt(self) -> None:
        """What a terminal does for Ctrl-C while a program computes."""
        self._child.sendintr()

    def signal(self, number: int) -> None:
        """Send the program a signal."""
        self._child.kill(number)

    def kill(self) -> None:
        """End the program at once, as `kill -9` does."""
        self._child.kill(signal.SIGKILL)

    def wait(self) -> int:
        """Read to the end and return the exit code (128 + number for a signal)."""
        end = time.monotonic() + self.timeout
        while self.read():
            if time.monotonic() > end:
                raise AssertionError(f"the program did not end; the screen shows:\n{self.text}")
        self._child.close()
        if self._child.exitstatus is not None:
            return self._child.exitstatus
        return 128 + (self._child.signalstatus or 0)


class Slow(Terminal):
    """A session whose model comes with `let` and whose continuations come with `stream`: see slow_llama.py."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, shell: bool = False, after: str = "") -> None:
        """shell: start it from an interactive shell, which has job control. after: the end of the shell's line."""
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
        """Let the loading end, with an error of this name."""
        (self._gate.parent / "new").write_text(error)
        (self._gate.parent / "new").rename(self._gate)

    def stream(self, *tokens: str | None) -> None:
        """Let the continuation go on with these tokens; None ends it."""
        with self._tokens.open("a") as file:
            file.writelines(json.dumps(token) + "\n" for token in tokens)


# Mapped float32, so that no start turns 4 bits into it.
MODEL = ("--model-dir", str(SMOLLM2_FP32))


def start(state: Path, *arguments: str, columns: int = 100) -> Terminal:
    """A session whose model is loaded."""
    terminal = Terminal(*MODEL, *arguments, env={"XDG_STATE_HOME": str(state)}, columns=columns)
    terminal.wait_for("lists the commands")
    terminal.settle(0.5)
    return terminal


# What stands under every answer, plain ones too ("Entropy").
ANSWERED = "ntropy "


def ask(terminal: Terminal, prompt: str) -> str:
    """Type a prompt and return the screen once the answer is there."""
    answers = terminal.seen(ANSWERED)
    terminal.type(prompt, "enter")
    terminal.wait_for_more(ANSWERED, answers)
    terminal.settle()
    return terminal.text


def candidates(text: str) -> list[list[str]]:
    """The token, its probability and the % of each candidate on a screen, the first without its frame."""
    rows = (line.replace("│", " ").split() for line in text.splitlines())
    return [row[:3] for row in rows if len(row) > 2 and row[2] == "%"]
