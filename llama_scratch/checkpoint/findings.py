"""The findings of `verify`, and its verdict."""

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

# hashlib's name of a digest → its name in a finding.
DIGEST_NAMES = {"md5": "MD5", "sha256": "SHA-256", "sha1": "Git's SHA-1"}
# Maximum number of files or tensors that a verdict or `verify` names.
MAX_NAMED = 8
# A file name in an error message.
_FILE_NAME = re.compile(r"[\w.+-]+\.(?:pth|safetensors|gguf|json|model|chk|md5)\b(?!/)")


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Args:
        part: The file or the part of the model that was checked.
        check: "MD5", "SHA-256", "Git's SHA-1", "presence", "checksum", "structure", "support", "values", "tied" or
            "factor".
        result: Whether the check passed (ok), failed (wrong), or found something that is not an error (note).
        sentence: Message for the user.
        fetch: Files to fetch again.
    """

    part: str
    check: str
    result: Literal["ok", "wrong", "note"]
    sentence: str
    fetch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Args:
        name: Name of the model.
        format: Its format; None if it could not be opened.
        path: The model's directory or file.
        findings: The result of each check.
    """

    name: str
    format: str | None
    path: Path
    findings: tuple[CheckResult, ...]

    @property
    def wrong(self) -> int:
        """Number of failed checks."""
        return sum(finding.result == "wrong" for finding in self.findings)

    @property
    def fetch_again(self) -> list[str]:
        """The files to fetch again, except those that already have the published checksum."""
        whole = {f.part for f in self.findings if f.result == "ok" and f.check in DIGEST_NAMES.values()}
        again = dict.fromkeys(name for f in self.findings if f.result == "wrong" for name in f.fetch)
        return [name for name in again if name not in whole]

    @property
    def verdict(self) -> str:
        """A summary of all findings, in one or two sentences."""
        notes = sum(finding.result == "note" for finding in self.findings)
        if not self.wrong:
            noted = f", {notes} with a note" if notes else ""
            return f"Intact: none of {len(self.findings)} checks failed{noted}."
        if all(finding.check == "support" for finding in self.findings if finding.result == "wrong"):
            return f"Not supported: {self.wrong} of {len(self.findings)} checks failed, but no file is damaged."
        names = self.fetch_again[:MAX_NAMED]
        others = len(self.fetch_again) - len(names)
        more = f" and {others} more" if others else ""
        advice = f". Fetch {', '.join(names)}{more} again" if names else ""
        if not names and any(finding.fetch for finding in self.findings if finding.result == "wrong"):
            advice = ". Its files match the published ones, so use another model"
        return f"Damaged: {self.wrong} of {len(self.findings)} checks failed{advice}."

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object for the command line."""
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


def finding_of(error: LlamaScratchError, file: str) -> CheckResult:
    """Turn an error from opening or loading a model into a finding.

    Args:
        error: The error.
        file: The part to name if the message does not name a file.

    Raises:
        UsageError: If that is the error.
        OutOfMemoryError: If that is the error.
    """
    if isinstance(error, UsageError | OutOfMemoryError):
        raise error
    named = _FILE_NAME.search(str(error))
    part = named[0] if named else sanitize(file)
    if isinstance(error, UnsupportedError):
        return CheckResult(part, "support", "wrong", str(error))
    return CheckResult(part, "structure", "wrong", str(error), (part,))


def missing_file(name: str, why: str) -> CheckResult:
    """Return the finding for a missing file.

    Args:
        name: The name of the file.
        why: The reason why the file is needed, for the message.
    """
    name = sanitize(name)
    return CheckResult(name, "presence", "wrong", f"It is missing: {why}. {REDOWNLOAD_HINT}", (name,))
