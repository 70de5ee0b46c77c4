"""Read GGUF files as the gguf package does, and reject broken headers quickly."""

from __future__ import annotations

import math
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import bytes_to_unicode
from llama_scratch.checkpoint.gguf.header import read_header
from llama_scratch.config import ModelArgs, is_tied
from llama_scratch.errors import (
    CheckpointError,
    LlamaScratchError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)
from llama_scratch.model import Transformer
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.system.progress import silent
from tests.helpers.assertions import is_sentence, little_time_and_memory
from tests.helpers.checkpoints import random_weights
from tests.helpers.gguf_files import (
    ARGS,
    MERGES,
    NAMES,
    File,
    arrays,
    ints,
    load_rejected,
    string,
    strings,
    text,
    uint,
    vocabulary,
    whole_file,
    write_with_gguf,
)
from tests.helpers.weights import same

pytestmark = pytest.mark.reference


@pytest.fixture
def file() -> File:
    return whole_file()


# --- The open model ---------------------------------------------------------------------------


def test_smollm2s_header_is_what_the_gguf_package_reads(smollm2_path: Path) -> None:
    """All metadata, and the name, shape, type, offset and size of every tensor match the gguf package's."""
    header = read_header(smollm2_path)
    reader = gguf.GGUFReader(smollm2_path)
    expected = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert len(header.tensors) == 272
    found = [(t.name, t.shape, t.type, t.start, t.size) for t in header.tensors]
    assert found == [
        (t.name, tuple(map(int, reversed(t.shape))), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]


@pytest.mark.slow
def test_smollm2s_weights_are_what_the_gguf_package_dequantizes(smollm2_path: Path) -> None:
    """All 272 tensors are bitwise equal, under Meta's names."""
    weights = open_checkpoint(smollm2_path).load(silent)
    parts = {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv"}
    parts |= {"ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}
    parts |= {"attn_output": "attention.wo", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    left = set(weights) - {"output.weight"}
    for tensor in gguf.GGUFReader(smollm2_path).tensors:
        name = NAMES.get(tensor.name, "")
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            name = f"layers.{layer}.{parts[part]}.weight"
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(as_tensor(weights[name], torch.float32).numpy(), expected), name
        left.remove(name)
    assert not left
    assert is_tied(weights)


def test_smollm2s_shape(smollm2_path: Path) -> None:
    """The known shape, a name without the quantization type, and no BOS token."""
    checkpoint = open_checkpoint(smollm2_path)
    expected = ModelArgs(576, 30, 9, 3, 49152, 1536, checkpoint.args.norm_eps, 100_000.0, None, 8192)
    assert checkpoint.args == expected
    assert math.isclose(checkpoint.args.norm_eps, 1e-5, rel_tol=1e-6)
    assert (checkpoint.name, checkpoint.format) == ("SmolLM2-135M-Instruct", "gguf")
    assert checkpoint.tokenizer.bos_id is None
    assert checkpoint.tokenizer.stop_ids == {0, 2}


def test_opening_smollm2_reads_no_weights(smollm2_path: Path) -> None:
    """Only the header is read: the file's 98 MB do not pass through memory."""
    with little_time_and_memory(seconds=10, mebibytes=60):
        open_checkpoint(smollm2_path)


# --- Files of other writers -------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "quant", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1]
)
def test_files_of_the_gguf_packages_writer(tmp_path: Path, quant: Quant, tied: bool) -> None:
    """Each quantization that the package can write loads as the package reads it, with and without an output."""
    path = write_with_gguf(tmp_path / f"small-{quant.name}.gguf", quant, tied=tied)
    checkpoint = open_checkpoint(path)
    weights = checkpoint.load(silent)
    assert (checkpoint.name, checkpoint.args.rope_theta) == ("small", 10000.0)
    assert is_tied(weights) is tied
    for name, array in arrays(tied=tied).items():
        kind = Quant.F32 if array.ndim == 1 else quant
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        meta = NAMES.get(name, name)
        assert np.array_equal(as_tensor(weights[meta], torch.float32).numpy(), expected), name
        assert np.abs(expected - array).max() < 0.1  # and is close to the original values


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_by_hand_is_the_same_as_the_writers(tmp_path: Path, file: File, version: int) -> None:
    """The files that the tests below damage are valid to begin with. Versions 2 and 3 are equivalent here."""
    file.version = version
    by_hand = open_checkpoint(file.write(tmp_path / "hand.gguf"))
    written = open_checkpoint(write_with_gguf(tmp_path / "written.gguf", Quant.F32))
    assert by_hand.args == written.args
    assert same(by_hand.load(silent), written.load(silent))
    assert by_hand.tokenizer.encode("the thin oven \x00é") == written.tokenizer.encode("the thin oven \x00é")


def test_a_small_file_answers(tmp_path: Path) -> None:
    """`Llama.load` computes the same as the weights that the file was made from."""
    llama = Llama.load(write_with_gguf(tmp_path / "small.gguf", Quant.F32), device="cpu")
    model = Transformer(ARGS)
    weights = {NAMES[name]: torch.from_numpy(array) for name, array in arrays().items()}
    model.load_state_dict(weights | {"output.weight": weights["tok_embeddings.weight"]})
    ids = list(range(64))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), all_positions=True)[0]
    torch.testing.assert_close(llama.logits(ids), expected, rtol=1e-5, atol=1e-5)
    assert llama.info.parameters == ARGS.n_parameters(tied=True)
    assert llama.info.format == "gguf"
    assert llama.tokenizer.decode(llama.encode("the thin é")) == "the thin é"


@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_the_alignment_that_a_file_asks_for(tmp_path: Path, file: File, alignment: int) -> None:
    """The data starts at the next multiple of `general.alignment`."""
    expected = open_checkpoint(file.write(tmp_path / "a.gguf")).load(silent)
    file.set("general.alignment", uint(alignment)).alignment = alignment
    offset = 0
    data, tensors = b"", []
    for name, dims, kind, start in file.tensors:
        size = 4 * math.prod(dims)
        tensors.append((name, dims, kind, offset))
        data += file.data[start : start + size] + bytes(-size % alignment)
        offset = len(data)
    file.data, file.tensors = data, tensors
    assert same(open_checkpoint(file.write(tmp_path / "b.gguf")).load(silent), expected)


def test_every_kind_of_metadata_value(tmp_path: Path) -> None:
    """Numbers of each width, booleans, strings, arrays and an empty array, in addition to the required keys."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -32768)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -(2**31))
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve\n")
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.strings", ["x", "", "é"])
    writer.add_array("a.bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "m.gguf").metadata == {
        "general.architecture": "llama",
        "a.u8": 255,
        "a.i8": -128,
        "a.u16": 65535,
        "a.i16": -32768,
        "a.u32": 2**32 - 1,
        "a.i32": -(2**31),
        "a.u64": 2**64 - 1,
        "a.i64": -(2**63),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.string": "naïve\n",
        "a.ints": [1, 2, 3],
        "a.strings": ["x", "", "é"],
        "a.bools": [True, False],
    }


def test_begin_and_end_of_text(tmp_path: Path, file: File) -> None:
    """BOS is added only if the file asks for it, and the named EOS is a stop token."""
    for add, expected in ((None, None), (False, None), (True, 271)):
        file.set("tokenizer.ggml.bos_token_id", uint(271))
        file.set("tokenizer.ggml.add_bos_token", None if add is None else struct.pack("<I?", 7, add))
        tokenizer = open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer
        assert tokenizer.bos_id == expected
        assert tokenizer.stop_ids == {270}


def test_what_is_said_of_how_weights_are_stored(tmp_path: Path) -> None:
    """Tensors counted by type, and whether the output is tied, without reading the data."""
    stored = open_checkpoint(write_with_gguf(tmp_path / "a.gguf", Quant.Q8_0)).storage(silent)
    assert (stored.types, stored.tied, stored.dtype) == ({"Q8_0": 15, "F32": 5}, True, torch.float32)
    assert not open_checkpoint(write_with_gguf(tmp_path / "b.gguf", Quant.F16, tied=False)).storage(silent).tied


def test_too_little_memory_is_noticed_first(tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of dequantized blocks follows from the header; nothing is dequantized to compute it."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=300_000))
    monkeypatch.setattr(
        "llama_scratch.precision.lazy_weight.GGUFBlockWeight.rows", lambda *_: pytest.fail("it was dequantized")
    )
    path = write_with_gguf(tmp_path / "small.gguf", Quant.Q8_0)
    with pytest.raises(OutOfMemoryError) as caught:
        Llama.load(path, precision="fp32", context=1, device="cpu")
    is_sentence(caught.value, OutOfMemoryError, "small", "GB", "choose")


def test_progress_counts_tensors(tmp_path: Path, file: File) -> None:
    """The progress bar advances by one per tensor and ends full."""
    calls: list[tuple[str, int, int]] = []
    open_checkpoint(file.write(tmp_path / "a.gguf")).load(lambda *call: calls.append(call))
    assert calls == [("reading", i, len(NAMES)) for i in range(1, len(NAMES) + 1)]


# --- Broken files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "24 bytes"),
        (b"GGUF", "24 bytes"),
        (b"GGUF" + bytes(19), "24 bytes"),
        (bytes(100), "expected GGUF"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "expected GGUF"),
    ],
)
def test_another_kind_of_file(tmp_path: Path, content: bytes, says: str) -> None:
    """Empty files, files that are too short, and files of other programs."""
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    load_rejected(path, says, "again")


@pytest.mark.parametrize("version", [0, 1, 4, 32, 2**32 - 1])
def test_another_version(tmp_path: Path, file: File, version: int) -> None:
    """Version 1 has another layout, and there may be a version 4. Any other version number means damage."""
    file.version = version
    kind = UnsupportedError if version in (1, 4) else CheckpointError
    message = load_rejected(file.write(tmp_path / "a.gguf"), f"version {version}", "2 or 3", error=kind)
    assert ("not a complete" in message) == (kind is CheckpointError)


def test_a_big_endian_file(tmp_path: Path) -> None:
    """Written by the gguf package itself; the error names the byte order and how to convert the file."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = load_rejected(tmp_path / "a.gguf", "version", "big-endian", "gguf-convert-endian", error=UnsupportedError)
    assert "not a complete" not in message


def test_no_file_by_that_name(tmp_path: Path) -> None:
    """A missing file is not reported as damaged."""
    load_rejected(tmp_path / "a.gguf", error=ModelNotFoundError)


def test_another_ending(tmp_path: Path, file: File) -> None:
    """A file is recognized as GGUF by its extension in any case, and by its first bytes."""
    assert open_checkpoint(file.write(tmp_path / "A.GGUF")).args == ARGS
    assert open_checkpoint(file.write(tmp_path / "a.bin")).args == ARGS


def test_a_file_that_the_system_does_not_give_out(tmp_path: Path, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing permission or a failing disk has the file's name."""
    path = file.write(tmp_path / "a.gguf")

    def denied(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    load_rejected(path, "ermission", error=LlamaScratchError)


def test_a_file_that_changes_after_opening(tmp_path: Path, file: File) -> None:
    """Removed or truncated between opening and loading: a clear error, not one from the system or numpy."""
    path = file.write(tmp_path / "a.gguf")
    checkpoint = open_checkpoint(path)
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-100]), path.unlink):
        damage()
        with pytest.raises(LlamaScratchError) as caught:
            checkpoint.load(silent)
        is_sentence(caught.value, type(caught.value), path)


def test_a_header_that_was_cut_short(tmp_path: Path, file: File) -> None:
    """Rejected at each of 300 places in the header, at the first and last 100 bytes, and within the data."""
    whole = file.header() + file.data
    end = len(file.header())
    ends = {*range(100), *range(0, end, end // 300), *range(end - 100, end), end + 1, len(whole) // 2, len(whole) - 1}
    path = tmp_path / "a.gguf"
    for size in ends:
        path.write_bytes(whole[:size])
        with pytest.raises(LlamaScratchError) as caught:
            open_checkpoint(path)
        is_sentence(caught.value, CheckpointError, path, "again")


def minimal_file() -> File:
    """The smallest complete model, with four tokens and one layer, so that every byte can be tried."""
    file = File()
    # Each tensor is longer than the alignment, so none can shrink without moving the next one.
    shape = {"context_length": 16, "embedding_length": 16, "block_count": 1, "feed_forward_length": 3}
    shape |= {"attention.head_count": 1, "attention.head_count_kv": 1}
    file.metadata = [
        ("general.architecture", string("llama")),
        *((f"llama.{name}", uint(value)) for name, value in shape.items()),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, 1e-5)),
        ("general.alignment", uint(32)),
        ("tokenizer.ggml.model", string("gpt2")),
        ("tokenizer.ggml.pre", string("smollm")),
        ("tokenizer.ggml.tokens", strings(["a", "b", "ab", "<?>"])),
        ("tokenizer.ggml.token_type", ints([1, 1, 1, 3])),
        ("tokenizer.ggml.merges", strings(["a b"])),
        ("tokenizer.ggml.unknown_token_id", uint(3)),
    ]
    args = ModelArgs(16, 1, 1, 1, 4, 3, 1e-5, 1e4, None, 16)
    rng = np.random.default_rng(0)
    for name, meta in NAMES.items():
        if "blk.1." not in name:
            array = rng.normal(size=args.weight_shapes()[meta]).astype(np.float32)
            file.tensors.append((name, tuple(reversed(array.shape)), 0, len(file.data)))
            file.data += array.tobytes()
    return file


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF, 0x20])
def test_no_changed_byte_of_the_header_changes_a_weight_unnoticed(tmp_path: Path, mask: int) -> None:
    """Change each byte of the header: the file is rejected within a second, or no weight changes.

    GGUF has no checksum, so a number such as the RoPE base may change. But the tensors are contiguous and fill the
    file, so they cannot be read from a wrong offset.
    """
    file = minimal_file()
    path = file.write(tmp_path / "a.gguf")
    original = open_checkpoint(path).load(silent)
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(file.header())):
        damaged = bytearray(whole)
        damaged[place] ^= mask
        path.unlink()
        path.write_bytes(damaged)
        start = time.process_time()
        try:
            if not same(open_checkpoint(path).load(silent), original):
                unnoticed.append(place)
        except LlamaScratchError as error:
            is_sentence(error, CheckpointError, path)
        assert time.process_time() - start < 1
    assert unnoticed == []


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_a_header_with_several_changes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Replace, remove and insert bytes: the file is rejected, or has exactly the shape that it states."""
    damaged = bytearray(minimal_file().header() + minimal_file().data)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 1100))
        length = data.draw(st.sampled_from([0, 1, 1, 1, 4, 8]))
        damaged[place : place + length] = data.draw(st.binary(min_size=0, max_size=8))
    path = tmp_path_factory.mktemp("changed") / "a.gguf"
    path.write_bytes(damaged)
    start = time.process_time()
    try:
        checkpoint = open_checkpoint(path)
        weights = checkpoint.load(silent)
    except LlamaScratchError as error:
        is_sentence(error, CheckpointError, path)
    else:
        assert {name: tuple(w.shape) for name, w in weights.items()} == checkpoint.args.weight_shapes()
    assert time.process_time() - start < 1


HUGE = [2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "build",
    [
        lambda n: File(n_tensors=n).header(),
        lambda n: File(n_metadata=n).header(),
        lambda n: File(n_tensors=n, n_metadata=n).header(),
        lambda n: File(n_metadata=n).header()[:24] + text("a") + uint(1),
        lambda n: File(n_metadata=1).header()[:24] + struct.pack("<Q", n) + b"key",
        lambda n: File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IQ", 8, n) + b"value",
        lambda n: File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IIQ", 9, 0, n),
        lambda n: File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IIQ", 9, 8, n),
        lambda n: File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IIQ", 9, 12, n),
        lambda n: File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IIQ", 9, 9, n),
        lambda n: File(n_tensors=1).header()[:24] + struct.pack("<Q", n) + b"name",
        lambda n: File(n_tensors=1).header()[:24] + text("t") + struct.pack("<I", n & 0xFFFFFFFF | 8),
        lambda n: File(tensors=[("t", (n,), 0, 0)]).header() + bytes(64),
        lambda n: File(tensors=[("t", (n, n, n, n), 0, 0)]).header() + bytes(64),
        lambda n: File(tensors=[("t", (8,), 0, n)]).header() + bytes(64),
        lambda n: File(tensors=[("t", (n, 0), 0, 0)]).header() + bytes(64),
        lambda n: File(metadata=[("general.alignment", struct.pack("<IQ", 10, n))]).header() + bytes(64),
    ],
    ids=[
        "tensors", "metadata", "both", "metadata after one", "key", "string", "array of bytes", "array of strings",
        "array of doubles", "array of arrays", "tensor name", "dimensions", "size", "sizes", "offset",
        "size of nothing", "alignment",
    ],
)  # fmt: skip
def test_absurd_numbers_in_a_tiny_file(tmp_path: Path, build: Callable[[int], bytes], count: int) -> None:
    """A tiny file with counts in the billions is rejected at once, without allocating memory for them.

    The gguf package's own reader loops forever on some of these.
    """
    path = tmp_path / "a.gguf"
    path.write_bytes(build(count))
    assert path.stat().st_size < 200
    load_rejected(path)


def test_the_43_bytes_that_keep_the_gguf_package_busy(tmp_path: Path) -> None:
    """An array of 2⁶⁴ − 1 elements of each type after an empty key, complete and cut to 43 bytes."""
    path = tmp_path / "a.gguf"
    for kind in range(13):
        whole = File(n_metadata=1).header()[:24] + text("") + struct.pack("<IIQ", 9, kind, 2**64 - 1)
        for size in (43, len(whole)):
            path.write_bytes(whole[:size])
            load_rejected(path)


def test_arrays_within_arrays(tmp_path: Path) -> None:
    """Ten thousand nested arrays of one element are rejected without a stack overflow."""
    path = tmp_path / "a.gguf"
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000
    path.write_bytes(File(n_metadata=1).header()[:24] + text("k") + nested)
    load_rejected(path, "type 9")


def test_a_large_array_takes_little_room(tmp_path: Path) -> None:
    """An array of eight million bytes, far larger than any vocabulary, does not become Python objects."""
    path = tmp_path / "a.gguf"
    n = 8_000_000
    path.write_bytes(File(n_metadata=1).header()[:24] + text("k") + struct.pack("<IIQ", 9, 0, n) + bytes(n))
    with little_time_and_memory(mebibytes=32), pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_many_tensors_over_the_same_bytes(tmp_path: Path) -> None:
    """Overlapping tensors in 4 MB would become 16 GB of weights; the file is rejected before any is created."""
    file = minimal_file()
    file.tensors += [(f"x{i}", (1 << 20,), 0, 0) for i in range(4_000)]
    file.data += bytes(4 << 20)
    load_rejected(file.write(tmp_path / "a.gguf"))


@pytest.mark.parametrize("key", ["general.architecture", "llama.rope.freq_base", "tokenizer.ggml.tokens"])
def test_a_key_that_stands_there_twice(tmp_path: Path, file: File, key: str) -> None:
    """A repeated key is ambiguous."""
    file.metadata.append((key, uint(1)))
    load_rejected(file.write(tmp_path / "a.gguf"), key, "repeated")


def test_a_tensor_that_stands_there_twice(tmp_path: Path, file: File) -> None:
    """A repeated tensor is ambiguous."""
    file.change("blk.1.attn_q.weight", name="blk.0.attn_q.weight")
    load_rejected(file.write(tmp_path / "a.gguf"), "repeated")


@pytest.mark.parametrize(
    ("kind", "name", "instead"),
    [
        (4, "Q4_2", "Q4_0"),
        (5, "Q4_3", "Q4_1"),
        (31, "Q4_0_4_4", "Q4_0"),
        (32, "Q4_0_4_8", "Q4_0"),
        (33, "Q4_0_8_8", "Q4_0"),
        (36, "IQ4_NL_4_4", "IQ4_NL"),
        (37, "IQ4_NL_4_8", "IQ4_NL"),
        (38, "IQ4_NL_8_8", "IQ4_NL"),
        (99, "type 99,", "Q8_0"),
    ],
)
def test_a_type_that_was_removed_or_is_to_come(tmp_path: Path, file: File, kind: int, name: str, instead: str) -> None:
    """The error names the type and a replacement; the file is not reported as damaged."""
    path = file.change("blk.0.attn_q.weight", kind=kind).write(tmp_path / "a.gguf")
    message = load_rejected(path, "blk.0.attn_q.weight", kind, name, f" {instead}", error=UnsupportedError)
    assert "not a complete" not in message


@pytest.mark.parametrize("kind", [256, 2**31, 2**32 - 1])
def test_a_type_that_cannot_be(tmp_path: Path, file: File, kind: int) -> None:
    """An impossible type number means damage."""
    path = file.change("blk.0.attn_q.weight", kind=kind).write(tmp_path / "a.gguf")
    load_rejected(path, "blk.0.attn_q.weight", kind, "again")


@pytest.mark.parametrize("kind", [13, 100, 2**32 - 1])
def test_an_unknown_type_of_metadata(tmp_path: Path, file: File, kind: int) -> None:
    """The length of a value of an unknown type is unknown."""
    file.set("some.key", struct.pack("<II", kind, 1))
    load_rejected(file.write(tmp_path / "a.gguf"), kind)


@pytest.mark.parametrize("kind", [24, 25, 26, 27, 28])
def test_a_type_that_is_no_weight(tmp_path: Path, file: File, kind: int) -> None:
    """Integers and doubles have a size, but a Llama does not use them."""
    file.change("output_norm.weight", kind=kind)
    file.data += bytes(1024)
    load_rejected(file.write(tmp_path / "a.gguf"))


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"])
def test_a_tensor_beyond_the_end(tmp_path: Path, file: File, tensor: str) -> None:
    """Its last four bytes would be after the end of the file."""
    start = next(len(file.data) - 4 * math.prod(dims) + 4 for name, dims, _, _ in file.tensors if name == tensor)
    load_rejected(file.change(tensor, offset=start).write(tmp_path / "a.gguf"))


def test_a_tensor_in_the_place_of_another(tmp_path: Path, file: File) -> None:
    """Two tensors that share bytes cannot both be right."""
    place = {name: offset for name, _, _, offset in file.tensors}
    file.change("blk.1.ffn_up.weight", offset=place["blk.0.ffn_up.weight"])
    load_rejected(file.write(tmp_path / "a.gguf"), "blk.1.ffn_up.weight")


@pytest.mark.parametrize(
    "dims", [(), (0,), (64, 0), (64, 64, 1, 1, 1), (4096,), (64, 63), (128, 32), (64, 64, 1), (1, 64, 64), (32, 128)]
)
def test_a_wrong_shape(tmp_path: Path, file: File, dims: tuple[int, ...]) -> None:
    """The error names the weight."""
    load_rejected(file.change("blk.1.attn_q.weight", dims=dims).write(tmp_path / "a.gguf"), "1.att")


@pytest.mark.parametrize("tensor", NAMES)
def test_a_missing_tensor(tmp_path: Path, tensor: str) -> None:
    """The error has the file's or Meta's name of the tensor."""
    message = load_rejected(whole_file(without=tensor).write(tmp_path / "a.gguf"))
    assert tensor in message or NAMES[tensor] in message


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"])
def test_bytes_that_no_tensor_claims(tmp_path: Path, file: File, tensor: str) -> None:
    """A tensor is missing in the table, but its data is still in the file."""
    file.tensors = [entry for entry in file.tensors if entry[0] != tensor]
    load_rejected(file.write(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    "name",
    ["rope_freqs.weight", "blk.2.attn_q.weight", "blk.0.attn_q.bias", "", "a\nb\x1b[2J", "n" * 5000],
    ids=lambda name: repr(name[:20]),
)
def test_an_unknown_tensor(tmp_path: Path, file: File, name: str) -> None:
    """The error names it; the name can neither break the line nor fill the screen."""
    file.tensors.append((name, (32,), 0, len(file.data)))
    file.data += bytes(128)
    load_rejected(file.write(tmp_path / "a.gguf"), name[:1])


def test_unknown_tensors_are_refused_before_the_long_part(tmp_path: Path, file: File) -> None:
    """Names and shapes are in the header: nothing is dequantized before they are checked."""
    file.tensors.append(("extra", (32,), 0, len(file.data)))
    file.data += bytes(128)
    calls: list[tuple[str, int, int]] = []
    with pytest.raises(CheckpointError):
        open_checkpoint(file.write(tmp_path / "a.gguf")).load(lambda *call: calls.append(call))
    assert calls == []


# --- Metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "", "Llama", "llama\n", "x" * 5000])
def test_another_architecture(tmp_path: Path, file: File, architecture: str) -> None:
    """The error names both the architecture and the expected one."""
    file.set("general.architecture", string(architecture))
    load_rejected(file.write(tmp_path / "a.gguf"), ascii(architecture[:20])[1:-1], "'llama'")


REQUIRED = [
    "general.architecture",
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
]
BAD_VALUES = {
    "zero": uint(0),
    "huge": uint(2**32 - 1),
    "negative": struct.pack("<Ii", 5, -1),
    "float": struct.pack("<If", 6, 1.5),
    "NaN": struct.pack("<If", 6, math.nan),
    "infinity": struct.pack("<If", 6, math.inf),
    "bool": struct.pack("<I?", 7, True),
    "string": string("6\n4\x1b[2J"),
    "array": ints([64, 64]),
    "strings": strings(["6\n4\x1b[2J"]),
}


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_field(tmp_path: Path, file: File, key: str) -> None:
    """The error names the field, or the tokenizer's type if that is missing."""
    message = load_rejected(file.set(key, None).write(tmp_path / "a.gguf"))
    assert key in message or "None" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in [*REQUIRED, "llama.rope.freq_base", "llama.attention.head_count_kv"]
        for value in BAD_VALUES
        if value not in ("float", "huge")
        or key not in ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon")
    ],
)
def test_a_field_of_the_wrong_kind(tmp_path: Path, file: File, key: str, value: str) -> None:
    """Numbers instead of text, text instead of numbers, numbers out of range: one printable line."""
    load_rejected(file.set(key, BAD_VALUES[value]).write(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.rope.scaling.factor", struct.pack("<If", 6, 2.0), "RoPE scaling is of the type"),
        ("llama.rope.scaling.attn_factor", struct.pack("<If", 6, 1.1), "RoPE scaling is of the type"),
        ("llama.attention.causal", struct.pack("<IB", 7, 0), "llama.attention.causal"),
        ("llama.expert_count", uint(8), "experts"),
        ("llama.rope.dimension_count", uint(16), "llama.rope.dimension_count"),
        ("llama.attention.key_length", uint(64), "blk.0.attn_q"),
        ("llama.attention.key_length", uint(33), "head_dim is 33"),
        ("llama.attention.value_length", uint(64), "llama.attention.value_length"),
        ("llama.attention.head_count", uint(3), "3 heads"),
        ("llama.attention.head_count_kv", uint(2), "blk.0.attn_k"),
        ("llama.block_count", uint(3), "blk.2."),
        ("llama.block_count", uint(1), "blk.1."),
        ("llama.feed_forward_length", uint(95), "blk.0.ffn_gate"),
        ("general.alignment", uint(0), "general.alignment"),
        ("general.alignment", uint(33), "general.alignment"),
        ("general.alignment", string("32"), "general.alignment"),
    ],
)
def test_a_shape_that_is_not_a_plain_llamas(tmp_path: Path, file: File, key: str, value: bytes, says: str) -> None:
    """Features that this network does not have, and numbers that contradict the tensors."""
    load_rejected(file.set(key, value).write(tmp_path / "a.gguf"), says)


@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_a_number_for_each_layer(tmp_path: Path, file: File, name: str) -> None:
    """An array of equal numbers counts as one number, as in llama.cpp; different shapes are not supported."""
    key = f"llama.{name}"
    number = read_header(file.write(tmp_path / "one.gguf")).metadata[key]
    path = file.set(key, ints([number] * ARGS.n_layers)).write(tmp_path / "a.gguf")
    assert open_checkpoint(path).args == open_checkpoint(tmp_path / "one.gguf").args
    load_rejected(
        file.set(key, ints([number, number + 1])).write(tmp_path / "b.gguf"), key, "layers", error=UnsupportedError
    )
    load_rejected(file.set(key, ints([number] * 3)).write(tmp_path / "c.gguf"), key, "3 values", "2 layers", "again")
    load_rejected(file.set(key, ints([])).write(tmp_path / "d.gguf"), key, "0 values", "again")


def test_numbers_that_are_whole_floats(tmp_path: Path, file: File) -> None:
    """Some programs write integers as float32."""
    expected = open_checkpoint(file.write(tmp_path / "one.gguf")).args
    for name in ("block_count", "embedding_length", "attention.head_count", "context_length", "feed_forward_length"):
        number = read_header(tmp_path / "one.gguf").metadata[f"llama.{name}"]
        file.set(f"llama.{name}", struct.pack("<If", 6, number))
    assert open_checkpoint(file.write(tmp_path / "a.gguf")).args == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention.key_length": 32, "attention.value_length": 64}, "llama.attention.value_length"),
        ({"rope.dimension_count": 16}, "llama.rope.dimension_count"),
        ({"expert_count": 8, "expert_used_count": 2}, "8 experts"),
    ],
)
def test_heads_and_layers_of_other_networks(tmp_path: Path, file: File, fields: dict[str, int], says: str) -> None:
    """Reported as not supported, not as damage."""
    for name, number in fields.items():
        file.set(f"llama.{name}", uint(number))
    load_rejected(file.write(tmp_path / "a.gguf"), says, error=UnsupportedError)


def test_heads_of_a_width_of_their_own(tmp_path: Path) -> None:
    """`key_length` may differ from embedding_length / heads: weights and shape are the ones written."""
    args = replace(ARGS, head_dim=16)
    weights = random_weights(args)
    file = whole_file()
    file.tensors, file.data = [], b""
    for name, meta in NAMES.items():
        array = weights[meta].numpy()
        file.tensors.append((name, tuple(reversed(array.shape)), 0, len(file.data)))
        file.data += array.tobytes()
    file.set("llama.attention.key_length", uint(args.head_dim))
    file.set("llama.rope.dimension_count", uint(args.head_dim))
    read = open_checkpoint(file.write(tmp_path / "a.gguf"))
    assert read.args.head_dim == args.head_dim
    assert same(read.load(silent), weights)


def test_a_file_without_weights(tmp_path: Path, file: File) -> None:
    """llama.cpp has files with only a vocabulary: valid, but not a model."""
    file.tensors, file.data = [], b""
    load_rejected(file.write(tmp_path / "a.gguf"), "no weights", error=UnsupportedError)


def test_a_vocabulary_size_that_the_embedding_contradicts(tmp_path: Path, file: File) -> None:
    """The tensors win, with a warning."""
    rows = open_checkpoint(file.write(tmp_path / "one.gguf")).args.vocab_size
    for stated, warnings in ((rows, 0), (rows + 1, 1)):
        checkpoint = open_checkpoint(file.set("llama.vocab_size", uint(stated)).write(tmp_path / "a.gguf"))
        assert checkpoint.args.vocab_size == rows
        assert len(checkpoint.warnings) == warnings


def hostile(n_tensors: int = 0, n_metadata: int = 0, body: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_metadata) + body


MANY = 1 << 19
SLOW: dict[str, Callable[[], bytes]] = {
    "arrays of empty strings": lambda: hostile(
        n_metadata=20,
        body=b"".join(text(f"k{n}") + struct.pack("<IIQ", 9, 8, MANY) + bytes(8 * MANY) for n in range(20)),
    ),
    "arrays of bytes": lambda: hostile(
        n_metadata=100, body=b"".join(text(f"k{n}") + struct.pack("<IIQ", 9, 0, MANY) + bytes(MANY) for n in range(100))
    ),
    "tensors": lambda: hostile(
        n_tensors=10**6, body=b"".join(text(f"{n}") + struct.pack("<IQIQ", 1, 8, 0, 0) for n in range(10**6))
    ),
    "keys": lambda: hostile(n_metadata=10**6, body=b"".join(text(f"{n}") + uint(n) for n in range(10**6))),
}


@pytest.mark.parametrize("case", SLOW)
def test_a_header_that_keeps_a_reader_busy(tmp_path: Path, case: str) -> None:
    """The file has as many entries as it states, but too many: it is rejected within 2 s of CPU time."""
    path = tmp_path / "a.gguf"
    path.write_bytes(SLOW[case]())
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.process_time() - start < 2
    is_sentence(caught.value, CheckpointError, path, "at most")


def test_the_vocabulary_of_a_large_model(tmp_path: Path) -> None:
    """128,256 tokens, their types and 280,147 merges are within the limits."""
    file = File()
    file.metadata = [
        ("tokens", struct.pack("<IIQ", 9, 8, 128_256) + text("ab") * 128_256),
        ("merges", struct.pack("<IIQ", 9, 8, 280_147) + text("a b") * 280_147),
        ("types", struct.pack("<IIQ", 9, 5, 128_256) + bytes(4 * 128_256)),
    ]
    start = time.process_time()
    header = read_header(file.write(tmp_path / "a.gguf"))
    assert time.process_time() - start < 2
    assert header.elements == 536_659
    assert header.metadata["merges"] == ["a b"] * 280_147


def test_a_context_of_millions_takes_no_memory(tmp_path: Path, file: File) -> None:
    """The longest allowed context takes no memory until it is used."""
    path = file.set("llama.context_length", uint(1 << 24)).write(tmp_path / "a.gguf")
    with little_time_and_memory(seconds=5):
        llama = Llama.load(path, device="cpu")
        llama.predict("the")
    assert llama.context == 1 << 24


# --- Tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tokenizer.ggml.model", "llama", "'llama'"),
        ("tokenizer.ggml.model", "bert", "'bert'"),
        ("tokenizer.ggml.pre", "qwen2", "'qwen2'"),
        ("tokenizer.ggml.pre", "default\n", "'default\\n'"),
    ],
)
def test_an_unknown_tokenizer(tmp_path: Path, file: File, key: str, value: str, says: str) -> None:
    """The error names the tokenizer, the supported ones, and what to do."""
    load_rejected(file.set(key, string(value)).write(tmp_path / "a.gguf"), says, "'gpt2'", "'smollm'", "`tokenizer`")


def test_a_tokenizer_from_elsewhere(tmp_path: Path, file: File) -> None:
    """`--tokenizer` replaces an unknown tokenizer; one of another size is rejected with both numbers."""
    from tests.helpers.checkpoints import tokenizer_file

    path = file.set("tokenizer.ggml.pre", string("qwen2")).write(tmp_path / "a.gguf")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, str(tmp_path / "tokenizer.model"))
    is_sentence(caught.value, CheckpointError, path, 556, 272)
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, str(tmp_path / "tokenizer.model"))
    is_sentence(caught.value, CheckpointError, tmp_path / "tokenizer.model", "line 1")


TEXTS, TYPES = vocabulary()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": strings([*TEXTS[:260], "中文", *TEXTS[261:]])}, "token 260"),
        ({"tokens": strings([*TEXTS[:260], "a\nb", *TEXTS[261:]])}, "token 260"),
        ({"tokens": strings([*TEXTS[:260], "", *TEXTS[261:]])}, "empty"),
        ({"tokens": strings([*TEXTS[:260], TEXTS[5], *TEXTS[261:]])}, "repeated"),
        ({"tokens": strings([*TEXTS[:271], "<|endoftext|>"])}, "repeated"),
        ({"tokens": strings([*TEXTS[:271], ""])}, "empty"),
        ({"tokens": strings(TEXTS[:-1])}, "271 tokens but 272 token types"),
        ({"token_type": ints(TYPES[:-1])}, "272 tokens but 271 token types"),
        ({"token_type": struct.pack("<IIQ272f", 9, 6, 272, *map(float, TYPES))}, "token_type"),
        ({"tokens": strings(TEXTS[:-1]), "token_type": ints(TYPES[:-1])}, "271"),
        ({"tokens": strings([*TEXTS, "<|more|>"]), "token_type": ints([*TYPES, 3])}, "273"),
        ({"tokens": strings([]), "token_type": ints([])}, ""),
        (
            {
                "unknown_token_id": None,
                "tokens": strings(["<|gone|>", *TEXTS[1:]]),
                "token_type": ints([3, *TYPES[1:]]),
            },
            "no unknown token",
        ),
        ({"merges": strings([MERGES[1], MERGES[0], *MERGES[2:]])}, "order"),
        ({"merges": strings([*MERGES, MERGES[0]])}, "order"),
        ({"merges": strings([*MERGES, "x y"])}, "'x y'"),
        ({"merges": strings([*MERGES, "\n\x1b[2J"])}, ""),
        ({"merges": strings(MERGES[:-1])}, "merges"),
        ({"merges": strings([])}, "merges"),
        ({"merges": strings(["th", *MERGES[1:]])}, "'th'"),
    ],
)
def test_a_vocabulary_that_cannot_be(tmp_path: Path, file: File, changes: dict[str, bytes | None], says: str) -> None:
    """Tokens, types and merges that contradict each other, or that tiktoken would read differently."""
    for key, value in changes.items():
        file.set(f"tokenizer.ggml.{key}", value)
    load_rejected(file.write(tmp_path / "a.gguf"), says)


@pytest.mark.parametrize("field_name", ["unknown", "eos", "bos"])
@pytest.mark.parametrize("value", [uint(2**32 - 1), struct.pack("<Ii", 5, -1), string("x"), ints([270])])
def test_special_ids_that_point_nowhere(tmp_path: Path, file: File, field_name: str, value: bytes) -> None:
    """They are dropped if nothing depends on them, as in this vocabulary, which has all bytes."""
    path = file.set(f"tokenizer.ggml.{field_name}_token_id", value).write(tmp_path / "a.gguf")
    assert open_checkpoint(path).tokenizer.encode("the") == [259]


def test_bytes_without_a_token_become_the_unknown_one(tmp_path: Path, file: File) -> None:
    """As in SmolLM2, which lacks 21 of the 256 bytes."""
    texts = ["<|gone|>", *TEXTS[1:]]
    gone = TEXTS[0]
    file.set("tokenizer.ggml.tokens", strings(texts)).set("tokenizer.ggml.token_type", ints([3, *TYPES[1:]]))
    tokenizer = open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer
    byte = next(byte for byte, char in bytes_to_unicode().items() if char == gone)
    assert tokenizer.encode(f"the{chr(byte)}") == [259, 271]


@pytest.mark.parametrize("special", ["", "x" * 5_000_000], ids=["empty", "long"])
def test_a_special_token_that_no_text_can_hold(tmp_path: Path, file: File, special: str) -> None:
    """tiktoken would search forever for an empty token, and cannot search for one of megabytes."""
    file.set("tokenizer.ggml.tokens", strings([*TEXTS[:271], special]))
    path = file.write(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    is_sentence(caught.value, CheckpointError, path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", ["token_embd", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.ffn_down"])
def test_scales_that_are_not_numbers(tmp_path: Path, tensor: str, value: float) -> None:
    """A damaged block never leads to an answer, and numpy does not warn before the error.

    Checking only the logits would miss it: torch's attention returns zeros if a query is NaN.
    """
    path = write_with_gguf(tmp_path / "a.gguf", Quant.Q8_0)
    start = next(t.start for t in read_header(path).tensors if t.name == f"{tensor}.weight")
    with path.open("r+b") as data:
        data.seek(start)
        data.write(struct.pack("<e", value))
    with pytest.raises(CheckpointError) as caught:
        Llama.load(path, device="cpu").predict("the")
    is_sentence(caught.value, CheckpointError, "again")


def test_opening_twice_gives_the_same(tmp_path: Path, file: File) -> None:
    """Nothing is cached between two readings, so a replaced file is read again."""
    path = file.write(tmp_path / "a.gguf")
    first = open_checkpoint(path).load(silent)
    shutil.copy(path, tmp_path / "b.gguf")
    file.data = bytes(len(file.data))
    file.write(path)
    assert not same(open_checkpoint(path).load(silent), first)
    assert same(open_checkpoint(tmp_path / "b.gguf").load(silent), first)
