"""What is written after a command: numbers, switches, texts, tokens, layers, files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.text import SPACE, visible
from llama_scratch.repl.session import Session
from llama_scratch.repl.user_files import user_path
from llama_scratch.results import Token


def first_word(text: str) -> tuple[str, str]:
    """A text → its first word and the rest. Any white space separates them, a tab or a line break too."""
    word, rest = [*text.split(maxsplit=1), "", ""][:2]
    return word, rest.strip()


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


def unquoted(argument: str) -> str:
    """The text that is meant: between double quotes as in JSON, else as it stands."""
    if len(argument) > 1 and argument[0] == argument[-1] == '"':
        try:
            text = json.loads(argument)
        except ValueError:
            return argument
        if isinstance(text, str):
            return text
    return argument


# A JSON string, or anything else up to a bar.
_PART = re.compile(r'(\s*"(?:[^"\\]|\\.)*"\s*|[^|]*)(\||\Z)')


def split_at_bars(argument: str) -> Iterator[str]:
    """What stands between bars, stripped; a bar between double quotes belongs to the text."""
    for part in _PART.finditer(argument):
        yield part[1].strip()
        if not part[2]:
            return


def two_texts(argument: str, command: str) -> list[str]:
    """Two texts with a bar between them. Raises `UsageError` where there are more, or fewer."""
    texts = [unquoted(part) for part in split_at_bars(argument)]
    if len(texts) != 2 or not all(texts):
        raise UsageError(
            f"'{sanitize(argument)}' was given for {command}, expected two texts with a | between them; "
            "one that has a | in it stands in double quotes."
        )
    return texts


def candidates(session: Session, _begun: str) -> Iterable[str]:
    """The last answer's candidates, as /force takes them."""
    return [visible(c.text).plain for c in session.now.prediction.top] if session.now else []


def one_token(session: Session, argument: str) -> Token:
    """The token that an argument names: as the answer shows it, by its id as #7042, or by its text."""
    llama = session.llama
    if argument.startswith("#") and argument[1:].isdecimal():
        return llama.token(whole_number(argument[1:], "a token's id", least=0))
    if session.now:  # as it stands in the answer, escapes and all
        for candidate in session.now.prediction.top:
            if visible(candidate.text).plain == argument:
                return candidate
    text = unquoted(argument).replace(SPACE, " ")
    ids = llama.encode(text, bos=False, special=True)
    if not ids:
        raise UsageError(f"'{sanitize(argument)}' is an empty text, expected one token, by its text or as #7042.")
    if len(ids) != 1:
        parts = " ".join(visible(llama.token(id).text).plain for id in ids[:8])
        raise UsageError(
            f"'{sanitize(argument)}' is {len(ids)} tokens ({sanitize(parts)}), expected one; "
            "write a space in front as ␣, or give the token's id as #7042."
        )
    return llama.token(ids[0])


_LAYER = re.compile(r"[lL]?([0-9]{1,4})")


def layers(session: Session, _begun: str) -> Iterable[str]:
    return map(str, range(session.llama.args.n_layers)) if session.state.loading.ended else ()


def layer_number(argument: str, name: str) -> int:
    """The number of a layer, which the microscope checks."""
    if (matched := _LAYER.fullmatch(argument)) is None:
        raise UsageError(f"'{sanitize(argument)}' was given for /{name}, expected a layer such as 5.")
    return int(matched[1])


def window_start(position: int | None, length: int, window: int) -> int:
    """Where the positions that are looked at begin.

    A position among the last ones is a place to scroll to; one further in front has a window of its own.
    """
    last = max(0, length - window)
    return last if position is None or last <= position < length else position


def paths(_session: Session, begun: str) -> Iterator[str]:
    """What lies where a path begins, folders with a slash behind them."""
    folder, name = os.path.split(begun)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in entries:
        hidden = entry.name.startswith(".") and not name.startswith(".")
        if entry.name.startswith(name) and entry.name.isprintable() and not hidden:
            yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")


def file_path(argument: str) -> Path:
    """The file that an argument names: as it is written, or in double quotes as JSON.

    Raises `UsageError` if it names a folder, or a home that there is not.
    """
    name = unquoted(argument)
    if name.endswith("/"):
        raise UsageError(f"'{sanitize(name)}' names a folder, expected a file; put its name behind the slash.")
    return user_path(name)
