"""Estimate a network's memory, so that one that does not fit is never built."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama_scratch.config import EMBEDDING, ModelArgs, is_tied
from llama_scratch.precision import kernels
from llama_scratch.precision.calibration import CALIBRATION_TOKENS
from llama_scratch.precision.dtypes import BITS, DTYPES, activation_type, file_type
from llama_scratch.precision.lazy_weight import Weight
from llama_scratch.precision.panels import PACKING_BYTES, panel_bytes
from llama_scratch.precision.quantize import WEIGHTS_PER_CALIBRATION
from llama_scratch.precision.rows import PRODUCT_BYTES, reads_gguf_blocks

# Tokens per chunk of a prompt. Ctrl-C takes effect between chunks, and chunks limit the size of activations and
# attention masks.
CHUNK = 512

# Temporary bytes: per element of a Hessian while it is computed, and per weight that is being calibrated.
_HESSIAN_BYTES, _CALIBRATION_BYTES = 24, 16


def memory_needed(
    args: ModelArgs,
    precision: str,
    file_dtype: torch.dtype | None,
    context: int,
    device: torch.device,
    *,
    tied: bool,
    activations: str = "auto",
    known: bool = True,
) -> dict[str, int]:
    """Estimate the memory of a network, not counting mapped weights.

    Args:
        args: The network's dimensions.
        precision: One of `PRECISIONS`.
        file_dtype: The file's `file_type`.
        context: Tokens in the cache.
        device: The device that the network runs on.
        tied: Whether embedding and output share a weight.
        activations: See `activation_type`.
        known: Whether the kernels support all formats of the file's quantized blocks, see `all_known`. If not, all
            weights count as converted.

    Returns:
        Purpose → bytes.
    """
    itemsize = activation_type(activations, precision, device).itemsize
    has_kernels = device.type == "cpu" and kernels.load()
    cache = context * args.kv_bytes_per_token(itemsize)
    packing = PACKING_BYTES * torch.get_num_threads() if precision in BITS else 0
    if not has_kernels:
        # Packing ends long before the KV cache is full, so the cache can reuse its memory. The kernels' search is
        # different: its memory is returned to the system late.
        packing = max(0, packing - cache)
    # With kernels and float32 activations, the layers run in C++.
    activation_memory = (
        _activations_of_kernels(args)
        if has_kernels and itemsize == 4
        else _activations_of_torch(args, context, itemsize, file_dtype)
    )
    return {
        "weights": _weights(args, precision, file_dtype, device, tied=tied, known=known),
        "packing": packing,
        "KV cache": cache,
        "activations": activation_memory + 16 * args.vocab_size,
    }


def calibration_memory(weights: Mapping[str, Weight], args: ModelArgs) -> dict[str, int]:
    """Estimate the memory for int4 calibration, in addition to the network's own.

    Args:
        weights: The file's weights.
        args: The network's dimensions.

    Returns:
        Purpose → bytes.
    """
    reader = memory_needed(args, "int8", file_type(weights), 0, torch.device("cpu"), tied=is_tied(weights))
    width = max(args.dim, args.n_heads * args.head_dim, args.ffn_dim)
    return {
        "int8 network": reader["weights"] + reader["activations"],
        "examples": 4 * CALIBRATION_TOKENS * args.dim,
        # The larger of two phases: computing the Hessian, and quantizing with it.
        "Hessian": max(_HESSIAN_BYTES * width**2, 8 * width**2 + _CALIBRATION_BYTES * WEIGHTS_PER_CALIBRATION),
    }


def _weights(
    args: ModelArgs,
    precision: str,
    file_dtype: torch.dtype | None,
    device: torch.device,
    *,
    tied: bool,
    known: bool,
) -> int:
    """Return the bytes of weights that are not mapped from the file."""
    if bits := BITS.get(precision):
        shapes = [shape for name, shape in args.weight_shapes().items() if len(shape) == 2 and name != EMBEDDING]
        return sum(panel_bytes((out, width), bits) for out, width in shapes)
    if file_dtype is None and known and reads_gguf_blocks(precision, args):
        return 0
    if file_dtype == DTYPES[precision] and device.type == "cpu":
        return 0
    return args.n_parameters(tied=tied) * DTYPES[precision].itemsize


def _activations_of_kernels(args: ModelArgs) -> int:
    """Return the bytes of `Space` in cpp/layer.h. Attention scores are negligible."""
    heads = args.n_heads * args.head_dim
    return 4 * CHUNK * (4 * args.dim + 2 * heads + 2 * args.n_kv_heads * args.head_dim + 3 * args.ffn_dim)


def _activations_of_torch(args: ModelArgs, context: int, itemsize: int, file_dtype: torch.dtype | None) -> int:
    """Return the bytes that torch's operators use for the last chunk of a full context."""
    numbers = CHUNK * (4 * args.ffn_dim + 8 * max(args.dim, args.n_heads * args.head_dim))
    mask = CHUNK * context * (3 + itemsize)
    return 4 * numbers + mask + (0 if file_dtype == torch.float32 else PRODUCT_BYTES)
