"""Whether a model is whole: the checksums of its files, and what its weights hold.

A checksum comes from what lies beside the weights, which is `checklist.chk` in a directory of any form, as Meta's have
it, and NAME.gguf.md5 beside a GGUF file; or from the names that Hugging Face's cache gives its files, which are their
checksums. Of a few published files it is known here. Where there is none, a bit that flipped in a weight is a weight
like any other. None of them is secret: they show damage, and not who changed a file and its checksum.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.base import Checkpoint, name_of, reading
from llama_scratch.checkpoint.checksums import CHECKLIST, MAX_CHECKLIST, PublishedFile, parse_checklist
from llama_scratch.checkpoint.recognize import recognize
from llama_scratch.config import ModelArgs, is_tied
from llama_scratch.errors import (
    REDOWNLOAD_HINT,
    CheckpointError,
    LlamaScratchError,
    OutOfMemoryError,
    UnsupportedError,
    UsageError,
    sanitize,
)
from llama_scratch.system.progress import Progress, silent
from llama_scratch.system.small_files import read_bytes

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

# Bytes that are hashed, and numbers that are looked at, at a time.
_READ, _BLOCK = 1 << 20, 1 << 20
# Tensors with values that are none are named up to so many.
_MOST_NAMED = 8

_DIGESTS = {"md5": "MD5", "sha256": "SHA-256", "sha1": "Git's SHA-1"}
# What the cache calls a file: a large one by its SHA-256, a small one by the SHA-1 that Git has of it.
_BLOB_NAMES = {64: "sha256", 40: "sha1"}
# Of the only shape that they are known of, by the number of its parameters. Third parties recorded them of public
# mirrors, so that another one is no more than worth a note.
_LLAMA_3_2_1B = 1_235_814_400
_LLAMA_3_2_1B_SHA256 = {
    "cfa47fb7185ebd1c3712fff5fa04fdbb0675c1e345fc72e12f6c7b65b8da6f05": "that of Meta's Llama 3.2 1B",
    "fc17d497df5e4175b3a8acb4f5865b26f7fc1b009b25bef814b95fde10e8a1f3": "that of Meta's Llama 3.2 1B Instruct",
}
_LLAMA_3_TOKENIZER_SIZE = 2_183_982
_LLAMA_3_TOKENIZER_MD5 = {"08292403f8b173e7524d7fba7bbbd2d3": "that of Llama 3's tokenizer"}
# Those of a directory's files that a model is read from.
_OWN = re.compile(r".*\.(?:pth|safetensors|gguf)|params\.json|tokenizer\.(?:model|json)|config\.json")
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
        whole = {f.part for f in self.findings if f.result == "ok" and f.check in _DIGESTS.values()}
        again = dict.fromkeys(name for f in self.findings if f.result == "wrong" for name in f.fetch)
        return [name for name in again if name not in whole]

    @property
    def verdict(self) -> str:
        """One sentence."""
        notes = sum(finding.result == "note" for finding in self.findings)
        if not self.wrong:
            found = "nothing is wrong" + (f", {notes} worth a note" if notes else "")
            return f"Whole: of {len(self.findings)} checks {found}."
        if all(finding.check == "support" for finding in self.findings if finding.result == "wrong"):
            return f"Not supported: {self.wrong} of {len(self.findings)} checks failed, none of them for damage."
        names = self.fetch_again[:_MOST_NAMED]
        others = len(self.fetch_again) - len(names)
        advice = f"; fetch {', '.join(names)}{f' and {others} more' * (others > 0)} again" if names else ""
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


def verify(
    path: Path,
    tokenizer: str | None = None,
    rope_factor: float | None = None,
    progress: Progress = silent,
    published: Sequence[PublishedFile] = (),
) -> Verification:
    """Check a model in every way there is: checksums, structure, values, what it would run with.

    tokenizer and rope_factor: as `Llama.load` takes them. published: files whose checksums are known. What is wrong
    with the model is found and not raised. Raises `ModelNotFoundError` where there is none, `UsageError` as
    `open_checkpoint` does, `OutOfMemoryError`.
    """
    model, checkpoint, args, findings = None, None, None, []
    try:
        model = recognize(path)
        path = model.path
        checkpoint = open_checkpoint(path, tokenizer)
        args = checkpoint.args.with_rope_factor(rope_factor)
    except LlamaScratchError as error:
        # A file that is not a model, and a directory without a list of files or a shape, have nothing to verify.
        if not (_describes_model(path) if os.path.isdir(path) else model):
            raise
        findings.append(_broken(error, path.name))
    folder = path.parent if path.is_file() else path
    files = checkpoint.files if checkpoint else (path,) * path.is_file()
    expected, found = _expected(path, folder, files, args, published)
    found += _without_checksum(files, expected, found, _sums_of(path, folder))

    weights = sum(_size(file) for file in files) * (checkpoint is not None)
    meter = _Meter(progress, sum(map(_size, expected)) + 2 * weights)  # hashed, loaded and looked through
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            hashed = [pool.submit(_check_file, file, sums, folder, meter) for file, sums in expected.items()]
            if checkpoint and args:
                findings += _check_weights(checkpoint, args, pool, meter, weights)
            found = [finding for future in hashed for finding in future.result()] + found
        finally:
            meter.stopped = True
            pool.shutdown(cancel_futures=True)
    if checkpoint and args:
        findings += _facts(checkpoint, args) + _unchanged(checkpoint)
    name, format = (checkpoint.name, checkpoint.format) if checkpoint else (name_of(path), None)
    return Verification(sanitize(name), format, path, (*found, *findings))


def _describes_model(directory: Path) -> bool:
    """Whether a directory has a file that says what else belongs there."""
    return any(os.path.lexists(directory / mark) for mark in (CHECKLIST, "params.json", "config.json"))


def _size(file: Path) -> int:
    return file.stat().st_size if os.path.isfile(file) else 0


def _broken(error: LlamaScratchError, file: str) -> Finding:
    """What an error while opening or loading says; it names the file as a rule. Others than about files are raised."""
    if isinstance(error, UsageError | OutOfMemoryError):
        raise error
    named = _FILE_NAME.search(str(error))
    part = named[0] if named else sanitize(file)
    if isinstance(error, UnsupportedError):
        return Finding(part, "support", "wrong", str(error))
    return Finding(part, "structure", "wrong", str(error), (part,))


class _Meter:
    """Counts bytes for the progress, from several threads."""

    def __init__(self, progress: Progress, total: int):
        self.stopped = False
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """`count` bytes more are done. Raises where nobody waits for the rest."""
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done = min(self._done + count, self._total)
            self._progress("verifying", self._done, self._total)

    def share(self, size: int) -> Progress:
        """For what reports its own progress: all of it is `size` bytes here."""
        seen = 0

        def report(_: str, done: int, total: int) -> None:
            nonlocal seen
            now = max(seen, size * done // total if total else 0)
            self.advance(min(now, size) - seen)
            seen = min(now, size)

        return report


# --- Checksums --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    """What a file's checksum should be. digests: any of these → where it is from. binding: another one is wrong.

    size: in bytes, where it is known. again: how to fetch the file.
    """

    kind: str
    digests: Mapping[str, str]
    binding: bool = True
    size: int | None = None
    again: str = REDOWNLOAD_HINT


_Expected = dict[Path, list[_Sum]]


def _expected(
    path: Path,
    folder: Path,
    files: tuple[Path, ...],
    args: ModelArgs | None,
    published: Sequence[PublishedFile],
) -> tuple[_Expected, list[Finding]]:
    """The checksums that are known of a model's files, and what is wrong before one byte of them was read."""
    expected: _Expected = defaultdict(list)
    sums = _sums_of(path, folder)
    listed, findings = _listed(sums)
    for name, digest in listed.items():
        expected[folder / name].append(_Sum("md5", {digest: f"the one in {sanitize(sums.name)}"}))
    if path.is_dir():
        if args and args.n_parameters(tied=True) == _LLAMA_3_2_1B and files[0].name == "consolidated.00.pth":
            expected[files[0]].append(_Sum("sha256", _LLAMA_3_2_1B_SHA256, binding=False))
        if _size(folder / "tokenizer.model") == _LLAMA_3_TOKENIZER_SIZE:
            expected[folder / "tokenizer.model"].append(_Sum("md5", _LLAMA_3_TOKENIZER_MD5, binding=False))
    for file in sorted({*files, *(folder.iterdir() if path.is_dir() else ())}):
        if not file.is_symlink():
            continue
        blob = os.path.basename(os.readlink(file))
        if re.fullmatch("[0-9a-f]+", blob) and (kind := _BLOB_NAMES.get(len(blob))):
            if os.path.isfile(file):
                expected[file].append(_Sum(kind, {blob: "the one in its name in the cache"}))
            else:
                findings.append(_missing(file.name, "it is a link to a file that is gone"))
    for model in published:
        if path.name == model.path.name and path.is_file():
            own = model.path.exists() and path.samefile(model.path)
            again = f"run 'llama-scratch pull {model.name}' to fetch it again."
            digests = {model.sha256: f"that of the published {model.name}"}
            expected[path].append(_Sum("sha256", digests, own, model.size, again if own else REDOWNLOAD_HINT))
    return expected, findings


def _sums_of(path: Path, folder: Path) -> Path:
    """Where the MD5s of a model's files lie."""
    return folder / CHECKLIST if path.is_dir() else path.with_name(f"{path.name}.md5")


def write_checksums(path: Path) -> Path:
    """Leave the MD5 of each file beside a model, as `md5sum` does and `verify` reads it; returns where."""
    sums, lines = _sums_of(path, path), []
    files = sorted(file for file in path.iterdir() if file.is_file() and file != sums) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, _md5).hexdigest()}  {file.name}\n")
    sums.write_text("".join(lines), encoding="utf-8")
    return sums


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _listed(sums: Path) -> tuple[dict[str, str], list[Finding]]:
    """Of the files that a list names those that are there, with their MD5; and what it shows to be wrong."""
    if not os.path.lexists(sums):
        return {}, []
    folder, listing = sums.parent, sanitize(sums.name)
    try:
        with reading(sums):
            entries = _read_checklist(sums)
    except LlamaScratchError as error:
        return {}, [Finding(listing, "structure", "wrong", str(error), (listing,))]
    there = {name: digest for name, digest in entries.items() if os.path.isfile(folder / name)}
    findings = [_missing(name, f"{listing} names it") for name in entries if name not in there]
    own = {file.name for file in folder.iterdir() if _OWN.fullmatch(file.name) and file.is_file()}
    for name in sorted((own if sums.name == CHECKLIST else {sums.stem}) - entries.keys()):
        findings.append(Finding(sanitize(name), "checksum", "note", f"{listing} does not list it."))
    return there, findings


def _missing(name: str, why: str) -> Finding:
    name = sanitize(name)
    return Finding(name, "presence", "wrong", f"It is missing, and {why}; {REDOWNLOAD_HINT}", (name,))


def _read_checklist(file: Path) -> dict[str, str]:
    data = read_bytes(file, MAX_CHECKLIST)
    try:
        return parse_checklist(data)
    except CheckpointError as error:  # which speaks of the list by Meta's name of it
        raise CheckpointError(str(error).replace(CHECKLIST, sanitize(file.name))) from error


def _without_checksum(files: tuple[Path, ...], expected: _Expected, found: list[Finding], sums: Path) -> list[Finding]:
    """A note for each file with weights of which no checksum is known."""
    noted = {finding.part for finding in found}
    advice = f"'md5sum {'*' if sums.name == CHECKLIST else sums.stem} > {sums.name}' beside it keeps one from now on"
    sentence = f"bytes have no checksum to be compared with; {sanitize(advice, 200)}."
    return [
        Finding(name, "checksum", "note", f"Its {_size(file):,} {sentence}")
        for file in files
        if file not in expected and (name := sanitize(file.name)) not in noted
    ]


def _check_file(file: Path, sums: list[_Sum], folder: Path, meter: _Meter) -> list[Finding]:
    """Read a file once and compare all its checksums."""
    name = sanitize(file.relative_to(folder) if file.is_relative_to(folder) else file.name)
    sizes = {known.size for known in sums} - {None, _size(file)}
    try:
        with reading(file):
            digests = {} if sizes else _digests(file, {known.kind for known in sums}, meter)
    except LlamaScratchError as error:
        return [Finding(name, _DIGESTS[sums[0].kind], "wrong", str(error), (name,))]
    return [_compare(name, _size(file), digests.get(known.kind, ""), known) for known in sums]


def _digests(file: Path, kinds: set[str], meter: _Meter) -> dict[str, str]:
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    if "sha1" in digests:  # Git's own is of the size too
        digests["sha1"].update(b"blob %d\0" % _size(file))
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_READ):
            for digest in digests.values():
                digest.update(block)  # without Python's lock
            meter.advance(len(block))
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _compare(name: str, size: int, digest: str, known: _Sum) -> Finding:
    kind = _DIGESTS[known.kind]
    if digest in known.digests:
        return Finding(name, kind, "ok", f"Its {kind} is {known.digests[digest]} ({size:,} bytes).")
    first, source = next(iter(known.digests.items()))
    if known.size not in (None, size):
        sentence = f"It has {size:,} bytes, expected the {known.size:,} of {source.removeprefix('that of ')}"
    elif known.binding:
        sentence = f"Its {kind} is {digest[:12]}…, expected {first[:12]}…, {source} ({size:,} bytes)"
    else:
        sources = " or ".join(known.digests.values())
        sentence = f"Its {kind} is {digest[:12]}…, which is not {sources} ({size:,} bytes)"
    if known.binding:
        return Finding(name, kind, "wrong", f"{sentence}; {known.again}", (name,))
    return Finding(name, kind, "note", f"{sentence}.")


# --- Weights ----------------------------------------------------------------------------------


def _unchanged(checkpoint: Checkpoint) -> list[Finding]:
    """Nothing, unless a file changed while it was checked."""
    try:
        checkpoint.mapped.check()
    except CheckpointError as error:
        return [_broken(error, checkpoint.path.name)]
    return []


def _check_weights(
    checkpoint: Checkpoint, args: ModelArgs, pool: ThreadPoolExecutor, meter: _Meter, size: int
) -> list[Finding]:
    """Whether every tensor is there, has its shape, and holds numbers."""
    try:
        weights = checkpoint.load(meter.share(size))
    except LlamaScratchError as error:
        return [_broken(error, checkpoint.path.name)]
    tensors: dict[int, tuple[str, Weight]] = {}
    for name, weight in weights.items():
        tensors.setdefault(id(weight), (name, weight))  # a tied pair once
    found = f"All {len(tensors)} tensors have the names, shapes and types of a Llama with {args.n_layers} layers."
    findings = [Finding("weights", "structure", "ok", found)]
    parameters = sum(weight.numel() for _, weight in tensors.values())
    scans = [pool.submit(_scan, name, weight, checkpoint, meter) for name, weight in tensors.values()]
    bad = [finding for scan in scans if (finding := scan.result())]
    findings += bad[:_MOST_NAMED]
    if len(bad) > _MOST_NAMED:
        more = f"{len(bad) - _MOST_NAMED} more tensors hold values that are no numbers."
        findings.append(Finding("weights", "values", "wrong", more, bad[0].fetch))
    if not bad:
        findings.append(Finding("weights", "values", "ok", f"None of {parameters:,} values is NaN or infinite."))
    tied = "is the embedding itself (tied)" if is_tied(weights) else "has weights of its own (untied)"
    return [*findings, Finding("output", "tied", "ok", f"The output projection {tied}.")]


def _scan(name: str, weight: Weight, checkpoint: Checkpoint, meter: _Meter) -> Finding | None:
    """Look for NaN and infinity a block of rows at a time: the smallest and the largest value show both."""
    import torch

    from llama_scratch.precision.lazy_weight import LazyWeight

    rows, nans, infinite, first = len(weight), 0, 0, None
    step = max(1, _BLOCK * rows // weight.numel())
    files = tuple(sanitize(file.name) for file in checkpoint.files)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        try:
            block = weight.rows(start, stop) if isinstance(weight, LazyWeight) else weight[start:stop]
        except CheckpointError as error:
            return Finding(name, "values", "wrong", str(error), files)
        if not all(end.isfinite() for end in torch.aminmax(block)):
            nans += int(block.isnan().sum())
            infinite += int(block.isinf().sum())
            if first is None:
                row = block.isfinite().logical_not().reshape(len(block), -1).any(dim=1).int().argmax()
                first = start + int(row)
        meter.advance(weight.nbytes * (stop - start) // rows)
    if first is None:
        return None
    files = _holders(weight, checkpoint) or files
    counted = " and ".join(f"{n:,} {kind}" for n, kind in ((nans, "NaN"), (infinite, "infinite")) if n)
    sentence = f"{counted} among its {weight.numel():,} values, first in row {first:,}, expected none."
    return Finding(name, "values", "wrong", sentence, files)


def _holders(weight: Weight, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of the shards that each hold a piece of a weight those whose piece has a value that is no number."""
    import torch

    from llama_scratch.precision.lazy_weight import ShardedWeight

    pieces = weight.pieces if isinstance(weight, ShardedWeight) else []
    found = zip(checkpoint.files, pieces, strict=False)
    return tuple(file.name for file, piece in found if not all(end.isfinite() for end in torch.aminmax(piece)))


def _facts(checkpoint: Checkpoint, args: ModelArgs) -> list[Finding]:
    """What was checked when the model was opened, and the RoPE factor that it would run with."""
    tokens = f"It has {checkpoint.tokenizer.n_vocab:,} tokens, as many as the embedding has rows."
    rope = f"The base is {args.rope_theta:,.0f}, {scaling_in_words(args)}"
    changed = args != checkpoint.args
    if changed:
        rope += f", by `rope_factor`; in the files it is {scaling_in_words(checkpoint.args)}"
    return [
        Finding("tokenizer", "structure", "ok", tokens),
        Finding("RoPE", "factor", "note" if changed else "ok", f"{rope}."),
        *(Finding(checkpoint.path.name, "structure", "note", sentence) for sentence in checkpoint.warnings),
    ]


def scaling_in_words(args: ModelArgs) -> str:
    """How the rotary embedding is stretched."""
    if divisors := args.rope_divisors:
        return f"each pair divided by a number of its own, {min(divisors):g} to {max(divisors):g}"
    return f"scaled by a factor of {args.rope_scaling.factor:g}" if args.rope_scaling else "not scaled"
