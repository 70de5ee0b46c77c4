"""Session files: their format, writing and reading.

A session file contains the typed lines and their answers as JSON Lines, with everything needed to replay them. The
first line describes the session's start and its state at the end. Each further line is one turn. Session files are
untrusted, so every line is validated before use.
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
# Maximum size of a file in bytes. Parsed JSON takes about 30 times as much memory, so this also limits the memory
# that an untrusted file can use.
MAX_BYTES = 64 << 20
_EXPECTED = "Use a session file written by /save."
_COMPLETE = "Use a complete session file written by /save."


@dataclass(frozen=True)
class SavedModel:
    """The model of a session.

    Args:
        name: Its name.
        format: The format of its checkpoint.
        path: Its absolute path.
        sha256: Digest of its weight files in hexadecimal, see `MappedFiles.sha256`.
        parameters: Number of parameters.
    """

    name: str
    format: str
    path: str
    sha256: str
    parameters: int


@dataclass(frozen=True)
class ModelDetails:
    """Details of a model besides its weights. All are None in files of version 0.1.0.

    Args:
        files: The number of weight files that `SavedModel.sha256` covers. Version 0.1.0 hashed only one.
        shape: The fields of `ModelArgs` that the model ran with.
        tokenizer: The fingerprint of the tokenizer, see `fingerprint_of`.
        precision: The precision of the weights.
    """

    files: int | None = None
    shape: dict[str, Any] | None = None
    tokenizer: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class SavedIntervention:
    """An intervention with its label in the session."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class SavedText:
    """A text of the session.

    Args:
        ids: See `Past`.
        prompt: See `Past`.
        top: See `Past`.
        offered: See `Past`.
        changes: The indices of its interventions in `SavedStateExtension.changes`.
    """

    ids: list[int]
    prompt: str
    top: int
    offered: list[int] | None
    changes: list[int]


@dataclass(frozen=True)
class SavedStateExtension:
    """The part of the final state that files of version 0.1.0 do not have.

    Args:
        model: The model at the end.
        details: Its details.
        texts: The texts that /undo can restore, newest last.
        questions: The chat's questions that at least one of the texts begins with.
        changes: All interventions that are active or were active for one of the texts.
        on: The indices of the active interventions.
    """

    model: SavedModel
    details: ModelDetails
    texts: list[SavedText]
    questions: list[Question]
    changes: list[SavedIntervention]
    on: list[int]


@dataclass(frozen=True)
class SavedState:
    """The session's state when it was saved.

    Args:
        settings: The settings.
        system: The chat's system prompt, if there is a chat.
        model: SHA-256 of the weight files of the model at the end, which tokenized the text.
        ids: The text's token ids.
        text: The decoded text.
        more: The rest of the state. None in files of version 0.1.0.
    """

    settings: Settings
    system: str | None
    model: str
    ids: list[int]
    text: str
    more: SavedStateExtension | None = None


@dataclass(frozen=True)
class SavedOptions:
    """The options given when the model was loaded. Paths are absolute."""

    tokenizer: str | None
    rope_factor: float | None
    context: int | None
    calibration: str | None
    activations: str | None = None


@dataclass(frozen=True)
class SessionHeader:
    """The first line of a session file: the session's start and its final state.

    Args:
        llama_scratch: The version that wrote the file.
        format: The version of the file format.
        model: The initial model.
        precision: Its precision.
        device: Its device.
        threads: The number of threads.
        context: Its context in tokens.
        rope_factor: Its RoPE factor, 1 if RoPE is not scaled.
        settings: The settings before the first line.
        system: The initial chat's system prompt. None if lines were prompts.
        repeatable: Whether a replay generates the same text. It does not if text was sampled without a seed.
        end: The state when the session was saved.
        versions: The versions of Python and torch, and the platform.
        details: Details of the initial model.
        turns: The number of turns that follow, to detect truncated files. None in files of version 0.1.0.
        asked: The options that the model was loaded with. None in files of version 0.1.0.
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
        """The model at the end and its details."""
        more = self.end.more
        return (more.model, more.details) if more else (replace(self.model, sha256=self.end.model), self.details)

    @property
    def options(self) -> dict[str, Any]:
        """The options to load the model with, by their names in `ModelOptions`."""
        # Files of version 0.1.0 contain only the values in use, not the options. Using these values as options is
        # equivalent, except that a context given as an option must fit into memory.
        asked = {"context": self.context, "rope_factor": self.rope_factor} if self.asked is None else vars(self.asked)
        return {
            "model_dir": self.model.path,
            "precision": self.precision,
            "device": self.device,
            # This machine may have fewer threads, and an untrusted file may contain any number.
            "threads": max(1, min(self.threads, os.cpu_count() or 1)),
            **asked,
        }


@dataclass(frozen=True)
class SessionFile:
    """The contents of a session file."""

    header: SessionHeader
    turns: list[Turn]


# --- Writing ----------------------------------------------------------------------------------


def save(recorded: SessionFile, path: Path) -> None:
    """Write a session file that only the user can read.

    Args:
        recorded: The session.
        path: The file. An existing session file is replaced.

    Raises:
        LlamaScratchError: If the path is an existing file of another kind, the session is larger than `MAX_BYTES`, or
            the file cannot be written.
    """
    if os.path.lexists(path):
        try:
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                _header(path, file.readline(MAX_BYTES))
        except (LlamaScratchError, OSError) as error:
            raise LlamaScratchError(
                f"{sanitize(path, 200)} exists and is not a session file. Choose another name."
            ) from error
    header = replace(recorded.header, turns=len(recorded.turns))
    lines = [dataclasses.asdict(header), *map(vars, recorded.turns)]
    data = "".join(replace_surrogates(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines).encode()
    if len(data) > MAX_BYTES:
        raise LlamaScratchError(
            f"The session takes {len(data):,} bytes, expected at most {MAX_BYTES:,}. Start a new session."
        )
    write_whole(path, data)


# --- Reading ----------------------------------------------------------------------------------


def load(path: Path) -> SessionFile:
    """Read and validate a session file.

    Raises:
        ModelNotFoundError: If the file does not exist.
        CheckpointError: If it cannot be read, is not a session file, or is truncated. The message names an
            invalid line.
    """
    name = sanitize(path, 200)
    try:
        data = read_bytes(path, MAX_BYTES, error=CheckpointError)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        missing = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        kind = ModelNotFoundError if missing else CheckpointError
        raise kind(f"{name} cannot be read ({reason}). {_EXPECTED}") from error
    lines = without_mark(data, name, CheckpointError).split(b"\n")
    header = _header(path, lines[0])
    if lines[-1]:
        raise CheckpointError(f"{name} is truncated in line {len(lines)}. {_COMPLETE}")
    turns = [_checked(path, n, Turn, line) for n, line in enumerate(lines[1:-1], start=2)]
    if header.turns is not None and len(turns) < header.turns:
        raise CheckpointError(f"{name} is truncated after {len(turns)} of {header.turns} turns. {_COMPLETE}")
    return SessionFile(header, turns)


def _header(path: Path, line: bytes) -> SessionHeader:
    header: SessionHeader = _checked(path, 1, SessionHeader, line)
    if header.format != FORMAT_VERSION:
        raise CheckpointError(
            f"{sanitize(path, 200)} is a session of format {header.format}, expected {FORMAT_VERSION}. "
            f"Read it with llama-scratch {sanitize(header.llama_scratch)}."
        )
    return header


def _checked(path: Path, number: int, kind: Any, line: bytes) -> Any:
    """Parse a line as a dataclass, without type coercion."""
    from pydantic import ValidationError

    try:
        return _reader(kind).validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        problem = sanitize(where + first["msg"], 200)
    except UsageError as error:  # a sampling option is out of range
        problem = sanitize(str(error).removesuffix("."), 200)
    raise CheckpointError(f"{sanitize(path, 200)}, line {number}: {problem}. {_EXPECTED}")


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def ids_of(output: dict[str, Any]) -> list[int] | None:
    """Return the token ids in an answer's JSON object.

    None if they are missing or invalid.
    """
    tokens = output.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    return whole_numbers([token.get("id") if isinstance(token, dict) else None for token in tokens])


def whole_numbers(value: Any) -> list[int] | None:
    """Return the value if it is a list of integers, otherwise None."""
    return value if isinstance(value, list) and all(type(id) is int for id in value) else None
