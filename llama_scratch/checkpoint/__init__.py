"""Files of a model on disk → a validated shape, its tokenizer and its weights. One module per format."""

from __future__ import annotations

from pathlib import Path

from llama_scratch.checkpoint.base import Checkpoint, reading
from llama_scratch.checkpoint.recognize import recognize

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a model: read everything except the weights, without importing torch.

    Args:
        path: Whatever `recognize` finds a model by: a directory, a .gguf file, or one of a model's files.
        tokenizer: A tokenizer.model elsewhere.

    Raises:
        ModelNotFoundError: If there is no model, or one of its files is missing.
        CheckpointError: If a file is damaged, or the model is of a kind that is not supported.
    """
    format, path = recognize(path)
    # Each format's module is imported where it is needed, so that starting up reads only one.
    with reading(path):
        if format == "gguf":
            from llama_scratch.checkpoint.gguf.reader import open_gguf

            return open_gguf(path, tokenizer)
        if format == "huggingface":
            from llama_scratch.checkpoint.huggingface.reader import open_huggingface

            return open_huggingface(path, tokenizer)
        from llama_scratch.checkpoint.meta.reader import open_meta

        return open_meta(path, tokenizer)
