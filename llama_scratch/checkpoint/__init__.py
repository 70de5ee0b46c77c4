"""Model files: reading the three formats, verification and conversion.

`recognize` finds the model at a path. One package per format (`meta`, `huggingface`, `gguf`) opens it as a
`base.Checkpoint`; `fields` and `byte_level_bpe` are shared by these packages. `describe`, `verify` (with `checksums`
and `findings`) and `convert` work with any `Checkpoint`. Read `base` first, then the `reader` of one format.
"""

from __future__ import annotations

from pathlib import Path

from llama_scratch.checkpoint.base import Checkpoint, reading
from llama_scratch.checkpoint.recognize import recognize

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a model: read everything except the weights, without importing torch.

    Args:
        path: Any path that `recognize` accepts: a directory, a .gguf file, or one of a model's files.
        tokenizer: Path of a tokenizer.model that replaces the model's own tokenizer.

    Raises:
        ModelNotFoundError: If there is no model, or one of its files is missing.
        CheckpointError: If a file is damaged or the model is not supported.
    """
    format, path = recognize(path)
    # Imported on demand: only one format's module is loaded at startup.
    with reading(path):
        if format == "gguf":
            from llama_scratch.checkpoint.gguf.reader import open_gguf

            return open_gguf(path, tokenizer)
        if format == "huggingface":
            from llama_scratch.checkpoint.huggingface.reader import open_huggingface

            return open_huggingface(path, tokenizer)
        from llama_scratch.checkpoint.meta.reader import open_meta

        return open_meta(path, tokenizer)
