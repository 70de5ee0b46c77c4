"""Compare the model of a session file with the loaded model."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.checkpoint.base import reading
from llama_scratch.errors import sanitize
from llama_scratch.repl.session_file import ModelDetails, SavedOptions, SessionHeader
from llama_scratch.repl.state import InitialModel
from llama_scratch.results import ModelInfo
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import fingerprint_of

if TYPE_CHECKING:
    from llama_scratch.llama import Llama


def versions() -> dict[str, str]:
    """Return the versions of Python and torch, and the platform."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}


def same_model(header: SessionHeader, llama: Llama, progress: Progress) -> bool:
    """Compare a model with the model at the end of a saved session.

    Args:
        header: The saved session's header.
        llama: The model.
        progress: Reports the progress of the digest.

    Returns:
        Whether both have the same weights and the same tokenizer.

    Raises:
        CheckpointError: If a weight file has changed since it was opened.
    """
    model, details = header.at_end
    if details.tokenizer not in (None, fingerprint_of(llama.tokenizer)):
        return False
    return weights_sha256(details, llama, progress) == model.sha256


def shape_differences(details: ModelDetails, llama: Llama) -> list[tuple[str, str, str]]:
    """Compare the network's shape with the recorded one.

    Args:
        details: The details of the recorded model.
        llama: The loaded model.

    Returns:
        The name, the recorded value and the current value of each field that differs.
    """
    old = details.shape or {}
    new = json.loads(json.dumps(dataclasses.asdict(llama.args)))
    names = [name for name, value in new.items() if name in old and old[name] != value]
    return [(name, sanitize(json.dumps(old[name])), sanitize(json.dumps(new[name]))) for name in names]


def initial_model(header: SessionHeader, llama: Llama | None) -> InitialModel:
    """Describe the model that a saved session began with.

    Args:
        header: The saved session's header.
        llama: The same model on this machine, if it is loaded. Its path and tokenizer option replace the saved ones.

    Returns:
        The description.
    """
    model = header.model
    info = ModelInfo(model.name, model.format, header.precision, header.device, model.parameters)
    options = {name: value for name, value in header.options.items() if name in SavedOptions.__dataclass_fields__}
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


def weights_sha256(details: ModelDetails, llama: Llama, progress: Progress) -> str:
    """Compute the digest of a model's weights over the same files as the recording.

    Args:
        details: The details of the recorded model.
        llama: The model.
        progress: Reports the progress.

    Returns:
        The SHA-256 digest in hexadecimal.

    Raises:
        CheckpointError: If a weight file has changed since it was opened.
    """
    files, path = llama.engine.files, llama.path or Path()
    with reading(path):
        if details.files is None and len(files.names) > 1:  # version 0.1.0 hashed only one of several files
            return files.sha256(progress, path.name if path.name in files.names else files.names[0])
        return files.sha256(progress)
