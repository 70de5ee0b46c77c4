"""Which model is meant: by path, by the name of one that `pull` fetched, or by looking where models usually are."""

from __future__ import annotations

import os
from pathlib import Path

from llama_scratch.checkpoint.pull import OPEN_MODELS
from llama_scratch.errors import ModelNotFoundError, UsageError

ENVIRONMENT = "LLAMA_SCRATCH_MODEL_DIR"
USUAL_PLACES = ("~/.llama/checkpoints/Llama3.2-1B", "~/.llama/Llama3.2-1B")
DEFAULT_MODEL = "smollm2"


def find_model(source: str | os.PathLike[str] | None = None) -> Path:
    """The path of a model: a Meta directory or a .gguf file.

    source: a path, or a name that `llama-scratch pull` knows. None: `$LLAMA_SCRATCH_MODEL_DIR`, then
    the usual places of Llama 3.2 1B, then the open model. Raises `ModelNotFoundError` where the open
    model is meant and was not fetched yet; `pull` mends that.
    """
    source = _meant(source)
    if open_model := OPEN_MODELS.get(os.fspath(source)):
        if not open_model.path.is_file():
            raise ModelNotFoundError(
                f"The model {open_model.name} is not on this machine yet; "
                f"run 'llama-scratch pull {open_model.name}' to fetch it."
            )
        return open_model.path
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~ without a home
        raise ModelNotFoundError(f"{source} cannot be resolved: {error}; name the directory in full.") from error


def _meant(source: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if source is None:
        return os.environ.get(ENVIRONMENT) or next(filter(_is_there, USUAL_PLACES), DEFAULT_MODEL)
    if not os.fspath(source):
        raise UsageError("The model's name is empty, expected a directory, a file or a name such as smollm2.")
    return source


def _is_there(place: str) -> bool:
    try:
        return Path(place).expanduser().is_dir()
    except (RuntimeError, OSError):  # no home, or one that must not be looked into
        return False


def missing_open_model(source: str | os.PathLike[str] | None) -> str | None:
    """The name of the open model that `find_model(source)` would refuse because it was not fetched yet."""
    model = OPEN_MODELS.get(os.fspath(_meant(source)))
    return model.name if model and not model.path.is_file() else None
