"""Weights in their file's format, converted row by row when they are used.

This saves memory for two kinds of weights: GGUF's quantized blocks, which would be several times larger as float32, and
the shards of a large model, which would be copied to join them. A mapped bfloat16 tensor does not need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

# Weights to convert at a time: 4 MB of float32, which fit into the CPU's cache.
_WEIGHTS_PER_BLOCK = 1 << 20


class LazyWeight(ABC):
    """A weight, (out, in), that is not a tensor yet.

    Attributes:
        shape: (out, in).
        dtype: Dtype of the tensors that `rows` returns.
        nbytes: Size in the file.
    """

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, nbytes: int):
        self.shape = shape
        self.dtype = dtype
        self.nbytes = nbytes

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Convert a range of rows: (stop − start, in) of `dtype`.

        Args:
            start: First row.
            stop: Row after the last one.

        Raises:
            CheckpointError: If the file is damaged.
        """

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def split(self, n: int) -> list[LazyWeight]:
        """Split into parts of `n` rows. The last part can have fewer."""
        starts = range(0, len(self), n)
        return [_RowRange(self, start, min(start + n, len(self))) for start in starts]

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the whole weight as a tensor, converted block by block."""
        step = max(1, _WEIGHTS_PER_BLOCK // self.shape[1])
        if len(self) <= step:
            return self.rows(0, len(self)).to(dtype)
        out = torch.empty(self.shape, dtype=dtype)
        for start in range(0, len(self), step):
            out[start : start + step] = self.rows(start, min(start + step, len(self)))
        return out


class _RowRange(LazyWeight):
    """A range of rows of another weight."""

    def __init__(self, whole: LazyWeight, start: int, stop: int):
        count = stop - start
        super().__init__((count, whole.shape[1]), whole.dtype, whole.nbytes * count // len(whole))
        self._whole = whole
        self._start = start

    def rows(self, start: int, stop: int) -> Tensor:
        return self._whole.rows(self._start + start, self._start + stop)


class GGUFBlockWeight(LazyWeight):
    """Rows of quantized blocks in one of GGUF's formats.

    Args:
        shape: (out, in).
        blocks: The blocks' bytes, (out, bytes per row) uint8.
        format: Name of the format, such as "Q4_1".
        dequantize: Function that converts the rows from `start` to `stop` to float32, (stop − start, in).
    """

    def __init__(self, shape: tuple[int, int], blocks: Tensor, format: str, dequantize: Callable[[int, int], Tensor]):
        super().__init__(shape, torch.float32, blocks.nbytes)
        self.blocks = blocks
        self.format = format
        self._dequantize = dequantize

    def rows(self, start: int, stop: int) -> Tensor:
        return self._dequantize(start, stop)


class ShardedWeight(LazyWeight):
    """A weight that is split along an axis over several files."""

    def __init__(self, pieces: Sequence[Tensor], axis: int):
        rows, columns = pieces[0].shape
        sizes = [piece.shape[axis] for piece in pieces]
        shape = (sum(sizes), columns) if axis == 0 else (rows, sum(sizes))
        super().__init__(shape, pieces[0].dtype, sum(piece.nbytes for piece in pieces))
        self.pieces = list(pieces)
        self.axis = axis

    def rows(self, start: int, stop: int) -> Tensor:
        if self.axis == 1:
            return torch.cat([piece[start:stop] for piece in self.pieces], dim=1)
        parts, first = [], 0
        for piece in self.pieces:
            if start < first + len(piece) and first < stop:
                parts.append(piece[max(start - first, 0) : stop - first])
            first += len(piece)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


Weight = Tensor | LazyWeight

# Dtypes that the kernels multiply without conversion, see cpp/rows.h.
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
KERNEL_FORMATS = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}


def kernel_operands(weight: Weight) -> list[tuple[Tensor, str]]:
    """Return the tensors of a weight for the kernels, with the names of their formats.

    The tensors are stacked along the rows. The list is empty if the kernels do not support a format.
    """
    if isinstance(weight, GGUFBlockWeight):
        return [(weight.blocks, weight.format)] if weight.format in KERNEL_FORMATS else []
    pieces = weight.pieces if isinstance(weight, ShardedWeight) and weight.axis == 0 else [weight]
    if all(isinstance(piece, Tensor) and piece.dtype in _FLOATS and piece.is_contiguous() for piece in pieces):
        return [(piece, _FLOATS[piece.dtype]) for piece in cast(list[Tensor], pieces)]
    return []


def as_tensor(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the whole weight as a tensor.

    Args:
        weight: The weight.
        dtype: Dtype of the result. By default, the weight's own.
    """
    return weight.to(dtype or weight.dtype)
