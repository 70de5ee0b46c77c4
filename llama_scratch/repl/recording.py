"""Describe a session for /save: its lines, its state, and its repeatability."""

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

# Maximum total number of tokens in the texts that are saved for /undo.
_MAX_TOKENS = 1 << 20


def record(session: Session) -> SessionFile:
    """Describe the session so far.

    Raises:
        UsageError: If it has no answers yet, or began with a model that was not loaded from a file.
        CheckpointError: If a weight file has changed since it was opened.
    """
    if not session.state.turns:
        raise UsageError("There is nothing to save yet. Enter a prompt or a command first.")
    now = InitialModel.of(session.intact)
    first = session.state.initial_model or now
    if first.path is None:
        raise UsageError("This model was not loaded from a file, so a replay could not load it. Load one from a path.")
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
    """Describe a model and compute the digest of its weight files."""
    info, path = model.info, model.path or Path()
    with reading(path):
        sha256 = model.sha256(progress)
    return SavedModel(info.name, info.format, str(path.absolute()), sha256, info.parameters)


def _details(model: InitialModel) -> ModelDetails:
    return ModelDetails(model.files, model.shape, model.tokenizer(), model.info.precision)


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    """Make a path absolute. A URL such as gs://… is returned unchanged."""
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
    """Return the newest texts with at most `_MAX_TOKENS` tokens in total.

    The newest text is always included.
    """
    recent: list[Snapshot | Past] = []
    tokens_left = _MAX_TOKENS
    for text in reversed(texts):
        tokens_left -= len(text.ids)
        if tokens_left < 0 and recent:
            break
        recent.insert(0, text)
    return recent


def _repeatable(session: Session) -> bool:
    """Whether all generated text was greedy or sampled with a seed.

    The sampling options at each turn are known from the answers of the commands that change them.
    """
    sampling = session.state.initial_settings.sampling
    temperature, seed = sampling.temperature, sampling.seed
    for turn in session.state.turns:
        if "temperature" in turn.output and "seed" in turn.output:
            temperature, seed = turn.output["temperature"], turn.output["seed"]
            if not isinstance(temperature, int | float):  # session files are untrusted
                return False
        elif temperature > 0 and seed is None and ("generated" in turn.output or "logprobs" in turn.output):
            return False
    return True
