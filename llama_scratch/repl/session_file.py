"""Session files: what was typed and answered, as JSON Lines, with all that is needed to run it again.

The first line says how the session began and where it stood, each further line is one turn. A file may come from
anyone, so every line is checked before it is used; what is written appears under its name when it is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import reading
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError, sanitize
from llama_scratch.microscope.recipe import Recipe
from llama_scratch.repl.conversation import Question
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import InitialModel, Past, Settings, Snapshot, Turn
from llama_scratch.results import ModelInfo
from llama_scratch.system.atomic_files import unfinished_file
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_bytes, without_mark
from llama_scratch.tokenizer import replace_surrogates

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from llama_scratch.llama import Llama
    from llama_scratch.microscope.interventions import Intervention

FORMAT = 1
# Bytes of a file. As JSON grows some thirty times in memory, this is what a file from a stranger can cost.
MOST = 64 << 20
# Tokens of the texts that are saved for /undo, together.
_MOST_TOKENS = 1 << 20
_EXPECTED = "expected a session that /save wrote"


@dataclass(frozen=True)
class Model:
    """The model that answered. sha256: of its weight files, in hexadecimal, see `Mapped.sha256`."""

    name: str
    format: str
    path: str
    sha256: str
    parameters: int


@dataclass(frozen=True)
class Details:
    """What decides a model's answers besides its weights. All are None for files of version 0.1.0.

    Args:
        files: The number of weight files that `Model.sha256` covers. Version 0.1.0 read one of them.
        shape: The fields of `ModelArgs` as it ran.
        tokenizer: `Tokenizer.fingerprint`.
        precision: How the weights were stored.
    """

    files: int | None = None
    shape: dict[str, Any] | None = None
    tokenizer: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Change:
    """An intervention under the name that it had in the session."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class SavedText:
    """A text of the session. See `Past`; `changes` are the indices of its interventions in `Saved.changes`."""

    ids: list[int]
    prompt: str
    top: int
    offered: list[int] | None
    changes: list[int]


@dataclass(frozen=True)
class Saved:
    """The part of the state at the end that files of version 0.1.0 do not have.

    Args:
        model, details: The model at the end.
        texts: The texts that /undo goes back to, the newest last.
        questions: Those questions of the chat that one of the texts begins with.
        changes: All interventions that a text was answered with, or that are on.
        on: The indices of the interventions that are on.
    """

    model: Model
    details: Details
    texts: list[SavedText]
    questions: list[Question]
    changes: list[Change]
    on: list[int]


@dataclass(frozen=True)
class State:
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
    more: Saved | None = None


@dataclass(frozen=True)
class Options:
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
    model: Model
    precision: str
    device: str
    threads: int
    context: int
    rope_factor: float
    settings: Settings
    system: str | None
    repeatable: bool
    end: State
    versions: dict[str, str]
    details: Details = Details()
    turns: int | None = None
    asked: Options | None = None

    @property
    def at_end(self) -> tuple[Model, Details]:
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


def record(session: Session) -> SessionFile:
    """Describe a session up to now. Raises `UsageError` if nothing was answered yet."""
    if not session.state.turns:
        raise UsageError("There is nothing to save yet, expected a prompt or a command before it.")
    first, now = session.state.initial_model or InitialModel.of(session.intact), InitialModel.of(session.intact)
    if first.path is None:
        raise UsageError("This model did not come from a file, expected one that a replay can load.")
    import torch

    from llama_scratch import __version__

    with session.screen.progress() as progress:
        model = _model(first, progress)
        end = model if now.path is None else _model(now, progress)
    ids = session.ids if session.now else []
    header = SessionHeader(
        llama_scratch=__version__,
        format=FORMAT,
        model=model,
        precision=first.info.precision,
        device=first.info.device,
        threads=torch.get_num_threads(),
        context=first.context,
        rope_factor=first.rope_factor,
        settings=session.state.initial_settings,
        system=session.state.initial_system,
        repeatable=_repeatable(session),
        end=State(
            session.settings,
            session.state.chat.system if session.state.chat else None,
            end.sha256,
            ids,
            session.text_of(ids),
            _more(session, end, _details(now)),
        ),
        versions=versions(),
        details=_details(first),
        asked=Options(
            tokenizer=_absolute(first.options.get("tokenizer")),
            rope_factor=first.options.get("rope_factor"),
            context=first.options.get("context"),
            calibration=_absolute(first.options.get("calibration")),
            activations=first.options.get("activations"),
        ),
    )
    return SessionFile(header, session.state.turns)


def _model(origin: InitialModel, progress: Progress) -> Model:
    """Describe a model, with the digest of its weights. Raises as `Mapped.sha256` does."""
    info, path = origin.info, origin.path or Path()
    with reading(path):
        sha256 = origin.sha256(progress)
    return Model(info.name, info.format, str(path.absolute()), sha256, info.parameters)


def _details(origin: InitialModel) -> Details:
    return Details(origin.files, origin.shape, origin.tokenizer(), origin.info.precision)


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    """A path that means the same file in any working directory. An address such as gs://… stays as it is."""
    if path is None or "://" in os.fspath(path):
        return None if path is None else os.fspath(path)
    return str(user_path(os.fspath(path)).absolute())


def _more(session: Session, model: Model, details: Details) -> Saved:
    texts: list[Snapshot | Past] = []
    room = _MOST_TOKENS
    for text in reversed(session.state.texts):
        if (room := room - len(text.ids)) < 0 and texts:
            break
        texts.insert(0, text)
    used = [one for text in texts for one in text.interventions] + list(session.state.interventions)
    changes = {id(one): Change(one.label, one.recipe) for one in used if one.recipe}
    numbers = {key: number for number, key in enumerate(changes)}

    def indices(interventions: Sequence[Intervention]) -> list[int]:
        return [numbers[id(one)] for one in interventions if one.recipe]

    return Saved(
        model,
        details,
        [
            SavedText(
                text.ids,
                text.prompt,
                text.top,
                None if text.offered is None else list(text.offered),
                indices(text.interventions),
            )
            for text in texts
        ],
        [
            question
            for question in (session.state.chat.questions if session.state.chat else [])
            if any(text.ids[: len(question.ids)] == question.ids for text in texts)
        ],
        list(changes.values()),
        indices(session.state.interventions),
    )


def versions() -> dict[str, str]:
    """What an answer may depend on besides the model."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}


def _repeatable(session: Session) -> bool:
    """Whether no text was generated by chance without a seed. Commands that change how tokens are drawn say how."""
    sampling = session.state.initial_settings.sampling
    temperature, seed = sampling.temperature, sampling.seed
    for turn in session.state.turns:
        if "temperature" in turn.output and "seed" in turn.output:
            temperature, seed = turn.output["temperature"], turn.output["seed"]
            if not isinstance(temperature, int | float):  # a file may say anything
                return False
        elif temperature > 0 and seed is None and ("generated" in turn.output or "logprobs" in turn.output):
            return False
    return True


def same_model(header: SessionHeader, llama: Llama, progress: Progress) -> bool:
    """Whether a model has the weights and the tokens of the one that a session ended with.

    Raises as `Mapped.sha256` does.
    """
    model, details = header.at_end
    if details.tokenizer not in (None, llama.tokenizer.fingerprint):
        return False
    return weights_sha256(details, llama, progress) == model.sha256


def shape_differences(details: Details, llama: Llama) -> list[tuple[str, str, str]]:
    """Fields of the network's shape that differ from the recorded model: the name, the old value, the new one."""
    old = details.shape or {}
    new = json.loads(json.dumps(dataclasses.asdict(llama.args)))
    names = [name for name, value in new.items() if name in old and old[name] != value]
    return [(name, sanitize(json.dumps(old[name])), sanitize(json.dumps(new[name]))) for name in names]


def origin(header: SessionHeader, llama: Llama | None) -> InitialModel:
    """The model that a loaded session began with.

    Args:
        header: The session's header.
        llama: The same model on this machine, if there is one. Its path counts then.
    """
    model = header.model
    info = ModelInfo(model.name, model.format, header.precision, header.device, model.parameters)
    options = {name: value for name, value in header.options.items() if name in Options.__dataclass_fields__}
    path = Path(model.path)
    if llama is not None and llama.path is not None:
        path, options["tokenizer"] = llama.path, llama.options.get("tokenizer")
    return InitialModel(
        info,
        path,
        header.context,
        header.rope_factor,
        options,
        header.details.files,
        header.details.shape,
        lambda: header.details.tokenizer,
        lambda _: model.sha256,
    )


def weights_sha256(details: Details, llama: Llama, progress: Progress) -> str:
    """The digest of a model's weights, computed as the one of the recording, in hexadecimal."""
    files, path = llama.engine.files, llama.path or Path()
    with reading(path):
        if details.files is None and len(files.names) > 1:  # version 0.1.0 read one file of several
            return files.sha256(progress, path.name if path.name in files.names else files.names[0])
        return files.sha256(progress)


# --- Writing ----------------------------------------------------------------------------------


def save(recorded: SessionFile, path: Path) -> None:
    """Write a session file for oneself alone. Raises `LlamaScratchError` where something else has that name."""
    if os.path.lexists(path):
        try:
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                _header(path, file.readline(MOST))
        except (LlamaScratchError, OSError) as error:
            raise LlamaScratchError(
                f"{sanitize(path, 200)} is there and is no session file, so it stays as it is; choose another name."
            ) from error
    header = replace(recorded.header, turns=len(recorded.turns))
    lines = [dataclasses.asdict(header), *map(vars, recorded.turns)]
    data = "".join(replace_surrogates(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines).encode()
    if len(data) > MOST:
        raise LlamaScratchError(f"The session takes {len(data):,} bytes, expected at most {MOST:,}; begin a new one.")
    write_whole(path, data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file for oneself alone, in one piece: under its name there is all of it or what was there before.

    Raises `LlamaScratchError` where it cannot be written.
    """
    try:
        path = path.resolve()  # what a link points to is written, not the link
        with unfinished_file(path.parent, ".llama-scratch-writing-") as (file, part):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        advice = "choose a folder that is there for you to write to."
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room on that disk, or choose a folder on another one."
        raise LlamaScratchError(f"{sanitize(path, 200)} cannot be written ({reason}); {advice}") from error


# --- Reading ----------------------------------------------------------------------------------


def load(path: Path) -> SessionFile:
    """Read and check a session file.

    Raises:
        ModelNotFoundError: If there is no such file.
        CheckpointError: If it is not a session or was cut. The message names the line.
    """
    shown = sanitize(path, 200)
    try:
        data = read_bytes(path, MOST, error=CheckpointError)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        missing = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        kind = ModelNotFoundError if missing else CheckpointError
        raise kind(f"{shown} cannot be read ({reason}); name a session that /save wrote.") from error
    lines = without_mark(data, shown, CheckpointError).split(b"\n")
    header = _header(path, lines[0])
    if lines[-1]:
        raise CheckpointError(f"{shown} breaks off in line {len(lines)}, {_EXPECTED}, whole.")
    turns = [_checked(path, n, Turn, line) for n, line in enumerate(lines[1:-1], start=2)]
    if header.turns is not None and len(turns) < header.turns:
        raise CheckpointError(f"{shown} breaks off after {len(turns)} of {header.turns} turns, {_EXPECTED}, whole.")
    return SessionFile(header, turns)


def _header(path: Path, line: bytes) -> SessionHeader:
    header: SessionHeader = _checked(path, 1, SessionHeader, line)
    if header.format != FORMAT:
        raise CheckpointError(
            f"{sanitize(path, 200)} is a session of format {header.format}, expected {FORMAT}; "
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


def user_path(argument: str) -> Path:
    """A path as a person writes it, with ~ for the home. Raises `UsageError` where there is no such home."""
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{sanitize(argument, 200)} cannot be resolved ({error}); name the path in full.") from error


def ids_of(output: dict[str, Any]) -> list[int] | None:
    """The ids of the text that an answer stands for; None where it names none, or something else."""
    tokens = output.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    return whole_numbers([token.get("id") if isinstance(token, dict) else None for token in tokens])


def whole_numbers(value: Any) -> list[int] | None:
    """A value as a list of ids; None where it is something else."""
    return value if isinstance(value, list) and all(type(id) is int for id in value) else None
