"""The license of a model, as its own files state it."""

from __future__ import annotations

import re
from pathlib import Path

from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.small_files import read_start, without_mark

_MAX_BYTES = 1 << 16


def read_license(directory: Path) -> str | None:
    """Return the license from README.md's front matter or the first line of LICENSE.

    If the directory is named `original`, as Meta's own files in a Hugging Face repository are, its parent is searched
    too.
    Files that cannot be read are skipped. Returns None if no license is stated.
    """
    if license := _stated(directory):
        return license
    return _stated(directory.parent) if directory.name == "original" else None


def _stated(directory: Path) -> str | None:
    front = re.match(r"---[ \t]*\n(.*?)\n---", _text(directory / "README.md"), re.DOTALL)
    fields = dict(re.findall(r"^(license\w*):[ \t]*(?:\n[ \t]*- )?(.+)$", front[1] if front else "", re.MULTILINE))
    license = fields.get("license")
    if license in (None, "other"):  # license_name is more specific
        license = fields.get("license_name", license)
    try:
        files = sorted(directory.glob("LICENSE*"))
    except OSError:
        files = []
    lines = (line.strip() for file in files for line in _text(file).splitlines())
    license = (license or "").strip("\"'[] \t") or next(filter(None, lines), None)
    return sanitize(license) if license else None


def _text(path: Path) -> str:
    """Return the start of a file as text; empty if it cannot be read."""
    try:
        start = without_mark(read_start(path, _MAX_BYTES), path.name)
    except (OSError, CheckpointError):
        return ""
    return start.decode("utf-8", errors="replace").replace("\r\n", "\n")
