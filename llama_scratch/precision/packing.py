"""Pack the weights of linear layers into panels of 8 or 4 bits in the background.

First, `replace_linears` replaces each linear layer by a module that multiplies the mapped weights, and returns a
`PackTarget` for each. For each target, `BlockPacker` quantizes the weights, or reads them from the cache, and gives the
module its new weight format. For int4, `hessians_in_turn` computes the Hessians of one target after another.
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
    """A replaced linear layer, or several fused ones, with the weights to pack.

    Attributes:
        layer: The layer whose weight format will be replaced.
        weights: Its weights in the file, stacked along the rows: (out, in) in total.
    """

    layer: FusedOutput | PackedLinear
    weights: Sequence[Weight]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the stacked weights."""
        return sum(map(len, self.weights)), self.weights[0].shape[1]


def replace_linears(model: Transformer, weights: Mapping[str, Weight]) -> list[PackTarget]:
    """Replace the linear layers by modules that multiply the file's weights.

    Layers with the same input are fused.

    Args:
        model: The network.
        weights: The file's weights, by Meta's names.

    Returns:
        The replaced layers, in order of execution.
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
    """Packs the weights of targets into panels, or reads them from the cache.

    Args:
        files: The weight files.
        targets: All layers to pack.
        bits: 8 or 4.
        hessians: See `hessians_in_turn`. None for quantization without calibration.
        recipe: Other inputs that determine the result, such as the calibration text.
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
        self._calibrated: dict[int, PackedPiece | None] = {}  # index → piece that `pack` has not taken yet
        self._lock = threading.Lock()

    def pack(self, i: int, target: PackTarget) -> None:
        """Pack a target's weights and replace its format, unless they cannot be quantized.

        Args:
            i: Index of the target.
            target: The target.
        """
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
                j, target, hessian = next(hessians)  # runs the target's forward passes, even if it is in the cache
                self._calibrated[j] = self._cache.get(j) or quantize_piece(target, self._bits, hessian())
            return self._calibrated.pop(i)


PackedPiece = tuple[Tensor, Tensor]
"""Values and scales of a weight in panels."""
CalibrationStep = tuple[int, PackTarget, Callable[[], Hessian | None]]
"""The index of a target, the target, and a function that returns its Hessian."""


def quantize_piece(target: PackTarget, bits: int, hessian: Hessian | None = None) -> PackedPiece | None:
    """Quantize a target's weights.

    Args:
        target: The target.
        bits: 8 or 4.
        hessian: Its Hessian, for calibration.

    Returns:
        The weights in panels; None if a weight is NaN or too large.
    """
    try:
        return to_panels(target.weights, bits, hessian, report_progress)
    except ValueError:
        return None


def hessians_in_turn(
    targets: Sequence[PackTarget], text: CalibrationText, reader: Callable[[], Transformer]
) -> Iterator[CalibrationStep]:
    """Run the calibration text through a network, and yield each target's Hessian.

    Args:
        targets: All layers, as returned by `replace_linears`.
        text: The calibration text.
        reader: Builds the network that reads the text.
    """
    model = reader()
    products_by_target = collect_hessians(model, text.windows(model), report_progress)
    for i, (target, (_, products)) in enumerate(zip(targets, products_by_target, strict=True)):
        yield i, target, partial(_hessian, products)


def _hessian(products: Tensor) -> Hessian | None:
    missing = -len(products) % BLOCK_SIZE[4]
    return Hessian(F.pad(products, (0, missing, 0, missing))) if products.isfinite().all() else None
