"""The license of a model, as its own files state it."""

from __future__ import annotations

import re
from pathlib import Path

from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.small_files import read_start, without_mark

_MAX_BYTES = 1 << 16


def read_license(directory: Path) -> str | None:
    """What the front matter of README.md names, or else the first line of LICENSE; None where neither says any.

    Beside `original/`, where Hugging Face's repositories of Meta's models have Meta's own files, it is the directory
    above that says it. Never an error: a file that cannot be read states nothing.
    """
    if license := _stated(directory):
        return license
    return _stated(directory.parent) if directory.name == "original" else None


def _stated(directory: Path) -> str | None:
    front = re.match(r"---[ \t]*\n(.*?)\n---", _text(directory / "README.md"), re.DOTALL)
    fields = dict(re.findall(r"^(license\w*):[ \t]*(?:\n[ \t]*- )?(.+)$", front[1] if front else "", re.MULTILINE))
    license = fields.get("license")
    if license in (None, "other"):  # then the name says more, where there is one
        license = fields.get("license_name", license)
    try:
        files = sorted(directory.glob("LICENSE*"))
    except OSError:
        files = []
    lines = (line.strip() for file in files for line in _text(file).splitlines())
    license = (license or "").strip("\"'[] \t") or next(filter(None, lines), None)
    return sanitize(license) if license else None


def _text(path: Path) -> str:
    """The beginning of a file as text; empty if it cannot be read."""
    try:
        start = without_mark(read_start(path, _MAX_BYTES), path.name)
    except (OSError, CheckpointError):
        return ""
    return start.decode("utf-8", errors="replace").replace("\r\n", "\n")
