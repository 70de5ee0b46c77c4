"""Memory that a network takes, estimated before it is built: what does not fit is rejected, and not killed later."""

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

# Prompts go through the network in chunks of so many tokens, so that Ctrl-C is heard between them, and activations and
# the attention mask stay small.
CHUNK = 512

# Bytes for each product of two inputs while a Hessian is made of them, and for each weight that is calibrated.
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
    """Bytes that a network takes besides the file's own weights, by what they are for.

    Args:
        args: The network's shape.
        precision: One of `PRECISIONS`.
        file_dtype: The file's `file_type`.
        context: Tokens in the cache.
        device: The device that the network runs on.
        tied: Whether embedding and output share a weight.
        activations: See `activation_type`.
        known: Whether the kernels know all formats of the file's quantized blocks, see `all_known`. If not, all
            weights count as converted.
    """
    itemsize = activation_type(activations, precision, device).itemsize
    has_kernels = device.type == "cpu" and kernels.load()
    cache = context * args.kv_bytes_per_token(itemsize)
    packing = PACKING_BYTES * torch.get_num_threads() if precision in BITS else 0
    if not has_kernels:
        # It is over long before a cache of its size is full; but what the kernels' search took is given back late.
        packing = max(0, packing - cache)
    # With kernels and float32, the layers run in C++.
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
    """Bytes that calibrating int4 takes beside the network that answers, by what they are for."""
    reader = memory_needed(args, "int8", file_type(weights), 0, torch.device("cpu"), tied=is_tied(weights))
    width = max(args.dim, args.n_heads * args.head_dim, args.ffn_dim)
    return {
        "the int8 network that reads examples": reader["weights"] + reader["activations"],
        "examples": 4 * CALIBRATION_TOKENS * args.dim,
        # First the Hessian is made, then weights are quantized by it.
        "products of inputs": max(
            _HESSIAN_BYTES * width**2, 8 * width**2 + _CALIBRATION_BYTES * WEIGHTS_PER_CALIBRATION
        ),
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
    """Bytes of weights that are not mapped from the file."""
    if bits := BITS.get(precision):
        shapes = [shape for name, shape in args.weight_shapes().items() if len(shape) == 2 and name != EMBEDDING]
        return sum(panel_bytes((out, width), bits) for out, width in shapes)
    if file_dtype is None and known and reads_gguf_blocks(precision, args):
        return 0
    if file_dtype == DTYPES[precision] and device.type == "cpu":
        return 0
    return args.n_parameters(tied=tied) * DTYPES[precision].itemsize


def _activations_of_kernels(args: ModelArgs) -> int:
    """Bytes of `Space` in cpp/layer.h; the scores of a long context take little."""
    heads = args.n_heads * args.head_dim
    return 4 * CHUNK * (4 * args.dim + 2 * heads + 2 * args.n_kv_heads * args.head_dim + 3 * args.ffn_dim)


def _activations_of_torch(args: ModelArgs, context: int, itemsize: int, file_dtype: torch.dtype | None) -> int:
    """Bytes that torch's operators take for one chunk at the end of a context."""
    numbers = CHUNK * (4 * args.ffn_dim + 8 * max(args.dim, args.n_heads * args.head_dim))
    mask = CHUNK * context * (3 + itemsize)
    return 4 * numbers + mask + (0 if file_dtype == torch.float32 else PRODUCT_BYTES)
