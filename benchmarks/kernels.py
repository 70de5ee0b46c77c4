"""Measure the matrix products of kernels.cpp for each instruction set of this CPU.

    python -m benchmarks.kernels [--rounds 5] [--record]

One thread multiplies activations by random weights. For one row of activations, the weights are larger than the CPU
caches. The instruction sets alternate, and each figure is the median of the rounds. int8 and int4 results are integer
sums, so they must be bitwise equal for all instruction sets; otherwise the exit code is 1.

--record writes benchmarks/kernels.json and renders benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.report import FOLDER, versions, write_report
from benchmarks.sections.kernels import kernel_case, kernel_figures
from llama_scratch.precision import kernels
from llama_scratch.precision.dtypes import DTYPES
from llama_scratch.precision.panels import panel_shapes

SOURCE = Path(__file__).parent.parent / "tests" / "precision" / "kernels_alone.cpp"


@dataclass(frozen=True)
class Case:
    """A product of activations and weights.

    Args:
        kind: Format of the weights, one of `KINDS`.
        rows: Number of rows of activations.
        out: Number of rows of a weight.
        inputs: Number of columns of a weight.
        copies: Number of different weights of this shape, multiplied in turn to exceed the caches.
    """

    kind: str
    rows: int
    out: int
    inputs: int
    copies: int


# In the order of `Type` in cpp/rows.h.
TYPES = ["int8", "int4", "fp32", "fp16", "bf16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
KINDS = ["bf16", "fp16", "fp32", "int8", "int4", "Q8_0", "Q4_1", "Q4_K"]
PANELS = {"int8": 8, "int4": 4}
# The shapes of w1 and wq of Llama 3.2 1B.
CASES = [Case(kind, *shape) for kind in KINDS for shape in ((1, 8192, 2048, 16), (128, 2048, 2048, 1))]


def random_weight(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Create a random weight: its rows, or the values and scales of its panels.

    Args:
        case: The format and shape of the weight.
        generator: The random generator.
    """
    if bits := PANELS.get(case.kind):
        values, scales = panel_shapes((case.out, case.inputs), bits)
        return (
            torch.randint(-127, 128, values, dtype=torch.int8, generator=generator),
            torch.rand(scales, generator=generator).half() / 100,
        )
    if case.kind in DTYPES:
        return (torch.randn(case.out, case.inputs, generator=generator).to(DTYPES[case.kind]),)
    columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[case.kind]]
    shape = case.out, case.inputs // columns * size
    return (torch.randint(0, 100, shape, dtype=torch.uint8, generator=generator),)  # never NaN in float16


class Product:
    """The matrix product of kernels_alone.cpp, compiled for one instruction set.

    Args:
        folder: Where to compile it.
        name: Name of the library.
        flags: Compiler flags of the instruction set.
    """

    def __init__(self, folder: Path, name: str, flags: Sequence[str]):
        compiler = kernels.compiler()
        if compiler is None:
            sys.exit("No C++ compiler found. Install one (Debian: apt-get install g++).")
        path = folder / f"{name}.so"
        usual = ["-std=c++20", "-O3", "-ffp-contract=off", "-w", "-Wno-psabi", "-shared", "-fPIC"]
        subprocess.run([*shlex.split(compiler), *usual, *flags, str(SOURCE), "-o", str(path)], check=True)
        self._library = ctypes.CDLL(str(path))
        self._library.machine_name.restype = ctypes.c_char_p
        self.name: str = self._library.machine_name().decode()

    def __call__(self, case: Case, x: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        """Multiply x (rows, in) by the transpose of a weight (out, in) → (rows, out).

        Args:
            case: The kind and shape of the weight.
            x: Activations.
            weight: The weight's tensors.
        """
        y = torch.empty(case.rows, case.out)
        rows, out, inputs, kind = map(ctypes.c_int64, (case.rows, case.out, case.inputs, TYPES.index(case.kind)))
        data, scales = ctypes.c_void_p(weight[0].data_ptr()), ctypes.c_void_p(weight[-1].data_ptr())
        x_data, y_data = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        self._library.product_of(x_data, rows, data, scales, kind, out, inputs, y_data, ctypes.c_int64(0))
        return y


def measure(products: Sequence[Product], case: Case, rounds: int) -> tuple[int, list[float], list[Tensor]]:
    """Measure one case with each instruction set.

    Args:
        products: The products of the instruction sets.
        case: The case.
        rounds: Number of rounds.

    Returns:
        Bytes of one weight; seconds per product for each set; the result for each set.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.rows, case.inputs, generator=generator)
    weights = [random_weight(case, generator) for _ in range(case.copies)]
    samples: list[list[float]] = [[] for _ in products]
    for _ in range(rounds):
        for product, seconds in zip(products, samples, strict=True):
            start = time.perf_counter()
            for weight in weights:
                product(case, x, weight)
            seconds.append((time.perf_counter() - start) / case.copies)
    weight_bytes = sum(tensor.nbytes for tensor in weights[0])
    return (
        weight_bytes,
        [median(seconds) for seconds in samples],
        [product(case, x, weights[0]) for product in products],
    )


def measure_all(cases: Sequence[Case], folder: Path, rounds: int) -> dict[str, Any]:
    """Measure all cases with the kernels of each instruction set.

    Args:
        cases: The cases.
        folder: Where to compile the kernels.
        rounds: Number of rounds.

    Returns:
        The content of kernels.json.
    """
    here = machine(threads=1)
    sets = {"native": [flag for flag in kernels._flags() if flag.endswith("=native")], **kernels.INSTRUCTION_SETS}
    if "avx2" not in here["features"]:
        del sets["avx2"]
    products: dict[str, Product] = {}
    for name, flags in sets.items():
        product = Product(folder, name, flags)
        products.setdefault(product.name, product)  # on a CPU with only AVX2, the native build is named AVX2 too
    measured, same = [], True
    for case in cases:
        weight_bytes, seconds, results = measure(list(products.values()), case, rounds)
        if case.kind in PANELS:
            same = same and all(torch.equal(y.view(torch.int32), results[0].view(torch.int32)) for y in results)
        measured.append(
            {
                "kind": case.kind,
                "rows": case.rows,
                "out": case.out,
                "in": case.inputs,
                "weight_bytes": weight_bytes,
                "seconds": dict(zip(products, seconds, strict=True)),
            }
        )
    return {"machine": here, "versions": versions(), "rounds": rounds, "cases": measured, "same_bits": same}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record and print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write kernels.json and results.md")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for kernels.json and results.md")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        recorded = measure_all(CASES, Path(folder), options.rounds)
    if options.record:
        (options.output / "kernels.json").write_text(json.dumps(recorded, indent=1) + "\n")
        write_report(options.output)
    print(f"{recorded['machine']['cpu']} ({', '.join(recorded['machine']['features'])}), one thread")
    for case in recorded["cases"]:
        print(f"{kernel_case(case)}: {'; '.join(f'{name} {figure}' for name, figure in kernel_figures(case).items())}")
    print("The results are bitwise equal." if recorded["same_bits"] else "The results differ.")
    return 0 if recorded["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
