"""The dtypes that a precision's name stands for: of weights in memory, of a file's weights, and of activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama_scratch.config import EMBEDDING
from llama_scratch.errors import UsageError
from llama_scratch.model import Transformer
from llama_scratch.precision import ACTIVATIONS, computes_bf16
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, kernel_operands

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the weights in memory, for the precisions that do not quantize."""

BITS = {"int8": 8, "int4": 4}
"""Bits per weight, for the precisions that quantize."""


def file_type(weights: Mapping[str, Weight]) -> torch.dtype | None:
    """The dtype of a file's weights; None if some are quantized blocks."""
    return None if any(isinstance(weight, GGUFBlockWeight) for weight in weights.values()) else weights[EMBEDDING].dtype


def all_known(weights: Mapping[str, Weight]) -> bool:
    """Whether the kernels know the formats of all quantized blocks."""
    return all(bool(kernel_operands(weight)) for weight in weights.values() if isinstance(weight, GGUFBlockWeight))


def activation_type(activations: str, precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the activations: the named one, or for "auto" float32 on a CPU, and the weights' dtype on a GPU.

    Raises:
        UsageError: If `activations` is neither "auto" nor one of `ACTIVATIONS`.
    """
    if activations not in ("auto", *ACTIVATIONS):
        raise UsageError(
            f"The activations are {activations!r}, expected one of auto, {', '.join(ACTIVATIONS)} (`activations`)."
        )
    if activations != "auto":
        return DTYPES[activations]
    if device.type == "cpu":
        return torch.float32
    return DTYPES.get(precision, torch.bfloat16 if computes_bf16(device) else torch.float32)


def activation_bytes(model: Transformer) -> int:
    """Bytes of each number that a network passes from layer to layer, and so of each number in its cache."""
    return model.norm.weight.dtype.itemsize
