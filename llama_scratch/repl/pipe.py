"""The session without a terminal: prompts in, a line or an object each out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from llama_scratch.errors import LlamaScratchError
from llama_scratch.render import lines
from llama_scratch.repl.commands import is_command, run_command, unescaped
from llama_scratch.repl.session import Session
from llama_scratch.results import as_json


@dataclass(frozen=True)
class Format:
    """How answers are written. `all_candidates`: a line for each, not only for the first."""

    kind: Literal["json", "lines", "terminal"]
    all_candidates: bool = False


def stdin_text() -> str:
    """All of standard input. Bytes that are not UTF-8 arrive as lone surrogates, which the tokenizer reports."""
    return sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")


def stdin_lines() -> Iterator[str]:
    """Standard input line by line, as it comes, without line ends."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")


def answer_all(session: Session, prompts: Iterable[str], form: Format, *, commands: bool, log: Console) -> int:
    """Answer each prompt; a prompt that fails is a sentence on stderr and the next one is taken.

    log: where the prompts' warnings go.

    Returns the exit code: 0, or that of the first failure.
    """
    exit_code = 0
    for prompt in prompts:
        if not prompt:
            continue
        try:
            if commands and is_command(prompt):
                run_command(session, prompt)
            else:
                answer(session, unescaped(prompt) if commands else prompt, form, log)
        except LlamaScratchError as error:
            print(f"llama-scratch: {error}", file=sys.stderr)
            exit_code = exit_code or error.exit_code
        if session.ended:
            break
    return exit_code


def answer(session: Session, prompt: str, form: Format, log: Console) -> None:
    """Answer one prompt on standard output."""
    if form.kind == "terminal":
        session.ask(prompt)
        return
    settings = session.settings
    prediction = session.llama.predict(prompt, top=settings.top)
    generated = session.llama.complete(prompt, settings.generate, settings.sampling) if settings.generate else None
    if form.kind == "json":
        _write(lines.json_line(as_json(prediction, generated)))
        return
    for sentence in prediction.warnings:
        log.print(f"llama-scratch: {sentence}", style="yellow", soft_wrap=True, markup=False)
    if generated is not None:
        _write(generated.text)
    else:
        for line in lines.answer_lines(prediction, all_candidates=form.all_candidates):
            _write(line)


def _write(line: str) -> None:
    print(line, flush=True)
