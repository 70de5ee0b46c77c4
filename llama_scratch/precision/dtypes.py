"""Dtypes of weights in memory, of weights in a file, and of activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama_scratch.config import EMBEDDING
from llama_scratch.errors import UsageError
from llama_scratch.model import Transformer
from llama_scratch.precision import ACTIVATIONS, computes_bf16
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, kernel_operands

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of the weights. The quantized precisions are in `BITS`."""

BITS = {"int8": 8, "int4": 4}
"""Quantized precision → bits per weight."""


def file_type(weights: Mapping[str, Weight]) -> torch.dtype | None:
    """Return the dtype of a file's weights, or None if some are quantized blocks."""
    return None if any(isinstance(weight, GGUFBlockWeight) for weight in weights.values()) else weights[EMBEDDING].dtype


def all_known(weights: Mapping[str, Weight]) -> bool:
    """Whether the kernels support the formats of all quantized blocks."""
    return all(bool(kernel_operands(weight)) for weight in weights.values() if isinstance(weight, GGUFBlockWeight))


def activation_type(activations: str, precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the activations.

    Args:
        activations: One of `ACTIVATIONS`, or "auto": float32 on a CPU, the weights' dtype on a GPU.
        precision: One of `PRECISIONS`.
        device: The device that the network runs on.

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
    """Return the bytes per activation in a network's residual stream and KV cache."""
    return model.norm.weight.dtype.itemsize
