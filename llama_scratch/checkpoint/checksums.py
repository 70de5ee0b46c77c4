"""Checksums that are known of a model's files: Meta's `checklist.chk`, and those that were published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, sanitize
from llama_scratch.system.small_files import without_mark

CHECKLIST = "checklist.chk"
# Bytes, several times those of the largest model; a line has some 60.
MAX_CHECKLIST = 1 << 16
_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(\S.*)")


@dataclass(frozen=True)
class PublishedFile:
    """A model's file whose checksum was published. path: its place if this package fetched it. size: in bytes."""

    name: str
    path: Path
    size: int
    sha256: str


def parse_checklist(data: bytes) -> dict[str, str]:
    """File → MD5, in lower case. A name may begin with ./, and must not leave the directory.

    Source: the format of md5sum. Raises `CheckpointError` for anything else, and where no file is named.
    """
    if len(data) > MAX_CHECKLIST:
        raise CheckpointError(f"{CHECKLIST} is too long, expected at most {MAX_CHECKLIST:,} bytes; {REDOWNLOAD_HINT}")
    sums: dict[str, str] = {}
    for number, line in enumerate(without_mark(data, CHECKLIST).decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        if not (match := _LINE.fullmatch(line.strip())):
            raise CheckpointError(
                f"Line {number} of {CHECKLIST} is '{sanitize(line)}', "
                f"expected an MD5, two spaces and a file's name; {REDOWNLOAD_HINT}"
            )
        md5, name = match[1].lower(), match[2].removeprefix("./")
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not place.parts or not name.isprintable():
            raise CheckpointError(
                f"Line {number} of {CHECKLIST} names '{sanitize(name)}', "
                f"expected a file of this directory; {REDOWNLOAD_HINT}"
            )
        if sums.setdefault(name, md5) != md5:
            raise CheckpointError(f"{CHECKLIST} has two MD5s of '{sanitize(name)}', expected one; {REDOWNLOAD_HINT}")
    if not sums:
        raise CheckpointError(f"{CHECKLIST} names no file, expected those of the model; {REDOWNLOAD_HINT}")
    return sums
