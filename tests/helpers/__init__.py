"""What test modules share: models, servers, terminals, texts, and a second implementation to compare with."""

from __future__ import annotations

import os
from pathlib import Path

# The folder of the repository, for tests that start programs in it or read its files.
ROOT = Path(__file__).parent.parent.parent
# The open model is fetched once and kept beside the sources, not in the home.
CACHE = ROOT / ".cache"
SMOLLM2_FP32 = CACHE / "SmolLM2-135M-Instruct.F32.gguf"
# The instruction set that tests compile the kernels for, see `make instruction-sets`.
KERNELS = os.environ.get("TEST_KERNELS", "native")
