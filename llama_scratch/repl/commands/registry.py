"""What a command is, and how a line becomes one."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render import text as terminal
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Page
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
    return Reply(facts, terminal.note(sentence), note=True)


def paged(session: Session, facts: dict[str, Any], page: Page) -> Reply:
    """A reply that shows a page, which /picture can draw afterwards."""
    session.update(page=page)
    return Reply(facts, to_terminal.plain(page) if session.settings.plain else to_terminal.view(page))


@dataclass(frozen=True)
class Command:
    """A command: its name without the slash, how its argument is written ("" for none), and what it does.

    complete: what the argument that was begun may become. An argument in brackets may be left out.
    replayed: False where files, the machine or a person answer it, so that a replay does not run it again.
    """

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


COMMANDS: dict[str, Command] = {}


def command(
    name: str, argument: str = "", complete: Complete = lambda _session, _begun: (), *, replayed: bool = True
) -> Callable[[Run], Run]:
    """Register a function as the command `/name`; its docstring is its help.

    It gets the session and the text behind its name, and raises `UsageError` with a sentence where that cannot
    be meant. What it returns is shown, or printed as JSON with the command's name in front.
    """

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name, argument, run, complete, replayed)
        return run

    return register


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


def first_word(text: str) -> tuple[str, str]:
    """A text → its first word and the rest. Any white space separates them, a tab or a line break too."""
    word, rest = [*text.split(maxsplit=1), "", ""][:2]
    return word, rest.strip()


def run_command(session: Session, line: str) -> tuple[Command, Reply | None]:
    """Run the command of a line that `is_command`. Raises `UsageError` where there is none of that name."""
    name, argument = split(line)
    found = COMMANDS.get(name)
    if found is None:
        raise unknown_command(name)
    if argument and not found.argument:
        raise UsageError(f"/{name} takes no argument, found '{sanitize(argument)}'.")
    if not argument and found.argument and not found.argument.startswith("["):
        raise UsageError(f"/{name} needs an argument, expected {found.usage}; /help {name} explains it.")
    return found, found.run(session, argument)


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
    found = COMMANDS.get(name)
    if found is None:
        return []
    return [f"/{name}{space}{value}" for value in found.complete(session, argument) if value.startswith(argument)]


def whole_number(argument: str, what: str, least: int = 1) -> int:
    """An argument as a whole number. Raises `UsageError` where it is none, or less than `least`."""
    try:
        value = int(argument)
    except ValueError:
        value = least - 1
    if value < least:
        raise UsageError(f"'{sanitize(argument)}' was given for {what}, expected a whole number of at least {least}.")
    return value


def number(argument: str, what: str) -> float:
    """An argument as a number. Raises `UsageError` where it is none."""
    try:
        return float(argument)
    except ValueError:
        raise UsageError(f"'{sanitize(argument)}' was given for {what}, expected a number.") from None


def on_or_off(argument: str, what: str) -> bool:
    """An argument as a switch. Raises `UsageError` where it is neither on nor off."""
    if argument not in ("on", "off"):
        raise UsageError(f"'{sanitize(argument)}' was given for {what}, expected on or off.")
    return argument == "on"
