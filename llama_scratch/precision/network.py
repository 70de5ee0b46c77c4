"""Build a network from a file's weights in a given precision, see `PRECISIONS`.

`build` creates the network for inference, `differentiable` the network for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from llama_scratch.config import EMBEDDING, ModelArgs, is_tied
from llama_scratch.model import RMSNorm, Transformer
from llama_scratch.precision import kernels
from llama_scratch.precision.calibration import CalibrationText
from llama_scratch.precision.dtypes import BITS, DTYPES, activation_type
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, as_tensor, kernel_operands
from llama_scratch.precision.linear import Differentiable, Embedding
from llama_scratch.precision.memory_estimate import calibration_memory
from llama_scratch.precision.packing import BlockPacker, PackTarget, hessians_in_turn, replace_linears
from llama_scratch.precision.rows import reads_gguf_blocks
from llama_scratch.system.jobs import BackgroundJobs, Job, report_progress
from llama_scratch.system.memory import require_memory, trim_heap


def build(
    weights: Mapping[str, Weight],
    args: ModelArgs,
    precision: str,
    device: torch.device,
    files: Sequence[Path],
    text: CalibrationText | None = None,
    activations: str = "auto",
) -> tuple[Transformer, BackgroundJobs]:
    """Build a network for inference.

    The network is created on the meta device and then filled with the file's own tensors, to avoid a second copy.

    Args:
        weights: The file's weights, by Meta's names.
        args: The network's dimensions.
        precision: One of `PRECISIONS`.
        device: The device that the network runs on.
        files: The weight files, which are the key in the cache of packed weights.
        text: Text to calibrate int4 with. Without it, int4 is quantized by search.
        activations: See `activation_type`.

    Returns:
        The network and its background jobs: packing, which the first answer waits for, and compiling the kernels.
    """
    dtype = activation_type(activations, precision, device)
    kernels.load()
    weights = _map_weights(weights, lambda weight: _in_precision(weight, args, precision, device))
    with torch.device("meta"):
        model = Transformer(args)
    targets: list[PackTarget] = []
    if device.type == "cpu" or precision in BITS or dtype != DTYPES[precision]:
        targets = replace_linears(model, weights)
        model.tok_embeddings = Embedding(weights[EMBEDDING], dtype)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    if not targets and is_tied(weights):
        model.output.weight = model.tok_embeddings.weight
    _convert_norms(model, dtype)
    model.eval().requires_grad_(False)
    model.freqs = model.freqs.to(device)
    jobs: list[Job] = []
    if device.type == "cpu" and not kernels.ready() and kernels.possible():
        jobs.append((kernels.build, 0))  # answers do not wait for jobs of size 0
    if precision in BITS:
        hessians, recipe = None, ""
        if precision == "int4" and text and device.type == "cpu":
            hessians = hessians_in_turn(targets, text, partial(_reader, weights, args, files))
            recipe = f"{text.name}, {args}"
        packer = BlockPacker(files, targets, BITS[precision], hessians, recipe)
        jobs += [(partial(packer.pack, i, target), target.size) for i, target in enumerate(targets)]
    return model, BackgroundJobs("packing", jobs, after=trim_heap)


def _reader(weights: Mapping[str, Weight], args: ModelArgs, files: Sequence[Path]) -> Transformer:
    """Build a second network to read the calibration text, in int8: fast and accurate enough."""
    require_memory(calibration_memory(weights, args), "Calibrating int4")
    model, packing = build(weights, args, "int8", torch.device("cpu"), files)
    try:
        packing.wait(lambda *_: report_progress())
    finally:
        packing.close()
    return model


def _in_precision(weight: Weight, args: ModelArgs, precision: str, device: torch.device) -> Weight:
    """Convert a weight to the dtype of a precision, except for weights of norms."""
    if precision in BITS or len(weight.shape) == 1:
        return weight if device.type == "cpu" else as_tensor(weight).to(device)
    dtype = DTYPES[precision]
    if device.type == "cpu" and kernel_operands(weight):
        blocks = isinstance(weight, GGUFBlockWeight)
        if reads_gguf_blocks(precision, args) if blocks else weight.dtype == dtype:
            return weight
    converted = weight.to(dtype)
    # A weight with values outside the range of float16 keeps its dtype.
    fits = dtype != torch.float16 or all(bound.isfinite() for bound in converted.aminmax())
    return (converted if fits else as_tensor(weight)).to(device)


def _map_weights(weights: Mapping[str, Weight], convert: Callable[[Weight], Weight]) -> dict[str, Weight]:
    """Convert all weights. Tied weights stay tied."""
    converted = {id(weight): convert(weight) for weight in {id(weight): weight for weight in weights.values()}.values()}
    return {name: converted[id(weight)] for name, weight in weights.items()}


def differentiable(weights: Mapping[str, Weight], args: ModelArgs) -> Transformer:
    """Build a network for gradients with respect to activations, computed in float32.

    Args:
        weights: The file's weights, by Meta's names. They are not copied.
        args: The network's dimensions.
    """
    tensors = cast(dict[str, Tensor], _map_weights(weights, as_tensor))
    with torch.device("meta"):
        model = Transformer(args)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Differentiable(tensors[f"{name}.weight"]))
    _convert_norms(model, torch.float32)
    model.tok_embeddings = Embedding(tensors[EMBEDDING], torch.float32)
    return model


def _convert_norms(model: Transformer, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.to(dtype)
