"""Pack the weights of linear layers into panels of 8 or 4 bits, in the background, while the network is in memory.

`replace_linears` first gives each linear layer the file's own weights, to be multiplied as they are mapped. Each
`PackTarget` is one piece of work: `BlockPacker` quantizes its weights, or takes them from the cache of an earlier run,
and exchanges its format. For int4 `hessians_in_turn` calibrates the pieces one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_scratch.config import OUTPUT
from llama_scratch.model import Transformer
from llama_scratch.precision.calibration import LINEARS_BY_INPUT, CalibrationText, collect_hessians
from llama_scratch.precision.lazy_weight import Weight
from llama_scratch.precision.linear import FusedLinearPart, FusedOutput, PackedLinear
from llama_scratch.precision.panels import Panels, panel_shapes, to_panels
from llama_scratch.precision.quantize import BLOCK_SIZE, Hessian
from llama_scratch.precision.rows import Rows
from llama_scratch.precision.weight_cache import Layout, PackedWeightCache
from llama_scratch.system.jobs import report_progress


@dataclass(frozen=True)
class PackTarget:
    """A replaced linear layer, or several that were fused, and its weights in the file.

    Attributes:
        layer: The layer whose format is to be exchanged.
        weights: Its weights below each other, (out, in) in all.
    """

    layer: FusedOutput | PackedLinear
    weights: Sequence[Weight]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all weights together."""
        return sum(map(len, self.weights)), self.weights[0].shape[1]


def replace_linears(model: Transformer, weights: Mapping[str, Weight]) -> list[PackTarget]:
    """Replace the linear layers by modules that multiply the file's weights; those that read the same x are fused.

    Returns the replaced layers in the order in which a token passes them.
    """
    targets = []
    for i in range(len(model.layers)):
        for group in LINEARS_BY_INPUT:
            names = [f"layers.{i}.{name}" for name in group]
            matrices = [weights[f"{name}.weight"] for name in names]
            fused = FusedOutput(Rows(matrices), [len(matrix) for matrix in matrices])
            for part, name in enumerate(names):
                model.set_submodule(name, FusedLinearPart(fused, part))
            targets.append(PackTarget(fused, matrices))
    output = PackedLinear(Rows([weights[OUTPUT]]))
    model.set_submodule("output", output)
    return [*targets, PackTarget(output, [weights[OUTPUT]])]


class BlockPacker:
    """Packs the weights of targets into panels, or takes those that an earlier run packed.

    Args:
        files: The files that the weights come from.
        targets: All layers to pack.
        bits: 8 or 4.
        hessians: See `hessians_in_turn`; None to quantize each target by itself.
        recipe: What else decides the result, such as the text that it is calibrated with.
    """

    def __init__(
        self,
        files: Sequence[Path],
        targets: Sequence[PackTarget],
        bits: int,
        hessians: Iterator[CalibrationStep] | None,
        recipe: str,
    ):
        self._bits = bits
        types = torch.int8 if bits == 8 else torch.uint8, torch.float16
        layouts = [tuple(zip(panel_shapes(target.shape, bits), types, strict=True)) for target in targets]
        self._cache = PackedWeightCache(files, cast(list[Layout], layouts), recipe)
        self._hessians = hessians
        self._calibrated: dict[int, PackedPiece | None] = {}  # pieces that no `pack` took yet
        self._lock = threading.Lock()

    def pack(self, i: int, target: PackTarget) -> None:
        """Exchange the format of target number i. Weights that cannot be quantized keep theirs."""
        piece = self._cache.get(i)
        if piece is None:
            if self._hessians is None:
                piece = quantize_piece(target, self._bits)
            else:
                piece = self._calibrate_up_to(i, self._hessians)
            if piece is None:
                return
            self._cache.put(i, *piece)
        device = target.weights[0].device
        target.layer.format = Panels(piece[0].to(device), piece[1].to(device), target.shape)

    def _calibrate_up_to(self, i: int, hessians: Iterator[CalibrationStep]) -> PackedPiece | None:
        with self._lock:
            while i not in self._calibrated:
                j, target, hessian = next(hessians)  # its forward passes run even if the piece is in the cache
                self._calibrated[j] = self._cache.get(j) or quantize_piece(target, self._bits, hessian())
            return self._calibrated.pop(i)


PackedPiece = tuple[Tensor, Tensor]
"""Values and scales in panels."""
CalibrationStep = tuple[int, PackTarget, Callable[[], Hessian | None]]
"""A target's index, the target, and a function that makes its Hessian."""


def quantize_piece(target: PackTarget, bits: int, hessian: Hessian | None = None) -> PackedPiece | None:
    """A target's weights in panels; None if a weight is not finite or too large."""
    try:
        return to_panels(target.weights, bits, hessian, report_progress)
    except ValueError:
        return None


def hessians_in_turn(
    targets: Sequence[PackTarget], text: CalibrationText, reader: Callable[[], Transformer]
) -> Iterator[CalibrationStep]:
    """Run a text through a network, and yield the Hessian of each target's inputs, in the order of the layers.

    Args:
        targets: All layers, as `replace_linears` returns them.
        text: The text to calibrate with.
        reader: Makes the network that reads the text.
    """
    model = reader()
    products_by_target = collect_hessians(model, text.windows(model), report_progress)
    for i, (target, (_, products)) in enumerate(zip(targets, products_by_target, strict=True)):
        yield i, target, partial(_hessian, products)


def _hessian(products: Tensor) -> Hessian | None:
    missing = -len(products) % BLOCK_SIZE[4]
    return Hessian(F.pad(products, (0, missing, 0, missing))) if products.isfinite().all() else None
