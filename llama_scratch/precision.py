"""How weights are stored and multiplied, and which way is best where.

| name | weights           | activations           | promise                                                        |
| ---- | ----------------- | --------------------- | -------------------------------------------------------------- |
| fp32 | float32           | float32               | the reference                                                  |
| bf16 | bfloat16          | bfloat16              | what Meta's own code computes                                  |
| fp16 | float16           | float32 (a GPU: fp16) | logits within 1e-3 of fp32, as fast as a CPU reads its memory  |
| int8 | 8 bits in blocks  | 8 bits in blocks      | half the bytes; no further from fp32 than llama.cpp's Q8_0     |
| int4 | 4 bits in blocks  | 8 bits in blocks      | a quarter; nearer to fp32 than llama.cpp's Q4_0, see quantise  |

The products of int8 and int4 are our own, see kernels.cpp. Where those cannot be compiled, int8 is a scale a row and 13
bits of activations (a GPU: bf16), and int4 is multiplied in float32, which is slow.

fp16, int8 and int4 are packed into the order that this CPU multiplies fastest, which takes seconds. Until that is
done, the weights in the file answer, multiplied in float32: the first answers are those of fp32, and say so.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_scratch import kernels
from llama_scratch.attention import KEPT, LONG, attend_in_blocks
from llama_scratch.background import Background, Job, go_on
from llama_scratch.calibration import GROUPS, TOKENS, hessians
from llama_scratch.checkpoint import EMBEDDING, OUTPUT, is_tied
from llama_scratch.config import PRECISIONS, ModelArgs
from llama_scratch.errors import UsageError
from llama_scratch.kept import KeptPieces, Layout
from llama_scratch.lazy import Weight, as_tensor
from llama_scratch.linear import (
    PACKED,
    Blocks,
    Columns,
    Differentiable,
    Embedding,
    Form,
    Half,
    Int8,
    Panels,
    Projection,
    Shared,
    SharedProjection,
    Stack,
    packs,
    panel_shapes,
    quantise,
    to_panels,
)
from llama_scratch.memory import give_back, require_memory
from llama_scratch.model import RMSNorm, Transformer, TransformerBlock
from llama_scratch.quantise import BLOCK, CALIBRATED, Curvature

# Prompts go through the network in pieces, so that Ctrl-C is heard between them and the attention
# mask stays small.
CHUNK = 512

# Bits of a weight where it is quantised.
BITS = {"int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_name(precision: str) -> None:
    """Raise `UsageError` for a `--precision` that there is not."""
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(
            f"The precision is {precision!r}, expected one of auto, {', '.join(PRECISIONS)} (--precision)."
        )


def choose(precision: str, stored: torch.dtype, device: torch.device | None = None) -> str:
    """The precision to run in: the one named, or for "auto" the fastest whose answers are the reference's to rounding.

    An x86 CPU reads float16 weights at its memory's speed and multiplies them in float32: fp16. Elsewhere it
    is the file's own type where the device computes in it, and fp32 where it does not.
    """
    if precision != "auto":
        return precision
    device = device or torch.device("cpu")
    if device.type == "cpu" and packs():
        return "fp16"
    return "bf16" if stored == torch.bfloat16 and _computes_bf16(device) else "fp32"


def find_device(device: str) -> torch.device:
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
    args: ModelArgs, precision: str, stored: torch.dtype | None, context: int, device: torch.device, *, tied: bool
) -> dict[str, int]:
    """Bytes that a network takes besides the file's own weights, by what they are for.

    stored: the type of the file's weights, which are mapped; None where they are `Lazy`. context: tokens in the cache.
    """
    packed = _is_packed(precision, device)
    bytes_each = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "int4": 1}[precision]
    activation = 2 if precision == "bf16" else 4
    cache = context * args.kv_bytes_per_token(activation)
    panels = _in_panels(precision, device)
    # Without kernels int8 holds both limbs of what is multiplied, and their products.
    wide, narrow = (8, 12) if precision == "int8" and not panels else (4, 8)
    width = max(args.dim, args.n_heads * args.head_dim)  # of the residual stream, or of all heads' queries
    activations = CHUNK * (wide * args.ffn_dim + narrow * width) * activation + 16 * args.vocab_size
    # The mask, which fused attention turns into numbers.
    activations += CHUNK * context * (2 if packed else 3 + activation)
    packing = 0
    if packed:
        weights = (
            _bytes_in_panels(args, BITS[precision]) if panels else bytes_each * _packed_weights(args, precision, device)
        )
        turned = stored is None and not _stay_lazy(args, precision, device)  # to float32, and then given back
        if turned:
            weights = max(4 * args.n_parameters(tied=tied), weights + 4 * args.vocab_size * args.dim)
        if device.type == "cpu" and packs():
            activations += KEPT * max(0, context - LONG)
        piece = min(_PIECE, args.dim * max(args.vocab_size, args.ffn_dim, width))
        if panels:
            packing = _ON_THE_WAY * PACKED * torch.get_num_threads()
            activations += 2 * _BLOCKS * (stored is None)  # of the first answers
        elif precision == "int8":
            packing = 2 * piece * torch.get_num_threads()  # the integers that are packed from
        elif stored != torch.float32 and not turned:
            packing = 4 * piece * torch.get_num_threads()  # as float32
            activations += _BLOCKS  # of the first answers
    else:
        copied = stored != DTYPES[precision] or device.type != "cpu"
        weights = args.n_parameters(tied=tied) * bytes_each * copied
    return {
        "weights": weights,
        # It is over long before a cache of its size is full; what fbgemm packs int8 from is given back late.
        "packing": packing if precision == "int8" and not panels else max(0, packing - cache),
        "KV cache": cache,
        "activations": activations,
    }


def _calibration_needed(weights: Mapping[str, Weight], args: ModelArgs) -> dict[str, int]:
    """Bytes that `_curvatures` takes beside the network that answers, by what they are for."""
    embedding = weights[EMBEDDING]
    stored = embedding.dtype if isinstance(embedding, Tensor) else None
    reading = memory_needed(args, "int8", stored, 0, torch.device("cpu"), tied=is_tied(weights))
    widest = max(args.dim, args.n_heads * args.head_dim, args.ffn_dim)
    return {
        "the int8 network that reads examples": reading["weights"] + reading["activations"],
        "examples": 4 * TOKENS * args.dim,
        # First the curvature is made, then weights are quantised by it.
        "products of inputs": max(_MAKING * widest**2, 8 * widest**2 + _CALIBRATING * CALIBRATED),
    }


# Bytes of the blocks of weights that are float32 at a time, with what oneDNN makes of them.
_BLOCKS = 6 << 22
# Bytes for each weight that is on its way into panels.
_ON_THE_WAY = 4
# For each product of two inputs while the curvature is made of them, and for each weight that is calibrated.
_MAKING, _CALIBRATING = 24, 16


def _fbgemm_block(precision: str) -> int:
    """Columns per block of fbgemm's packed weights, whose last block is padded; 1 without fbgemm.

    Source: `PackingTraits` (int8, KCB) and `PackedGemmMatrixB` (fp16) in fbgemm. int8 blocks follow the instruction
    set, which torch and fbgemm detect alike; FBGEMM_ENABLE_INSTRUCTIONS limits fbgemm alone.
    """
    if not packs():
        return 1
    capability = torch.backends.cpu.get_cpu_capability()
    wide = capability == "AVX512" and os.environ.get("FBGEMM_ENABLE_INSTRUCTIONS", "AVX512").startswith("AVX512")
    return 256 if precision == "int8" and wide else 512


def _packed_weights(args: ModelArgs, precision: str, device: torch.device) -> int:
    """Number of weights that the packed linear layers hold, padding included."""
    block = _fbgemm_block(precision) if device.type == "cpu" else 1
    total = 0
    for name, (out, *columns) in args.weight_shapes().items():
        if columns and name != EMBEDDING:
            groups = _output_groups(columns[0]) if precision == "int8" and name == OUTPUT else 1
            total += out * groups * block * math.ceil(columns[0] / (groups * block))
    return total


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
    examples: Examples | None = None,
) -> tuple[Transformer, Background]:
    """The network with the file's weights in it, and what is still to be done for their speed.

    Built without memory and filled with the file's own tensors, so that there is never a second copy.
    files: where the weights are from, by which quantised ones are kept for the next time. examples: what 4 bits are
    calibrated with; without any, their scales are searched for.
    """
    packed = _is_packed(precision, device)
    if not packed:
        weights = _as_tensors(weights, DTYPES[precision])
    elif not _stay_lazy(args, precision, device):
        weights = _as_tensors(weights)
    with torch.device("meta"):
        model = Transformer(args)
    if device.type != "cpu":
        weights = _each(weights, lambda weight: as_tensor(weight).to(device))
    packing = _store(model, weights, precision, files, examples) if packed else Background("packing", [])
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    if not packed and is_tied(weights):
        model.output.weight = model.tok_embeddings.weight
    if packed:
        _convert_norms(model, _activations(device))
    model.eval().requires_grad_(False)
    model.freqs = model.freqs.to(device)
    return model, packing


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


def _activations(device: torch.device) -> torch.dtype:
    """What goes from layer to layer where the linear layers are exchanged."""
    return torch.bfloat16 if device.type != "cpu" and _computes_bf16(device) else torch.float32


def _is_packed(precision: str, device: torch.device) -> bool:
    """Whether the linear layers are exchanged; else they are torch's own."""
    return precision in BITS or (precision == "fp16" and device.type == "cpu")


def _in_panels(precision: str, device: torch.device) -> bool:
    """Whether weights are quantised in blocks, for the kernels."""
    if precision == "int8":
        return device.type == "cpu" and kernels.possible()
    return precision == "int4"


def _stay_lazy(args: ModelArgs, precision: str, device: torch.device) -> bool:
    """Whether weights that are no tensors yet stay so until they are packed.

    A small model becomes float32 at once, because the first answers are faster then, unless it is to save memory.
    """
    return device.type == "cpu" and (precision in BITS or args.n_parameters(tied=False) > _SMALL)


_SMALL = 1 << 28  # weights: 1 GB of float32


def _as_tensors(weights: Mapping[str, Weight], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All as tensors, of `dtype` where one is given; those that are so already stay the same, and a tied pair one."""
    return _each(weights, lambda weight: as_tensor(weight, dtype))


def _each(weights: Mapping[str, Weight], turn: Callable[[Weight], Tensor]) -> dict[str, Tensor]:
    turned = {id(weight): turn(weight) for weight in {id(weight): weight for weight in weights.values()}.values()}
    return {name: turned[id(weight)] for name, weight in weights.items()}


# Projections that read the same vector stand together: small ones become one product of at most so many weights.
_FUSED = 1 << 23  # more of them take longer to read than a call costs
_LAYER = 1 << 40  # in panels a layer's are always whole, see `step`
# Weights that are packed by one job: some tenths of a second, and what more than one thread can share.
_PIECE = 1 << 24
# A third of the error of 8-bit weights comes from the output projection: up to 4 groups of its columns have scales.
_OUTPUT_GROUPS = 4


def _output_groups(width: int) -> int:
    """Column groups of an output projection of `width` columns: at most one per block, since groups are padded."""
    return min(_OUTPUT_GROUPS, math.ceil(width / _fbgemm_block("int8")))


def _store(
    model: Transformer,
    weights: Mapping[str, Weight],
    precision: str,
    files: Sequence[Path],
    examples: Examples | None,
) -> Background:
    """Exchange the linear layers: at once they multiply the weights as they are, and the `Background` packs those."""
    device = weights[EMBEDDING].device
    panels = _in_panels(precision, device)
    slots: list[_Slot] = []
    for i in range(len(model.layers)):
        for group in GROUPS:
            names = [f"layers.{i}.{name}" for name in group]
            slots += _exchange(model, names, weights, most=_LAYER if panels else _FUSED)
    groups = _output_groups(model.args.dim) if precision == "int8" and not panels else 1
    slots += _exchange(model, ["output"], weights, groups=groups)
    model.tok_embeddings = Embedding(weights[EMBEDDING], _activations(device))
    if device.type == "cpu" and packs():
        for block in model.layers:
            cast(TransformerBlock, block).attention.attend = attend_in_blocks
    pack: Callable[[int, _Slot], None]
    jobs: list[Job] = []
    if panels:
        made, curvatures = "", None
        if precision == "int4" and examples and device.type == "cpu":
            made = f"{examples.name}, {model.args}"
            curvatures = _curvatures(weights, model.args, slots, examples, files)
        pack = _Blocks(files, slots, BITS[precision], curvatures, made).pack
        if not kernels.load():
            jobs.append((kernels.build, 0))  # no weight is packed by that
    else:
        pack = _pack_half if precision == "fp16" else _Quantiser(files, slots).pack
    jobs += [(partial(pack, i, slot), slot.size) for i, slot in enumerate(slots)]
    return Background("packing", jobs, torch.get_num_threads(), after=give_back)


@dataclass(frozen=True)
class _Slot:
    """A place for a form: that of `weights` below each other, (out, in) in all, in `groups` groups of columns."""

    stack: Stack
    index: int
    weights: Sequence[Weight]
    groups: int = 1

    @property
    def size(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """Of all together."""
        return sum(map(len, self.weights)), self.weights[0].shape[1]

    @property
    def columns(self) -> list[slice]:
        """The groups, one next to the other."""
        edges = torch.arange(self.weights[0].shape[1]).tensor_split(self.groups)
        return [slice(int(edge[0]), int(edge[-1]) + 1) for edge in edges]

    def weight(self) -> Tensor:
        tensors = [as_tensor(weight) for weight in self.weights]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def fill(self, form: Form) -> None:
        self.stack.forms[self.index] = form


def _exchange(
    model: Transformer,
    names: Sequence[str],
    weights: Mapping[str, Weight],
    *,
    groups: int = 1,
    most: int = 0,
) -> list[_Slot]:
    """Put projections in the place of linear layers. most: weights up to which several become one product."""
    found = [weights[f"{name}.weight"] for name in names]
    if len(found) > 1 and sum(weight.numel() for weight in found) <= most:
        stack = Stack([Blocks(found)])
        shared = Shared(stack, [len(weight) for weight in found])
        for part, name in enumerate(names):
            model.set_submodule(name, SharedProjection(shared, part))
        return [_Slot(stack, 0, found)]
    slots = []
    for name, weight in zip(names, found, strict=True):
        pieces = [weight] if weight.numel() <= most else weight.split(max(1, _PIECE // weight.shape[1]))
        stack = Stack([Blocks([piece]) for piece in pieces])
        model.set_submodule(name, Projection(stack))
        slots += [_Slot(stack, i, [piece], groups) for i, piece in enumerate(pieces)]
    return slots


def _pack_half(_i: int, slot: _Slot) -> None:
    weight = slot.weight()
    low, high = weight.aminmax()  # which copies nothing
    # Else it stays as it is; what is no number does too.
    if torch.maximum(-low, high) <= torch.finfo(torch.float16).max:
        slot.fill(Half(weight) if packs() else Blocks([weight.half()]))


@dataclass(frozen=True)
class Examples:
    """Text that 4-bit weights are calibrated with. name: of it. windows: makes it tokens, for the network given."""

    name: str
    windows: Callable[[Transformer], Sequence[Tensor]]


class _Blocks:
    """Fills slots with weights in panels, kept ones where there are.

    curvatures: of all slots, one after the other, for calibration; without them each piece is made by itself.
    """

    def __init__(
        self,
        files: Sequence[Path],
        slots: Sequence[_Slot],
        bits: int,
        curvatures: Iterator[_ToCalibrate] | None,
        made: str,
    ):
        self._bits = bits
        types = torch.int8 if bits == 8 else torch.uint8, torch.float16
        layouts = [tuple(zip(panel_shapes(slot.shape, bits), types, strict=True)) for slot in slots]
        self._kept = KeptPieces(files, cast(list[Layout], layouts), made)
        self._curvatures = curvatures
        self._made: dict[int, _Piece] = {}
        self._lock = threading.Lock()

    def pack(self, i: int, slot: _Slot) -> None:
        piece = self._kept.get(i)
        if piece is None:
            piece = _searched(slot, self._bits) if self._curvatures is None else self._in_turn(i, self._curvatures)
            if piece is None:
                return  # it stays as it is
            self._kept.put(i, *piece)
        device = slot.weights[0].device
        slot.fill(Panels(piece[0].to(device), piece[1].to(device), slot.shape))

    def _in_turn(self, i: int, curvatures: Iterator[_ToCalibrate]) -> _Piece:
        with self._lock:
            while i not in self._made:
                j, slot, curvature = next(curvatures)  # its forward passes run even if the piece is kept
                self._made[j] = self._kept.get(j) or _searched(slot, self._bits, curvature())
            return self._made.pop(i)


_Piece = tuple[Tensor, Tensor] | None
"""Values and scales in panels; None of weights that are not finite."""
_ToCalibrate = tuple[int, _Slot, Callable[[], Curvature | None]]
"""A slot's index, the slot, and what makes its curvature."""


def _searched(slot: _Slot, bits: int, curvature: Curvature | None = None) -> _Piece:
    try:
        return to_panels(slot.weights, bits, curvature, go_on)
    except ValueError:
        return None


def _curvatures(
    weights: Mapping[str, Weight], args: ModelArgs, slots: Sequence[_Slot], examples: Examples, files: Sequence[Path]
) -> Iterator[_ToCalibrate]:
    """All slots with functions that make their curvatures, in the order in which a token comes by.

    Another network reads the examples, for this one is in use: that of int8, which is fast and near enough.
    """
    require_memory(_calibration_needed(weights, args), "Calibrating int4")
    model, packing = build(weights, args, "int8", torch.device("cpu"), files)
    try:
        packing.wait(lambda *_: go_on())
    finally:
        packing.close()
    waiting = enumerate(slots)
    for names, products in hessians(model, examples.windows(model), go_on):
        curvature = cache(partial(_curvature, products))  # once for all pieces of the output projection
        for i, slot in waiting if names == ["output"] else islice(waiting, 1):
            yield i, slot, curvature


def _curvature(products: Tensor) -> Curvature | None:
    missing = -len(products) % BLOCK[4]
    return Curvature(F.pad(products, (0, missing, 0, missing))) if products.isfinite().all() else None


class _Quantiser:
    """Fills slots with 8-bit weights, kept ones where there are."""

    def __init__(self, files: Sequence[Path], slots: Sequence[_Slot]):
        layouts: list[Layout] = [
            (((slot.shape[0], columns.stop - columns.start), torch.int8), ((slot.shape[0],), torch.float32))
            for slot in slots
            for columns in slot.columns
        ]
        self._first = list(accumulate((len(slot.columns) for slot in slots), initial=0))  # part of each slot
        self._kept = KeptPieces(files, layouts)

    def pack(self, i: int, slot: _Slot) -> None:
        if slot.weights[0].device.type != "cpu":
            slot.fill(_side_by_side([Blocks([piece[0]], [piece[1]]) for piece in quantise(slot.weights, slot.columns)]))
            return
        parts = range(self._first[i], self._first[i] + len(slot.columns))
        found = [piece for piece in map(self._kept.get, parts) if piece is not None]
        if len(found) < len(parts):
            found = quantise(slot.weights, slot.columns)
            for part, (values, scales) in zip(parts, found, strict=True):
                self._kept.put(part, values, scales)
        slot.fill(_side_by_side([Int8(*piece) if packs() else Blocks(piece[:1], piece[1:]) for piece in found]))


def _side_by_side(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else Columns(forms)
