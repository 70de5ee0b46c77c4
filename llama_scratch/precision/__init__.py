"""Weight formats: how weights are stored and multiplied in each precision.

Start with `network`, which builds a network in a given precision. Then read `linear` and its two weight formats, `rows`
and `panels`. `packing`, `quantize` and `calibration` quantize a file's weights to 8 or 4 bits. `kernels.cpp` is a
faster implementation of `rows` and `panels`. `weight_cache` keeps packed weights between runs. `memory_estimate`
estimates in advance how much memory a network needs.

Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.errors import UsageError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
"""Precisions of the weights:

| name | weights                                       | accuracy                                                     |
| ---- | --------------------------------------------- | ------------------------------------------------------------ |
| fp32 | float32                                       | the reference                                                |
| bf16 | bfloat16, memory-mapped                       | within 1e-5 of fp32 for the same file                        |
| fp16 | float16, memory-mapped from a float16 file    | logits within 1e-3 of fp32                                   |
| int8 | 8 bits, group size 32; activations likewise   | at least as close to fp32 as llama.cpp's Q8_0                |
| int4 | 4 bits, group size 64; activations in 8 bits  | closer to fp32 than llama.cpp's Q4_0, see `quantize`         |

fp32 and fp16 multiply GGUF's quantized blocks directly and without loss. The first three precisions need no
preparation: the first answer uses the mapped file. For int8 and int4, weights are packed into panels once and cached
for later runs.
"""

ACTIVATIONS = ("fp32", "bf16")
"""Dtypes of the activations between layers. The default is float32 on a CPU and the weights' dtype on a GPU."""

_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def validate_precision(precision: str) -> None:
    """Raise `UsageError` if a precision is neither "auto" nor one of `PRECISIONS`."""
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(
            f"The precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)} (`precision`)."
        )


def resolve_precision(precision: str, file_dtype: torch.dtype | None, device: torch.device | None = None) -> str:
    """Return the precision to run in: for "auto" the file's, otherwise as given.

    Args:
        precision: One of `PRECISIONS`, or "auto".
        file_dtype: Dtype of the file's weights; None for GGUF's quantized blocks, which run in fp16.
        device: The device to run on. By default the CPU, which supports all dtypes.
    """
    if precision != "auto":
        return precision
    if file_dtype is None:
        return "fp16"
    name = _NAMES.get(str(file_dtype), "fp32")
    if name == "bf16" and device is not None and not computes_bf16(device):
        return "fp32"
    return name


def resolve_device(device: str) -> torch.device:
    """Return the torch device for a name; "auto" is CUDA if available, else the CPU.

    Raises:
        UsageError: If this machine does not have the device.
    """
    import torch

    available = ["cpu"]
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if device == "auto":
        return torch.device(available[0])
    if device not in available:
        raise UsageError(f"The device is {device!r}, expected one that this machine has: {', '.join(available)}.")
    return torch.device(device)


def computes_bf16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 in hardware."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True
