"""Build the package, optionally with kernels for this CPU and torch version.

LLAMA_SCRATCH_BUILD_KERNELS=1 pip install --no-build-isolation .
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        from llama_scratch.precision.kernels import compile_into

        compile_into(Path(self.build_lib, "llama_scratch", "precision"))


class ForThisMachine(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if os.environ.get("LLAMA_SCRATCH_BUILD_KERNELS") == "1":
    setup(cmdclass={"build_py": BuildWithKernels}, distclass=ForThisMachine)
else:
    setup()
