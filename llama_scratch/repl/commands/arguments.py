"""Parsers for command arguments: numbers, switches, texts, tokens, layers, files."""

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
    """Split a text at the first white space into its first word and the rest."""
    word, rest = [*text.split(maxsplit=1), "", ""][:2]
    return word, rest.strip()


def whole_number(argument: str, what: str, least: int = 1) -> int:
    """Parse a whole number.

    Args:
        argument: The argument.
        what: Name of the value, for the error.
        least: Minimum.

    Returns:
        The number.

    Raises:
        UsageError: If it is not a whole number or is below the minimum.
    """
    try:
        value = int(argument)
    except ValueError:
        value = least - 1
    if value < least:
        raise UsageError(f"Invalid value '{sanitize(argument)}' for {what}. Use a whole number, at least {least}.")
    return value


def number(argument: str, what: str) -> float:
    """Parse a number.

    Args:
        argument: The argument.
        what: Name of the value, for the error.

    Returns:
        The number.

    Raises:
        UsageError: If it is not a number.
    """
    try:
        return float(argument)
    except ValueError:
        raise UsageError(f"Invalid value '{sanitize(argument)}' for {what}. Use a number.") from None


def on_or_off(argument: str, what: str) -> bool:
    """Parse on or off.

    Args:
        argument: The argument.
        what: Name of the switch, for the error.

    Returns:
        Whether it is on.

    Raises:
        UsageError: If it is neither on nor off.
    """
    if argument not in ("on", "off"):
        raise UsageError(f"Invalid value '{sanitize(argument)}' for {what}. Use on or off.")
    return argument == "on"


def unquoted(argument: str) -> str:
    """Decode a text in double quotes as JSON; return any other text unchanged."""
    if len(argument) > 1 and argument[0] == argument[-1] == '"':
        try:
            text = json.loads(argument)
        except ValueError:
            return argument
        if isinstance(text, str):
            return text
    return argument


# A JSON string, or any other text up to a vertical bar.
_PART = re.compile(r'(\s*"(?:[^"\\]|\\.)*"\s*|[^|]*)(\||\Z)')


def split_at_bars(argument: str) -> Iterator[str]:
    """Split at vertical bars, except in double quotes, and strip each part."""
    for part in _PART.finditer(argument):
        yield part[1].strip()
        if not part[2]:
            return


def two_texts(argument: str, command: str) -> list[str]:
    """Parse two texts separated by a vertical bar.

    Args:
        argument: The argument.
        command: Name of the command, for the error.

    Returns:
        The two texts.

    Raises:
        UsageError: If there are fewer or more than two texts, or one is empty.
    """
    texts = [unquoted(part) for part in split_at_bars(argument)]
    if len(texts) != 2 or not all(texts):
        raise UsageError(
            f"Invalid argument '{sanitize(argument)}' for {command}. Give two texts separated by |. "
            "Put a text that contains | in double quotes."
        )
    return texts


def candidates(session: Session, _begun: str) -> Iterable[str]:
    """Complete a token with the candidates of the last answer.

    Args:
        session: The session.

    Returns:
        The candidates in the form that /force accepts.
    """
    return [visible(c.text).plain for c in session.now.prediction.top] if session.now else []


def one_token(session: Session, argument: str) -> Token:
    """Parse a token: as the answer shows it, as an id such as #7042, or as text.

    Args:
        session: The session.
        argument: The argument.

    Returns:
        The token.

    Raises:
        UsageError: If it is not exactly one token.
    """
    llama = session.llama
    if argument.startswith("#") and argument[1:].isdecimal():
        return llama.token(whole_number(argument[1:], "a token's id", least=0))
    if session.now:  # as the answer shows it, including escapes
        for candidate in session.now.prediction.top:
            if visible(candidate.text).plain == argument:
                return candidate
    text = unquoted(argument).replace(SPACE, " ")
    ids = llama.encode(text, bos=False, special=True)
    if not ids:
        raise UsageError(f"'{sanitize(argument)}' is an empty text. Give a token as text, or as an id such as #7042.")
    if len(ids) != 1:
        parts = " ".join(visible(llama.token(id).text).plain for id in ids[:8])
        raise UsageError(
            f"'{sanitize(argument)}' is {len(ids)} tokens ({sanitize(parts)}). Give one token. "
            "Write a leading space as ␣, or use a token id such as #7042."
        )
    return llama.token(ids[0])


_LAYER = re.compile(r"[lL]?([0-9]{1,4})")


def layers(session: Session, _begun: str) -> Iterable[str]:
    """Complete a layer number.

    Args:
        session: The session.

    Returns:
        The numbers of all layers; empty until the model is loaded.
    """
    return map(str, range(session.llama.args.n_layers)) if session.state.loading.ended else ()


def layer_number(argument: str, name: str) -> int:
    """Parse a layer such as 5 or L5. The microscope checks that the layer exists.

    Args:
        argument: The argument.
        name: Name of the command, for the error.

    Returns:
        The layer's number.

    Raises:
        UsageError: If it does not look like a layer.
    """
    if (matched := _LAYER.fullmatch(argument)) is None:
        raise UsageError(f"Invalid value '{sanitize(argument)}' for /{name}. Give a layer such as 5.")
    return int(matched[1])


def window_start(position: int | None, length: int, window: int) -> int:
    """Return the first position of the window to compute.

    The last window is computed unless the requested position is outside it. The window then starts at that position.

    Args:
        position: The requested position, if any.
        length: Number of tokens in the text.
        window: Number of positions in a window.

    Returns:
        The first position, counted from 0.
    """
    last = max(0, length - window)
    return last if position is None or last <= position < length else position


def paths(_session: Session, begun: str) -> Iterator[str]:
    """Complete a path.

    Args:
        begun: The path up to the cursor.

    Yields:
        The matching paths. Folders end with a slash.
    """
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
    """Parse a file name, as plain text or in double quotes as JSON.

    Raises:
        UsageError: If it ends with a slash, or begins with ~ and that user has no home folder.
    """
    name = unquoted(argument)
    if name.endswith("/"):
        raise UsageError(f"'{sanitize(name)}' is a folder. Add a file name after the slash.")
    return user_path(name)
