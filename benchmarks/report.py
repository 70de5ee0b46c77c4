"""The recorded .json files → results.md: a section per benchmark, each with its tables and its bounds.

`render` is a pure function, so that a test can hold the files in the repository together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.sections import (
    formats,
    kernels,
    keystrokes,
    loading,
    microscope,
    quality,
    quality_rotated,
    speculation,
    speed,
    startup,
)

FOLDER = Path(__file__).parent
PACKAGES = ("llama-scratch", "torch", "llama-cpp-python", "ctranslate2", "transformers", "gguf")
# The name of each recorded file and the function that renders it, in the order of the report.
SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "results": speed.section,
    "kernels": kernels.section,
    "quality": quality.section,
    "quality_rotated": quality_rotated.section,
    "startup": startup.section,
    "keystrokes": keystrokes.section,
    "microscope": microscope.section,
    "loading": loading.section,
    "formats": formats.section,
    "speculation": speculation.section,
}


def versions() -> dict[str, str]:
    """The versions of all engines that are installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def render(recorded: Mapping[str, dict[str, Any]]) -> str:
    """Render results.md.

    Args:
        recorded: The content of the recorded files by name, see `SECTIONS`. A missing file has no section.
    """
    blocks = [
        "# Measured",
        "Made by `make benchmark`, `make quality`, `make formats`, `python -m benchmarks.startup`, "
        "`python -m benchmarks.kernels`, `python -m benchmarks.keystrokes`, `python -m benchmarks.microscope` and "
        "`python -m benchmarks.speculation`; not edited by hand.",
    ]
    for name, section in SECTIONS.items():
        if name in recorded:
            blocks += section(recorded[name])
    return "\n\n".join(blocks) + "\n"


def read_recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the recorded files of a folder, by name."""
    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def write_report(folder: Path) -> None:
    """Write results.md from the recorded files beside it."""
    (folder / "results.md").write_text(render(read_recorded(folder)))
