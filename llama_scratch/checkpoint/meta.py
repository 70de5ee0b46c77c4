"""Meta's model directory: `params.json`, `tokenizer.model` and `consolidated.00.pth`."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.checkpoint.base import Checkpoint, Stored, checked, is_tied
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError
from llama_scratch.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PARAMS, TOKENIZER, WEIGHTS = "params.json", "tokenizer.model", "consolidated.00.pth"
_AGAIN = "Fetch that file again from where the model came from."
# Older checkpoints carry the rotation table, which is computed here.
_IGNORED = {"rope.freqs"}
# The description of a checkpoint's tensors takes some hundred bytes a tensor.
_MAX_PICKLE = 16 << 20
_MAX_PARAMS = 1 << 20


def open_meta(directory: Path, tokenizer: str | None = None) -> Checkpoint:
    """Read and check the small files; `tokenizer` is a tokenizer.model elsewhere.

    Raises `ModelNotFoundError` where a file is missing and `CheckpointError` where one is wrong.
    """
    required = [PARAMS, WEIGHTS] if tokenizer else [PARAMS, TOKENIZER, WEIGHTS]
    for file in required:
        if not (directory / file).is_file():
            raise ModelNotFoundError(_missing(directory, file))
    if (directory / "consolidated.01.pth").exists():
        raise CheckpointError(
            f"{directory} holds a model in several shards (consolidated.01.pth), expected {WEIGHTS} alone; "
            "use a size of up to 8B."
        )
    args = ModelArgs.from_params_json(_read_params(directory / PARAMS), str(directory / PARAMS))
    resolved = directory.resolve()
    name = resolved.parent.name if resolved.name == "original" else resolved.name
    path = directory / WEIGHTS
    return Checkpoint(
        name=name or "Llama",
        format="meta",
        path=path,
        args=args,
        tokenizer=Tokenizer.from_meta(tokenizer or str(directory / TOKENIZER)),
        load=lambda progress: checked(load_pth(path, progress), args, path),
        inspect=lambda progress: _stored(checked(load_pth(path, progress), args, path)),
    )


def load_pth(path: Path, progress: Progress) -> dict[str, Tensor]:
    """Map the tensors of a zip-format `torch.save` file: nothing is copied and none of its code is run.

    Every byte is compared with the file's own checksums first, because the mapping skips them. That
    reads the file once, from front to back, which is also the fastest way to bring it into memory.
    """
    _check_archive(path, progress)
    import torch

    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a hostile file
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} wants to run the code {match[1]!r} when it is loaded, expected tensors and nothing else; "
                "do not use this file."
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as tensors ({str(error).splitlines()[0][:100]}). {_AGAIN}"
        ) from error
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}, expected a dictionary of tensors. {_AGAIN}")
    for name, tensor in weights.items():
        _check_tensor(path, name, tensor)
    return {name: tensor for name, tensor in weights.items() if name not in _IGNORED}


def _stored(weights: dict[str, Tensor]) -> Stored:
    return Stored(
        types=dict(Counter(str(weight.dtype).removeprefix("torch.") for weight in weights.values())),
        tied=is_tied(weights),
        dtype=weights["tok_embeddings.weight"].dtype,
    )


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{path} holds a {type(tensor).__name__} under {str(name)[:60]!r}, expected tensors under names. {_AGAIN}"
        )
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    whole = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
    if tensor.dtype not in kinds or not whole:
        raise CheckpointError(
            f"{path}: {name!r} is a {tensor.dtype} tensor, expected bfloat16, float16 or float32 in one piece; "
            "quantised checkpoints are not supported."
        )


def _check_archive(path: Path, progress: Progress) -> None:
    """Refuse whatever is not an undamaged archive of stored records, as `torch.save` writes them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise CheckpointError(f"{path} is a web page, expected weights; the download was refused. {_AGAIN}")
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} begins with {start[:8]!r}, expected a zip-format torch.save file. {_AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} has {size:,} bytes without the table of contents that belongs at its end, "
            f"so it was cut short or damaged. {_AGAIN}"
        ) from error
    names = [record.filename for record in records]
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(set(names)) != len(names) or len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote. {_AGAIN}")
    total = sum(record.file_size for record in records)
    if any(r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1 for r in records) or total > size:
        raise CheckpointError(f"{path} holds compressed records, expected the plain ones of torch.save. {_AGAIN}")

    done = 0
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            largest_first = sorted(records, key=lambda record: -record.file_size)
            for record_size in pool.map(lambda record: _check_record(path, record), largest_first):
                done += record_size
                progress("checking", done, total)
        finally:
            pool.shutdown(cancel_futures=True)


def _check_record(path: Path, record: zipfile.ZipInfo) -> int:
    """Read one record to its end, where zipfile compares its CRC-32; the checksum runs without Python's lock."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(record) as file:
            while file.read(1 << 18):
                pass
    except (zipfile.BadZipFile, EOFError, ValueError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{path}: the record {record.filename!r} does not match its checksum, so the file is damaged. {_AGAIN}"
        ) from error
    return record.file_size


def _read_params(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_PARAMS:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, expected a few hundred. {_AGAIN}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text, expected JSON. {_AGAIN}") from error
    except OSError as error:
        raise LlamaScratchError(f"{path} cannot be read: {error.strerror}.") from error


def _missing(directory: Path, file: str) -> str:
    advice = f"name the directory that holds {PARAMS}, {TOKENIZER} and {WEIGHTS}."
    if (directory / "original" / file).is_file():
        advice = f"use --model-dir {directory / 'original'}."
    elif file == TOKENIZER:
        advice = "copy it there from the model's download, or name it with --tokenizer."
    return f"There is no {file} in {directory}; {advice}"
