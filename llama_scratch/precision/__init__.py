"""How are weights stored, and how are they multiplied?

Read `network` first, which builds a network in a given precision, then `linear` with its two weight formats `rows` and
`panels`, then `packing`, `quantize` and `calibration`, which make 8 and 4 bits of a file's weights. `kernels.cpp`
computes the same as `rows` and `panels` faster; `weight_cache` keeps packed weights between runs, and `memory_estimate`
says beforehand what all of it takes.

Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_scratch.errors import UsageError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
"""How weights can be stored and multiplied:

| name | weights                                       | promise                                                      |
| ---- | --------------------------------------------- | ------------------------------------------------------------ |
| fp32 | float32                                       | the reference                                                |
| bf16 | bfloat16, read where the file is mapped       | equal to fp32 of the same file within 1e-5                   |
| fp16 | float16, mapped if the file holds it          | logits within 1e-3 of fp32                                   |
| int8 | 8 bits, a scale per 32; activations alike     | half the bytes; no further from fp32 than llama.cpp's Q8_0   |
| int4 | 4 bits, a scale per 64; activations in 8 bits | a quarter; nearer to fp32 than llama.cpp's Q4_0, see quantize |

A GGUF file's quantized blocks are read as the file holds them in fp32 and fp16, which loses nothing. 32 and 16 bits
answer as soon as the file is mapped. int8 and int4 are packed into panels once, and kept for the next run.
"""

ACTIVATIONS = ("fp32", "bf16")
"""Number types of the activations between the layers. By default float32 on a CPU, and the weights' type on a GPU."""

_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def validate_precision(precision: str) -> None:
    """Raise `UsageError` if a precision is neither "auto" nor one of `PRECISIONS`."""
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(
            f"The precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)} (`precision`)."
        )


def resolve_precision(precision: str, file_dtype: torch.dtype | None, device: torch.device | None = None) -> str:
    """Return the precision to run in: the named one, or for "auto" the file's own type.

    Args:
        precision: One of `PRECISIONS`, or "auto".
        file_dtype: Type of the file's weights; None for GGUF's quantized blocks, which run in fp16.
        device: The device that multiplies. By default the CPU, which multiplies all types.
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
    """Return the device of a name; "auto" is CUDA if there is a GPU, else the CPU.

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
    """Whether a device multiplies bfloat16 itself."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True
