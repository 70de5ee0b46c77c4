"""The format of session files, how they are written, and how they are read.

A file has what was typed and answered, as JSON Lines, with everything that is needed to run it again. The first line
says how the session began and its state at the end; each further line is one turn. A file may come from anyone, so
every line is checked before it is used.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError, sanitize
from llama_scratch.microscope.recipe import Recipe
from llama_scratch.repl.conversation import Question
from llama_scratch.repl.state import Settings, Turn
from llama_scratch.repl.user_files import write_whole
from llama_scratch.system.small_files import read_bytes, without_mark
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT_VERSION = 1
# Bytes of a file. As JSON grows some thirty times in memory, this is what a file from a stranger can cost.
MAX_BYTES = 64 << 20
_EXPECTED = "expected a session that /save wrote"


@dataclass(frozen=True)
class SavedModel:
    """The model that answered. sha256: of its weight files, in hexadecimal, see `Mapped.sha256`."""

    name: str
    format: str
    path: str
    sha256: str
    parameters: int


@dataclass(frozen=True)
class ModelDetails:
    """What decides a model's answers besides its weights. All are None for files of version 0.1.0.

    Args:
        files: The number of weight files that `SavedModel.sha256` covers. Version 0.1.0 read one of them.
        shape: The fields of `ModelArgs` as it ran.
        tokenizer: `fingerprint_of` the tokenizer.
        precision: How the weights were stored.
    """

    files: int | None = None
    shape: dict[str, Any] | None = None
    tokenizer: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class SavedIntervention:
    """An intervention under the name that it had in the session."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class SavedText:
    """A text of the session. See `Past`.

    changes: The indices of its interventions in `SavedStateExtension.changes`.
    """

    ids: list[int]
    prompt: str
    top: int
    offered: list[int] | None
    changes: list[int]


@dataclass(frozen=True)
class SavedStateExtension:
    """The part of the state at the end that files of version 0.1.0 do not have.

    Args:
        model, details: The model at the end.
        texts: The texts that /undo goes back to, the newest last.
        questions: Those questions of the chat that one of the texts begins with.
        changes: All interventions that a text was answered with, or that are on.
        on: The indices of the interventions that are on.
    """

    model: SavedModel
    details: ModelDetails
    texts: list[SavedText]
    questions: list[Question]
    changes: list[SavedIntervention]
    on: list[int]


@dataclass(frozen=True)
class SavedState:
    """The session's state when it was saved: settings, the chat's system prompt, and the text, if any.

    Args:
        model: SHA-256 of the weights that the ids belong to.
        more: Everything else; None in files of version 0.1.0.
    """

    settings: Settings
    system: str | None
    model: str
    ids: list[int]
    text: str
    more: SavedStateExtension | None = None


@dataclass(frozen=True)
class SavedOptions:
    """The options that the model was loaded with, None if one was not given. Paths are absolute."""

    tokenizer: str | None
    rope_factor: float | None
    context: int | None
    calibration: str | None
    activations: str | None = None


@dataclass(frozen=True)
class SessionHeader:
    """What a session began with: the model and how it was run, and the settings before the first line.

    llama_scratch: the version that wrote the file. rope_factor: 1 where RoPE is not scaled. system: the system prompt
    of the chat, None where lines were prompts. repeatable: whether a replay gives the same text; what was drawn by
    chance without a seed is another one each time. end: where the session stood when it was saved. versions: of
    Python and torch, and the platform. details: of the model. turns: the number of lines that follow, so that a file
    that was cut between two lines is noticed. asked: the options of the model. Version 0.1.0 did not write them.
    """

    llama_scratch: str
    format: int
    model: SavedModel
    precision: str
    device: str
    threads: int
    context: int
    rope_factor: float
    settings: Settings
    system: str | None
    repeatable: bool
    end: SavedState
    versions: dict[str, str]
    details: ModelDetails = ModelDetails()
    turns: int | None = None
    asked: SavedOptions | None = None

    @property
    def at_end(self) -> tuple[SavedModel, ModelDetails]:
        """The model at the end."""
        more = self.end.more
        return (more.model, more.details) if more else (replace(self.model, sha256=self.end.model), self.details)

    @property
    def options(self) -> dict[str, Any]:
        """How the model was run, by the names that the command line has for it."""
        # Without them the numbers that were in use: they mean the same, but that a context that was asked for must fit.
        asked = {"context": self.context, "rope_factor": self.rope_factor} if self.asked is None else vars(self.asked)
        return {
            "model_dir": self.model.path,
            "precision": self.precision,
            "device": self.device,
            # Another machine may have fewer, and a stranger may have written any number.
            "threads": max(1, min(self.threads, os.cpu_count() or 1)),
            **asked,
        }


@dataclass(frozen=True)
class SessionFile:
    """A session as it is kept in a file."""

    header: SessionHeader
    turns: list[Turn]


# --- Writing ----------------------------------------------------------------------------------


def save(recorded: SessionFile, path: Path) -> None:
    """Write a session file for oneself alone. Raises `LlamaScratchError` where something else has that name."""
    if os.path.lexists(path):
        try:
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                _header(path, file.readline(MAX_BYTES))
        except (LlamaScratchError, OSError) as error:
            raise LlamaScratchError(
                f"{sanitize(path, 200)} is there and is no session file, so it stays as it is; choose another name."
            ) from error
    header = replace(recorded.header, turns=len(recorded.turns))
    lines = [dataclasses.asdict(header), *map(vars, recorded.turns)]
    data = "".join(replace_surrogates(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines).encode()
    if len(data) > MAX_BYTES:
        raise LlamaScratchError(
            f"The session takes {len(data):,} bytes, expected at most {MAX_BYTES:,}; begin a new one."
        )
    write_whole(path, data)


# --- Reading ----------------------------------------------------------------------------------


def load(path: Path) -> SessionFile:
    """Read and check a session file.

    Raises:
        ModelNotFoundError: If there is no such file.
        CheckpointError: If it is not a session or was cut. The message names the line.
    """
    name = sanitize(path, 200)
    try:
        data = read_bytes(path, MAX_BYTES, error=CheckpointError)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        missing = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        kind = ModelNotFoundError if missing else CheckpointError
        raise kind(f"{name} cannot be read ({reason}); name a session that /save wrote.") from error
    lines = without_mark(data, name, CheckpointError).split(b"\n")
    header = _header(path, lines[0])
    if lines[-1]:
        raise CheckpointError(f"{name} breaks off in line {len(lines)}, {_EXPECTED}, whole.")
    turns = [_checked(path, n, Turn, line) for n, line in enumerate(lines[1:-1], start=2)]
    if header.turns is not None and len(turns) < header.turns:
        raise CheckpointError(f"{name} breaks off after {len(turns)} of {header.turns} turns, {_EXPECTED}, whole.")
    return SessionFile(header, turns)


def _header(path: Path, line: bytes) -> SessionHeader:
    header: SessionHeader = _checked(path, 1, SessionHeader, line)
    if header.format != FORMAT_VERSION:
        raise CheckpointError(
            f"{sanitize(path, 200)} is a session of format {header.format}, expected {FORMAT_VERSION}; "
            f"read it with llama-scratch {sanitize(header.llama_scratch)}."
        )
    return header


def _checked(path: Path, number: int, kind: Any, line: bytes) -> Any:
    """A line as the dataclass that it should be, with nothing taken for what it is not."""
    from pydantic import ValidationError

    try:
        return _reader(kind).validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        problem = sanitize(where + first["msg"], 200)
    except UsageError as error:  # a sampling option out of its range
        problem = sanitize(str(error).removesuffix("."), 200)
    raise CheckpointError(f"{sanitize(path, 200)}, line {number}: {problem}; {_EXPECTED}.")


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def ids_of(output: dict[str, Any]) -> list[int] | None:
    """The ids of the text that an answer stands for; None where it names none, or something else."""
    tokens = output.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    return whole_numbers([token.get("id") if isinstance(token, dict) else None for token in tokens])


def whole_numbers(value: Any) -> list[int] | None:
    """A value as a list of ids; None where it is something else."""
    return value if isinstance(value, list) and all(type(id) is int for id in value) else None
