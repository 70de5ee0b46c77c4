"""Meta's weight files, `consolidated.NN.pth`, in the zip format of `torch.save`.

The files are untrusted. They are checked before they are memory-mapped, and their pickles cannot run code.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, LlamaScratchError, UnsupportedError, sanitize
from llama_scratch.system.memory import does_not_fit, is_memory_error
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_start

if TYPE_CHECKING:
    from torch import Tensor

# The pickle has a few hundred bytes per tensor.
_MAX_PICKLE = 1 << 20
_MAX_TUPLES = 1 << 16  # about 5 per tensor
_MAX_OPCODES = 1 << 17  # about 40 per tensor
# The largest Llama has 1,138 tensors, and the central directory about 100 bytes per tensor.
_MAX_RECORDS, _MAX_TABLE = 1 << 12, 1 << 20
# First bytes of a file that torch.save wrote before version 1.6.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Allowed globals in a pickle: storages, dtypes, and the functions with which torch.load rebuilds tensors.
_CALLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_\w{1,40}|torch(\.storage)? \w{1,20}Storage"
    r"|torch (float|bfloat|complex|u?int|q?u?int)\d+\w{0,10}|torch (Size|device)|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
)


def load_pth(path: Path, progress: Progress) -> dict[str, Tensor]:
    """Memory-map the tensors of a `torch.save` file without running code from it.

    The content is first compared with the archive's checksums, if it has any, because torch does not check them when it
    maps a file. This also brings the file into the page cache. The tensors may be views with any strides.

    Args:
        path: The file.
        progress: Called with the number of bytes checked.

    Raises:
        UnsupportedError: If the file is not a state dict of dense float tensors.
        CheckpointError: If the file is damaged or would run code.
        OutOfMemoryError: If it cannot be mapped.
    """
    records = _check_archive(path)
    _check_checksums(path, records, progress)
    _check_description(path, records)
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights = _plain_tensors(path, loaded)
        _check_sizes(path, weights.values(), records)
        return weights
    except LlamaScratchError:
        raise
    except Exception as error:  # torch raises many types of errors for a malicious file
        if is_memory_error(error):
            raise does_not_fit(sanitize(path, 200), error) from error
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise _code(path, match[1]) from error
        raise _unreadable(path, error) from error


def _plain_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    """Return the tensors without their attributes, which could shadow methods."""
    import torch

    if not isinstance(loaded, dict):
        raise UnsupportedError(
            f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors. {_SAVE_ALONE}"
        )
    weights = {}
    for name, tensor in dict.items(loaded):  # `loaded.items` could be overridden
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(
                f"{path} holds a {type(tensor).__name__} under '{sanitize(name)}', expected only named tensors. "
                + _SAVE_ALONE
            )
        weights[name] = torch.Tensor.detach(tensor)
        _check_tensor(path, name, weights[name])
    return weights


_SAVE_ALONE = "Save only the state dict with torch.save."


def _check_description(path: Path, records: list[zipfile.ZipInfo]) -> None:
    """Scan the pickle without running it. Reject unknown globals and deep nesting.

    torch's own check is too late: before it fails, a pickle of a few bytes can allocate gigabytes, and 100,000 nested
    tuples overflow Python's stack.
    """
    with zipfile.ZipFile(path) as archive:
        data = next(archive.read(record) for record in records if record.filename.endswith("/data.pkl"))
    tuples = 0
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "GLOBAL" and not _CALLED.fullmatch(str(argument)):
                raise _code(path, str(argument).replace(" ", "."))
            tuples += "TUPLE" in opcode.name
            if tuples > _MAX_TUPLES or count > _MAX_OPCODES:
                raise CheckpointError(f"{path} has a pickle larger than torch.save writes. {REDOWNLOAD_HINT}")
    except (ValueError, IndexError) as error:  # invalid opcodes
        raise _unreadable(path, error) from error


def _code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} would run the code '{sanitize(name)}' when loaded, expected only tensors. Do not use this file."
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition(". ")[0].removesuffix(".")  # its first sentence
    return CheckpointError(f"{path} cannot be read as tensors ({sanitize(reason, 100)}). {REDOWNLOAD_HINT}")


def _check_sizes(path: Path, tensors: Iterable[Tensor], records: list[zipfile.ZipInfo]) -> None:
    """Check that each storage has a record of its size, to not read past a record."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    if excess := Counter(storages.values()) - Counter(record.file_size for record in records):
        raise CheckpointError(
            f"{path} describes a tensor of {next(iter(excess)):,} bytes, but no record has that size. "
            + REDOWNLOAD_HINT
        )


# Errors that zipfile raises for a damaged archive.
_DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, struct.error, NotImplementedError, RuntimeError, OSError)


def _raise_unless_damage(error: Exception) -> None:
    """Re-raise system errors, except EINVAL: an offset before the file's start."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        raise error


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UnsupportedError(
            f"{path}: '{sanitize(name)}' is a {tensor.layout} tensor on {tensor.device}, expected a dense tensor on "
            "the CPU. Save the model again from dense weights."
        )
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(
            f"{path}: '{sanitize(name)}' is a {tensor.dtype} tensor, expected bfloat16, float16 or float32. "
            "Use the model in one of these types, or a GGUF file of it."
        )


class _WithShortTable(io.BufferedReader):
    """A file that limits each read to the maximum size of a central directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = _MAX_TABLE + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) == limit:
            raise CheckpointError(
                f"{sanitize(self.name, 200)} has a table of contents of over {_MAX_TABLE:,} bytes, too large for a "
                f"model. {REDOWNLOAD_HINT}"
            )
        return data


def _check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """Check that `torch.save` wrote an archive, and return its records."""
    size = path.stat().st_size
    start = read_start(path)
    if start.startswith(_LEGACY):
        raise UnsupportedError(
            f"{path} is in the format of torch before 1.6, expected a zip-format torch.save file. "
            "Load it with torch.load and save it again with torch.save."
        )
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path} starts with {start[:8]!r}, expected a zip-format torch.save file. {REDOWNLOAD_HINT}"
        )
    try:
        with _WithShortTable(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except _DAMAGE as error:
        _raise_unless_damage(error)
        raise CheckpointError(
            f"{path} ({size:,} bytes) has no valid table of contents at its end, "
            f"so it is truncated or damaged. {REDOWNLOAD_HINT}"
        ) from error
    if len(records) > _MAX_RECORDS:
        raise CheckpointError(
            f"{path} holds {len(records):,} records, expected at most {_MAX_RECORDS:,}. {REDOWNLOAD_HINT}"
        )
    names = [record.filename for record in records]
    folder = names[0].partition("/")[0] if names else ""
    known = re.compile(re.escape(folder) + r"/(data\.pkl|data/\d+|version|byteorder|\.[\w/]+)")
    if f"{folder}/constants.pkl" in names:
        raise UnsupportedError(f"{path} is a TorchScript program, expected only weights. {_SAVE_ALONE}")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if (
        not all(map(known.fullmatch, names))
        or len(set(names)) != len(names)
        or len(pickles) != 1
        or pickles[0].file_size > _MAX_PICKLE
    ):
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote. {REDOWNLOAD_HINT}")
    plain = all(
        r.compress_type == zipfile.ZIP_STORED and not r.flag_bits & 1 and r.compress_size == r.file_size
        for r in records
    )
    if not plain or sum(record.file_size for record in records) > size:
        raise UnsupportedError(
            f"{path} holds compressed records, expected the uncompressed ones of torch.save. Unpack the archive, "
            "or load the file with torch.load and save it again."
        )
    if not any(record.CRC for record in records):  # saved with torch.serialization.set_crc32_options(False)
        for record in records:
            record.CRC = None  # type: ignore[assignment]  # zipfile then skips the comparison
    return records


def begin_checks(paths: Sequence[Path]) -> None:
    """Start verifying checksums in background threads. `load_pth` raises their errors."""
    for path in paths:
        with contextlib.suppress(LlamaScratchError, OSError):
            future: Future[None] = Future()
            _ahead[_identity(path)] = future
            Thread(target=_check_in_background, args=(path, future), daemon=True).start()


# Identity of a file when its check was started → the check.
_ahead: dict[tuple[object, ...], Future[None]] = {}


def _identity(path: Path) -> tuple[object, ...]:
    status = path.stat()
    return str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_in_background(path: Path, future: Future[None]) -> None:
    try:
        records = _check_archive(path)
        with _mapped(path) as data, zipfile.ZipFile(path) as archive:
            for record in records:
                _check_record(path, archive, data, record)
        future.set_result(None)
    except BaseException as error:  # noqa: BLE001 - raised again when the file is loaded
        future.set_exception(error)


def _check_checksums(path: Path, records: list[zipfile.ZipInfo], progress: Progress) -> None:
    """Verify all checksums in parallel, or wait for `begin_checks` if it was called."""
    if begun := _ahead.pop(_identity(path), None):
        return begun.result()
    done, total = 0, sum(record.file_size for record in records)
    with (
        _mapped(path) as data,
        zipfile.ZipFile(path) as archive,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        try:
            check = partial(_check_record, path, archive, data)
            for record_size in pool.map(check, sorted(records, key=lambda record: -record.file_size)):
                done += record_size
                progress("checking", done, total)
        finally:
            pool.shutdown(cancel_futures=True)
    return None


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """Map a file, so that checksums are computed without the GIL and without copies."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            yield view
        finally:
            view.release()


def _check_record(path: Path, archive: zipfile.ZipFile, data: memoryview, record: zipfile.ZipInfo) -> int:
    try:
        archive.open(record).close()  # checks the record's local header
        name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)
        start = record.header_offset + 30 + name + extra
        with data[start : start + record.file_size] as content:
            whole = len(content) == record.file_size and record.CRC in (None, zlib.crc32(content))
    except _DAMAGE as error:
        _raise_unless_damage(error)
        raise _damaged(path, record) from error
    if not whole:
        raise _damaged(path, record)
    return record.file_size


def _damaged(path: Path, record: zipfile.ZipInfo) -> CheckpointError:
    return CheckpointError(
        f"{path}: the record '{sanitize(record.filename)}' does not match its checksum, so the file is damaged. "
        + REDOWNLOAD_HINT
    )
