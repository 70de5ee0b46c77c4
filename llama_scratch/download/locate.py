"""Which model is meant: by path, by the name of one that `pull` fetched, or by looking where models usually are."""

from __future__ import annotations

import os
from pathlib import Path

from llama_scratch.checkpoint.base import reading
from llama_scratch.download.cloud import local_copy, remote_address
from llama_scratch.download.hub import Repository
from llama_scratch.download.meta import CHECKPOINTS
from llama_scratch.download.pypi import OPEN_MODELS, OpenModel
from llama_scratch.errors import ModelNotFoundError, UsageError, sanitize
from llama_scratch.system.progress import Progress, silent

ENVIRONMENT = "LLAMA_SCRATCH_MODEL_DIR"
USUAL_PLACES = ("~/.llama/checkpoints/Llama3.2-1B", "~/.llama/Llama3.2-1B")
DEFAULT_MODEL = "smollm2"


def find_model(source: str | os.PathLike[str] | None = None, progress: Progress = silent) -> Path:
    """The path that names a model; `recognize` finds which model is there.

    source: a path; a name that `llama-scratch pull` takes (smollm2, Meta's Llama3.2-1B, or OWNER/REPO[@REVISION],
    for which an existing path goes first); or a remote directory (gs://, az://), whose files are brought here. None:
    `$LLAMA_SCRATCH_MODEL_DIR`, then the usual places of Llama 3.2 1B, then the open model. Raises
    `ModelNotFoundError` for a model that was not fetched yet; `pull` mends that.
    """
    source = _source_or_default(source)
    name = os.fspath(source)
    if address := remote_address(name):
        return local_copy(address, progress)
    if open_model := OPEN_MODELS.get(name):
        if not _is_fetched(open_model):
            raise _not_here(f"The model {name}", name)
        return open_model.path
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~ without a home
        raise ModelNotFoundError(f"{source} cannot be resolved: {error}; name the directory in full.") from error
    if not isinstance(source, str) or os.path.exists(path):
        return path
    if name == path.name and _is_there(fetched := os.path.join(CHECKPOINTS, name)):
        return Path(fetched).expanduser()
    if repository := Repository.named(name):
        if fetched_path := repository.path:
            return fetched_path
        if not name.endswith(".gguf"):
            raise _not_here(f"There is no directory {sanitize(name, 100)}, and the model of that name", name)
    return path


def _not_here(what: str, name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{what} is not on this machine yet; run 'llama-scratch pull {sanitize(name)}' to fetch it."
    )


def _source_or_default(source: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if source is None:
        return os.environ.get(ENVIRONMENT) or next(filter(_is_there, USUAL_PLACES), DEFAULT_MODEL)
    if not os.fspath(source):
        raise UsageError("The model's name is empty, expected a directory, a file or a name such as smollm2.")
    return source


def _is_fetched(model: OpenModel) -> bool:
    """Whether an open model is on this machine. Raises `LlamaScratchError` if its folder cannot be read."""
    with reading(model.path):
        return model.path.is_file()


def _is_there(place: str) -> bool:
    try:
        return Path(place).expanduser().is_dir()
    except (RuntimeError, OSError):  # no home, or one that must not be looked into
        return False


def missing_open_model(source: str | os.PathLike[str] | None) -> str | None:
    """The name of the open model that `find_model(source)` would refuse because it was not fetched yet."""
    model = OPEN_MODELS.get(os.fspath(_source_or_default(source)))
    return model.name if model and not _is_fetched(model) else None
