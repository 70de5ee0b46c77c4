"""Shared test helpers: models, servers, terminals, texts and references."""

from __future__ import annotations

import os
from pathlib import Path

# The folder of the repository, for tests that start programs in it or read its files.
ROOT = Path(__file__).parent.parent.parent
# The downloaded model is cached in the repository, not in the home.
CACHE = ROOT / ".cache"
SMOLLM2_FP32 = CACHE / "SmolLM2-135M-Instruct.F32.gguf"
# Instruction set for which tests compile the kernels, see `make instruction-sets`.
KERNELS = os.environ.get("TEST_KERNELS", "native")
