"""What the checks of a model found, and the verdict on it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llama_scratch.errors import (
    REDOWNLOAD_HINT,
    LlamaScratchError,
    OutOfMemoryError,
    UnsupportedError,
    UsageError,
    sanitize,
)

# Digests by hashlib's names, and by those that a finding has.
DIGEST_NAMES = {"md5": "MD5", "sha256": "SHA-256", "sha1": "Git's SHA-1"}
# A verdict and `verify` name so many files or tensors.
MAX_NAMED = 8
# A file's name in a sentence about it.
_FILE_NAME = re.compile(r"[\w.+-]+\.(?:pth|safetensors|gguf|json|model|chk|md5)\b(?!/)")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    part: the file or the part of the model. check: "MD5", "SHA-256", "Git's SHA-1", "presence", "checksum",
    "structure", "support", "values", "tied" or "factor". sentence: what was found. fetch: files to fetch again.
    """

    part: str
    check: str
    result: Literal["ok", "wrong", "note"]
    sentence: str
    fetch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What `verify` found in the model at `path`. format: None where it could not even be opened."""

    name: str
    format: str | None
    path: Path
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> int:
        """How many checks failed."""
        return sum(finding.result == "wrong" for finding in self.findings)

    @property
    def fetch_again(self) -> list[str]:
        """The files to fetch again; a file whose checksum is the published one would come back as it is."""
        whole = {f.part for f in self.findings if f.result == "ok" and f.check in DIGEST_NAMES.values()}
        again = dict.fromkeys(name for f in self.findings if f.result == "wrong" for name in f.fetch)
        return [name for name in again if name not in whole]

    @property
    def verdict(self) -> str:
        """One sentence."""
        notes = sum(finding.result == "note" for finding in self.findings)
        if not self.wrong:
            noted = f", {notes} worth a note" if notes else ""
            return f"Whole: of {len(self.findings)} checks nothing is wrong{noted}."
        if all(finding.check == "support" for finding in self.findings if finding.result == "wrong"):
            return f"Not supported: {self.wrong} of {len(self.findings)} checks failed, none of them for damage."
        names = self.fetch_again[:MAX_NAMED]
        others = len(self.fetch_again) - len(names)
        more = f" and {others} more" if others else ""
        advice = f"; fetch {', '.join(names)}{more} again" if names else ""
        if not names and any(finding.fetch for finding in self.findings if finding.result == "wrong"):
            advice = "; its files are as they were written, so choose another model"
        return f"Damaged: {self.wrong} of {len(self.findings)} checks failed{advice}."

    def as_json(self) -> dict[str, Any]:
        """As `verify --json` prints it."""
        findings = [{name: value for name, value in asdict(f).items() if name != "fetch"} for f in self.findings]
        return {
            "name": self.name,
            "format": self.format,
            "path": str(self.path),
            "ok": not self.wrong,
            "verdict": self.verdict,
            "fetch_again": self.fetch_again,
            "findings": findings,
        }


def finding_of(error: LlamaScratchError, file: str) -> Finding:
    """What an error while opening or loading says; it names the file as a rule. Others than about files are raised."""
    if isinstance(error, UsageError | OutOfMemoryError):
        raise error
    named = _FILE_NAME.search(str(error))
    part = named[0] if named else sanitize(file)
    if isinstance(error, UnsupportedError):
        return Finding(part, "support", "wrong", str(error))
    return Finding(part, "structure", "wrong", str(error), (part,))


def missing_file(name: str, why: str) -> Finding:
    name = sanitize(name)
    return Finding(name, "presence", "wrong", f"It is missing, and {why}; {REDOWNLOAD_HINT}", (name,))
