"""The model that a session file names, compared with the model here."""

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
    """What an answer may depend on besides the model."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}


def same_model(header: SessionHeader, llama: Llama, progress: Progress) -> bool:
    """Whether a model has the weights and the tokens of the one that a session ended with.

    Raises as `Mapped.sha256` does.
    """
    model, details = header.at_end
    if details.tokenizer not in (None, fingerprint_of(llama.tokenizer)):
        return False
    return weights_sha256(details, llama, progress) == model.sha256


def shape_differences(details: ModelDetails, llama: Llama) -> list[tuple[str, str, str]]:
    """Fields of the network's shape that differ from the recorded model: the name, the old value, the new one."""
    old = details.shape or {}
    new = json.loads(json.dumps(dataclasses.asdict(llama.args)))
    names = [name for name, value in new.items() if name in old and old[name] != value]
    return [(name, sanitize(json.dumps(old[name])), sanitize(json.dumps(new[name]))) for name in names]


def initial_model(header: SessionHeader, llama: Llama | None) -> InitialModel:
    """The model that a loaded session began with.

    Args:
        header: The session's header.
        llama: The same model on this machine, if there is one. Its path counts then.
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
    """The digest of a model's weights, computed as the one of the recording, in hexadecimal."""
    files, path = llama.engine.files, llama.path or Path()
    with reading(path):
        if details.files is None and len(files.names) > 1:  # version 0.1.0 read one file of several
            return files.sha256(progress, path.name if path.name in files.names else files.names[0])
        return files.sha256(progress)
