"""The session without a terminal: prompts in, a line or an object each out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from llama_scratch.errors import LlamaScratchError, UsageError, escape_controls, unexpected
from llama_scratch.render import lines, text
from llama_scratch.render.messages import user_message
from llama_scratch.repl.commands import Reply, escaped
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.session import Session
from llama_scratch.system.small_files import without_line_end, without_mark

OutputFormat = Literal["json", "lines", "terminal"]
"""How answers are written: one JSON object per prompt, lines of text, or as on a terminal."""

# Bytes of a prompt: the longest context holds no more, whatever the text.
_MAX_PROMPT = 1 << 24
_STDIN = "Standard input"


def stdin_text() -> str:
    """All of standard input without its last line end.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer reports.

    Raises:
        UsageError: If it is UTF-16, or longer than any context.
    """
    return without_line_end(_text(without_mark(_read(sys.stdin.buffer.read), _STDIN, UsageError)))


def stdin_lines() -> Iterator[str]:
    """Standard input line by line, as it arrives, without line ends; otherwise as `stdin_text`."""
    line = without_mark(_read(sys.stdin.buffer.readline), _STDIN, UsageError)
    while line:
        yield _text(line).rstrip("\r\n")
        line = _read(sys.stdin.buffer.readline)


def _read(read: Callable[[int], bytes]) -> bytes:
    data = read(_MAX_PROMPT + 1)
    if len(data) > _MAX_PROMPT:
        raise UsageError(f"A prompt on standard input is longer than {_MAX_PROMPT:,} bytes; shorten it.")
    return data


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def answer_all(session: Session, prompts: Iterable[str], format: OutputFormat, *, commands: bool, log: Console) -> int:
    """Answer each prompt; a prompt that fails is a sentence on stderr and the next one is taken.

    commands: lines that begin with a slash are commands. log: where the prompts' warnings go.

    Returns the exit code: 0, or that of the first failure.
    """
    exit_code = 0
    for prompt in prompts:
        if not prompt:
            continue
        try:
            # Without commands a slash is a character like any other.
            line = prompt if commands else escaped(prompt)
            session.screen.echo(session.state.loading.name, line)
            output, reply = respond(session, line)
            _show(session, output, reply, format, log)
        except LlamaScratchError as error:
            print(f"llama-scratch: {escape_controls(user_message(error))}", file=sys.stderr)
            exit_code = exit_code or error.exit_code
        except (OSError, MemoryError):  # the reader went away, or the machine has no more to give
            raise
        except Exception as error:  # one line's trouble is not the next one's
            if session.debug:
                raise
            print(f"llama-scratch: {unexpected(error)}", file=sys.stderr)
            exit_code = exit_code or 1
        if session.ended:
            break
    return exit_code


def _show(session: Session, output: dict[str, Any], reply: Reply | None, format: OutputFormat, log: Console) -> None:
    """What a line was answered, on standard output; what holds no data goes where notes go."""
    if format == "json":
        _write(session, lines.json_line(output))
    elif reply and reply.view is not None:
        if format == "terminal" or reply.note:
            session.screen.show(reply.view)
        else:
            _write(session, text.as_text(reply.view))
    elif format == "lines" and "next" in output:
        for sentence in output["warnings"]:
            if sentence in session.screen.explained:  # about the model, and printed before
                continue
            log.print(f"llama-scratch: {sentence}", style="yellow", soft_wrap=True, markup=False)
        session.screen.explained.update(session.llama.warnings)
        if "generated" in output:
            _write(session, output["generated"]["text"])
        else:
            prediction = session.state.snapshots[-1].prediction
            for line in lines.answer_lines(prediction, all_candidates=session.lists_candidates):
                _write(session, line)


def _write(session: Session, line: str) -> None:
    print(line, flush=True)
    session.screen.record_view(Text(line))
