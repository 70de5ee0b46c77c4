"""Convert models between formats. Weights and tokens stay the same.

If the target format cannot represent the network or the tokenizer, the conversion is rejected. Other losses, such as
stop tokens, chat format, license and sampling defaults, are reported as notes. Quantized GGUF weights become float32
with exactly the same values.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.byte_level_bpe import template_of
from llama_scratch.checkpoint.checksums import write_checksums
from llama_scratch.checkpoint.extras import Extras
from llama_scratch.checkpoint.gguf.reader import SAMPLING
from llama_scratch.checkpoint.gguf.writer import write_gguf
from llama_scratch.checkpoint.huggingface.writer import write_huggingface
from llama_scratch.checkpoint.meta.writer import write_meta
from llama_scratch.checkpoint.recognize import recognize
from llama_scratch.config import EMBEDDING, ModelArgs
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError, sanitize
from llama_scratch.system.atomic_files import temporary_folder
from llama_scratch.system.mapped_files import MappedFiles
from llama_scratch.system.progress import Progress, silent
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

_Write = Callable[[Checkpoint, Mapping[str, "Weight"], Path, Progress], None]
FORMATS: dict[str, _Write] = {"meta": write_meta, "hf": write_huggingface, "gguf": write_gguf}
# License files, which must be distributed with every copy of a model.
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# Upper bound of the size of the tokenizer and the metadata, in bytes.
_SMALL_FILES_BYTES = 50_000_000
# Keys of GGUF metadata with an equivalent in every other format.
_OWN_METADATA = {
    *("general.architecture", "general.type", "general.name", "general.license", "general.alignment"),
    *("general.file_type", "general.quantization_version", "general.size_label", "general.basename"),
    *("general.finetune", "tokenizer.chat_template"),
}
# Fields of generation_config.json that are not sampling parameters.
_NOT_SAMPLING = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
# Maximum number of names in a note.
_MAX_NAMED = 8


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Args:
        path: The file or directory that was written.
        format: Its format, as in `FORMATS`.
        size: Total size in bytes.
        notes: Losses and other differences, one sentence each.
    """

    path: Path
    format: str
    size: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object for the command line."""
        return {"path": str(self.path), "form": self.format, "bytes": self.size, "notes": list(self.notes)}


def convert(
    source: Path, destination: Path, to: str, progress: Progress = silent, *, tokenizer: str | None = None
) -> Converted:
    """Convert a model to another format. The result is written atomically.

    Args:
        source: The model.
        destination: A new path; for a directory, also an existing empty one.
        to: "meta" or "hf" for a directory, "gguf" for a file.
        progress: Called while reading and writing.
        tokenizer: Path of a tokenizer.model that replaces the model's own.

    Raises:
        UsageError: If the format is unknown or the destination is not usable.
        CheckpointError: If the model cannot be read, or the format cannot hold it.
        LlamaScratchError: If the result cannot be written.
    """
    if to not in FORMATS:
        raise UsageError(f"'{sanitize(to)}' is not a model format. Use one of: {', '.join(FORMATS)} (`to`).")
    source = recognize(source).path
    destination = _place(source, destination, to)
    checkpoint = _with_short_numbers(open_checkpoint(source, tokenizer))
    weights = _with_own_norms(checkpoint, checkpoint.load(progress))
    _require_space(checkpoint.name, weights, destination.parent)
    with (
        _writing(destination, checkpoint.mapped),
        temporary_folder(destination.parent, ".llama-scratch-converting-") as folder,
    ):
        # Has the destination's name from the start, because Meta's format detects chat models by the directory name.
        written = folder / destination.name
        FORMATS[to](checkpoint, weights, written, progress)
        _copy_legal(source, written)
        sums = write_checksums(written)
        notes = [*checkpoint.warnings, *_dequantized(checkpoint, weights), *_lost(checkpoint, open_checkpoint(written))]
        size = sum(map(_flushed, [written] if written.is_file() else sorted(written.iterdir())))
        checkpoint.mapped.check()
        with _beside(sums, destination) if written.is_file() else nullcontext():
            written.rename(destination)  # also over an empty directory
    return Converted(destination, to, size, tuple(notes))


# --- Destination ------------------------------------------------------------------------------


def _place(source: Path, destination: Path, to: str) -> Path:
    """Return the absolute destination after checking that it can be written."""
    try:
        source, destination = source.resolve(), destination.expanduser().resolve()
        if source.is_relative_to(destination):
            what = "is the model itself" if source == destination else "holds the model to convert"
            raise UsageError(f"{sanitize(destination, 200)} {what}. Choose another path for the result.")
        if to == "gguf":
            if destination.suffix.lower() != ".gguf":
                raise UsageError(
                    f"{sanitize(destination, 200)} is not a file name for `to=gguf`. Use a name that ends in .gguf."
                )
            free = not destination.exists()
        else:
            free = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
        if not free:
            raise UsageError(f"{sanitize(destination, 200)} already exists. Choose another path, or remove it first.")
        if not destination.parent.is_dir():
            raise ModelNotFoundError(f"The folder {sanitize(destination.parent, 200)} does not exist. Create it first.")
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a loop of links, ~ without a home
        raise UsageError(
            f"{sanitize(destination, 200)} cannot be written ({sanitize(error, 100)}). Choose another path."
        ) from error
    return destination


def _require_space(name: str, weights: Mapping[str, Weight], folder: Path) -> None:
    sizes = {id(weight): weight.numel() * weight.dtype.itemsize for weight in weights.values()}  # tied ones once
    needed, free = sum(sizes.values()) + _SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise LlamaScratchError(
            f"{sanitize(name)} needs {needed / 1e9:.1f} GB of disk space, but only {free / 1e9:.1f} GB are free in "
            f"{sanitize(folder, 200)}. Free up disk space, or choose another path."
        )


@contextmanager
def _writing(destination: Path, source: MappedFiles) -> Iterator[None]:
    """Turn a write error into a message, unless a changed source file caused it."""
    try:
        yield
    except OSError as error:
        source.check()
        raise LlamaScratchError(
            f"{sanitize(destination, 200)} cannot be written ({sanitize(error.strerror or error, 100)}). "
            "Free up disk space, or choose another path."
        ) from error


@contextmanager
def _beside(sums: Path, destination: Path) -> Iterator[None]:
    """Move the checksums into place before the file, to never leave a stale list."""
    place = destination.with_name(sums.name)
    try:
        sums.replace(place)
        yield
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def _copy_legal(source: Path, written: Path) -> None:
    """Copy the license and related files, if both models are directories."""
    if source.is_dir() and written.is_dir():
        folders = [source.parent, source] if source.name == "original" else [source]
        for file in [file for folder in folders for name in _LEGAL for file in folder.glob(name) if file.is_file()]:
            shutil.copyfile(file, written / file.name)


def _flushed(file: Path) -> int:
    """Flush a file to the disk and return its size in bytes."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    return file.stat().st_size


# --- Model ------------------------------------------------------------------------------------


def _with_short_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """Undo GGUF's float32 rounding of numbers such as 1e-5, by the shortest decimal."""
    if checkpoint.format != "gguf":
        return checkpoint
    import numpy as np

    def short(number: float) -> float:
        return float(str(np.float32(number)))

    args = checkpoint.args
    args = replace(args, norm_eps=short(args.norm_eps), rope_theta=short(args.rope_theta))
    return replace(checkpoint, args=args)


def _with_own_norms(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
    """Convert GGUF's float32 norms to the dtype of the matrices, if that is exact."""
    import torch

    from llama_scratch.precision.lazy_weight import as_tensor

    dtype = weights[EMBEDDING].dtype
    if checkpoint.format != "gguf" or dtype == torch.float32:
        return weights
    norms = {name: as_tensor(weight) for name, weight in weights.items() if len(weight.shape) == 1}
    fitting = {name: norm.to(dtype) for name, norm in norms.items() if torch.equal(norm.to(dtype).float(), norm)}
    return {**weights, **fitting}


def _dequantized(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> Iterator[str]:
    from llama_scratch.precision.lazy_weight import GGUFBlockWeight

    if any(isinstance(weight, GGUFBlockWeight) for weight in weights.values()):
        yield f"{sanitize(checkpoint.name)} was quantized. Its weights became float32 with exactly the same values."


def _lost(before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Describe the losses of a conversion, one sentence per loss.

    Raises:
        CheckpointError: If the network or the tokenizer is not equivalent.
    """
    name, old, new = sanitize(before.name), before.tokenizer, after.tokenizer
    if not _same_network(before.args, after.args) or _cut(old) != _cut(new):
        raise CheckpointError(
            f"{name} would be a different model in this format, so the result was discarded. Use another format."
        )
    if after.args.max_seq_len != before.args.max_seq_len:
        yield f"The context of {before.args.max_seq_len:,} tokens is not kept. It becomes {after.args.max_seq_len:,}."
    if new.names != old.names:
        yield "Unused special tokens have other names in this format."
    elif new.special_tokens != old.special_tokens:
        yield "In this format, special tokens in a text are matched differently."
    if new.stop_ids != old.stop_ids:
        ids = [sorted(tokenizer.stop_ids) for tokenizer in (old, new)]
        yield f"The stop tokens change from {ids[0]} to {ids[1]}."
    yield from _lost_extras(before.extras, after.extras, {new.bos_id, *new.stop_ids, new.names.get(new.unknown or "")})
    if before.license and not after.license:
        yield f"This format does not state the license ({sanitize(before.license)}). Keep it with the model."
    templates = template_of(before.chat), template_of(after.chat)
    if templates[0] != templates[1]:
        if templates[1] is None:
            yield "The chat format is not kept. Meta's format has one only if 'Instruct' is in the directory's name."
        elif templates[0] is None:
            yield "The base model becomes a chat model, because the directory's name marks it as one in Meta's format."
        else:
            yield "The chat template is replaced by Meta's own chat format."


def _cut(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Return everything that determines how plain text is tokenized."""
    return (
        *(tokenizer.ranks, tokenizer.pattern, tokenizer.merges, tokenizer.whole_pieces),
        *(tokenizer.added_tokens, tokenizer.bos_id, tokenizer.unknown),
    )


def _lost_extras(before: Extras, after: Extras, known: Collection[int | None]) -> Iterator[str]:
    """Describe the lost information that only other programs use.

    Args:
        before: Extras of the source.
        after: Extras of the result.
        known: Ids with a role in the result's tokenizer.
    """
    roles = [role for role, id in before.roles.items() if after.roles.get(role) != id and id not in known]
    if roles:
        yield f"The roles of special tokens are not kept in this format: {_listed(roles)}."
    if before.flagged - after.flagged:
        yield "This format cannot mark ordinary tokens as special, so those marks are not kept."
    settings = [name for name, value in before.generation.items() if after.generation.get(name) != value]
    if settings := [name for name in settings if name not in _NOT_SAMPLING]:
        yield f"The sampling defaults are not kept in this format: {_listed(settings)}."
    metadata = [key for key, value in before.metadata.items() if key not in _OWN_METADATA and value not in ("", [])]
    if metadata := [key for key in metadata if key not in after.metadata and key not in SAMPLING.values()]:
        yield f"Metadata of the GGUF file is not kept in this format: {_listed(metadata)}."
    templates = before.settings.get("chat_template")
    if isinstance(templates, list) and after.settings.get("chat_template") != templates:
        yield "Of several chat templates, only the default one is kept in this format."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(sanitize, names[:_MAX_NAMED])) + more


def _same_network(a: ModelArgs, b: ModelArgs) -> bool:
    """Whether two networks compute the same, except for rounding in a GGUF file.

    Args:
        a: Dimensions of a network.
        b: Dimensions of another network.
    """
    import torch

    from llama_scratch.model import rope_frequencies

    plain = [
        replace(args, norm_eps=0.0, rope_theta=0.0, rope_scaling=None, rope_divisors=None, max_seq_len=1)
        for args in (a, b)
    ]
    return (
        plain[0] == plain[1]
        and math.isclose(a.norm_eps, b.norm_eps, rel_tol=1e-6)
        and torch.allclose(rope_frequencies(a), rope_frequencies(b), rtol=1e-5, atol=0)
    )
