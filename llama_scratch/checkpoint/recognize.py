"""Find the model at a path, or report what the path contains instead.

A user can pass the directory above a model, one of its files, a folder of the Hugging Face cache, or a file name
without its extension. If exactly one complete model matches, it is used. Otherwise the error lists what was found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from llama_scratch.checkpoint.base import reading
from llama_scratch.checkpoint.fields import read_object
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, ModelNotFoundError, sanitize
from llama_scratch.system.small_files import read_start, read_text

FormatName = Literal["meta", "huggingface", "gguf"]

_MAX_ENTRIES = 1000  # of a directory
_MAX_NAMED = 5  # in a message
_EXPECTED = "a GGUF file, or a directory with Hugging Face's safetensors or Meta's files"

# model-00002-of-00003.gguf
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SAFETENSORS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_CONSOLIDATED = re.compile(r"consolidated\.\d\d\.pth")
# Files that only one format has. The path of such a file stands for its directory.
_META_FILE = re.compile(rf"params\.json|checklist\.chk|{_CONSOLIDATED.pattern}")
_HUGGINGFACE_FILE = re.compile(rf"(config|generation_config|tokenizer|tokenizer_config)\.json|{_SAFETENSORS.pattern}")
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"}

# File extension → unsupported format.
_FOREIGN = {
    ".onnx": "an ONNX model",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".npz": "MLX's older weights",
    ".pte": "an ExecuTorch model",
    ".tflite": "a TensorFlow Lite model",
    ".mlpackage": "a Core ML model",
    ".engine": "a TensorRT engine",
    ".nemo": "a NeMo archive",
    ".llamafile": "a llamafile",
}
# Weight files that do not describe the network's dimensions.
_BARE = {".bin": "PyTorch weights", ".pt": "PyTorch weights", ".pth": "PyTorch weights", ".safetensors": "weights"}
# First bytes of a file → unsupported format.
_STARTS = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"Rar!": "a rar archive",
    b"\x89HDF": "TensorFlow weights",
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), "a GGML file, the predecessor of GGUF"),
}


class FoundModel(NamedTuple):
    """A model found at a path.

    Args:
        format: The format.
        path: The model's directory or .gguf file. For a split model, its first file.
    """

    format: FormatName
    path: Path


def recognize(path: Path) -> FoundModel:
    """Find the model at a path.

    Args:
        path: A model's directory or .gguf file, one of a model's files, a directory with one .gguf file, or a folder of
            the Hugging Face cache.

    Returns:
        The format and the path to open. The files may still be damaged.

    Raises:
        ModelNotFoundError: If the path does not exist, or has no model or more than one.
        CheckpointError: If it is another kind of file, or a model in an unsupported format.
        LlamaScratchError: If the path cannot be read.
    """
    with reading(path):
        if path.is_dir():
            return _in_directory(path)
        if path.exists():
            return _from_file(path)
    raise ModelNotFoundError(
        f"There is no model at {sanitize(path, 200)}. Pass an existing file or directory, "
        "or run 'llama-scratch pull smollm2' to download an open model."
    )


# --- Directories ------------------------------------------------------------------------------


def complete_model(directory: Path, prefer: FormatName | None = None) -> FoundModel | None:
    """Find the model whose files are all in a directory or in its subfolder original/.

    Args:
        directory: An existing directory.
        prefer: The format to use if a directory has complete models in several formats.

    Returns:
        The model, or None if no model is complete or there are several .gguf files.
    """
    candidates = [
        FoundModel("meta", directory),
        FoundModel("huggingface", directory),
        FoundModel("meta", directory / "original"),
    ]
    if len(files := gguf_files(directory)) == 1:
        candidates.append(FoundModel("gguf", files[0]))
    candidates.sort(key=lambda model: model.format != prefer)
    whole = [model for model in candidates if _has_weights(model)]
    # A tokenizer can be given separately, so a missing one only breaks ties.
    return next(filter(_has_tokenizer, whole), whole[0] if whole else None)


def gguf_files(directory: Path) -> list[Path]:
    """List the .gguf files of a directory, but only the first file of a split model."""
    models: dict[str, Path] = {}
    for name in _names(directory):
        if name.lower().endswith(".gguf") and not name.startswith("."):
            split = _SPLIT.fullmatch(name)
            models.setdefault("/".join(split.groups()) if split else name, directory / name)
    return list(models.values())


def _names(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in islice(entries, _MAX_ENTRIES))


def _has(directory: Path, *names: str) -> bool:
    return all((directory / name).is_file() for name in names)


def _has_weights(model: FoundModel) -> bool:
    """Whether the files of dimensions and weights exist, judging by their names."""
    format, path = model
    if format == "meta":
        return _has(path, "params.json", "consolidated.00.pth")
    return format == "gguf" or (_has(path, "config.json") and _has_safetensors(path))


def _has_safetensors(directory: Path) -> bool:
    index = _has(directory, "model.safetensors.index.json")
    return _has(directory, "model.safetensors") or (index and any(map(_SHARD.fullmatch, _names(directory))))


def _has_tokenizer(model: FoundModel) -> bool:
    format, path = model
    return (
        format == "gguf" or _has(path, "tokenizer.model") or (format == "huggingface" and _has(path, "tokenizer.json"))
    )


def _in_directory(path: Path, prefer: FormatName | None = None) -> FoundModel:
    if model := complete_model(path, prefer):
        _reject_old_quantization(model)
        return model
    if (path / "snapshots").is_dir():
        return _in_hub_cache(path)
    if models := gguf_files(path):
        raise _several(path, models)
    names = _names(path)
    _reject_adapter(path, names)
    # The reader reports which file of an incomplete model is missing.
    pytorch = any(name.startswith("pytorch_model") for name in names)
    if any(map(_SAFETENSORS.fullmatch, names)) or (pytorch and "config.json" in names):
        return FoundModel("huggingface", path)
    if any(map(_CONSOLIDATED.fullmatch, names)):
        return FoundModel("meta", path)
    _reject_foreign(path, names, _FOREIGN)
    if any(map(_META_FILE.fullmatch, names)):
        return FoundModel("meta", path)
    if "config.json" in names:
        return FoundModel("huggingface", path)
    if "original" in names and any(map(_META_FILE.fullmatch, _names(path / "original"))):
        return FoundModel("meta", path / "original")
    if models := _models_in(path / "blobs" if {"blobs", "manifests"} <= {*names} else path):  # ollama's store
        raise _several(path, models)
    _reject_foreign(path, names, _BARE)
    raise _nothing(path, names)


def _in_hub_cache(path: Path) -> FoundModel:
    """Find the model in a models--OWNER--REPO folder: revision main, or the only one.

    Source: huggingface_hub's "Understand caching".
    """
    snapshots = path / "snapshots"
    commits = [name for name in _names(snapshots) if (snapshots / name).is_dir()]
    main = ""
    with suppress(OSError):
        main = read_text(path / "refs" / "main", 200).strip()
    if main in commits:
        return _in_directory(snapshots / main)
    if len(commits) == 1:
        return _in_directory(snapshots / commits[0])
    if commits:
        raise _several(path, [snapshots / commit for commit in commits])
    raise ModelNotFoundError(f"{sanitize(path, 200)} is a Hugging Face cache folder without a model. {REDOWNLOAD_HINT}")


def _models_in(directory: Path) -> list[Path]:
    """List the models among the entries of a directory."""
    models = []
    for name in _names(directory):
        entry = directory / name
        with suppress(OSError, CheckpointError):
            if entry.is_dir():
                if complete_model(entry) or gguf_files(entry) or (entry / "snapshots").is_dir():
                    models.append(entry)
            elif name.startswith("sha256-") and read_start(entry, 4, any_content=True) == b"GGUF":
                models.append(entry)
    return models


def _several(path: Path, models: list[Path]) -> ModelNotFoundError:
    more = len(models) - _MAX_NAMED
    names = ", ".join(sanitize(model, 200) for model in models[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
    if len(models) == 1:
        return ModelNotFoundError(f"{sanitize(path, 200)} is the directory above a model. Choose the model: {names}.")
    return ModelNotFoundError(f"{sanitize(path, 200)} holds {len(models)} models. Choose one of them: {names}.")


def _nothing(path: Path, names: list[str]) -> ModelNotFoundError:
    if not names:
        content = "is an empty directory"
    elif tokenizer := next(filter(_TOKENIZERS.__contains__, names), None):
        content = f"holds a tokenizer ({tokenizer}) without a model"
    else:
        more = "…" if len(names) > _MAX_NAMED else ""
        content = f"does not hold a model (only {', '.join(map(sanitize, names[:_MAX_NAMED]))}{more})"
    return ModelNotFoundError(f"{sanitize(path, 200)} {content}. Pass the path of {_EXPECTED}.")


# --- Files ------------------------------------------------------------------------------------


def _from_file(path: Path) -> FoundModel:
    if path.suffix.lower() == ".gguf":
        return FoundModel("gguf", path)
    start = read_start(path)
    if start.startswith(b"GGUF"):
        return FoundModel("gguf", path)
    if _META_FILE.fullmatch(path.name):
        return _in_directory(path.parent, "meta")
    if _HUGGINGFACE_FILE.fullmatch(path.name):
        return _in_directory(path.parent, "huggingface")
    if path.name in _TOKENIZERS:
        return _in_directory(path.parent)
    _reject_adapter(path.parent, [path.name])
    _reject_foreign(path, [path.name], {**_FOREIGN, **_BARE})
    kind = next((kind for magic, kind in _STARTS.items() if start.startswith(magic)), None)
    if kind is None and start[257:262] == b"ustar":
        kind = "a tar archive"
    if kind:
        advice = "Unpack it and use the model in it" if "archive" in kind else "Use a file in a supported format"
        raise CheckpointError(f"{sanitize(path, 200)} is {kind}, expected {_EXPECTED}. {advice}.")
    content = f"is not a model (it starts with {start[:8]!r})" if start else "is an empty file"
    raise CheckpointError(f"{sanitize(path, 200)} {content}. Pass the path of {_EXPECTED}.")


# --- Unsupported models -----------------------------------------------------------------------


def _reject_adapter(directory: Path, names: Iterable[str]) -> None:
    """Raise `CheckpointError` for a PEFT adapter."""
    if not any(name.startswith("adapter_") for name in names):
        return
    config = read_object(directory / "adapter_config.json")
    kind = config.get("peft_type") or "LORA"
    name = "LoRA adapter" if kind == "LORA" else f"PEFT adapter ({sanitize(kind)})"
    base = config.get("base_model_name_or_path") or config.get("model")
    of = f" for {sanitize(base, 100)}" if base else ""
    raise CheckpointError(
        f"{sanitize(directory, 200)} holds a {name}{of}, which is not a complete model. "
        "Merge it into its base model with PEFT (merge_and_unload), or use the base model."
    )


def _reject_foreign(path: Path, names: Iterable[str], kinds: dict[str, str]) -> None:
    """Raise `CheckpointError` if a file has the extension of an unsupported format."""
    for name in names:
        suffix = ".onnx" if name == "onnx" else Path(name).suffix.lower()
        if kind := kinds.get(suffix):
            content = f"is {kind}" if name == path.name else f"holds {kind} ({sanitize(name)})"
            alone = " without config.json" if suffix in _BARE else ""
            raise CheckpointError(
                f"{sanitize(path, 200)} {content}{alone}, which is not supported. Use the same model as {_EXPECTED}."
            )


def _reject_old_quantization(model: FoundModel) -> None:
    """Raise `CheckpointError` for GPTQ and AWQ models not marked in config.json."""
    for name in ("quantize_config.json", "quant_config.json"):
        if model.format == "huggingface" and _has(model.path, name):
            raise CheckpointError(
                f"{sanitize(model.path, 200)} is quantized by GPTQ or AWQ ({name}), which is not supported. "
                "Use the unquantized model (bf16, fp16 or fp32), or a GGUF file of it."
            )
