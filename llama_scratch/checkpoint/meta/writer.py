"""Writer of Meta's format: `params.json`, `tokenizer.model` and the weights."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.meta.params import PARAMS, format_params
from llama_scratch.checkpoint.meta.reader import FIRST_SHARD, TOKENIZER
from llama_scratch.config import EMBEDDING, OUTPUT, is_tied
from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import parse_tokenizer_model

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

_RESERVED = "<|reserved_special_token_"


def write_meta(checkpoint: Checkpoint, weights: Mapping[str, Weight], directory: Path, progress: Progress) -> None:
    """Write a model into a new directory in Meta's format.

    Args:
        checkpoint: The model.
        weights: Its weights, under Meta's names.
        directory: The new directory.
        progress: Called with the number of bytes written.

    Raises:
        CheckpointError: If Meta's format cannot hold the model.
    """
    files = {
        PARAMS: format_params(checkpoint.args, checkpoint.name).encode(),
        TOKENIZER: _tokenizer_model(checkpoint),
    }
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    _write_weights(weights, directory / FIRST_SHARD, progress)


# --- tokenizer.model --------------------------------------------------------------------------


def _tokenizer_model(checkpoint: Checkpoint) -> bytes:
    """Format tokenizer.model: `base64 rank` per line.

    The file has no pattern and no special tokens, so they must be Llama 3's.
    """
    tokenizer = checkpoint.tokenizer
    by_rank = sorted(tokenizer.ranks.items(), key=lambda entry: entry[1])
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    try:
        llama3 = parse_tokenizer_model(content)
    except CheckpointError:
        llama3 = None
    if (
        llama3 is None
        or (tokenizer.ranks, tokenizer.pattern, tokenizer.bos_id) != (llama3.ranks, llama3.pattern, llama3.bos_id)
        or tokenizer.added_tokens
        or tokenizer.merges
        or not _same_layout(tokenizer.names, llama3.names)
    ):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} does not have Llama 3's tokenizer, the only one that Meta's format can "
            "hold. Use `to=hf` or `to=gguf`."
        )
    return content


def _same_layout(ids: Mapping[str, int], llama3: Mapping[str, int]) -> bool:
    """Whether the special tokens are Llama 3's, apart from the names of reserved ones.

    Each release of Llama 3 renamed some of the reserved tokens.

    Args:
        ids: Name → id of the special tokens.
        llama3: Name → id of Llama 3's special tokens.
    """
    names = {id: name for name, id in ids.items()}
    return len(ids) == len(llama3) and all(
        names.get(id) == name or _RESERVED in names.get(id, "") or (_RESERVED in name and id in names)
        for name, id in llama3.items()
    )


# --- consolidated.00.pth ----------------------------------------------------------------------


def _write_weights(weights: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write the weights with torch.save. A tied output shares the embedding's storage."""
    import torch

    from llama_scratch.precision.lazy_weight import LazyWeight, as_tensor

    # torch.save needs all weights at once. Mapped weights do not take memory.
    unmapped = [w.numel() * w.dtype.itemsize for w in weights.values() if isinstance(w, LazyWeight)]
    require_memory(sum(unmapped), f"Writing {path.name}")
    tensors = {name: as_tensor(w).contiguous() for name, w in weights.items() if name != OUTPUT or not is_tied(weights)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if is_tied(weights):
        tensors[OUTPUT] = tensors[EMBEDDING]
    with path.open("wb") as file:
        reporting = _ReportingFile(file, lambda done: progress("writing", min(done, total), total))
        try:
            torch.save(tensors, reporting)  # type: ignore[arg-type]  # it writes and flushes
        except RuntimeError as error:  # torch could not finish the archive
            raise reporting.error or error from error


class _ReportingFile:
    """A sequentially written file that reports the number of bytes written so far.

    Attributes:
        error: The exception that ended the writing: an interrupt or an operating system error.
    """

    def __init__(self, file: BinaryIO, report: Callable[[int], None]):
        self.error: BaseException | None = None
        self._file = file
        self._report = report
        self._done = 0

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            self._done += len(data)
            self._report(self._done)
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()
