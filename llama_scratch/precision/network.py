"""How weights are stored and multiplied, and which way is best where.

| name | weights                                       | promise                                                      |
| ---- | --------------------------------------------- | ------------------------------------------------------------ |
| fp32 | float32                                       | the reference                                                |
| bf16 | bfloat16, read where the file is mapped       | equal to fp32 of the same file within 1e-5                   |
| fp16 | float16, mapped if the file holds it          | logits within 1e-3 of fp32                                   |
| int8 | 8 bits, a scale per 32; activations alike     | half the bytes; no further from fp32 than llama.cpp's Q8_0   |
| int4 | 4 bits, a scale per 64; activations in 8 bits | a quarter; nearer to fp32 than llama.cpp's Q4_0, see quantize |

Between the layers activations are float32 on a CPU, and of the weights' type on a GPU. A GGUF file's quantized blocks
are read as they lie in the file in fp16 too, which loses nothing.

32 and 16 bits answer as soon as the file is mapped. int8 and int4 are put into panels first, once: they are kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch.config import ACTIVATIONS, EMBEDDING, OUTPUT, PRECISIONS, ModelArgs, is_tied
from llama_scratch.errors import UsageError
from llama_scratch.model import RMSNorm, Transformer
from llama_scratch.precision import kernels
from llama_scratch.precision.calibration import GROUPS, TOKENS, collect_hessians
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight, as_tensor, stored
from llama_scratch.precision.linear import (
    PACKED,
    Differentiable,
    Embedding,
    FusedLinearPart,
    FusedOutput,
    PackedLinear,
    Panels,
    Rows,
    panel_shapes,
    to_panels,
)
from llama_scratch.precision.quantize import BLOCK, CALIBRATED, Hessian
from llama_scratch.precision.weight_cache import Layout, PackedWeightCache
from llama_scratch.system.jobs import BackgroundJobs, Job, report_progress
from llama_scratch.system.memory import require_memory, trim_heap

# Prompts go through the network in pieces, so that Ctrl-C is heard between them and the attention
# mask stays small.
CHUNK = 512

# Precisions in which GGUF's quantized blocks are read as they lie in the file: neither loses anything of them.
_READ_BLOCKS = ("fp32", "fp16")
# Bits of a weight where it is quantized.
BITS = {"int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def validate_precision(precision: str) -> None:
    """Raise `UsageError` for a precision that does not exist."""
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(
            f"The precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)} (`precision`)."
        )


def resolve_precision(precision: str, stored: torch.dtype | None, device: torch.device | None = None) -> str:
    """The precision to run in: the one named, or for "auto" the file's own type, see `file_type`.

    GGUF's blocks run in fp16. device: by default the CPU, which multiplies all types.
    """
    if precision != "auto":
        return precision
    if stored is None:
        return "fp16"
    computes = device is None or stored != torch.bfloat16 or _computes_bf16(device)
    return _NAMES.get(stored, "fp32") if computes else "fp32"


def file_type(weights: Mapping[str, Weight]) -> torch.dtype | None:
    """The type of a file's weights; None where some are quantized blocks."""
    return None if any(isinstance(weight, GGUFBlockWeight) for weight in weights.values()) else weights[EMBEDDING].dtype


def all_known(weights: Mapping[str, Weight]) -> bool:
    """Whether the kernels know the formats of all quantized blocks."""
    return all(bool(stored(weight)) for weight in weights.values() if isinstance(weight, GGUFBlockWeight))


def activation_type(activations: str, precision: str, device: torch.device) -> torch.dtype:
    """What goes from layer to layer: what is named, or for "auto" float32 on a CPU, and the weights' type on a GPU.

    Raises `UsageError` for a name that there is not.
    """
    if activations not in ("auto", *ACTIVATIONS):
        raise UsageError(
            f"The activations are {activations!r}, expected one of auto, {', '.join(ACTIVATIONS)} (`activations`)."
        )
    if activations != "auto":
        return DTYPES[activations]
    if device.type == "cpu":
        return torch.float32
    return DTYPES.get(precision, torch.bfloat16 if _computes_bf16(device) else torch.float32)


def resolve_device(device: str) -> torch.device:
    """The device of a name; "auto": CUDA where there is one, else the CPU. Raises `UsageError` where it is missing."""
    available = ["cuda"] * torch.cuda.is_available() + ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    if device == "auto":
        return torch.device(available[0])
    if device not in available:
        raise UsageError(f"The device is {device!r}, expected one that this machine has: {', '.join(available)}.")
    return torch.device(device)


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def memory_needed(
    args: ModelArgs,
    precision: str,
    stored: torch.dtype | None,
    context: int,
    device: torch.device,
    *,
    tied: bool,
    activations: str = "auto",
    known: bool = True,
) -> dict[str, int]:
    """Bytes that a network takes besides the file's own weights, by what they are for.

    stored: the `file_type`. context: tokens in the cache. activations: see `activation_type`. known: whether the
    kernels know all formats of the file's quantized blocks, see `all_known`. If not, all weights count as converted.
    """
    number = activation_type(activations, precision, device).itemsize
    fast = device.type == "cpu" and kernels.load()
    packing = 0
    if bits := BITS.get(precision):
        weights = _bytes_in_panels(args, bits)
        packing = _ON_THE_WAY * PACKED * torch.get_num_threads()
    elif precision in _READ_BLOCKS and stored is None and known and _stay_lazy(args):
        weights = 0
    else:
        copied = stored != DTYPES[precision] or device.type != "cpu"
        weights = args.n_parameters(tied=tied) * DTYPES[precision].itemsize * copied
    cache = context * args.kv_bytes_per_token(number)
    heads = args.n_heads * args.head_dim
    if fast and number == 4:  # see `Space` in cpp/layer.h, and what a long context's scores take is little
        numbers = CHUNK * (4 * args.dim + 2 * heads + 2 * args.n_kv_heads * args.head_dim + 3 * args.ffn_dim)
        mask = 0
    else:
        numbers = CHUNK * (4 * args.ffn_dim + 8 * max(args.dim, heads))
        mask = CHUNK * context * (3 + number) + 4 * _BLOCKS * (stored != torch.float32)
    return {
        "weights": weights,
        # It is over long before a cache of its size is full; but what the kernels' search took is given back late.
        "packing": packing if fast else max(0, packing - cache),
        "KV cache": cache,
        "activations": numbers * 4 + 16 * args.vocab_size + mask,
    }


# Numbers of the blocks of weights that torch's operators turn into float32 at a time, with what oneDNN makes of them.
_BLOCKS = 6 << 20
# Bytes for each weight that is on its way into panels.
_ON_THE_WAY = 4
# For each product of two inputs while the curvature is made of them, and for each weight that is calibrated.
_MAKING, _CALIBRATING = 24, 16


def _calibration_needed(weights: Mapping[str, Weight], args: ModelArgs) -> dict[str, int]:
    """Bytes that `_hessians_in_turn` takes beside the network that answers, by what they are for."""
    reading = memory_needed(args, "int8", file_type(weights), 0, torch.device("cpu"), tied=is_tied(weights))
    widest = max(args.dim, args.n_heads * args.head_dim, args.ffn_dim)
    return {
        "the int8 network that reads examples": reading["weights"] + reading["activations"],
        "examples": 4 * TOKENS * args.dim,
        # First the curvature is made, then weights are quantized by it.
        "products of inputs": max(_MAKING * widest**2, 8 * widest**2 + _CALIBRATING * CALIBRATED),
    }


def _bytes_in_panels(args: ModelArgs, bits: int) -> int:
    matrices = [shape for name, shape in args.weight_shapes().items() if len(shape) == 2 and name != EMBEDDING]
    parts = [part for out, width in matrices for part in zip(panel_shapes((out, width), bits), (1, 2), strict=True)]
    return sum(size * math.prod(shape) for shape, size in parts)


def activation_bytes(model: Transformer) -> int:
    """Bytes of each number that goes from layer to layer, and so of those in the cache."""
    return model.norm.weight.dtype.itemsize


# --- Storing a network ------------------------------------------------------------------------


def build(
    weights: Mapping[str, Weight],
    args: ModelArgs,
    precision: str,
    device: torch.device,
    files: Sequence[Path],
    examples: CalibrationText | None = None,
    activations: str = "auto",
) -> tuple[Transformer, BackgroundJobs]:
    """The network with the file's weights in it, and what is still to be done before it answers, or answers fast.

    Built without memory and filled with the file's own tensors, so that there is never a second copy.
    files: where the weights are from, by which quantized ones are kept for the next time. examples: what 4 bits are
    calibrated with; without any, their scales are searched for. activations: see `activation_type`.
    """
    dtype = activation_type(activations, precision, device)
    kernels.load()
    weights = _each(weights, lambda weight: _stored(weight, args, precision, device))
    with torch.device("meta"):
        model = Transformer(args)
    slots: list[PackTarget] = []
    if device.type == "cpu" or precision in BITS or dtype != DTYPES[precision]:
        slots = replace_linears(model, weights)
        model.tok_embeddings = Embedding(weights[EMBEDDING], dtype)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    if not slots and is_tied(weights):
        model.output.weight = model.tok_embeddings.weight
    _convert_norms(model, dtype)
    model.eval().requires_grad_(False)
    model.freqs = model.freqs.to(device)
    jobs: list[Job] = []
    if device.type == "cpu" and not kernels.ready() and kernels.possible():
        jobs.append((kernels.build, 0))  # answers do not wait for it
    if precision in BITS:
        made, curvatures = "", None
        if precision == "int4" and examples and device.type == "cpu":
            made = f"{examples.name}, {args}"
            curvatures = _hessians_in_turn(weights, args, slots, examples, files)
        pack = BlockPacker(files, slots, BITS[precision], curvatures, made).pack
        jobs += [(partial(pack, i, slot), slot.size) for i, slot in enumerate(slots)]
    return model, BackgroundJobs("packing", jobs, after=trim_heap)


def _stored(weight: Weight, args: ModelArgs, precision: str, device: torch.device) -> Weight:
    """A weight in the type of a precision: the file's own where it is of that type already. Norms stay as they are."""
    if precision in BITS or len(weight.shape) == 1:
        return weight if device.type == "cpu" else as_tensor(weight).to(device)
    dtype = DTYPES[precision]
    if device.type == "cpu" and stored(weight):
        blocks = isinstance(weight, GGUFBlockWeight)
        if (precision in _READ_BLOCKS and _stay_lazy(args)) if blocks else weight.dtype == dtype:
            return weight
    turned = weight.to(dtype)
    # Weights that are too large for float16, on either side of 0, stay as they are.
    fits = dtype != torch.float16 or all(bound.isfinite() for bound in turned.aminmax())
    return (turned if fits else as_tensor(weight)).to(device)


def _stay_lazy(args: ModelArgs) -> bool:
    """Whether GGUF's quantized blocks stay as they are. Without kernels those of a small model would be slow."""
    return kernels.load() or args.n_parameters(tied=False) > _SMALL


_SMALL = 1 << 28  # weights: half a GB of float16


def _as_tensors(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """All as tensors; those that are so already stay the same, and a tied pair one."""
    return cast(dict[str, Tensor], _each(weights, as_tensor))


def _each(weights: Mapping[str, Weight], turn: Callable[[Weight], Weight]) -> dict[str, Weight]:
    turned = {id(weight): turn(weight) for weight in {id(weight): weight for weight in weights.values()}.values()}
    return {name: turned[id(weight)] for name, weight in weights.items()}


def replace_linears(model: Transformer, weights: Mapping[str, Weight]) -> list[PackTarget]:
    """Put projections in the place of the linear layers, in the order in which a token comes by.

    Those that read the same vector become one product.
    """
    slots = []
    for i in range(len(model.layers)):
        for group in GROUPS:
            names = [f"layers.{i}.{name}" for name in group]
            found = [weights[f"{name}.weight"] for name in names]
            shared = FusedOutput(Rows(found), [len(weight) for weight in found])
            for part, name in enumerate(names):
                model.set_submodule(name, FusedLinearPart(shared, part))
            slots.append(PackTarget(shared, found))
    projection = PackedLinear(Rows([weights[OUTPUT]]))
    model.set_submodule("output", projection)
    return [*slots, PackTarget(projection, [weights[OUTPUT]])]


@dataclass(frozen=True)
class PackTarget:
    """A place for a form: that of `weights` below each other, (out, in) in all."""

    place: FusedOutput | PackedLinear
    weights: Sequence[Weight]

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """Of all together."""
        return sum(map(len, self.weights)), self.weights[0].shape[1]


@dataclass(frozen=True)
class CalibrationText:
    """Text that 4-bit weights are calibrated with. name: of it. windows: makes it tokens, for the network given."""

    name: str
    windows: Callable[[Transformer], Sequence[Tensor]]


class BlockPacker:
    """Fills slots with weights in panels, kept ones where there are.

    curvatures: of all slots, one after the other, for calibration; without them each piece is made by itself.
    """

    def __init__(
        self,
        files: Sequence[Path],
        slots: Sequence[PackTarget],
        bits: int,
        curvatures: Iterator[_ToCalibrate] | None,
        made: str,
    ):
        self._bits = bits
        types = torch.int8 if bits == 8 else torch.uint8, torch.float16
        layouts = [tuple(zip(panel_shapes(slot.shape, bits), types, strict=True)) for slot in slots]
        self._kept = PackedWeightCache(files, cast(list[Layout], layouts), made)
        self._curvatures = curvatures
        self._made: dict[int, _Piece] = {}
        self._lock = threading.Lock()

    def pack(self, i: int, slot: PackTarget) -> None:
        piece = self._kept.get(i)
        if piece is None:
            piece = quantize_piece(slot, self._bits) if self._curvatures is None else self._in_turn(i, self._curvatures)
            if piece is None:
                return  # it stays as it is
            self._kept.put(i, *piece)
        device = slot.weights[0].device
        slot.place.form = Panels(piece[0].to(device), piece[1].to(device), slot.shape)

    def _in_turn(self, i: int, curvatures: Iterator[_ToCalibrate]) -> _Piece:
        with self._lock:
            while i not in self._made:
                j, slot, curvature = next(curvatures)  # its forward passes run even if the piece is kept
                self._made[j] = self._kept.get(j) or quantize_piece(slot, self._bits, curvature())
            return self._made.pop(i)


_Piece = tuple[Tensor, Tensor] | None
"""Values and scales in panels; None of weights that are not finite."""
_ToCalibrate = tuple[int, PackTarget, Callable[[], Hessian | None]]
"""A slot's index, the slot, and what makes its curvature."""


def quantize_piece(slot: PackTarget, bits: int, curvature: Hessian | None = None) -> _Piece:
    try:
        return to_panels(slot.weights, bits, curvature, report_progress)
    except ValueError:
        return None


def _hessians_in_turn(
    weights: Mapping[str, Weight],
    args: ModelArgs,
    slots: Sequence[PackTarget],
    examples: CalibrationText,
    files: Sequence[Path],
) -> Iterator[_ToCalibrate]:
    """All slots with functions that make their curvatures, in the order in which a token comes by.

    Another network reads the examples, for this one is in use: that of int8, which is fast and near enough.
    """
    require_memory(_calibration_needed(weights, args), "Calibrating int4")
    model, packing = build(weights, args, "int8", torch.device("cpu"), files)
    try:
        packing.wait(lambda *_: report_progress())
    finally:
        packing.close()
    found = collect_hessians(model, examples.windows(model), report_progress)
    for i, (slot, (_, products)) in enumerate(zip(slots, found, strict=True)):
        yield i, slot, partial(_hessian, products)


def _hessian(products: Tensor) -> Hessian | None:
    missing = -len(products) % BLOCK[4]
    return Hessian(F.pad(products, (0, missing, 0, missing))) if products.isfinite().all() else None


# --- With gradients ---------------------------------------------------------------------------


def differentiable(weights: Mapping[str, Weight], args: ModelArgs) -> Transformer:
    """The network with the file's own weights, multiplied in float32, through which gradients go."""
    tensors = _as_tensors(weights)
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
