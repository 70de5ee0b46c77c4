"""Measure the peak resident memory of one prompt, including mapped file pages.

    python -m benchmarks.peak_memory MODEL_DIRECTORY

Runs the program as a child process. Prints the peak memory that the kernel reports, and the size of the weights.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    model_dir = parser.parse_args().model_dir
    weights = (model_dir / "consolidated.00.pth").stat().st_size
    command = [sys.executable, "-m", "llama_scratch", "--model-dir", str(model_dir), "--prompt", "My name is"]
    subprocess.run(command, check=True)
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak {peak / 1e9:.3f} GB, weights {weights / 1e9:.3f} GB, ratio {peak / weights:.3f}")


if __name__ == "__main__":
    main()
