"""Writes Meta's form: `params.json`, `tokenizer.model`, `consolidated.00.pth`, and `checklist.chk` with their MD5s."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.meta.params import PARAMS, format_params
from llama_scratch.checkpoint.meta.reader import TOKENIZER, WEIGHTS
from llama_scratch.config import EMBEDDING, OUTPUT, is_tied
from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import parse_tokenizer_model

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

CHECKLIST = "checklist.chk"
_RESERVED = "<|reserved_special_token_"


def write_meta(checkpoint: Checkpoint, weights: Mapping[str, Weight], directory: Path, progress: Progress) -> None:
    """Write a model into a new directory. Raises `CheckpointError` for one that Meta's form has no place for."""
    files = {PARAMS: format_params(checkpoint.args, checkpoint.name).encode(), TOKENIZER: _tokenizer_model(checkpoint)}
    directory.mkdir()
    sums = {}
    for name, content in files.items():
        (directory / name).write_bytes(content)
        sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    sums[WEIGHTS] = _write_weights(weights, directory / WEIGHTS, progress)
    (directory / CHECKLIST).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


# --- tokenizer.model --------------------------------------------------------------------------


def _tokenizer_model(checkpoint: Checkpoint) -> bytes:
    """`base64 rank` a line. The form says no more: its pattern and its special tokens are Llama 3's."""
    own = checkpoint.tokenizer
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(own.ranks.items(), key=lambda x: x[1])]
    content = b"".join(lines)
    try:
        read = parse_tokenizer_model(content)
    except CheckpointError:
        read = None
    if (
        read is None
        or (own.ranks, own.pattern, own.bos_id) != (read.ranks, read.pattern, read.bos_id)
        or own.added_tokens
        or own.merges
        or not _same_layout(own.names, read.names)
    ):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} has another tokenizer than Llama 3's, which is the only one that Meta's "
            "form holds; --to hf and --to gguf hold any."
        )
    return content


def _same_layout(own: Mapping[str, int], llama3: Mapping[str, int]) -> bool:
    """Whether the special tokens are Llama 3's: each release gave names to some that were reserved before."""
    names = {id: name for name, id in own.items()}
    return len(own) == len(llama3) and all(
        names.get(id) == name or _RESERVED in names.get(id, "") or (_RESERVED in name and id in names)
        for name, id in llama3.items()
    )


# --- consolidated.00.pth ----------------------------------------------------------------------


def _write_weights(weights: Mapping[str, Weight], path: Path, progress: Progress) -> str:
    """torch.save, in which a tied output shares the embedding's storage; returns the file's MD5."""
    import torch

    from llama_scratch.precision.lazy_weight import LazyWeight, as_tensor

    # torch.save takes them all at once; those that are mapped need no memory.
    unmapped = [w.numel() * w.dtype.itemsize for w in weights.values() if isinstance(w, LazyWeight)]
    require_memory(sum(unmapped), f"Writing {path.name}")
    tensors = {name: as_tensor(w).contiguous() for name, w in weights.items() if name != OUTPUT or not is_tied(weights)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if is_tied(weights):
        tensors[OUTPUT] = tensors[EMBEDDING]
    with path.open("wb") as file:
        summed = _Summed(file, lambda done: progress("writing", min(done, total), total))
        try:
            torch.save(tensors, summed)  # type: ignore[arg-type]  # it writes and flushes
        except RuntimeError as error:  # torch's own, about the archive that it could not end
            raise summed.failed or error from error
    return summed.md5.hexdigest()


class _Summed:
    """A file that is written from its beginning to its end, with the MD5 of what was written.

    failed: what ended it, an interrupt or the system's refusal.
    """

    def __init__(self, file: Any, report: Any):
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._file = file
        self._report = report
        self._done = 0
        self.failed: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            self.md5.update(data)
            self._done += len(data)
            self._report(self._done)
        except BaseException as error:
            self.failed = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()
