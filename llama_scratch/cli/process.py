"""Standard streams, consoles, and the exit codes of errors."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from llama_scratch.errors import LlamaScratchError, OutOfMemoryError, escape_controls, unexpected
from llama_scratch.render.messages import user_message
from llama_scratch.system.memory import is_memory_error, refusal

if TYPE_CHECKING:
    from llama_scratch.cli.options import OutputOptions

# `python -m llama_scratch` also uses this name, so that shell completion is installed for it.
NAME = "llama-scratch"


@dataclass(frozen=True)
class Consoles:
    """The output streams of the main command and its subcommands.

    Args:
        out: Standard output.
        log: Standard error, for progress and notes.
        json: Whether answers are printed as JSON.
        interactive: Whether the user can be asked a question.
    """

    out: Console
    log: Console
    json: bool
    interactive: bool

    @classmethod
    def open(cls, output: OutputOptions) -> Consoles:
        """Open the consoles according to the options."""
        colors: dict[str, Any] = {"no_color": True} if output.no_color or output.plain else {}
        return cls(
            Console(highlight=False, emoji=False, **colors),
            Console(stderr=True, quiet=output.quiet, highlight=False, emoji=False, **colors),
            output.json,
            not output.no_input and sys.stdin.isatty() and sys.stderr.isatty(),
        )

    def note(self, text: str) -> None:
        """Print a note for the user, without markup."""
        self.log.print(text, soft_wrap=True, markup=False)


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    from llama_scratch.render.lines import json_line

    print(json_line(value))


# --- Streams ----------------------------------------------------------------------------------


def prepare_streams() -> None:
    """Open the standard streams that are closed, and set their encodings."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Otherwise the next file to be opened would get the descriptor of the closed stream.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot encode
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # data is UTF-8 in any locale


def flush_stdout() -> None:
    """Flush standard output, unless its reader has closed the pipe."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # not an error: the reader closed the pipe
        discard_stdout()


def discard_stdout() -> None:
    """Discard the buffered output, which Python would flush at exit and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- Errors and exit codes --------------------------------------------------------------------


@contextmanager
def tracebacks() -> Iterator[None]:
    """Print the traceback of an error raised in the block."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception:
        traceback.print_exc()
        raise


def report(error: BaseException) -> int:
    """Print an error as one message on stderr, and return its exit code."""
    match error:
        case typer.TyperException():
            context: typer.Context | None = getattr(error, "ctx", None)
            command = context.command_path if context else NAME
            message = error.format_message().rstrip(".")
            return _fail(f"{message}. '{command} --help' lists the options.", error.exit_code)
        case LlamaScratchError():
            return _fail(user_message(error), error.exit_code)
        case KeyboardInterrupt() | typer.Abort():
            return 130
    if isinstance(error, MemoryError) or is_memory_error(error):  # includes a library that could not be mapped
        return _fail(refusal(), OutOfMemoryError.exit_code)
    if isinstance(error, OSError):
        discard_stdout()
        return _fail(f"Reading or writing failed ({error}). Check the disk and the output.", 1)
    return _fail(unexpected(error), 1)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # the exit code still reports the failure
        print(f"{NAME}: {escape_controls(message)}", file=sys.stderr)
    return code
