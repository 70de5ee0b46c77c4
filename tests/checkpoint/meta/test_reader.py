"""Meta's directories: good ones load without a copy, and every kind of bad one is rejected."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.meta.params import parse_params
from llama_scratch.config import is_tied
from llama_scratch.errors import (
    CheckpointError,
    LlamaScratchError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
    UsageError,
)
from llama_scratch.model import Transformer
from llama_scratch.precision.calibration import LINEARS_BY_INPUT
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.precision.linear import format_of
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.precision.rows import Rows
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected, is_sentence
from tests.helpers.checkpoints import TINY_PARAMS, random_weights, tiny_args, tiny_params, tokenizer_file, write_meta
from tests.helpers.meta_files import Danger
from tests.helpers.processes import mappings
from tests.helpers.weights import load, same

WEIGHTS, TOKENIZER, PARAMS = "consolidated.00.pth", "tokenizer.model", "params.json"
# Small, so that a damaged copy loads in milliseconds.
SMALL = tiny_params(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, multiple_of=16)
SMALL_ARGS = tiny_args(**SMALL)
PREFIX = "consolidated.00"


def save(directory: Path, weights: object) -> Path:
    """Replace the weights with a new file: the tensors to save may be mapped from the old one."""
    (directory / WEIGHTS).unlink()
    torch.save(weights, directory / WEIGHTS)
    return directory


def change_params(directory: Path, **changes: Any) -> Path:
    (directory / PARAMS).write_text(json.dumps(SMALL | changes))
    return directory


def repack(path: Path, changes: Mapping[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite the archive with correct checksums, with records replaced or removed (None)."""
    with zipfile.ZipFile(path) as archive:
        content: dict[str, bytes | None] = {info.filename: archive.read(info) for info in archive.infolist()}
    content |= {f"{PREFIX}/{name}": data for name, data in changes.items()}
    write_zip(path, [(name, data) for name, data in content.items() if data is not None], compression)


def write_zip(path: Path, records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    path.unlink()
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile warns about repeated names
        for name, data in records:
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def good_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid directory of the `SMALL` shape. Read only."""
    return write_meta(tmp_path_factory.mktemp("good") / "Small", params=SMALL)


@pytest.fixture
def small_dir(good_dir: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(good_dir, tmp_path / "Small"))


# --- Good directories -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_is_what_loads(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """Weights of each type, tied and untied, load bitwise equal under their names."""
    directory = write_meta(tmp_path / "m", params=SMALL, dtype=dtype, tied=tied)
    weights = load(directory)
    expected = {k: w.to(dtype) for k, w in random_weights(SMALL_ARGS, tied=False).items()}
    if tied:
        expected["output.weight"] = expected["tok_embeddings.weight"]
    assert same(weights, expected)
    assert is_tied(weights) is tied
    assert (weights["output.weight"] is weights["tok_embeddings.weight"]) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_said_of_how_weights_are_stored(tmp_path: Path, tied: bool) -> None:
    """Tensors counted by type, and whether the output is tied."""
    directory = write_meta(tmp_path / "m", params=SMALL, dtype=torch.float16, tied=tied)
    weights = dict(load(directory))
    weights["norm.weight"] = weights["norm.weight"].float()
    stored = open_checkpoint(save(directory, weights)).storage(silent)
    assert (stored.types, stored.tied, stored.dtype) == ({"float16": 11, "float32": 1}, tied, torch.float16)


def test_a_file_without_an_output_uses_the_embedding(small_dir: Path) -> None:
    """Some exports omit `output.weight`; the embedding is used, never random values."""
    weights = load(small_dir)
    del weights["output.weight"]
    again = load(save(small_dir, weights))
    assert again["output.weight"] is again["tok_embeddings.weight"]
    assert is_tied(again)


def test_two_tensors_over_one_storage_are_tied(small_dir: Path) -> None:
    """Meta's files have two tensors with the same storage; they become one tensor again."""
    weights = load(small_dir)
    weights["output.weight"] = weights["tok_embeddings.weight"].detach()
    assert weights["output.weight"] is not weights["tok_embeddings.weight"]
    again = load(save(small_dir, weights))
    assert is_tied(again)
    assert same(again, weights)
    assert Llama.load(small_dir, device="cpu").info.parameters == SMALL_ARGS.n_parameters(tied=True)


def test_equal_output_in_its_own_storage_stays_untied(small_dir: Path) -> None:
    """Tied means the same storage, not equal values, which are never compared."""
    weights = load(small_dir)
    weights["output.weight"] = weights["output.weight"].clone()
    assert not is_tied(load(save(small_dir, weights)))


def test_the_rotation_table_of_older_files_is_ignored(small_dir: Path) -> None:
    """`rope.freqs` is skipped by name and has no effect."""
    weights = load(small_dir)
    again = load(save(small_dir, weights | {"rope.freqs": torch.ones(8)}))
    assert same(again, weights)


def test_parameters_are_as_good_as_tensors(small_dir: Path) -> None:
    """A state dict of `nn.Parameter`s holds the same weights."""
    weights = load(small_dir)
    parameters = {name: torch.nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    assert same(load(save(small_dir, parameters)), weights)


def test_name_and_format(small_dir: Path) -> None:
    """The model has its directory's name, or that of the parent if it is Hugging Face's `original`."""
    assert (open_checkpoint(small_dir).name, open_checkpoint(small_dir).format) == ("Small", "meta")
    inner = Path(shutil.copytree(small_dir, small_dir.parent / "Llama-3.2-1B" / "original"))
    assert open_checkpoint(inner).name == "Llama-3.2-1B"


def test_a_tokenizer_from_elsewhere(small_dir: Path, tmp_path: Path) -> None:
    """`--tokenizer` replaces the directory's own tokenizer, which need not exist."""
    elsewhere = Path(shutil.move(small_dir / TOKENIZER, tmp_path / "other.model"))
    assert open_checkpoint(small_dir, str(elsewhere)).tokenizer.n_vocab == SMALL["vocab_size"]


def test_progress_counts_every_byte_once(good_dir: Path) -> None:
    """The progress bar never goes back and ends full."""
    calls: list[tuple[str, int, int]] = []
    open_checkpoint(good_dir).load(lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert {call[0] for call in calls} == {"checking"}
    assert done == sorted(done)
    assert done[-1] == calls[-1][2] > 0


def matrices(llama: Llama) -> list[Tensor]:
    """The matrices that a loaded model multiplies in 32 or 16 bits, as stored, the embedding first."""
    model = llama.engine.model
    found = [model.tok_embeddings.weight]
    for form in {id(form): form for form in map(format_of, model.modules()) if form is not None}.values():
        assert isinstance(form, Rows)
        found += [as_tensor(weight) for weight in form.weights]
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux shows a process its mappings")
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"), (torch.bfloat16, "auto")],
    ids=str,
)
def test_weights_are_the_file_itself(tmp_path: Path, dtype: torch.dtype, precision: str) -> None:
    """Every weight of a loaded model is in a mapping of the file, and generating copies none of its pages."""
    directory = write_meta(tmp_path / "m", params=SMALL, dtype=dtype)
    llama = Llama.load(directory, precision=precision, device="cpu")
    llama.predict("The the")
    mapped = list(mappings(directory / WEIGHTS))
    assert mapped
    assert {weight.dtype for weight in matrices(llama)} == {dtype}
    for weight in matrices(llama):
        last_byte = weight.data_ptr() + weight.nbytes - 1
        assert any(weight.data_ptr() in area and last_byte in area for area, _ in mapped)
    assert sum(figures["Anonymous"] for _, figures in mapped) == 0


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_loading_changes_no_file(small_dir: Path, precision: str) -> None:
    """A model's files are only read, whatever precision it is converted to."""

    def digests() -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in small_dir.iterdir()}

    before = digests()
    llama = Llama.load(small_dir, precision=precision, device="cpu")
    llama.predict("The")
    llama.prepare()
    assert digests() == before


# --- Precision --------------------------------------------------------------------------------


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
@pytest.mark.parametrize("asked", ["auto", *DTYPES])
def test_precision(tmp_path: Path, stored: torch.dtype, asked: str, tied: bool) -> None:
    """Every weight has the requested precision, rounded once; a tied output stays one tensor and is counted once."""
    directory = write_meta(tmp_path / "m", params=SMALL, dtype=stored, tied=tied)
    llama = Llama.load(directory, precision=asked, device="cpu")
    dtype = stored if asked == "auto" else DTYPES[asked]
    assert llama.info.precision == {dtype: name for name, dtype in DTYPES.items()}[dtype]
    assert llama.info.parameters == SMALL_ARGS.n_parameters(tied=tied)
    embedding, *_, output = found = matrices(llama)
    assert {weight.dtype for weight in found} == {dtype}
    assert (output.data_ptr() == embedding.data_ptr()) is tied
    weights = load(directory)
    assert torch.equal(embedding, weights["tok_embeddings.weight"].to(dtype))
    names = [f"layers.0.{name}.weight" for group in LINEARS_BY_INPUT for name in group]
    for weight, name in zip(found[1:], names, strict=False):
        assert torch.equal(weight, weights[name].to(dtype)), name
    assert llama.engine.packing.done


@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
@pytest.mark.parametrize(
    ("precision", "bound"), [("auto", 1e-5), ("fp32", 1e-5), ("bf16", 0.05), ("fp16", 1e-3), ("int8", 0.1)]
)
def test_answers_in_each_precision(tmp_path: Path, stored: torch.dtype, precision: str, bound: float) -> None:
    """From the first token on, compared with fp32; bfloat16 loses the most of the 16-bit types."""
    directory = write_meta(tmp_path / "m", params=SMALL, dtype=stored)
    llama = Llama.load(directory, precision=precision, device="cpu")
    ids = list(range(40, 60))
    expected = Llama.load(directory, precision="fp32", device="cpu").logits(ids)
    first = llama.logits(ids)
    llama.prepare()
    for found in (first, llama.logits(ids)):
        assert float((found - expected).norm() / expected.norm()) <= bound


def test_answers_are_those_of_the_weights(tmp_path: Path) -> None:
    """A loaded fp32 model computes the same as the weights that were never in a file."""
    directory = write_meta(tmp_path / "m", params=TINY_PARAMS, dtype=torch.float32)
    model = Transformer(tiny_args())
    model.load_state_dict(random_weights(tiny_args()))
    ids = list(range(40, 104))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), all_positions=True)[0]
    found = Llama.load(directory, precision="fp32", device="cpu").logits(ids)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


def test_only_a_conversion_needs_memory(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped weights load with memory for only the cache; a conversion is rejected before it starts."""
    needed = memory_needed(SMALL_ARGS, "bf16", torch.bfloat16, 4096, torch.device("cpu"), tied=True)
    assert needed["weights"] == 0
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=sum(needed.values())))
    assert Llama.load(small_dir, precision="bf16", device="cpu").info.precision == "bf16"
    with pytest.raises(OutOfMemoryError) as caught:
        Llama.load(small_dir, precision="fp32", device="cpu")
    is_sentence(caught.value, OutOfMemoryError, "fp32", "GB", "choose")


def test_an_unknown_precision_is_refused_before_the_weights_are_read(small_dir: Path) -> None:
    """A typo costs no time: the damaged file is not read."""
    (small_dir / WEIGHTS).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UsageError) as caught:
        Llama.load(small_dir, precision="fp8", device="cpu")
    is_sentence(caught.value, UsageError, "'fp8'", "auto", "fp32", "bf16", "fp16", "int8", "`precision`")


# --- Missing and misplaced files --------------------------------------------------------------


def test_a_missing_directory(tmp_path: Path) -> None:
    """The error has the path and how to get a model."""
    assert_rejected(
        lambda: load(tmp_path / "nowhere"), ModelNotFoundError, tmp_path / "nowhere", "llama-scratch pull smollm2"
    )


@pytest.mark.parametrize("file", [PARAMS, TOKENIZER, WEIGHTS])
def test_a_file_in_place_of_a_directory(good_dir: Path, file: str) -> None:
    """The path of one of a model's files is the model."""
    assert open_checkpoint(good_dir / file).files == open_checkpoint(good_dir).files


@pytest.mark.parametrize("file", [PARAMS, TOKENIZER, WEIGHTS])
def test_a_missing_file(small_dir: Path, file: str) -> None:
    """The error names the missing file and its directory."""
    (small_dir / file).unlink()
    assert_rejected(lambda: load(small_dir), ModelNotFoundError, file, small_dir)


@pytest.mark.parametrize("file", [PARAMS, TOKENIZER, WEIGHTS])
def test_a_directory_in_place_of_a_file(small_dir: Path, file: str) -> None:
    """It counts as missing."""
    (small_dir / file).unlink()
    (small_dir / file).mkdir()
    assert_rejected(lambda: load(small_dir), ModelNotFoundError, file, small_dir)


def test_hugging_faces_directory_around_original(small_dir: Path) -> None:
    """The path of the repository opens the model inside, under the repository's name."""
    outer = small_dir.parent / "Llama-3.2-1B"
    shutil.copytree(small_dir, outer / "original")
    checkpoint = open_checkpoint(outer)
    assert (checkpoint.name, checkpoint.path) == ("Llama-3.2-1B", outer / "original" / WEIGHTS)
    assert same(load(outer), load(small_dir))


def test_the_license_beside_original(small_dir: Path) -> None:
    """It is in the repository's own files."""
    small_dir.rename(small_dir.parent / "original")
    assert open_checkpoint(small_dir.parent).license is None
    (small_dir.parent / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    assert open_checkpoint(small_dir.parent).license == "llama3.2"
    (small_dir.parent / "original" / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    assert open_checkpoint(small_dir.parent / "original").license == "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"


def test_weights_that_vanish_after_opening(small_dir: Path) -> None:
    """Removed or unreadable between opening and loading: a clear error, not the operating system's."""
    checkpoint = open_checkpoint(small_dir)
    (small_dir / WEIGHTS).unlink()
    with pytest.raises(LlamaScratchError) as caught:
        checkpoint.load(silent)
    is_sentence(caught.value, type(caught.value), small_dir / WEIGHTS)


@pytest.mark.parametrize("file", [PARAMS, TOKENIZER, WEIGHTS])
def test_a_file_that_the_system_does_not_give_out(small_dir: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission errors and failing disks are reported with the file's name."""
    original = os.open
    path = small_dir / file

    def opened(name: Any, *args: Any, **kwargs: Any) -> int:
        if Path(name) == path:
            raise PermissionError(13, "Permission denied", str(name))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    assert_rejected(lambda: load(small_dir), LlamaScratchError, path)


# --- Damaged weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>Access denied</body></html>",
        b"\n  <html><head></head></html>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    ],
)
def test_a_web_page_saved_as_weights(small_dir: Path, content: bytes) -> None:
    """An expired link often leaves one; the error says that it is a web page."""
    (small_dir / WEIGHTS).write_bytes(content)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, "web page", "again")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), bytes(4096), b"version https://git-lfs\n"]
)
def test_no_weights_at_all(small_dir: Path, content: bytes) -> None:
    """Empty files, zeros, an empty archive and a Git LFS pointer."""
    (small_dir / WEIGHTS).write_bytes(content)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, "again")


def test_a_download_that_was_cut_short(small_dir: Path) -> None:
    """Rejected at 80 places over the file, at record boundaries, and within the last bytes."""
    path = small_dir / WEIGHTS
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        seams = [info.header_offset for info in archive.infolist()]
    ends = {*range(0, len(data), len(data) // 80), *seams, *(len(data) - n for n in (1, 2, 21, 22, 23, 64))}
    assert len(ends) > 90
    for end in sorted(ends, reverse=True):
        os.truncate(path, end)
        message = assert_rejected(lambda: load(small_dir), CheckpointError, path, "again")
        assert end == 0 or "truncated" in message or "starts with" in message


def flipped_at(small_dir: Path, bits: list[int], original: dict[str, Tensor]) -> list[int]:
    """Flip one bit of the weight file at a time; return the bits whose damage was noticed."""
    path = small_dir / WEIGHTS
    data = path.read_bytes()
    noticed = []
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        # A new file each time: tensors of the previous one may still be mapped.
        path.unlink()
        path.write_bytes(damaged)
        try:
            unchanged = same(load(small_dir), original)
        except LlamaScratchError as error:
            is_sentence(error, CheckpointError, path)
            noticed.append(bit)
        else:
            assert unchanged, f"bit {bit} changed the weights unnoticed"
    return noticed


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_changes_a_weight_unnoticed(small_dir: Path, good_dir: Path, seed: int) -> None:
    """100 bits anywhere in the file: each is rejected or has no effect."""
    size = (small_dir / WEIGHTS).stat().st_size
    bits = random.Random(seed).sample(range(8 * size), 100)
    noticed = flipped_at(small_dir, bits, load(good_dir))
    assert len(noticed) > 80  # nearly all of the file is weights


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_of_the_archives_structure_gets_through(small_dir: Path, good_dir: Path, seed: int) -> None:
    """The same for 150 bits outside of the weights: pickle, record headers, central directory."""
    with zipfile.ZipFile(small_dir / WEIGHTS) as archive:
        end_of_pickle = archive.getinfo(f"{PREFIX}/data/0").header_offset
        table = archive.getinfo(f"{PREFIX}/version").header_offset
        headers = [info.header_offset + i for info in archive.infolist() for i in range(30 + len(info.filename))]
    size = (small_dir / WEIGHTS).stat().st_size
    places = sorted({*range(end_of_pickle), *headers, *range(table, size)})
    bits = random.Random(seed).sample([8 * byte + bit for byte in places for bit in range(8)], 150)
    flipped_at(small_dir, bits, load(good_dir))


@pytest.mark.parametrize("flag", range(16))
def test_every_flag_of_a_record(small_dir: Path, good_dir: Path, flag: int) -> None:
    """zip's flag bits (encrypted, patched, strong encryption, …) on the first weight: rejected or no effect."""
    path = small_dir / WEIGHTS
    with zipfile.ZipFile(path) as archive:
        table = archive.start_dir
    entry = path.read_bytes().index(b"data/0", table) - len(PREFIX) - 1 - 46  # its central directory entry
    flipped_at(small_dir, [8 * (entry + 8) + flag], load(good_dir))


def test_the_checksum_is_compared_before_a_tensor_is_made(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the damaged weight, and torch never reads the file."""
    path = small_dir / WEIGHTS
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo(f"{PREFIX}/data/7")
    with path.open("r+b") as file:
        file.seek(record.header_offset + 1000)
        file.write(b"damage")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    assert_rejected(lambda: load(small_dir), CheckpointError, path, record.filename, "checksum", "again")


# --- Archives that torch.save did not write, or of other content -------------------------------


@pytest.mark.parametrize(
    "records",
    [
        [("readme.txt", b"hello")],
        [("a/data.pkl", b"."), ("b/data.pkl", b"."), ("a/version", b"3\n")],
        [("a/data.pkl", b"not a pickle"), ("a/version", b"3\n")],
        [("a/data.pkl", b""), ("a/version", b"3\n")],
        [("data.pkl", pickle.dumps({}, 2)), ("version", b"3\n")],
        [("a/data.pkl", pickle.dumps({}, 2))],
        [("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"three")],
        [("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"3\n"), ("a/constants.pkl", b"")],
        [("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"3\n"), ("a/byteorder", b"middle")],
        [("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"3\n"), ("a/.storage_alignment", b"x")],
    ],
    ids=[
        "no pickle", "two pickles", "no pickle inside", "empty pickle", "at the root", "no version", "odd version",
        "TorchScript", "byte order", "alignment",
    ],
)  # fmt: skip
def test_an_archive_that_is_no_checkpoint(small_dir: Path, records: list[tuple[str, bytes]]) -> None:
    """Zip files of other programs."""
    write_zip(small_dir / WEIGHTS, records)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive(small_dir: Path, compression: int) -> None:
    """A compressed archive cannot be mapped; a zip bomb is not unpacked to find out."""
    repack(small_dir / WEIGHTS, {}, compression)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, "compressed", "torch.save")


def test_one_compressed_record(small_dir: Path) -> None:
    """Among plain ones, with bytes that grow by compression: mapping would read it as the weight itself."""
    path = small_dir / WEIGHTS
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            packed = name.endswith("data/10")
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    assert_rejected(lambda: load(small_dir), CheckpointError, path, "compressed")


def test_a_record_that_stands_there_twice(small_dir: Path) -> None:
    """Two readers could see two different files in such an archive."""
    path = small_dir / WEIGHTS
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    write_zip(path, [*records, (f"{PREFIX}/data/0", bytes(35584))])
    assert_rejected(lambda: load(small_dir), CheckpointError, path, "torch.save")


@pytest.mark.parametrize("record", ["data/0", "data/10"])
def test_a_record_that_is_missing(small_dir: Path, record: str) -> None:
    """The pickle names a weight that is missing in the archive."""
    repack(small_dir / WEIGHTS, {record: None})
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)


@pytest.mark.parametrize("record", ["data/0", "data/5", "data/10"])
@pytest.mark.parametrize("size", [0, 2, 62])
def test_a_record_that_is_smaller_than_its_tensor(small_dir: Path, record: str, size: int) -> None:
    """The mapping would continue into the next record and read its bytes as weights."""
    repack(small_dir / WEIGHTS, {record: bytes(size)})
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)


@pytest.mark.parametrize("place", ["alone", "beside the weights", "as a name", "in a list"])
@pytest.mark.parametrize("name", ["system", "eval"])
def test_weights_that_want_to_run_code(small_dir: Path, tmp_path: Path, name: str, place: str) -> None:
    """The error names the code, which does not run."""
    proof = tmp_path / "proof"
    danger = Danger(os.system, f"touch {proof}") if name == "system" else Danger(eval, f"open({str(proof)!r}, 'w')")
    weights = load(small_dir)
    saved = {
        "alone": danger,
        "beside the weights": weights | {"norm.weight": danger},
        "as a name": {danger: torch.ones(1)},
        "in a list": weights | {"norm.weight": [danger]},
    }
    save(small_dir, saved[place])
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, name, "Do not use this file")
    assert not proof.exists()


def test_the_danger_is_real(small_dir: Path, tmp_path: Path) -> None:
    """The test above would notice: a naive loader does run that code."""
    proof = tmp_path / "proof"
    save(small_dir, Danger(os.system, f"touch {proof}"))
    torch.load(small_dir / WEIGHTS, weights_only=False)
    assert proof.exists()


def pickled(directory: Path, description: bytes) -> Path:
    """A directory whose archive has these opcodes as its pickle."""
    records = [("a/data.pkl", b"\x80\x02" + description), ("a/version", b"3\n"), ("a/data/0", bytes(256))]
    write_zip(directory / WEIGHTS, records)
    return directory


# Pickle's opcodes: } empty dictionary, ) empty tuple, \x85 tuple of one, c global, R call,
# X text, K J \x8a integers of 1, 4 and any number of bytes, s sets a dictionary item, . end.
@pytest.mark.parametrize(
    "description",
    [
        b"}",
        b".",
        b"}X\xff\xff\xff\x7fabc",
        b"}" + b")" + b"\x85" * 5000 + b"K\x01s.",
        b"c" + b"p" * 50_000 + b"\nsystem\n.",
        b"c__builtin__\nbytearray\n(J\x00\x00\x00\x10tR.",
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsctorch\ndevice\nsb.",
        b"cposix\x1b[2J\nsys\x07tem\n.",
        b"ctorch.storage\nUntypedStorage\n(J\x00\x00\x00\x10tR.",
        b"}X\x00\x00\x10\x00" + b"n" * (1 << 20) + b"K\x01s.",
        b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b".",
    ],
    ids=[
        "no end", "nothing", "a text beyond the end", "a name of tuples", "a long global", "256 MiB",
        "items is a number", "items is a type",
        "a global with escapes", "a storage of 256 MiB", "a long name", "a long number",
    ],
)  # fmt: skip
def test_a_description_meant_to_harm(small_dir: Path, description: bytes) -> None:
    """All opcodes end quickly in a short error, without allocating the memory that they request."""
    pickled(small_dir, description)
    start = time.process_time()
    with little_memory():
        assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)
    assert time.process_time() - start < 3


@contextmanager
def little_memory(mebibytes: float = 32) -> Iterator[None]:
    """Limit the memory that is allocated inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()


def test_a_description_meant_to_overflow_the_stack(small_dir: Path) -> None:
    """A million nested tuples as a name: Python itself would crash when it hashes the name."""
    pickled(small_dir, b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.")
    code = (
        "from llama_scratch.checkpoint import open_checkpoint\nfrom pathlib import Path\n"
        f"try:\n    open_checkpoint(Path({str(small_dir)!r})).load(print)\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout.split()[-1:]) == (0, ["CheckpointError"])


def test_an_archive_of_many_records(small_dir: Path) -> None:
    """Time grows with the number of records: the central directory is read only once."""
    records = [("a/data.pkl", b"\x80\x02}."), ("a/version", b"3\n")]
    write_zip(small_dir / WEIGHTS, records + [(f"a/data/{i}", b"ab") for i in range(2000)])
    start = time.process_time()
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("count", [5_000, 60_000])
def test_an_archive_of_very_many_records(small_dir: Path, count: int) -> None:
    """Far more than in any model: rejected within 2 s of CPU time, before they are read."""
    records = [("a/data.pkl", b"\x80\x02}."), ("a/version", b"3\n")]
    write_zip(small_dir / WEIGHTS, records + [(f"a/data/{i}", b"") for i in range(count)])
    start = time.process_time()
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)
    assert time.process_time() - start < 2


def test_a_description_of_very_many_steps(small_dir: Path) -> None:
    """A megabyte of opcodes that build nothing."""
    pickled(small_dir, b"}" + b"N0" * ((1 << 19) - 10) + b".")
    start = time.process_time()
    assert_rejected(lambda: load(small_dir), CheckpointError, "larger than torch.save writes")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("content", ["legacy", "pickle"])
def test_pickles_outside_of_an_archive(small_dir: Path, content: str) -> None:
    """Files of torch.save before version 1.6, and plain pickles."""
    path = small_dir / WEIGHTS
    if content == "legacy":
        torch.save(random_weights(SMALL_ARGS), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"tok_embeddings.weight": 1}))
    kind = UnsupportedError if content == "legacy" else CheckpointError
    assert_rejected(lambda: load(small_dir), kind, path, "expected a zip-format torch.save file")


@pytest.mark.parametrize(
    ("saved", "found"),
    [([1, 2], "list"), (torch.ones(2), "Tensor"), (3, "int"), (None, "None"), ((1, 2), "tuple")],
)
def test_no_dictionary(small_dir: Path, saved: object, found: str) -> None:
    """Anything other than a dictionary of named tensors."""
    save(small_dir, saved)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, found, "expected a dictionary")


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"model": {"norm.weight": torch.ones(2)}}, "dict"),
        ({"norm.weight": 1.5}, "float"),
        ({3: torch.ones(2)}, "3"),
        ({"norm.weight": [torch.ones(2)]}, "list"),
        ({"norm.weight": None}, "NoneType"),
        ({("a", "b"): torch.ones(2)}, "('a', 'b')"),
    ],
)
def test_a_dictionary_of_something_else(small_dir: Path, entry: dict[Any, Any], found: str) -> None:
    """A whole training state, or single values."""
    save(small_dir, load(small_dir) | entry)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, found, "expected only named tensors")


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda t: t.to(torch.int8),
    "float64": lambda t: t.double(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex64": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "sparse": lambda t: t.float().to_sparse(),
    "sparse rows": lambda t: t.float().to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "strided": lambda t: torch.cat([t, t], 1)[:, ::2],
    "columns of a wider one": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : -t.shape[1]],
    "rows of a longer one": lambda t: torch.cat([t, t, t])[len(t) : -len(t)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_not_plain(small_dir: Path, kind: str) -> None:
    """Other types and layouts; the error names the weight."""
    weights = load(small_dir)
    name = "layers.0.attention.wq.weight"  # square, so that every change keeps its shape
    save(small_dir, weights | {name: ODD_TENSORS[kind](weights[name])})
    message = assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS)
    # If its rebuild function is rejected first, the error names that instead.
    assert name in message or "torch._utils" in message or kind in ("quantized", "float8")


@pytest.mark.parametrize("view", VIEWS)
def test_a_weight_that_is_a_view(small_dir: Path, view: str) -> None:
    """torch.save keeps strides and offsets: the values are the same, in contiguous rows."""
    weights = load(small_dir)
    for name in ("layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight", "tok_embeddings.weight"):
        weights[name] = VIEWS[view](weights[name])
    weights["layers.0.ffn_norm.weight"] = weights["layers.0.ffn_norm.weight"].repeat_interleave(2)[::2]
    weights["output.weight"] = weights["tok_embeddings.weight"]
    read = open_checkpoint(save(small_dir, weights)).load(silent)
    assert same(read, weights)
    assert all(isinstance(weight, Tensor) and weight.is_contiguous() for weight in read.values())
    assert is_tied(read)


def test_another_view_of_the_embedding_is_not_tied(tmp_path: Path) -> None:
    """It has the same first byte and shape, but another order of values."""
    directory = write_meta(tmp_path / "m", params=SMALL | {"vocab_size": 556, "dim": 556 * 2, "n_heads": 2})
    weights = load(directory)
    store = weights["tok_embeddings.weight"].clone().reshape(-1)
    weights["tok_embeddings.weight"] = store.as_strided((556, 1112), (1112, 1))
    weights["output.weight"] = store.as_strided((556, 1112), (1, 556))
    read = open_checkpoint(save(directory, weights)).load(silent)
    assert not is_tied(read)
    assert same(read, weights)


def test_a_view_that_is_much_larger_than_its_file(small_dir: Path) -> None:
    """A number expanded to terabytes: its shape is checked before a copy is made."""
    weights = load(small_dir) | {"norm.weight": torch.ones(1, dtype=torch.bfloat16).expand(10**13)}
    with little_memory():
        assert_rejected(lambda: load(save(small_dir, weights)), CheckpointError, "norm.weight has the shape")


@pytest.mark.parametrize("n", [None, 6])
def test_a_file_without_checksums(small_dir: Path, n: int | None) -> None:
    """torch.serialization.set_crc32_options(False) writes 0 for each; a single 0 is damage."""
    weights, path = load(small_dir), small_dir / WEIGHTS
    torch.serialization.set_crc32_options(False)
    try:
        save(small_dir, weights)
    finally:
        torch.serialization.set_crc32_options(True)
    if n is None:
        assert same(load(small_dir), weights)
        return
    save(small_dir, weights)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = data.index(f"data/{n}".encode(), archive.start_dir) - len(PREFIX) - 1 - 46
    data[place + 16 : place + 20] = bytes(4)
    path.unlink()
    path.write_bytes(data)
    assert_rejected(lambda: load(small_dir), CheckpointError, f"data/{n}", "checksum", "again")


@pytest.mark.parametrize(
    "attribute",
    ["is_contiguous", "untyped_storage", "detach", "data_ptr", "shape", "stride", "__class__", "grad", "data"],
)
def test_an_attribute_that_shadows_a_method(small_dir: Path, attribute: str) -> None:
    """A pickle can attach attributes to a parameter: they are ignored, or the file is rejected."""
    weights = load(small_dir)
    parameter = torch.nn.Parameter(weights["norm.weight"], requires_grad=False)
    parameter.odd = "odd"  # type: ignore[attr-defined]
    save(small_dir, weights | {"norm.weight": parameter})
    path = small_dir / WEIGHTS
    with zipfile.ZipFile(path) as archive:
        description = archive.read(f"{PREFIX}/data.pkl")
    name = struct.pack("<cI", b"X", len(attribute)) + attribute.encode()
    repack(path, {"data.pkl": description.replace(b"X\x03\x00\x00\x00odd", name, 1)})
    try:
        assert same(load(small_dir), weights)
    except CheckpointError as error:
        is_sentence(error, CheckpointError, path)


@pytest.mark.parametrize("name", SMALL_ARGS.weight_shapes())
def test_a_wrong_shape(small_dir: Path, name: str) -> None:
    """Each weight's shape is checked: the error has the weight, its shape and the expected one."""
    weights = load(small_dir)
    if name == "tok_embeddings.weight":
        weights["output.weight"] = weights["output.weight"].clone()
    wrong = torch.cat([weights[name], weights[name][:1]])
    save(small_dir, weights | {name: wrong})
    expected = SMALL_ARGS.weight_shapes()[name]
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, name, tuple(wrong.shape), expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (32, 1), (1, 32), (0, 10**15)])
def test_a_norm_of_another_shape(small_dir: Path, shape: tuple[int, ...]) -> None:
    """Shapes that would broadcast, and empty ones."""
    weights = load(small_dir)
    save(small_dir, weights | {"norm.weight": torch.ones(shape)})
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / WEIGHTS, "norm.weight", shape, (32,))


@pytest.mark.parametrize("name", [name for name in SMALL_ARGS.weight_shapes() if name != "output.weight"])
def test_a_missing_weight(small_dir: Path, name: str) -> None:
    """The error names it; an untied output does not replace the embedding."""
    weights = load(small_dir)
    del weights[name]
    assert_rejected(
        lambda: load(save(small_dir, weights)), CheckpointError, small_dir / WEIGHTS, repr(name), "lacks", 12
    )


def test_no_weights_in_the_dictionary(small_dir: Path) -> None:
    """An empty dictionary: the error names the first missing weight and counts the others."""
    assert_rejected(
        lambda: load(save(small_dir, {})), CheckpointError, small_dir / WEIGHTS, "tok_embeddings.weight", "more weights"
    )


@pytest.mark.parametrize(
    "name",
    ["rope.freqs.weight", "layers.1.ffn_norm.weight", "layers.0.attention.wq.bias", "", "a\nb\x1b[2J", "n" * 5000],
    ids=lambda name: repr(name[:20]),
)
def test_an_unknown_weight(small_dir: Path, name: str) -> None:
    """The error names it; the name can neither break the line nor fill the screen."""
    assert_rejected(
        lambda: load(save(small_dir, load(small_dir) | {name: torch.ones(2)})),
        CheckpointError,
        small_dir / WEIGHTS,
        name[:1],
    )


@pytest.mark.parametrize("change", [{"n_layers": 2}, {"dim": 64}, {"n_kv_heads": 2}, {"multiple_of": 512}])
def test_params_of_another_model(small_dir: Path, change: dict[str, int]) -> None:
    """Weights and params of different models, whichever of them is wrong."""
    assert_rejected(lambda: load(change_params(small_dir, **change)), CheckpointError, small_dir / WEIGHTS, "params")


@pytest.mark.filterwarnings("ignore")  # torch's own warnings about odd tensors
@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_a_description_that_was_tampered_with(
    tmp_path_factory: pytest.TempPathFactory, good_dir: Path, data: st.DataObject
) -> None:
    """Bytes of the pickle changed, with a correct checksum: rejected, or tensors of the right shape."""
    with zipfile.ZipFile(good_dir / WEIGHTS) as archive:
        description = bytearray(archive.read(f"{PREFIX}/data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(description) - 1))
        description[place] = data.draw(st.integers(0, 255))
    directory = Path(shutil.copytree(good_dir, tmp_path_factory.mktemp("tampered") / "m"))
    repack(directory / WEIGHTS, {"data.pkl": bytes(description)})
    try:
        weights = load(directory)
    except LlamaScratchError as error:
        is_sentence(error, CheckpointError, directory / WEIGHTS)
    else:
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == SMALL_ARGS.weight_shapes()


# --- params.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"dim: 32", "not JSON"),
        (b"<html></html>", "web page"),
        (b"\xff\xfe\x00", "UTF-16"),
        (b"\xe9", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"dim": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[1]", "list"),
        (b"3", "int"),
        (b'"dim"', "str"),
        (b"null", "NoneType"),
        (b" " * (2 << 20), "2,097,152 bytes"),
    ],
)
def test_params_that_are_no_object(small_dir: Path, content: bytes, found: str) -> None:
    """Not JSON, not text, not an object, too large."""
    (small_dir / PARAMS).write_bytes(content)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / PARAMS, found)


def test_params_nested_as_deep_as_python_can_read() -> None:
    """A value that can just be parsed must not be too deep for the error message."""
    for depth in range(1, 1100):
        text = json.dumps(SMALL).replace('"dim": 32', f'"dim": {"[" * depth + "]" * depth}')
        with pytest.raises(CheckpointError) as caught:
            parse_params(text, "there/params.json")
        is_sentence(caught.value, CheckpointError, "there/params.json")


INTEGERS = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
NUMBERS = ["norm_eps", "rope_theta", "ffn_dim_multiplier"]
OPTIONAL = {"ffn_dim_multiplier", "use_scaled_rope"}
BAD_NUMBERS: list[Any] = [0, -1, 10**12, 10**30, float("nan"), float("inf"), "32", "3\n2", True, [32], {"a": 1}]
BAD_VALUES: list[tuple[str, Any]] = [
    *((field, value) for field in INTEGERS for value in [*BAD_NUMBERS, 1.5]),
    *((field, value) for field in NUMBERS for value in BAD_NUMBERS),
    *(("use_scaled_rope", value) for value in (0, 1, "true", 1.0, [True])),
]


@pytest.mark.parametrize("field", [field for field in SMALL if field not in OPTIONAL])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_params_that_lack_a_field(small_dir: Path, field: str, how: str) -> None:
    """The error names the field, whether it is missing or null."""
    params = {k: v for k, v in SMALL.items() if k != field} | ({field: None} if how == "null" else {})
    (small_dir / PARAMS).write_text(json.dumps(params))
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / PARAMS, field, "missing", "again")


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=repr)
def test_params_with_an_impossible_value(small_dir: Path, field: str, value: Any) -> None:
    """The error has the field, its value and the expected range."""
    found = value[0] if isinstance(value, str) else value
    assert_rejected(
        lambda: load(change_params(small_dir, **{field: value})),
        CheckpointError,
        small_dir / PARAMS,
        field,
        found,
        "expected",
    )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_heads": 3}, "3 heads"),
        ({"n_heads": 32}, "32 heads"),  # heads of one number have no pairs to rotate
        ({"n_heads": 2, "n_kv_heads": 3}, "2 query heads"),
        ({"rope_scaling_factor": 0.5}, "0.5"),
        ({"n_layers": 1025}, "1025"),
    ],
)
def test_params_that_contradict_each_other(small_dir: Path, changes: dict[str, Any], found: str) -> None:
    """Each number is valid, but together they are not."""
    assert_rejected(lambda: load(change_params(small_dir, **changes)), CheckpointError, small_dir / PARAMS, found)


@pytest.mark.parametrize(
    ("arguments", "release"),
    [
        ({"quantization_args": {"group_size": 32}, "lora_args": {"rank": 16}}, "int4-qlora-eo8"),
        ({"quantization_args": {"group_size": 32, "spinquant": True}}, "int4-spinquant-eo8"),
        ({"quantization_args": {"scheme": "8da4w"}}, "8da4w"),
        ({"quantization_args": {"group_size": 256}}, "in int4"),
        ({"quantization_args": 7}, "7"),
    ],
)
def test_quantized_releases_are_not_supported(small_dir: Path, arguments: dict[str, Any], release: str) -> None:
    """Meta's SpinQuant and QLoRA files hold other tensors; the error is raised before anything else."""
    change_params(small_dir, **arguments)
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / PARAMS, release, "bf16")


def test_fields_that_nobody_knows_are_ignored(small_dir: Path, good_dir: Path) -> None:
    """Newer files may have more fields."""
    assert same(load(change_params(small_dir, model_type="llama3")), load(good_dir))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(changes=st.dictionaries(st.sampled_from([*SMALL, "rope_scaling_factor"]), json_values, min_size=1, max_size=3))
def test_any_value_in_any_field(changes: dict[str, Any]) -> None:
    """Any JSON value gives valid dimensions, or an error."""
    try:
        args = parse_params(json.dumps(SMALL | changes), "there/params.json")
    except LlamaScratchError as error:
        is_sentence(error, CheckpointError, "there/params.json")
    else:
        assert args.dim == args.n_heads * args.head_dim
        assert args.head_dim % 2 == 0
        assert args.ffn_dim > 0
        assert args.rope_theta > 0


# --- tokenizer.model --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        (1, b""),
        (1, b"AA=="),
        (17, b"EA== 17"),
        (17, b"EA== 16 x"),
        (17, b"EA== sixteen"),
        (17, b"EA== -16"),
        (17, b"EA== 1_6"),
        (17, b"EA== +16"),
        (17, b"E A== 16"),
        (17, b"??? 16"),
        (17, b"AA== 16"),
        (17, b" 16"),
        (300, b"\xff\xfe 299"),
        (300, b"Y2g= " + b"9" * 5000),
        (300, b"Y2g=\x1b[2J 299"),
    ],
)
def test_a_bad_line_in_the_tokenizer(small_dir: Path, line: int, bad: bytes) -> None:
    """The error has the line number and the expected content."""
    path = small_dir / TOKENIZER
    lines = path.read_bytes().splitlines()
    lines[line - 1] = bad
    path.write_bytes(b"\n".join(lines))
    assert_rejected(lambda: load(small_dir), CheckpointError, path, f"line {line}", f"rank {line - 1}", "again")


def test_an_empty_tokenizer(small_dir: Path) -> None:
    """A tokenizer without tokens."""
    (small_dir / TOKENIZER).write_bytes(b"")
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir / TOKENIZER, "0x00")


@pytest.mark.parametrize("lines", [256, 299, 301])
def test_a_tokenizer_that_does_not_fit(small_dir: Path, lines: int) -> None:
    """One token more or fewer than the embedding's rows: the error has both numbers."""
    whole = (tokenizer_file() + b"Y2hh 300\n").splitlines(keepends=True)
    (small_dir / TOKENIZER).write_bytes(b"".join(whole[:lines]))
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir, lines + 256, SMALL["vocab_size"], "tokenizer")


def test_the_tokenizer_is_read_anew_each_time(small_dir: Path) -> None:
    """tiktoken's own reader caches the first file; a repaired file must be read again."""
    good = (small_dir / TOKENIZER).read_bytes()
    (small_dir / TOKENIZER).write_bytes(good[:-20])
    assert_rejected(lambda: load(small_dir), CheckpointError, small_dir)
    (small_dir / TOKENIZER).write_bytes(good)
    assert open_checkpoint(small_dir).tokenizer.encode("the") != []
