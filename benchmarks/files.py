"""Model files for the other engines: GGUF, Hugging Face and CTranslate2.

All files contain the same weights, so that all engines compute the same answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import quiet_llama_cpp
from llama_scratch.checkpoint import Checkpoint, open_checkpoint
from llama_scratch.checkpoint.gguf import writer
from llama_scratch.checkpoint.huggingface import writer as write_huggingface
from llama_scratch.precision.lazy_weight import Weight, as_tensor
from llama_scratch.system.progress import silent


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Create a file or directory atomically, unless it exists.

    Args:
        path: The path.
        make: Writes to the path that it is given.

    Returns:
        `path`.
    """
    if not path.exists():
        unfinished = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"Writing {path.name}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def matrices_in(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load the weights with all matrices in one dtype. A tied output stays tied.

    Args:
        checkpoint: The model.
        dtype: Dtype of the matrices.
    """
    made: dict[int, Tensor] = {}

    def converted(weight: Weight) -> Tensor:
        if id(weight) not in made:
            made[id(weight)] = as_tensor(weight, dtype if len(weight.shape) == 2 else weight.dtype)
        return made[id(weight)]

    return {name: converted(weight) for name, weight in checkpoint.load(silent).items()}


# --- Meta -------------------------------------------------------------------------------------

# Matrix → the axis along which it is split. The embedding is split by columns, as in Meta's published shards.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


def make_shards(source: Path, target: Path, count: int) -> None:
    """Split a Meta directory with one shard into `count` shards.

    Args:
        source: The directory.
        target: The new directory.
        count: Number of shards.
    """
    target.mkdir()
    for name in ("params.json", "tokenizer.model"):
        shutil.copyfile(source / name, target / name)
    weights = {name: as_tensor(weight) for name, weight in open_checkpoint(source).load(silent).items()}
    for shard in range(count):
        parts = {}
        for name, weight in weights.items():
            axis = _AXES.get(name.split(".")[-2])
            parts[name] = weight if axis is None else weight.chunk(count, dim=axis)[shard].clone()
        torch.save(parts, target / f"consolidated.{shard:02}.pth")


# --- GGUF -------------------------------------------------------------------------------------


def make_gguf(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a model as a GGUF file.

    Args:
        source: The model.
        target: The file.
        dtype: Dtype of the matrices.
    """
    checkpoint = open_checkpoint(source)
    writer.write_gguf(checkpoint, matrices_in(checkpoint, dtype), target, silent)


def quantize_gguf(source: Path, target: Path, kind: str, *, pure: bool = False) -> None:
    """Quantize a GGUF file with llama.cpp.

    Args:
        source: The file.
        target: The quantized file.
        kind: llama.cpp's name of the type, such as Q8_0 or Q4_K_M.
        pure: Whether all matrices, including the output, get this type. A matrix whose rows are not a multiple of the
            block size still gets another type.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = pure
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quiet_llama_cpp()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}. See its message above.")


# --- Hugging Face and CTranslate2 -------------------------------------------------------------


def make_huggingface(source: Path, target: Path) -> None:
    """Write a model as a Hugging Face directory in bfloat16.

    Args:
        source: The model.
        target: The new directory.
    """
    checkpoint = open_checkpoint(source)
    write_huggingface.write_huggingface(checkpoint, matrices_in(checkpoint, torch.bfloat16), target, silent)


class _IdsAsTokens:
    """A tokenizer for CTranslate2's converter. The text of each token is its id."""

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab
        self.bos_token, self.eos_token, self.unk_token = "0", "1", "2"

    def get_vocab(self) -> dict[str, int]:
        return {str(id): id for id in range(self.n_vocab)}


def make_ctranslate2(huggingface: Path, target: Path, quantization: str = "int8") -> None:
    """Convert a Hugging Face directory to CTranslate2's format.

    The text of each token is its id.

    Args:
        huggingface: The directory.
        target: The new directory.
        quantization: CTranslate2's name of the type.
    """
    from ctranslate2.converters import TransformersConverter

    n_vocab = json.loads((huggingface / "config.json").read_text())["vocab_size"]

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> _IdsAsTokens:
            return _IdsAsTokens(n_vocab)

    Converter(str(huggingface)).convert(str(target), quantization=quantization)
