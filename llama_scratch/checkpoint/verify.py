"""Verify that a model is intact: checksums, structure and values.

A weight with a flipped bit is usually still a valid number, so only a checksum can detect it (see `checksums`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.base import Checkpoint, name_of
from llama_scratch.checkpoint.checksums import (
    CHECKLIST,
    PublishedFile,
    check_file,
    checklist_of,
    known_digests,
    size_of,
    without_checksum,
)
from llama_scratch.checkpoint.findings import MAX_NAMED, CheckResult, Verification, finding_of
from llama_scratch.checkpoint.recognize import recognize
from llama_scratch.config import ModelArgs, is_tied
from llama_scratch.errors import (
    CheckpointError,
    LlamaScratchError,
    sanitize,
)
from llama_scratch.system.progress import Progress, silent

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

# Number of values to check at a time.
_BLOCK = 1 << 20


def verify(
    path: Path,
    tokenizer: str | None = None,
    rope_factor: float | None = None,
    progress: Progress = silent,
    published: Sequence[PublishedFile] = (),
) -> Verification:
    """Check a model's checksums, structure and values. Damage is reported, not raised.

    Args:
        path: The model.
        tokenizer: Path of a tokenizer.model that replaces the model's own.
        rope_factor: RoPE scaling factor that replaces the model's own.
        progress: Called with the number of bytes checked.
        published: Files with published checksums.

    Raises:
        ModelNotFoundError: If there is no model.
        UsageError: If `rope_factor` is not valid.
        OutOfMemoryError: If the model does not fit into memory.
    """
    model, checkpoint, args, findings = None, None, None, []
    try:
        model = recognize(path)
        path = model.path
        checkpoint = open_checkpoint(path, tokenizer)
        args = checkpoint.args.with_rope_factor(rope_factor)
    except LlamaScratchError as error:
        # Nothing to verify: not a model file, or a directory without checklist.chk, params.json and config.json.
        if not (_describes_model(path) if os.path.isdir(path) else model):
            raise
        findings.append(finding_of(error, path.name))
    folder = path.parent if path.is_file() else path
    files = checkpoint.files if checkpoint else (path,) if path.is_file() else ()
    known, file_findings = known_digests(path, folder, files, args, published)
    file_findings += without_checksum(files, known, file_findings, checklist_of(path, folder))

    weights = sum(size_of(file) for file in files) if checkpoint else 0
    meter = _Meter(progress, sum(map(size_of, known)) + 2 * weights)  # hashed, loaded and scanned
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            hashed = [pool.submit(check_file, file, sums, folder, meter.advance) for file, sums in known.items()]
            if checkpoint and args:
                findings += _check_weights(checkpoint, args, pool, meter, weights)
            file_findings = [finding for future in hashed for finding in future.result()] + file_findings
        finally:
            meter.stopped = True
            pool.shutdown(cancel_futures=True)
    if checkpoint and args:
        findings += _facts(checkpoint, args) + _unchanged(checkpoint)
    name, format = (checkpoint.name, checkpoint.format) if checkpoint else (name_of(path), None)
    return Verification(sanitize(name), format, path, (*file_findings, *findings))


def _describes_model(directory: Path) -> bool:
    """Whether a directory has a file that tells which other files belong to the model."""
    return any(os.path.lexists(directory / mark) for mark in (CHECKLIST, "params.json", "config.json"))


class _Meter:
    """Counts bytes for the progress callback. Thread-safe."""

    def __init__(self, progress: Progress, total: int):
        self.stopped = False
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Add `count` bytes. Raises `CancelledError` if the work was stopped."""
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done = min(self._done + count, self._total)
            self._progress("verifying", self._done, self._total)

    def share(self, size: int) -> Progress:
        """Return a progress callback for a task that counts as `size` bytes in total."""
        seen = 0

        def report(_: str, done: int, total: int) -> None:
            nonlocal seen
            now = max(seen, size * done // total if total else 0)
            self.advance(min(now, size) - seen)
            seen = min(now, size)

        return report


# --- Weights ----------------------------------------------------------------------------------


def _unchanged(checkpoint: Checkpoint) -> list[CheckResult]:
    """Return a finding if a file changed while it was checked."""
    try:
        checkpoint.mapped.check()
    except CheckpointError as error:
        return [finding_of(error, checkpoint.path.name)]
    return []


def _check_weights(
    checkpoint: Checkpoint, args: ModelArgs, pool: ThreadPoolExecutor, meter: _Meter, size: int
) -> list[CheckResult]:
    """Check names and shapes of all tensors, and that all values are finite."""
    try:
        weights = checkpoint.load(meter.share(size))
    except LlamaScratchError as error:
        return [finding_of(error, checkpoint.path.name)]
    tensors: dict[int, tuple[str, Weight]] = {}
    for name, weight in weights.items():
        tensors.setdefault(id(weight), (name, weight))  # a tied pair only once
    sentence = f"All {len(tensors)} tensors have the names, shapes and types of a Llama with {args.n_layers} layers."
    findings = [CheckResult("weights", "structure", "ok", sentence)]
    parameters = sum(weight.numel() for _, weight in tensors.values())
    scans = [pool.submit(_scan, name, weight, checkpoint, meter) for name, weight in tensors.values()]
    bad = [finding for scan in scans if (finding := scan.result())]
    findings += bad[:MAX_NAMED]
    if len(bad) > MAX_NAMED:
        more = f"{len(bad) - MAX_NAMED} more tensors hold NaN or infinity."
        findings.append(CheckResult("weights", "values", "wrong", more, bad[0].fetch))
    if not bad:
        findings.append(
            CheckResult("weights", "values", "ok", f"None of the {parameters:,} values is NaN or infinite.")
        )
    tied = "is tied to the embedding" if is_tied(weights) else "has its own weights (untied)"
    return [*findings, CheckResult("output", "tied", "ok", f"The output projection {tied}.")]


def _scan(name: str, weight: Weight, checkpoint: Checkpoint, meter: _Meter) -> CheckResult | None:
    """Scan a weight in blocks of rows for NaN and infinity; both show in aminmax."""
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
            return CheckResult(name, "values", "wrong", str(error), files)
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
    sentence = f"{counted} among its {weight.numel():,} values, first in row {first:,}."
    return CheckResult(name, "values", "wrong", sentence, files)


def _holders(weight: Weight, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the shards in which a weight holds NaN or infinity."""
    import torch

    from llama_scratch.precision.lazy_weight import ShardedWeight

    pieces = weight.pieces if isinstance(weight, ShardedWeight) else []
    return tuple(
        file.name
        for file, piece in zip(checkpoint.files, pieces, strict=False)
        if not all(end.isfinite() for end in torch.aminmax(piece))
    )


def _facts(checkpoint: Checkpoint, args: ModelArgs) -> list[CheckResult]:
    """Report the checks done when the model was opened, and its RoPE factor."""
    tokens = f"It has {checkpoint.tokenizer.n_vocab:,} tokens, equal to the embedding's number of rows."
    rope = f"The base is {args.rope_theta:,.0f}, {scaling_in_words(args)}"
    changed = args != checkpoint.args
    if changed:
        rope += f" by `rope_factor`; in the files it is {scaling_in_words(checkpoint.args)}"
    return [
        CheckResult("tokenizer", "structure", "ok", tokens),
        CheckResult("RoPE", "factor", "note" if changed else "ok", f"{rope}."),
        *(CheckResult(checkpoint.path.name, "structure", "note", sentence) for sentence in checkpoint.warnings),
    ]


def scaling_in_words(args: ModelArgs) -> str:
    """Describe the scaling of the rotary embedding."""
    if divisors := args.rope_divisors:
        return f"each pair's frequency divided by its own factor, {min(divisors):g} to {max(divisors):g}"
    return f"scaled by a factor of {args.rope_scaling.factor:g}" if args.rope_scaling else "not scaled"
