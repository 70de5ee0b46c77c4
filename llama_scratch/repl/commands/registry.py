"""What a command is, how a module adds one under a heading of /help, and how a line becomes one."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import RenderableType

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render import text, to_plain, to_terminal
from llama_scratch.render.page import Page
from llama_scratch.repl.commands.arguments import first_word
from llama_scratch.repl.session import Session

Run = Callable[[Session, str], "Reply | None"]
Complete = Callable[[Session, str], Iterable[str]]


@dataclass(frozen=True)
class Reply:
    """What a command answers: `facts` for programs, the same as a `view` for people.

    view: None where it stands on the screen already, or there is nothing to see.
    note: it says what was done and holds no data; a pipe's standard output gets it only as JSON.
    """

    facts: dict[str, Any]
    view: RenderableType | None = None
    note: bool = False


def note(sentence: str, **facts: Any) -> Reply:
    """A reply that says what was done."""
    return Reply(facts, text.note(sentence), note=True)


def paged(session: Session, facts: dict[str, Any], page: Page) -> Reply:
    """A reply that shows a page, which /picture can draw afterwards."""
    session.update(page=page)
    return Reply(facts, to_plain.plain(page) if session.settings.plain else to_terminal.view(page))


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        heading: The heading of /help under which it is listed.
        name: Its name without the slash.
        argument: How its argument is written, "" for none. An argument in brackets may be left out.
        run: What it does.
        complete: What an argument that was begun may become.
        replayed: False if files, the machine or a user answer it, so that a replay does not run it again.
    """

    heading: str
    name: str
    argument: str
    run: Run
    complete: Complete
    replayed: bool = True

    @property
    def usage(self) -> str:
        """`/name ARGUMENT`"""
        return f"/{self.name} {self.argument}".rstrip()

    @property
    def help(self) -> str:
        """What it does: a line, and more where there is more to say."""
        return inspect.getdoc(self.run) or ""

    @property
    def summary(self) -> str:
        """The first line of its help."""
        return self.help.partition("\n")[0]


# In the order in which the modules add them, which is the order of /help.
COMMANDS: dict[str, Command] = {}


class Register(Protocol):
    """The decorator `@command("name", "ARGUMENT")`: registers a function, whose docstring is its help.

    The function gets the session and the text after the command's name, and raises `UsageError` if that text has no
    meaning. Its reply is shown, or printed as JSON after the command's name.
    """

    def __call__(
        self, name: str, argument: str = "", complete: Complete = ..., *, replayed: bool = True
    ) -> Callable[[Run], Run]:
        """Register a command."""


def commands_under(heading: str) -> Register:
    """A module's `command` decorator, which lists its commands under this heading of /help."""

    def command(
        name: str, argument: str = "", complete: Complete = lambda _session, _begun: (), *, replayed: bool = True
    ) -> Callable[[Run], Run]:
        def register(run: Run) -> Run:
            COMMANDS[name] = Command(heading, name, argument, run, complete, replayed)
            return run

        return register

    return command


def by_heading() -> dict[str, list[Command]]:
    """The commands under each heading of /help."""
    groups: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        groups.setdefault(command.heading, []).append(command)
    return groups


def is_command(line: str) -> bool:
    """Whether a line is a command: a slash, but not two (which stand for a prompt that begins with one)."""
    return line.startswith("/") and not line.startswith("//")


def unescaped(line: str) -> str:
    """A line as the prompt that it means: two slashes in front stand for one."""
    return line[1:] if line.startswith("//") else line


def escaped(text: str) -> str:
    """A text as the line to type for it: a slash in front becomes two. The opposite of `unescaped`."""
    return f"/{text}" if text.startswith("/") else text


def split(line: str) -> tuple[str, str]:
    """A command's line → its name and the text after it."""
    return first_word(line[1:])


def run_command(session: Session, line: str) -> tuple[Command, Reply | None]:
    """Run the command of a line that `is_command`. Raises `UsageError` if there is none of that name."""
    name, argument = split(line)
    command = COMMANDS.get(name)
    if command is None:
        raise unknown_command(name)
    if argument and not command.argument:
        raise UsageError(f"/{name} takes no argument, found '{sanitize(argument)}'.")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name} needs an argument, expected {command.usage}; /help {name} explains it.")
    return command, command.run(session, argument)


def unknown_command(name: str) -> UsageError:
    """The sentence for a command that there is not: the nearest one, or else where to look."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    advice = f"did you mean /{near[0]}?" if near else "/help lists them"
    return UsageError(
        f"There is no command /{sanitize(name)}; {advice} (for a prompt that begins with a slash, type two)."
    )


def completions(session: Session, line: str) -> list[str]:
    """What may stand in place of the last part of a command's line: whole lines, the one that was begun first."""
    begun = re.fullmatch(r"/(\S*)(\s+)(.*)", line, re.DOTALL)
    if begun is None:
        return [f"/{name}" for name in COMMANDS if name.startswith(line[1:])]
    name, space, argument = begun.groups()
    command = COMMANDS.get(name)
    if command is None:
        return []
    return [f"/{name}{space}{value}" for value in command.complete(session, argument) if value.startswith(argument)]
