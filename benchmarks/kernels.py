"""Measure the products of `kernels.cpp` by themselves, for each instruction set that this CPU can run.

    python -m benchmarks.kernels [--rounds 5]

One thread multiplies random weights, of which one row of activations reads more than the caches hold. The instruction
sets take turns; each figure is the median of the rounds. Exit code 1 if two sets do not give the same bits.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.compare import machine
from llama_scratch import kernels
from llama_scratch.linear import panel_shapes

SOURCE = Path(__file__).parent.parent / "tests" / "kernels_alone.cpp"


@dataclass(frozen=True)
class Case:
    """A product: `rows` rows of activations times weights (out, in), of which there are `copies` in turn."""

    bits: int
    rows: int
    out: int
    inputs: int
    copies: int


# The shapes of w1 and wq of Llama 3.2 1B.
CASES = [Case(bits, *shape) for bits in (8, 4) for shape in ((1, 8192, 2048, 16), (128, 2048, 2048, 1))]


class Product:
    """The product of one instruction set: kernels_alone.cpp, compiled into `folder`."""

    def __init__(self, folder: Path, name: str, flags: Sequence[str]):
        compiler = kernels.compiler()
        if compiler is None:
            sys.exit("There is no C++ compiler. Install one (Debian: apt-get install g++).")
        path = folder / f"{name}.so"
        usual = ["-std=c++20", "-O3", "-ffp-contract=off", "-w", "-Wno-psabi", "-shared", "-fPIC"]
        subprocess.run([*shlex.split(compiler), *usual, *flags, str(SOURCE), "-o", str(path)], check=True)
        self._library = ctypes.CDLL(str(path))
        self._library.machine_name.restype = ctypes.c_char_p
        self.name: str = self._library.machine_name().decode()

    def __call__(self, case: Case, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        """x (rows, in) times a weight in panels → (rows, out)."""
        y = torch.empty(case.rows, case.out)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, values, scales, y)]
        sizes = [ctypes.c_int64(size) for size in (case.rows, case.out, case.inputs, case.bits)]
        self._library.product_of(
            pointers[0], sizes[0], pointers[1], pointers[2], sizes[1], sizes[2], sizes[3], pointers[3], False
        )
        return y


def measure(products: Sequence[Product], case: Case, rounds: int) -> list[tuple[float, Tensor]]:
    """Seconds per product, and its result, for each instruction set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.inputs, generator=generator)
    numbers, steps = panel_shapes((case.out, case.inputs), case.bits)
    weights = []
    for _ in range(case.copies):
        values = torch.randint(-127, 128, numbers, dtype=torch.int8, generator=generator)
        weights.append((values, torch.rand(steps, generator=generator).half() / 100))
    seconds: list[list[float]] = [[] for _ in products]
    for _ in range(rounds):
        for product, taken in zip(products, seconds, strict=True):
            start = time.perf_counter()
            for values, scales in weights:
                product(case, x, values, scales)
            taken.append((time.perf_counter() - start) / case.copies)
    return [(median(taken), product(case, x, *weights[0])) for product, taken in zip(products, seconds, strict=True)]


def main() -> int:
    """Measure, and print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    here = machine(threads=1)
    sets = {"native": [flag for flag in kernels._flags() if flag.endswith("=native")], **kernels.INSTRUCTION_SETS}
    if "avx2" not in here["features"]:
        del sets["avx2"]
    same = True
    with TemporaryDirectory() as folder:
        products = [Product(Path(folder), name, flags) for name, flags in sets.items()]
        print(f"{here['cpu']} ({', '.join(here['features'])}), one thread")
        for case in CASES:
            figures = []
            results = measure(products, case, rounds)
            for product, (seconds, y) in zip(products, results, strict=True):
                values, scales = panel_shapes((case.out, case.inputs), case.bits)
                read = torch.Size(values).numel() + 2 * torch.Size(scales).numel()
                one = f"{read / seconds / 1e9:.1f} GB/s"
                many = f"{2 * case.rows * case.out * case.inputs / seconds / 1e9:.0f} GOP/s"
                figures.append(f"{product.name} {one if case.rows == 1 else many}")
                same = same and torch.equal(y.view(torch.int32), results[0][1].view(torch.int32))
            print(f"int{case.bits}, {case.rows} {'row' if case.rows == 1 else 'rows'}: {'; '.join(figures)}")
    print("The same bits." if same else "Different bits.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
