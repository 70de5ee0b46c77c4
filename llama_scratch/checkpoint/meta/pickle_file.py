"""Meta's weight files, `consolidated.NN.pth`: zip-format `torch.save`, checked, mapped, and no code of it run."""

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

# The description of a checkpoint's tensors takes some hundred bytes a tensor.
_MAX_PICKLE = 1 << 20
_MAX_TUPLES = 1 << 16  # some five a tensor
_MAX_OPCODES = 1 << 17  # some 40 a tensor
# The largest Llama has 1,138 tensors, and the table of contents some 100 bytes for each.
_MAX_RECORDS, _MAX_TABLE = 1 << 12, 1 << 20
# What torch.save began its files with before version 1.6.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What torch.save's description of tensors calls: storages, types, and what makes a tensor of them.
_CALLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_\w{1,40}|torch(\.storage)? \w{1,20}Storage"
    r"|torch (float|bfloat|complex|u?int|q?u?int)\d+\w{0,10}|torch (Size|device)|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
)


def load_pth(path: Path, progress: Progress) -> dict[str, Tensor]:
    """Map the tensors of a zip-format `torch.save` file: nothing is copied and none of its code is run.

    Every byte is compared with the file's own checksums first, if it has any, because the mapping skips them; that
    also brings the file into the page cache. The tensors may be views of any strides.
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
    except Exception as error:  # torch raises many kinds for a hostile file
        if is_memory_error(error):
            raise does_not_fit(sanitize(path, 200), error) from error
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise _code(path, match[1]) from error
        raise _unreadable(path, error) from error


def _plain_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    """The tensors of a dictionary, without what a file can attach to them: an attribute may shadow a method."""
    import torch

    if not isinstance(loaded, dict):
        raise UnsupportedError(
            f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors; {_SAVE_ALONE}"
        )
    weights = {}
    for name, tensor in dict.items(loaded):  # whatever a subclass claims of itself
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(
                f"{path} holds a {type(tensor).__name__} under '{sanitize(name)}', expected tensors under names; "
                + _SAVE_ALONE
            )
        weights[name] = torch.Tensor.detach(tensor)
        _check_tensor(path, name, weights[name])
    return weights


_SAVE_ALONE = "save the state dict alone with torch.save."


def _check_description(path: Path, records: list[zipfile.ZipInfo]) -> None:
    """Walk through the pickle without running it: it may call what makes tensors, and nest no deeper than they do.

    torch's own check comes afterwards; but before it refuses, a few bytes can ask for gigabytes, and
    tuples nested a hundred thousand deep overflow the stack of Python itself.
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
                raise CheckpointError(f"{path} is not described as torch.save describes tensors; {REDOWNLOAD_HINT}")
    except (ValueError, IndexError) as error:  # opcodes that are none
        raise _unreadable(path, error) from error


def _code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} wants to run the code '{sanitize(name)}' when it is loaded, "
        "expected tensors and nothing else; do not use this file."
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition(". ")[0].removesuffix(".")  # its first sentence
    return CheckpointError(f"{path} cannot be read as tensors ({sanitize(reason, 100)}); {REDOWNLOAD_HINT}")


def _check_sizes(path: Path, tensors: Iterable[Tensor], records: list[zipfile.ZipInfo]) -> None:
    """Each storage must have a record of its very size: the mapping would read on into what lies behind it."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    if excess := Counter(storages.values()) - Counter(record.file_size for record in records):
        raise CheckpointError(
            f"{path} speaks of a tensor of {next(iter(excess)):,} bytes, expected one of its records to be that long; "
            + REDOWNLOAD_HINT
        )


# What zipfile raises for an archive that is none or is damaged.
_DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, struct.error, NotImplementedError, RuntimeError, OSError)


def _raise_unless_damage(error: Exception) -> None:
    """The system's own refusals pass; a place before the file's beginning (EINVAL) is damage."""
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        raise error


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UnsupportedError(
            f"{path}: '{sanitize(name)}' is a {tensor.layout} tensor on {tensor.device}, expected a dense one with "
            "data; save the model again from dense weights."
        )
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedError(
            f"{path}: '{sanitize(name)}' is a {tensor.dtype} tensor, expected bfloat16, float16 or float32; "
            "use the model in one of these types, or a GGUF file of it."
        )


class _WithShortTable(io.BufferedReader):
    """A file that does not give out more bytes at once than a model's table of contents has."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = _MAX_TABLE + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) == limit:
            raise CheckpointError(
                f"{sanitize(self.name, 200)} has a table of contents of over {_MAX_TABLE:,} bytes, expected that of a "
                f"model; {REDOWNLOAD_HINT}"
            )
        return data


def _check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """The records of an archive, once its table of contents is one that `torch.save` wrote."""
    size = path.stat().st_size
    start = read_start(path)
    if start.startswith(_LEGACY):
        raise UnsupportedError(
            f"{path} is in the format of torch before 1.6, expected a zip-format torch.save file; "
            "load it with torch.load and save it again with torch.save."
        )
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path} begins with {start[:8]!r}, expected a zip-format torch.save file; {REDOWNLOAD_HINT}"
        )
    try:
        with _WithShortTable(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except _DAMAGE as error:
        _raise_unless_damage(error)
        raise CheckpointError(
            f"{path} has {size:,} bytes without the table of contents that belongs at its end, "
            f"so it was cut short or damaged; {REDOWNLOAD_HINT}"
        ) from error
    if len(records) > _MAX_RECORDS:
        raise CheckpointError(
            f"{path} holds {len(records):,} records, expected at most {_MAX_RECORDS:,}; {REDOWNLOAD_HINT}"
        )
    names = [record.filename for record in records]
    folder = names[0].partition("/")[0] if names else ""
    known = re.compile(re.escape(folder) + r"/(data\.pkl|data/\d+|version|byteorder|\.[\w/]+)")
    if f"{folder}/constants.pkl" in names:
        raise UnsupportedError(f"{path} is a TorchScript program, expected weights alone; {_SAVE_ALONE}")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if (
        not all(map(known.fullmatch, names))
        or len(set(names)) != len(names)
        or len(pickles) != 1
        or pickles[0].file_size > _MAX_PICKLE
    ):
        raise CheckpointError(f"{path} is a zip archive, but not one that torch.save wrote; {REDOWNLOAD_HINT}")
    plain = all(
        r.compress_type == zipfile.ZIP_STORED and not r.flag_bits & 1 and r.compress_size == r.file_size
        for r in records
    )
    if not plain or sum(record.file_size for record in records) > size:
        raise UnsupportedError(
            f"{path} holds compressed records, expected the plain ones of torch.save; unpack the archive, "
            "or load the file with torch.load and save it again."
        )
    if not any(record.CRC for record in records):  # saved with torch.serialization.set_crc32_options(False)
        for record in records:
            record.CRC = None  # type: ignore[assignment]  # zipfile then compares nothing
    return records


def begin_checks(paths: Sequence[Path]) -> None:
    """Begin to compare files with their checksums in the background; what is wrong is raised when they are loaded."""
    for path in paths:
        with contextlib.suppress(LlamaScratchError, OSError):
            future: Future[None] = Future()
            _ahead[_identity(path)] = future
            Thread(target=_check_in_background, args=(path, future), daemon=True).start()


# Checks that were begun, by what the files were then.
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
    except BaseException as error:  # noqa: BLE001 - it is raised where the file is loaded
        future.set_exception(error)


def _check_checksums(path: Path, records: list[zipfile.ZipInfo], progress: Progress) -> None:
    """Compare every record with its checksum, several at a time; or wait for what `begin_checks` began."""
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
    """The bytes of a file, mapped: a checksum of them runs without Python's lock and copies nothing."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            yield view
        finally:
            view.release()


def _check_record(path: Path, archive: zipfile.ZipFile, data: memoryview, record: zipfile.ZipInfo) -> int:
    try:
        archive.open(record).close()  # which checks the header in front of the record
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
        f"{path}: the record '{sanitize(record.filename)}' does not match its checksum, so the file is damaged; "
        + REDOWNLOAD_HINT
    )
