"""The registry of slash commands: add, run and complete commands."""

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
    """A command's result.

    Args:
        facts: The result for programs, printed as JSON.
        view: The result for the terminal. None if it is already on the screen, or there is nothing to show.
        note: Whether the view is not a result, but a confirmation, for example. In a pipe, such a reply is written to
            standard output only as JSON.
    """

    facts: dict[str, Any]
    view: RenderableType | None = None
    note: bool = False


def note(sentence: str, **facts: Any) -> Reply:
    """Create a reply with a note, such as the confirmation of an action.

    Args:
        sentence: The text of the note.
        **facts: The result for programs.

    Returns:
        The reply.
    """
    return Reply(facts, text.note(sentence), note=True)


def paged(session: Session, facts: dict[str, Any], page: Page) -> Reply:
    """Create a reply that shows a page, and make it the last view for /picture.

    Args:
        session: The session.
        facts: The result for programs.
        page: The page.

    Returns:
        The reply.
    """
    session.update(page=page)
    return Reply(facts, to_plain.plain(page) if session.settings.plain else to_terminal.view(page))


@dataclass(frozen=True)
class Command:
    """A slash command.

    Args:
        heading: Its heading in /help.
        name: Its name without the slash.
        argument: The syntax of its argument; "" if it takes no argument. Brackets mark an optional argument.
        run: The function that runs it.
        complete: Returns the completions of a partial argument.
        replayed: Whether a replay runs it. False if its result depends on files, the machine or the user.
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
        """Its help text: a summary line and optional details."""
        return inspect.getdoc(self.run) or ""

    @property
    def summary(self) -> str:
        """The first line of its help."""
        return self.help.partition("\n")[0]


# By name, in the order of registration. /help lists the commands in the same order.
COMMANDS: dict[str, Command] = {}


class Register(Protocol):
    """The type of the decorator `@command("name", "ARGUMENT")`.

    The decorator registers a function as a command. The function's docstring is the command's help text. The function
    receives the session and the command's argument, and raises `UsageError` if the argument is invalid. Its reply is
    shown on the terminal or printed as JSON.
    """

    def __call__(
        self, name: str, argument: str = "", complete: Complete = ..., *, replayed: bool = True
    ) -> Callable[[Run], Run]:
        """Create a decorator that registers a command.

        Args:
            name: See `Command`.
            argument: See `Command`.
            complete: See `Command`. By default, the argument has no completions.
            replayed: See `Command`.

        Returns:
            The decorator, which returns the function unchanged.
        """


def commands_under(heading: str) -> Register:
    """Create a `command` decorator for commands under this heading in /help."""

    def command(
        name: str, argument: str = "", complete: Complete = lambda _session, _begun: (), *, replayed: bool = True
    ) -> Callable[[Run], Run]:
        def register(run: Run) -> Run:
            COMMANDS[name] = Command(heading, name, argument, run, complete, replayed)
            return run

        return register

    return command


def by_heading() -> dict[str, list[Command]]:
    """Return the commands under each heading in /help."""
    groups: dict[str, list[Command]] = {}
    for command in COMMANDS.values():
        groups.setdefault(command.heading, []).append(command)
    return groups


def is_command(line: str) -> bool:
    """Whether a line is a command: it begins with exactly one slash.

    Two slashes escape a prompt that begins with one.
    """
    return line.startswith("/") and not line.startswith("//")


def unescaped(line: str) -> str:
    """Convert a line to a prompt: two leading slashes become one."""
    return line[1:] if line.startswith("//") else line


def escaped(text: str) -> str:
    """Convert a prompt to a line: a leading slash becomes two.

    The inverse of `unescaped`.
    """
    return f"/{text}" if text.startswith("/") else text


def split(line: str) -> tuple[str, str]:
    """Split a command line into the command's name and its argument."""
    return first_word(line[1:])


def run_command(session: Session, line: str) -> tuple[Command, Reply | None]:
    """Run a command.

    Args:
        session: The session.
        line: A line that `is_command`.

    Returns:
        The command and its reply.

    Raises:
        UsageError: If the command is unknown or its argument invalid.
    """
    name, argument = split(line)
    command = COMMANDS.get(name)
    if command is None:
        raise unknown_command(name)
    if argument and not command.argument:
        raise UsageError(f"/{name} takes no argument. Remove '{sanitize(argument)}'.")
    if not argument and command.argument and not command.argument.startswith("["):
        raise UsageError(f"/{name} needs an argument: {command.usage}. For details, enter /help {name}.")
    return command, command.run(session, argument)


def unknown_command(name: str) -> UsageError:
    """Create the error for an unknown command, with the closest command if any."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    advice = f"Did you mean /{near[0]}?" if near else "For a list, enter /help."
    return UsageError(f"Unknown command /{sanitize(name)}. {advice} To begin a prompt with a slash, type two slashes.")


def completions(session: Session, line: str) -> list[str]:
    """Complete a command line.

    Args:
        session: The session.
        line: The line up to the cursor.

    Returns:
        The completed lines.
    """
    begun = re.fullmatch(r"/(\S*)(\s+)(.*)", line, re.DOTALL)
    if begun is None:
        return [f"/{name}" for name in COMMANDS if name.startswith(line[1:])]
    name, space, argument = begun.groups()
    command = COMMANDS.get(name)
    if command is None:
        return []
    return [f"/{name}{space}{value}" for value in command.complete(session, argument) if value.startswith(argument)]
