"""Reference dequantization of GGUF blocks, one weight at a time.

Independent of llama_scratch and of the gguf package. A block consists of one or two float16 scales and small
integers. Legacy blocks have 32 weights; K-quant blocks have 256 weights in groups with their own scales.
Source: the `block_*` structures in ggml-common.h and `dequantize_row_*` in ggml-quants.c of ggml-org/ggml.

`python -m tests.helpers.gguf_reference .../libggml-base.so` prints the digests of ggml's own results for these blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
# (scale, integer, offset): each weight is scale · integer + offset, each step rounded to float32.
Weights = Iterator[tuple[np.float32, int, np.float32]]
ZERO = np.float32(0)


@dataclass(frozen=True)
class Kind:
    """A type of block.

    Args:
        number: GGUF's number of the type.
        weights: Weights per block.
        size: Bytes per block.
        halves: Offsets of the float16 scales.
        decode: Decodes one block; None if only the digests of ggml's results are recorded.
    """

    number: int
    weights: int
    size: int
    halves: tuple[int, ...]
    decode: Callable[[bytes], Weights] | None = None


def half(block: bytes, place: int) -> np.float32:
    """The float16 at an offset of the block."""
    return np.float32(struct.unpack_from("<e", block, place)[0])


def bit(data: bytes, place: int) -> int:
    """One bit of a byte sequence, counted from the lowest bit of the first byte."""
    return data[place // 8] >> (place % 8) & 1


def nibbles(data: bytes) -> Iterator[int]:
    """The lower four bits of all bytes, then the upper four bits of all bytes."""
    return chain((byte & 15 for byte in data), (byte >> 4 for byte in data))


def q8_0(block: bytes) -> Weights:
    for number in struct.unpack_from("<32b", block, 2):
        yield half(block, 0), number, ZERO


def q4_0(block: bytes) -> Weights:
    for number in nibbles(block[2:]):
        yield half(block, 0), number - 8, ZERO


def q4_1(block: bytes) -> Weights:
    for number in nibbles(block[4:]):
        yield half(block, 0), number, half(block, 2)


def q5_0(block: bytes) -> Weights:
    for i, number in enumerate(nibbles(block[6:])):
        yield half(block, 0), number + 16 * bit(block[2:6], i) - 16, ZERO


def q5_1(block: bytes) -> Weights:
    for i, number in enumerate(nibbles(block[8:])):
        yield half(block, 0), number + 16 * bit(block[4:8], i), half(block, 2)


def six_bits(packed: bytes) -> list[tuple[int, int]]:
    """Unpack scale and minimum of eight groups, six bits each, from twelve bytes.

    For the first four groups they are the lower six bits of the first eight bytes. For the other groups the lower
    four bits are in the last four bytes, and the upper two bits are the upper bits of the first eight bytes.
    """
    found = [(packed[i] & 63, packed[4 + i] & 63) for i in range(4)]
    for i in range(4):
        low = packed[8 + i]
        found.append((low & 15 | (packed[i] >> 6) << 4, low >> 4 | (packed[4 + i] >> 6) << 4))
    return found


def q4_k(block: bytes) -> Weights:
    for group, (scale, minimum) in enumerate(six_bits(block[4:16])):
        step, added = half(block, 0) * np.float32(scale), -(half(block, 2) * np.float32(minimum))
        for byte in block[16 + group // 2 * 32 :][:32]:
            yield step, byte >> 4 if group % 2 else byte & 15, added


def q5_k(block: bytes) -> Weights:
    for group, (scale, minimum) in enumerate(six_bits(block[4:16])):
        step, added = half(block, 0) * np.float32(scale), -(half(block, 2) * np.float32(minimum))
        for i, byte in enumerate(block[48 + group // 2 * 32 :][:32]):
            number = byte >> 4 if group % 2 else byte & 15
            yield step, number + 16 * (block[16 + i] >> group & 1), added


def q6_k(block: bytes) -> Weights:
    scales = struct.unpack_from("<16b", block, 192)
    for i in range(256):
        part, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        low = block[part * 64 + place % 64]
        number = (low >> 4 if quarter > 1 else low & 15) | (block[128 + part * 32 + column] >> 2 * quarter & 3) << 4
        yield half(block, 208) * np.float32(scales[i // 16]), number - 32, ZERO


KINDS = {
    "Q4_0": Kind(2, 32, 18, (0,), q4_0),
    "Q4_1": Kind(3, 32, 20, (0, 2), q4_1),
    "Q5_0": Kind(6, 32, 22, (0,), q5_0),
    "Q5_1": Kind(7, 32, 24, (0, 2), q5_1),
    "Q8_0": Kind(8, 32, 34, (0,), q8_0),
    "Q4_K": Kind(12, 256, 144, (0, 2), q4_k),
    "Q5_K": Kind(13, 256, 176, (0, 2), q5_k),
    "Q6_K": Kind(14, 256, 210, (208,), q6_k),
}
OTHERS = {
    "Q2_K": Kind(10, 256, 84, (80, 82)),
    "Q3_K": Kind(11, 256, 110, (108,)),
    "IQ2_XXS": Kind(16, 256, 66, (0,)),
    "IQ2_XS": Kind(17, 256, 74, (0,)),
    "IQ3_XXS": Kind(18, 256, 98, (0,)),
    "IQ1_S": Kind(19, 256, 50, (0,)),
    "IQ4_NL": Kind(20, 32, 18, (0,)),
    "IQ3_S": Kind(21, 256, 110, (0,)),
    "IQ2_S": Kind(22, 256, 82, (0,)),
    "IQ4_XS": Kind(23, 256, 136, (0,)),
    "TQ1_0": Kind(34, 256, 54, (52,)),
    "TQ2_0": Kind(35, 256, 66, (64,)),
}


def dequantize(kind: str, data: bytes) -> Floats:
    """Dequantize a row of blocks to float32."""
    size, decode = KINDS[kind].size, KINDS[kind].decode
    assert decode is not None
    found = chain.from_iterable(decode(data[place : place + size]) for place in range(0, len(data), size))
    steps, numbers, added = zip(*found, strict=True)
    product: Floats = np.array(steps, np.float32) * np.array(numbers, np.float32)
    return product + np.array(added, np.float32)


def random_blocks(kind: str, rows: int, columns: int, *, seed: str = "0", spread: float = 0.01) -> bytes:
    """Generate blocks of random bytes with random scales in [-spread, spread].

    Args:
        kind: Type of block.
        rows: Number of rows.
        columns: Weights per row.
        seed: Random seed.
        spread: Largest absolute value of a scale.
    """
    chance = random.Random(f"{kind} {rows} {columns} {seed}")
    held = (KINDS | OTHERS)[kind]
    data = bytearray(chance.randbytes(rows * columns // held.weights * held.size))
    for block in range(0, len(data), held.size):
        for place in held.halves:
            struct.pack_into("<e", data, block + place, chance.uniform(-spread, spread))
    return bytes(data)


def digest(weights: Floats) -> str:
    """Hash every bit of some weights; -0 counts as 0."""
    return hashlib.sha256((weights + ZERO).astype("<f4").tobytes()).hexdigest()[:16]


def main() -> None:
    """Dequantize random blocks with ggml's shared library and print the digests."""
    library = ctypes.CDLL(sys.argv[1])
    for kind in KINDS | OTHERS:
        data = random_blocks(kind, 4, 512)
        out = np.empty(4 * 512, np.float32)
        name = kind.replace("Q", "q") if kind.endswith("K") else kind.lower()
        function = library[f"dequantize_row_{name}"]
        function(data, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(out.size))
        print(f'    "{kind}": "{digest(out)}",')


if __name__ == "__main__":
    main()
