"""Commands of the session: a function each, found by its name.

To add one, write a function with `@command`; its docstring is its help. It gets the session and the text
behind its name, prints to `session.console`, and raises `UsageError` with a sentence where it is misused.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from llama_scratch.errors import UsageError, printable
from llama_scratch.render import terminal
from llama_scratch.repl.session import Session


@dataclass(frozen=True)
class Command:
    """A command: its name without the slash, how its arguments are written, and what it does."""

    name: str
    arguments: str
    run: Callable[[Session, str], None]

    @property
    def usage(self) -> str:
        """`/name ARGUMENTS`"""
        return f"/{self.name} {self.arguments}".rstrip()

    @property
    def help(self) -> str:
        """What it does, in a line."""
        return inspect.getdoc(self.run) or ""


COMMANDS: dict[str, Command] = {}


def command(
    name: str, arguments: str = ""
) -> Callable[[Callable[[Session, str], None]], Callable[[Session, str], None]]:
    """Register a function as the command `/name`."""

    def register(run: Callable[[Session, str], None]) -> Callable[[Session, str], None]:
        COMMANDS[name] = Command(name, arguments, run)
        return run

    return register


def is_command(line: str) -> bool:
    """Whether a line is a command: a slash, but not two (which stand for a prompt that begins with one)."""
    return line.startswith("/") and not line.startswith("//")


def unescaped(line: str) -> str:
    """A line as the prompt that it means: two slashes in front stand for one."""
    return line[1:] if line.startswith("//") else line


def run_command(session: Session, line: str) -> None:
    """Run the command of a line that `is_command`. Raises `UsageError` where there is none of that name."""
    name, _, argument = line[1:].strip().partition(" ")
    found = COMMANDS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise UsageError(
            f"There is no command /{printable(name)}; {advice} (for a prompt that begins with a slash, type two)."
        )
    argument = argument.strip()
    if argument and not found.arguments:
        raise UsageError(f"/{name} takes no argument, found '{printable(argument)}'.")
    found.run(session, argument)


@command("help")
def _help(session: Session, _: str) -> None:
    """List the commands and the keys."""
    session.console.print(terminal.rows({found.usage: found.help for found in COMMANDS.values()} | _KEYS))


@command("quit")
def _quit(session: Session, _: str) -> None:
    """Leave the session."""
    session.ended = True


_KEYS = {
    "Enter": "Answer the prompt; on an empty line accept what was predicted and go on from there.",
    "Alt-Enter": "A line break within the prompt.",
    "Up, Down": "Earlier prompts. Ctrl-R searches them.",
    "Ctrl-C": "Clear the line, or cancel what is running.",
    "Ctrl-D": "Leave the session.",
    "//…": "A prompt that begins with a slash.",
}
