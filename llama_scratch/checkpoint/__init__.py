"""A model directory or file → a validated shape, its tokenizer and its weights. One module a format."""

from __future__ import annotations

from pathlib import Path

from llama_scratch.checkpoint.base import EMBEDDING, OUTPUT, Checkpoint, is_tied, reading
from llama_scratch.errors import CheckpointError, ModelNotFoundError, printable

__all__ = ["EMBEDDING", "OUTPUT", "Checkpoint", "is_tied", "open_checkpoint"]


def open_checkpoint(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a Meta or Hugging Face directory or a .gguf file; reads all but the weights and imports no torch.

    tokenizer: a tokenizer.model elsewhere. Raises `ModelNotFoundError` and `CheckpointError`.
    """
    # Each format's module is imported where it is needed, so that starting up reads only one.
    with reading(path):
        if path.is_dir():
            return _open_directory(path, tokenizer)
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise CheckpointError(f"{path} is a file, expected a directory with Meta's files or a .gguf file.")
            from llama_scratch.checkpoint.gguf import open_gguf

            return open_gguf(path, tokenizer)
    raise ModelNotFoundError(
        f"There is no model at {printable(path, 200)}; name an existing directory, "
        "or run 'llama-scratch pull smollm2' for an open one."
    )


def _open_directory(path: Path, tokenizer: str | None) -> Checkpoint:
    """What lies at the top decides; Hugging Face's repositories of Meta's models hold Meta's own files in original/."""
    from llama_scratch.checkpoint.meta import PARAMS, open_meta

    if not (path / PARAMS).exists():
        if (path / "config.json").exists():
            from llama_scratch.checkpoint.huggingface import open_huggingface

            return open_huggingface(path, tokenizer)
        if (path / "original" / PARAMS).exists():
            path = path / "original"
    return open_meta(path, tokenizer)
