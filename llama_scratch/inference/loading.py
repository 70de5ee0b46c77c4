"""Load a checkpoint's weights into a network, in a given precision."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llama_scratch.checkpoint import Checkpoint
from llama_scratch.config import ModelArgs, is_tied
from llama_scratch.inference.engine import require_device_memory
from llama_scratch.inference.long_attention import use_kernels
from llama_scratch.model import Transformer
from llama_scratch.precision import resolve_device, resolve_precision, validate_precision
from llama_scratch.precision.calibration import calibration_text
from llama_scratch.precision.dtypes import activation_type, all_known, file_type
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.precision.network import build
from llama_scratch.results import ModelInfo
from llama_scratch.system.jobs import BackgroundJobs
from llama_scratch.system.memory import memory_errors
from llama_scratch.system.progress import Progress


@dataclass(frozen=True)
class StorageOptions:
    """Precision and device. The fields are arguments of `Llama.load`."""

    precision: str
    activations: str
    device: str
    calibration: str | os.PathLike[str] | None


def load_network(
    checkpoint: Checkpoint, args: ModelArgs, options: StorageOptions, context: int, progress: Progress
) -> tuple[Transformer, BackgroundJobs, ModelInfo]:
    """Build the network of a checkpoint.

    Args:
        checkpoint: The files to load.
        args: The network's dimensions.
        options: Precision and device.
        context: Context length in tokens. A KV cache of this length must fit into memory, too.
        progress: Called while the weights are read.

    Returns:
        The network, its background jobs (see `build`) and its description.

    Raises:
        OutOfMemoryError: If the network does not fit into memory. The size is estimated before it is built.
        UsageError: If an option is unknown, or this machine does not have the device.
        ModelNotFoundError: If the calibration text cannot be read.
        CheckpointError: If the weights are damaged.
    """
    device, activations = resolve_device(options.device), options.activations
    validate_precision(options.precision)
    activation_type(activations, options.precision, device)
    is_int4 = options.precision == "int4"
    text = calibration_text(checkpoint.tokenizer, options.calibration) if is_int4 else None
    with memory_errors(checkpoint.name):
        weights = checkpoint.load(progress)
        file_dtype, tied, known = file_type(weights), is_tied(weights), all_known(weights)
        precision = resolve_precision(options.precision, file_dtype, device)
        needed = memory_needed(
            args, precision, file_dtype, context, device, tied=tied, activations=activations, known=known
        )
        require_device_memory(needed, f"{checkpoint.name} in {precision} with a context of {context:,} tokens", device)
        model, packing = build(weights, args, precision, device, checkpoint.files, text, activations)
    if device.type == "cpu":
        use_kernels(model)
    info = ModelInfo(checkpoint.name, checkpoint.format, precision, device.type, args.n_parameters(tied=tied))
    return model, packing, info
