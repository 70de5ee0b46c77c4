"""The `Checkpoint` that all formats share: dimensions, tokenizer and lazy weights.

Weights have Meta's names in every format. To add a format:

1. Write a package beside `gguf/` whose `reader` returns a `Checkpoint`.
2. Add its files to `recognize` and its reader to `open_checkpoint`.
3. To write the format too, add its writer to `FORMATS` in `convert`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.chat_format import ChatFormat
from llama_scratch.checkpoint.extras import Extras
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs
from llama_scratch.errors import (
    CheckpointError,
    LlamaScratchError,
    ModelNotFoundError,
    UnsupportedError,
    sanitize,
)
from llama_scratch.system.mapped_files import MappedFiles
from llama_scratch.system.memory import does_not_fit, is_memory_error
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama_scratch.precision.lazy_weight import Weight

# The path does not exist: no such file, a parent that is a file, a name that is too long, a loop of symbolic links.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
# Suffix of a weight file → the file that defines the shapes of its weights.
_DESCRIBED_BY = {".pth": "params.json", ".safetensors": "config.json", ".json": "config.json"}


@dataclass(frozen=True)
class WeightStorage:
    """How a file stores its weights.

    Args:
        types: Type → number of tensors.
        tied: Whether the output projection is the embedding matrix.
        dtype: Dtype of the embedding matrix as `Checkpoint.load` returns it.
    """

    types: dict[str, int]
    tied: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, with its small files read and checked.

    Args:
        name: Name of the model.
        format: "meta", "huggingface" or "gguf".
        path: The weight file, or the first one if there are several.
        args: Dimensions of the network.
        tokenizer: The tokenizer.
        load: Reads and checks the weights, and returns them under Meta's names.
        storage: Returns how the weights are stored.
        chat: The model's chat format; None for a base model.
        files: All weight files.
        license: The license that the files state.
        warnings: Warnings for the user: files contradict each other, or a missing value was guessed.
        extras: Facts that only conversion needs.
        mapped: The weight files as they were when the checkpoint was opened.
    """

    name: str
    format: str
    path: Path
    args: ModelArgs
    tokenizer: Tokenizer
    load: Callable[[Progress], Mapping[str, Weight]]
    storage: Callable[[Progress], WeightStorage]
    chat: ChatFormat | None = None
    files: tuple[Path, ...] = ()
    license: str | None = None
    warnings: tuple[str, ...] = ()
    extras: Extras = field(default_factory=Extras)
    mapped: MappedFiles = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokenizer.n_vocab != self.args.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {self.tokenizer.n_vocab} tokens, but the model's embedding has "
                f"{self.args.vocab_size} rows. Use the tokenizer that came with the model."
            )
        object.__setattr__(self, "mapped", MappedFiles(self.files))

    def fingerprint(self, progress: Progress) -> str:
        """Return the SHA-256 of all weight files, concatenated in order of their names.

        For a model in one file, this is the checksum of that file. See `MappedFiles.sha256`.
        """
        return self.mapped.sha256(progress)


def name_of(path: Path) -> str:
    """Return a model's name: for a GGUF file, its name without quantization type and shard number; otherwise the
    directory's."""
    if path.suffix.lower() == ".gguf":
        # "SmolLM2-135M-Instruct.Q4_1-00001-of-00003" → "SmolLM2-135M-Instruct"
        ending = r"([.-](I?Q\d\w*|B?F16|F32))?(-\d{5}-of-\d{5})?$"
        return re.sub(ending, "", path.stem, count=1, flags=re.IGNORECASE)
    path = path.resolve()
    directory = path.parent if path.name == "original" else path
    if directory.parent.name == "snapshots":  # Hugging Face cache: models--OWNER--REPO/snapshots/COMMIT
        directory = directory.parent.parent
    return directory.name.rpartition("--")[2] or "Llama"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an operating system error into a message that names the file.

    Args:
        path: The file to name if the error does not name one.

    Raises:
        ModelNotFoundError: If the file does not exist, or was removed after it was found.
        OutOfMemoryError: If the file cannot be mapped into memory.
        LlamaScratchError: If the file cannot be read for another reason.
    """
    try:
        yield
    except OSError as error:
        if is_memory_error(error):
            raise does_not_fit(sanitize(path, 200), error) from error
        name = sanitize(error.filename or path, 200)
        # safetensors raises FileNotFoundError without an errno.
        absent = error.errno in _ABSENT or isinstance(error, FileNotFoundError)
        kind = ModelNotFoundError if absent else LlamaScratchError
        raise kind(
            f"{name} cannot be read: {error.strerror or error}. Check that it exists and that you may read it."
        ) from error


def check_shapes(
    file_shapes: Mapping[str, tuple[int, ...]], args: ModelArgs, path: Path, names: Mapping[str, str] | None = None
) -> None:
    """Check the names and shapes of the weights.

    Only the output projection may be missing.

    Args:
        file_shapes: Name in the file → shape.
        args: The expected dimensions of the network.
        path: The file to name in errors.
        names: Name in the file → Meta's name, if they differ.

    Raises:
        UnsupportedError: If the linear layers have biases.
        CheckpointError: If a weight is missing, is unknown or has another shape. The message names the first one.
    """
    by = _DESCRIBED_BY.get(path.suffix, "its header")
    metas = args.weight_shapes()
    names = names or dict(zip(metas, metas, strict=True))
    shapes = {name: metas[meta] for name, meta in names.items()}
    missing = [name for name in shapes if name not in file_shapes and names[name] != OUTPUT]
    unknown = [name for name in file_shapes if name not in shapes]
    if missing and not unknown:
        raise CheckpointError(
            f"{path} lacks {_some(missing)} of the {len(shapes)} weights in {by}. Fetch the model again."
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(missing)} and holds {_some(unknown)}, unlike the {len(shapes)} weights in {by}. "
            "Check that weights and configuration belong to the same model."
        )
    if unknown and all(name.endswith(".bias") for name in unknown):
        raise UnsupportedError(
            f"{path} holds {_some(unknown)}, but linear layers with a bias are not supported. "
            "Use a model without biases."
        )
    if unknown:
        raise CheckpointError(
            f"{path} holds {_some(unknown)}, but a Llama with these dimensions has no such weight. "
            "Check that weights and configuration belong to the same model."
        )
    for name, shape in file_shapes.items():
        if shape != shapes[name]:
            raise CheckpointError(
                f"{path}: {name} has the shape {shape}, expected {shapes[name]} as in {by}. "
                "Check that weights and configuration belong to the same model."
            )


def tie(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Tie the output to the embedding if it is missing, or if both are the same view of one storage."""
    from llama_scratch.precision.lazy_weight import LazyWeight

    embedding = weights[EMBEDDING]
    output = weights.get(OUTPUT, embedding)
    if isinstance(output, LazyWeight) or isinstance(embedding, LazyWeight):
        return {**weights, OUTPUT: output}
    return {**weights, OUTPUT: embedding if same_view(output, embedding) else output}


def same_view(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of one storage.

    Args:
        a: A tensor.
        b: Another tensor.
    """
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _some(names: list[str]) -> str:
    first = f"'{sanitize(names[0])}'"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more weights"
