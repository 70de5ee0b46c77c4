"""Run the program and truncate a mapped file meanwhile.

    python -m tests.helpers.shrinking FILE PLACE [OPTIONS]

FILE is a glob. PLACE is `module:function`: the file is truncated to 0 bytes before each call of the function. The
checks for changed files are off until SIGBUS, so that SIGBUS ends the program; a ! after PLACE keeps them on.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from importlib import import_module
from typing import Any

from llama_scratch.errors import CheckpointError
from llama_scratch.system import mapped_files


def main() -> None:
    """Patch the function and run the command line."""
    pattern, place = sys.argv[1:3]
    del sys.argv[1:3]
    check, changed_file = mapped_files.MappedFiles.check, mapped_files.changed_file
    if not place.endswith("!"):
        mapped_files.MappedFiles.check = lambda self: None  # type: ignore[method-assign]

    def checked() -> CheckpointError | None:
        mapped_files.MappedFiles.check = check  # type: ignore[method-assign]
        return changed_file()

    mapped_files.changed_file = checked
    module, _, name = place.removesuffix("!").partition(":")
    home = import_module(module)
    for part in name.split(".")[:-1]:
        home = getattr(home, part)
    function = getattr(home, name.rpartition(".")[2])

    def cut(*arguments: Any, **options: Any) -> Any:
        for file in glob(pattern):
            os.truncate(file, 0)
        return function(*arguments, **options)

    setattr(home, name.rpartition(".")[2], cut)
    from llama_scratch.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
