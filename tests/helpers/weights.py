"""Random weights in each file format that the kernels multiply without conversion."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from torch import Tensor

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, as_tensor
from llama_scratch.system.progress import silent
from tests.helpers import gguf_reference

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMS = (*FLOATS, *gguf_reference.KINDS)
# The largest value of a block in multiples of its scale.
_LARGEST = {"Q8_0": 128, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}
_LARGEST |= {"Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32}


def columns_per_block(form: str) -> int:
    return 1 if form in FLOATS else gguf_reference.KINDS[form].weights


@cache
def weight(form: str, out: int, columns: int, seed: int = 0) -> Weight:
    """A random weight (out, in), scaled by 1/√in. Cached, so do not modify it.

    Args:
        form: A float dtype or a type of block.
        out: Number of rows.
        columns: Number of columns.
        seed: Random seed.
    """
    if form in FLOATS:
        generator = torch.Generator().manual_seed(seed)
        numbers: Tensor = torch.randn(out, columns, generator=generator) / columns**0.5
        return numbers.to(FLOATS[form])
    spread = 3 / (_LARGEST[form] * columns**0.5)
    data = gguf_reference.random_blocks(form, out, columns, seed=str(seed), spread=spread)
    return quantized(form, torch.frombuffer(bytearray(data), dtype=torch.uint8).view(out, -1))


def quantized(form: str, blocks: Tensor) -> GGUFBlockWeight:
    """Create a weight from blocks (out, bytes per row) that gguf dequantizes."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[Quant[form]]

    def dequantize(start: int, stop: int) -> Tensor:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks[start:stop].numpy(), Quant[form])
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    return GGUFBlockWeight((len(blocks), blocks.shape[1] // n_bytes * size), blocks, form, dequantize)


def load(path: Path) -> dict[str, Tensor]:
    return {name: as_tensor(weight) for name, weight in open_checkpoint(path).load(silent).items()}


def same(a: Mapping[str, Weight], b: Mapping[str, Weight]) -> bool:
    """Whether two sets of weights are bitwise equal."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(as_tensor(a[k]), as_tensor(b[k])) for k in a
    )
