"""Find a model by its path, by its name, or in the usual places."""

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
    """Find the path of a model; `recognize` then determines its format.

    Args:
        source: One of:

            - A path.
            - A name that `llama-scratch pull` accepts: smollm2, Meta's Llama3.2-1B, or OWNER/REPO[@REVISION]. An
              existing path of the same name takes precedence, except for smollm2.
            - A remote directory (gs://, az://), which is downloaded.
            - None: `$LLAMA_SCRATCH_MODEL_DIR`, then the usual places of Llama 3.2 1B, then smollm2.
        progress: Called during a download with the stage, the bytes done and the total bytes.

    Raises:
        UsageError: If the name is empty.
        ModelNotFoundError: If the model has not been downloaded yet.
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
    except RuntimeError as error:  # ~ cannot be expanded without a home directory
        raise ModelNotFoundError(f"{source} cannot be resolved: {error}. Use the full path.") from error
    if not isinstance(source, str) or os.path.exists(path):
        return path
    if name == path.name and _is_there(fetched := os.path.join(CHECKPOINTS, name)):
        return Path(fetched).expanduser()
    if repository := Repository.named(name):
        if fetched_path := repository.path:
            return fetched_path
        if not name.endswith(".gguf"):
            raise _not_here(f"{sanitize(name, 100)} is not a directory, and the model with that name", name)
    return path


def _not_here(what: str, name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{what} has not been downloaded yet. Run `llama-scratch pull {sanitize(name)}`.")


def _source_or_default(source: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if source is None:
        return os.environ.get(ENVIRONMENT) or next(filter(_is_there, USUAL_PLACES), DEFAULT_MODEL)
    if not os.fspath(source):
        raise UsageError("The model's name is empty. Pass a directory, a file or a model such as smollm2.")
    return source


def _is_fetched(model: OpenModel) -> bool:
    """Whether an open model has been downloaded.

    Raises:
        LlamaScratchError: If its folder cannot be read.
    """
    with reading(model.path):
        return model.path.is_file()


def _is_there(place: str) -> bool:
    try:
        return Path(place).expanduser().is_dir()
    except (RuntimeError, OSError):  # no home directory, or no permission to read the place
        return False


def missing_open_model(source: str | os.PathLike[str] | None) -> str | None:
    """The name of the open model that `find_model` needs, if it is not downloaded yet."""
    model = OPEN_MODELS.get(os.fspath(_source_or_default(source)))
    return model.name if model and not _is_fetched(model) else None
