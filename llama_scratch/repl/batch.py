"""The session without a terminal: prompts from a pipe, lines or JSON objects out."""

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
"""The output format: one JSON object per prompt, lines of text, or as on a terminal."""

# Maximum size of a prompt in bytes. A longer text would not fit into any context.
_MAX_PROMPT = 1 << 24
_STDIN = "Standard input"


def stdin_text() -> str:
    """Read all of standard input without the last line break.

    Bytes that are not UTF-8 become lone surrogates, which the tokenizer reports.

    Raises:
        UsageError: If the input is UTF-16 or UTF-32, or longer than `_MAX_PROMPT`.
    """
    return without_line_end(_text(without_mark(_read(sys.stdin.buffer.read), _STDIN, UsageError)))


def stdin_lines() -> Iterator[str]:
    """Yield the lines of standard input as they arrive, without line breaks.

    Invalid bytes and errors are handled as in `stdin_text`.
    """
    line = without_mark(_read(sys.stdin.buffer.readline), _STDIN, UsageError)
    while line:
        yield _text(line).rstrip("\r\n")
        line = _read(sys.stdin.buffer.readline)


def _read(read: Callable[[int], bytes]) -> bytes:
    data = read(_MAX_PROMPT + 1)
    if len(data) > _MAX_PROMPT:
        raise UsageError(f"A prompt on standard input is longer than {_MAX_PROMPT:,} bytes. Shorten it.")
    return data


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")


def answer_all(session: Session, prompts: Iterable[str], format: OutputFormat, *, commands: bool, log: Console) -> int:
    """Answer each prompt. Print errors to stderr and continue.

    Args:
        session: The session.
        prompts: The prompts.
        format: The output format.
        commands: Whether lines that begin with a slash are commands.
        log: The console for warnings.

    Returns:
        The exit code: 0, or the exit code of the first error.

    Raises:
        OSError: If the output is closed.
        MemoryError: If memory is exhausted.
    """
    exit_code = 0
    for prompt in prompts:
        if not prompt:
            continue
        try:
            # Without commands, a slash has no special meaning.
            line = prompt if commands else escaped(prompt)
            session.screen.echo(session.state.loading.name, line)
            output, reply = respond(session, line)
            _show(session, output, reply, format, log)
        except LlamaScratchError as error:
            print(f"llama-scratch: {escape_controls(user_message(error))}", file=sys.stderr)
            exit_code = exit_code or error.exit_code
        except (OSError, MemoryError):  # the output is closed, or memory is exhausted
            raise
        except Exception as error:  # one failing line does not stop the others
            if session.debug:
                raise
            print(f"llama-scratch: {unexpected(error)}", file=sys.stderr)
            exit_code = exit_code or 1
        if session.ended:
            break
    return exit_code


def _show(session: Session, output: dict[str, Any], reply: Reply | None, format: OutputFormat, log: Console) -> None:
    """Print an answer to standard output.

    In terminal format, views go to the session's console. So do notes (`Reply.note`) unless the format is JSON.
    """
    if format == "json":
        _write(session, lines.json_line(output))
    elif reply and reply.view is not None:
        if format == "terminal" or reply.note:
            session.screen.show(reply.view)
        else:
            _write(session, text.as_text(reply.view))
    elif format == "lines" and "next" in output:
        for sentence in output["warnings"]:
            if sentence in session.screen.explained:  # already printed: a warning about the model
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
