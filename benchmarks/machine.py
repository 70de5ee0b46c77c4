"""Description of the machine: CPU, features and instruction set of our kernels."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from llama_scratch.precision import kernels

# CPU features that affect the speed of matrix products.
FEATURES = (
    *("f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
# Environment variables that limit our kernels and torch's libraries to AVX2, as in `make instruction-sets`.
ONLY_AVX2 = {
    "LLAMA_SCRATCH_KERNELS": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def machine(threads: int | None = None) -> dict[str, Any]:
    """Describe this machine for a .json file. Compiles our kernels if necessary.

    Args:
        threads: Number of threads of the measurement. Default: torch's.

    Returns:
        The CPU, its features, and the instruction set of our kernels ("" without kernels).
    """
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "features": features(),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "kernels": kernel_instructions(),
    }


def features() -> list[str]:
    """The features from `FEATURES` that this CPU has."""
    flags = (_cpu_field("flags") or _cpu_field("Features")).split()
    return [feature for feature in FEATURES if feature in flags]


def kernel_instructions() -> str:
    """Instruction set of our compiled kernels, or "" without kernels."""
    return str(torch.ops.llama_scratch.machine()) if kernels.build() else ""


def has_more_than_avx2(features: list[str]) -> bool:
    """Whether our kernels can use more than AVX2. If so, AVX2 is measured separately."""
    return "avx2" in features and "avx512f" in features


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
