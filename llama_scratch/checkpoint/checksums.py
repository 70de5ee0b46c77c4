"""Known checksums of a model's files, and their comparison with the files.

There are three sources of checksums:

- A file beside the weights: Meta's `checklist.chk` in a directory of any format, or NAME.gguf.md5 for a GGUF file.
- The names of files in the Hugging Face cache, which are their checksums.
- The recorded checksums of a few published files.

Checksums detect damage, not tampering: an attacker who changes a file can change its checksum too.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llama_scratch.checkpoint.base import reading
from llama_scratch.checkpoint.findings import DIGEST_NAMES, CheckResult, missing_file
from llama_scratch.config import ModelArgs
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, LlamaScratchError, sanitize
from llama_scratch.system.hashing import add_blocks, blocks_of, file_digest, new_digest
from llama_scratch.system.small_files import read_bytes, without_mark

CHECKLIST = "checklist.chk"
# Maximum size of a list of MD5s in bytes, several times the largest model's. A line has about 60 bytes.
MAX_CHECKLIST = 1 << 16
_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(\S.*)")
# The cache names large files after their SHA-256, small files after Git's SHA-1.
_BLOB_NAMES = {64: "sha256", 40: "sha1"}
# Parameter count of the only model with built-in checksums. Third parties recorded them from public mirrors, so a
# different checksum is only a note.
_LLAMA_3_2_1B = 1_235_814_400
_LLAMA_3_2_1B_SHA256 = {
    "cfa47fb7185ebd1c3712fff5fa04fdbb0675c1e345fc72e12f6c7b65b8da6f05": "Meta's Llama 3.2 1B",
    "fc17d497df5e4175b3a8acb4f5865b26f7fc1b009b25bef814b95fde10e8a1f3": "Meta's Llama 3.2 1B Instruct",
}
_LLAMA_3_TOKENIZER_SIZE = 2_183_982
_LLAMA_3_TOKENIZER_MD5 = {"08292403f8b173e7524d7fba7bbbd2d3": "Llama 3's tokenizer"}
# Patterns of the files in a directory that belong to a model.
_MODEL_FILE = re.compile(r".*\.(?:pth|safetensors|gguf)|params\.json|tokenizer\.(?:model|json)|config\.json")


@dataclass(frozen=True)
class PublishedFile:
    """A model file with a published checksum.

    Args:
        name: Name of the model.
        path: Path of the file if this package downloaded it.
        size: Size in bytes.
        sha256: Published SHA-256, in hexadecimal.
    """

    name: str
    path: Path
    size: int
    sha256: str


def parse_checklist(data: bytes) -> dict[str, str]:
    """Parse a list of MD5s in the format of md5sum.

    A file name may start with ./ but must not be in another directory.

    Returns:
        File name → MD5 in lower case.

    Raises:
        CheckpointError: If a line has another format, or the list is empty.
    """
    if len(data) > MAX_CHECKLIST:
        raise CheckpointError(f"{CHECKLIST} is longer than {MAX_CHECKLIST:,} bytes. {REDOWNLOAD_HINT}")
    sums: dict[str, str] = {}
    for number, line in enumerate(without_mark(data, CHECKLIST).decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        if not (match := _LINE.fullmatch(line.strip())):
            raise CheckpointError(
                f"Line {number} of {CHECKLIST} is '{sanitize(line)}', "
                f"expected an MD5, two spaces and a file name. {REDOWNLOAD_HINT}"
            )
        md5, name = match[1].lower(), match[2].removeprefix("./")
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not place.parts or not name.isprintable():
            raise CheckpointError(
                f"Line {number} of {CHECKLIST} names '{sanitize(name)}', "
                f"expected a file in this directory. {REDOWNLOAD_HINT}"
            )
        if sums.setdefault(name, md5) != md5:
            raise CheckpointError(f"{CHECKLIST} has two different MD5s of '{sanitize(name)}'. {REDOWNLOAD_HINT}")
    if not sums:
        raise CheckpointError(f"{CHECKLIST} does not list any files. {REDOWNLOAD_HINT}")
    return sums


def _read_checklist(file: Path) -> dict[str, str]:
    data = read_bytes(file, MAX_CHECKLIST)
    try:
        return parse_checklist(data)
    except CheckpointError as error:  # the message names checklist.chk, whatever the name of the list is
        raise CheckpointError(str(error).replace(CHECKLIST, sanitize(file.name))) from error


def checklist_of(path: Path, folder: Path) -> Path:
    """Return the path of the list of MD5s for a model.

    Args:
        path: The model's directory or file.
        folder: The directory that contains the model's files.
    """
    return folder / CHECKLIST if path.is_dir() else path.with_name(f"{path.name}.md5")


def write_checksums(path: Path) -> Path:
    """Write the MD5s of a model's files in md5sum's format. Returns the list's path."""
    checklist = checklist_of(path, path)
    files = sorted(file for file in path.iterdir() if file.is_file() and file != checklist) if path.is_dir() else [path]
    text = "".join(f"{file_digest(file, 'md5')}  {file.name}\n" for file in files)
    checklist.write_text(text, encoding="utf-8")
    return checklist


# --- Known checksums --------------------------------------------------------------------------


def size_of(file: Path) -> int:
    """Return a file's size in bytes; 0 if it does not exist."""
    return file.stat().st_size if os.path.isfile(file) else 0


@dataclass(frozen=True)
class KnownDigest:
    """The expected checksum of a file.

    Args:
        kind: hashlib's name of the digest, such as md5.
        digests: Accepted digest → its source.
        binding: Whether a different digest is an error. Otherwise it is only a note.
        size: Size in bytes, if known.
        again: A sentence that says how to fetch the file again.
    """

    kind: str
    digests: Mapping[str, str]
    binding: bool = True
    size: int | None = None
    again: str = REDOWNLOAD_HINT


KnownDigests = dict[Path, list[KnownDigest]]


def known_digests(
    path: Path,
    folder: Path,
    files: tuple[Path, ...],
    args: ModelArgs | None,
    published: Sequence[PublishedFile],
) -> tuple[KnownDigests, list[CheckResult]]:
    """Collect the known checksums of a model's files, without reading the files.

    Args:
        path: The model's directory or file.
        folder: The directory that contains the model's files.
        files: The weight files.
        args: The model's dimensions; None if they could not be read.
        published: Files with published checksums.

    Returns:
        The checksums, and findings such as missing files.
    """
    known: KnownDigests = defaultdict(list)
    checklist = checklist_of(path, folder)
    listed, findings = _listed(checklist)
    for name, digest in listed.items():
        known[folder / name].append(KnownDigest("md5", {digest: sanitize(checklist.name)}))
    if path.is_dir():
        if args and args.n_parameters(tied=True) == _LLAMA_3_2_1B and files[0].name == "consolidated.00.pth":
            known[files[0]].append(KnownDigest("sha256", _LLAMA_3_2_1B_SHA256, binding=False))
        if size_of(folder / "tokenizer.model") == _LLAMA_3_TOKENIZER_SIZE:
            known[folder / "tokenizer.model"].append(KnownDigest("md5", _LLAMA_3_TOKENIZER_MD5, binding=False))
    for file in sorted({*files, *(folder.iterdir() if path.is_dir() else ())}):
        if not file.is_symlink():
            continue
        blob = os.path.basename(os.readlink(file))
        if re.fullmatch("[0-9a-f]+", blob) and (kind := _BLOB_NAMES.get(len(blob))):
            if os.path.isfile(file):
                known[file].append(KnownDigest(kind, {blob: "its name in the cache"}))
            else:
                findings.append(missing_file(file.name, "the symbolic link points to a file that does not exist"))
    for model in published:
        if path.name == model.path.name and path.is_file():
            is_fetched = model.path.exists() and path.samefile(model.path)
            digests = {model.sha256: f"the published {model.name}"}
            pull_hint = f"Run 'llama-scratch pull {model.name}' to fetch it again."
            again = pull_hint if is_fetched else REDOWNLOAD_HINT
            known[path].append(KnownDigest("sha256", digests, is_fetched, model.size, again))
    return known, findings


def _listed(checklist: Path) -> tuple[dict[str, str], list[CheckResult]]:
    """Return the MD5s of the listed files that exist, and findings about the list."""
    if not os.path.lexists(checklist):
        return {}, []
    folder, listing = checklist.parent, sanitize(checklist.name)
    try:
        with reading(checklist):
            entries = _read_checklist(checklist)
    except LlamaScratchError as error:
        return {}, [CheckResult(listing, "structure", "wrong", str(error), (listing,))]
    there = {name: digest for name, digest in entries.items() if os.path.isfile(folder / name)}
    findings = [missing_file(name, f"{listing} lists it") for name in entries if name not in there]
    model_files = {file.name for file in folder.iterdir() if _MODEL_FILE.fullmatch(file.name) and file.is_file()}
    for name in sorted((model_files if checklist.name == CHECKLIST else {checklist.stem}) - entries.keys()):
        findings.append(CheckResult(sanitize(name), "checksum", "note", f"{listing} does not list it."))
    return there, findings


def without_checksum(
    files: tuple[Path, ...], known: KnownDigests, findings: list[CheckResult], checklist: Path
) -> list[CheckResult]:
    """Return a note for each weight file without a known checksum.

    Args:
        files: The weight files.
        known: The known checksums.
        findings: Findings so far; files with a finding are skipped.
        checklist: Path of the list of MD5s that the note recommends.
    """
    noted = {finding.part for finding in findings}
    listed = "*" if checklist.name == CHECKLIST else checklist.stem
    advice = f"Run 'md5sum {listed} > {checklist.name}' beside it to record one"
    sentence = f"bytes have no known checksum. {sanitize(advice, 200)}."
    return [
        CheckResult(name, "checksum", "note", f"Its {size_of(file):,} {sentence}")
        for file in files
        if file not in known and (name := sanitize(file.name)) not in noted
    ]


def check_file(file: Path, sums: list[KnownDigest], folder: Path, advance: Callable[[int], None]) -> list[CheckResult]:
    """Read a file once and compare it with all its known checksums.

    Args:
        file: The file.
        sums: Its known checksums.
        folder: The model's directory.
        advance: Called with the number of bytes read.
    """
    name = sanitize(file.relative_to(folder) if file.is_relative_to(folder) else file.name)
    sizes = {known.size for known in sums} - {None, size_of(file)}
    try:
        with reading(file):
            digests = {} if sizes else _digests(file, {known.kind for known in sums}, advance)
    except LlamaScratchError as error:
        return [CheckResult(name, DIGEST_NAMES[sums[0].kind], "wrong", str(error), (name,))]
    return [_compare(name, size_of(file), digests.get(known.kind, ""), known) for known in sums]


def _digests(file: Path, kinds: set[str], advance: Callable[[int], None]) -> dict[str, str]:
    digests = {kind: new_digest(kind) for kind in kinds}
    if "sha1" in digests:  # Git's digest also covers the size
        digests["sha1"].update(b"blob %d\0" % size_of(file))
    with file.open("rb", buffering=0) as stream:
        add_blocks(digests.values(), blocks_of(stream), advance)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _compare(name: str, size: int, digest: str, known: KnownDigest) -> CheckResult:
    kind = DIGEST_NAMES[known.kind]
    if digest in known.digests:
        return CheckResult(name, kind, "ok", f"Its {kind} matches {known.digests[digest]} ({size:,} bytes).")
    first, source = next(iter(known.digests.items()))
    if known.size not in (None, size):
        sentence = f"It has {size:,} bytes, expected {known.size:,} as in {source}"
    elif known.binding:
        sentence = f"Its {kind} is {digest[:12]}…, expected {first[:12]}… from {source} ({size:,} bytes)"
    else:
        sources = " or ".join(known.digests.values())
        sentence = f"Its {kind} is {digest[:12]}…, which does not match {sources} ({size:,} bytes)"
    if known.binding:
        return CheckResult(name, kind, "wrong", f"{sentence}. {known.again}", (name,))
    return CheckResult(name, kind, "note", f"{sentence}.")
