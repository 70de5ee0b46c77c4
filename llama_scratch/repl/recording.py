"""A session as a session file: what is saved of it, and whether a replay can repeat it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.checkpoint.base import reading
from llama_scratch.errors import UsageError
from llama_scratch.repl.conversation import Question
from llama_scratch.repl.saved_model import versions
from llama_scratch.repl.session import Session
from llama_scratch.repl.session_file import (
    FORMAT_VERSION,
    ModelDetails,
    SavedIntervention,
    SavedModel,
    SavedOptions,
    SavedState,
    SavedStateExtension,
    SavedText,
    SessionFile,
    SessionHeader,
)
from llama_scratch.repl.state import InitialModel, Past, Snapshot
from llama_scratch.repl.user_files import user_path
from llama_scratch.system.progress import Progress

if TYPE_CHECKING:
    from llama_scratch.microscope.interventions import Intervention

# Maximum number of tokens of all texts that are saved for /undo.
_MAX_TOKENS = 1 << 20


def record(session: Session) -> SessionFile:
    """Describe a session up to now. Raises `UsageError` if nothing was answered yet."""
    if not session.state.turns:
        raise UsageError("There is nothing to save yet, expected a prompt or a command before it.")
    now = InitialModel.of(session.intact)
    first = session.state.initial_model or now
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
        format=FORMAT_VERSION,
        model=model,
        precision=first.info.precision,
        device=first.info.device,
        threads=torch.get_num_threads(),
        context=first.context,
        rope_factor=first.rope_factor,
        settings=session.state.initial_settings,
        system=session.state.initial_system,
        repeatable=_repeatable(session),
        end=SavedState(
            session.settings,
            session.state.chat.system if session.state.chat else None,
            end.sha256,
            ids,
            session.text_of(ids),
            _extension(session, end, _details(now)),
        ),
        versions=versions(),
        details=_details(first),
        asked=SavedOptions(
            tokenizer=_absolute(first.options.get("tokenizer")),
            rope_factor=first.options.get("rope_factor"),
            context=first.options.get("context"),
            calibration=_absolute(first.options.get("calibration")),
            activations=first.options.get("activations"),
        ),
    )
    return SessionFile(header, session.state.turns)


def _model(model: InitialModel, progress: Progress) -> SavedModel:
    """Describe a model, with the digest of its weights. Raises as `Mapped.sha256` does."""
    info, path = model.info, model.path or Path()
    with reading(path):
        sha256 = model.sha256(progress)
    return SavedModel(info.name, info.format, str(path.absolute()), sha256, info.parameters)


def _details(model: InitialModel) -> ModelDetails:
    return ModelDetails(model.files, model.shape, model.tokenizer(), model.info.precision)


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    """A path that means the same file in any working directory. An address such as gs://… stays as it is."""
    if path is None or "://" in os.fspath(path):
        return None if path is None else os.fspath(path)
    return str(user_path(os.fspath(path)).absolute())


def _extension(session: Session, model: SavedModel, details: ModelDetails) -> SavedStateExtension:
    state = session.state
    texts = _recent_texts(state.texts)
    used = [*(one for text in texts for one in text.interventions), *state.interventions]
    changes = {id(one): SavedIntervention(one.label, one.recipe) for one in used if one.recipe}
    numbers = {key: number for number, key in enumerate(changes)}

    def indices(interventions: Sequence[Intervention]) -> list[int]:
        return [numbers[id(one)] for one in interventions if one.recipe]

    def saved(text: Snapshot | Past) -> SavedText:
        offered = None if text.offered is None else list(text.offered)
        return SavedText(text.ids, text.prompt, text.top, offered, indices(text.interventions))

    def is_asked(question: Question) -> bool:
        return any(text.ids[: len(question.ids)] == question.ids for text in texts)

    return SavedStateExtension(
        model=model,
        details=details,
        texts=[saved(text) for text in texts],
        questions=[question for question in (state.chat.questions if state.chat else []) if is_asked(question)],
        changes=list(changes.values()),
        on=indices(state.interventions),
    )


def _recent_texts(texts: Sequence[Snapshot | Past]) -> list[Snapshot | Past]:
    """The newest texts that have `_MAX_TOKENS` together; at least one."""
    recent: list[Snapshot | Past] = []
    tokens_left = _MAX_TOKENS
    for text in reversed(texts):
        tokens_left -= len(text.ids)
        if tokens_left < 0 and recent:
            break
        recent.insert(0, text)
    return recent


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
