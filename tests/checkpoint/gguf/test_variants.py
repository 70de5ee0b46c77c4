"""GGUF files that are split, with divisors of the rotary embedding, and with each pre-tokenizer."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from hypothesis import given, settings

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import bytes_to_unicode
from llama_scratch.config import RopeScaling
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UnsupportedError
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.system.progress import silent
from llama_scratch.tokenizer import Tokenizer
from tests.helpers import reference
from tests.helpers.assertions import assert_rejected, is_sentence, little_time_and_memory
from tests.helpers.gguf_files import (
    ARGS,
    NAMES,
    File,
    arrays,
    cut,
    ints,
    load_rejected,
    place,
    short,
    string,
    strings,
    uint,
    whole,
    whole_file,
    write,
    write_with_gguf,
)
from tests.helpers.texts import FRAGMENTS, drawn
from tests.helpers.weights import load, same

pytestmark = pytest.mark.reference

# --- Several files ----------------------------------------------------------------------------

IDS = [0, 5, 260, 271, 17, 17]
BOOL = struct.pack("<I?", 7, True)


def rejected_at_each(paths: Sequence[Path], *words: object, error: type[LlamaScratchError] = CheckpointError) -> None:
    """Check that opening any of the files is rejected quickly."""
    for path in paths:
        with little_time_and_memory():
            assert_rejected(partial(load, path), error, *words)


@pytest.mark.parametrize("sizes", [(7, 1, 12), (20,), (0, 20), (1,) * 20])
def test_several_files_are_the_whole_one(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Whichever file is named: the same shape, tokens, weights and list of files."""
    expected = open_checkpoint(whole_file().write(tmp_path / "whole.gguf"))
    weights, ids = expected.load(silent), expected.tokenizer.encode("the thin é")
    paths = write(tmp_path, cut(*sizes))
    for path in paths:
        found = open_checkpoint(path)
        assert (found.name, found.path, list(found.files), found.args) == ("small", paths[0], paths, ARGS)
        assert found.tokenizer.encode("the thin é") == ids
        assert same(found.load(silent), weights)
        assert found.storage(silent) == expected.storage(silent)


@pytest.mark.parametrize("quant", [Quant.F32, Quant.Q8_0])
@pytest.mark.parametrize("first_is_small", [True, False])
def test_files_that_the_gguf_package_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: Quant, first_is_small: bool
) -> None:
    """Files of its own writer, with and without tensors in the first one, give the same logits."""
    expected = Llama.load(write_with_gguf(tmp_path / "whole.gguf", quant), device="cpu", precision="fp32").logits(IDS)
    writer = gguf.GGUFWriter

    def splitting(path: Path, architecture: str) -> gguf.GGUFWriter:
        return writer(path, architecture, split_max_tensors=6, small_first_shard=first_is_small)

    monkeypatch.setattr(gguf, "GGUFWriter", splitting)
    write_with_gguf(tmp_path / "parts.gguf", quant)
    paths = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(paths) == 4 + first_is_small
    for path in paths:
        assert torch.equal(Llama.load(path, device="cpu", precision="fp32").logits(IDS), expected)


def test_each_file_is_mapped(tmp_path: Path) -> None:
    """Later writes to any of the files are visible in the weights; nothing is copied."""
    paths = write(tmp_path, cut(7, 1, 12))
    calls: list[tuple[str, int, int]] = []
    weights = open_checkpoint(paths[1]).load(lambda *call: calls.append(call))
    for path in paths:
        tensor = gguf.GGUFReader(path).tensors[0]
        start, name = int(tensor.data_offset), NAMES[tensor.name]
        del tensor
        with path.open("r+b") as file:
            file.seek(start)
            file.write(struct.pack("<f", 3.5))
        assert as_tensor(weights[name]).flatten()[0] == 3.5
    assert calls == [("reading", i, 20) for i in range(1, 21)]


def test_files_with_an_ending_in_capitals(tmp_path: Path) -> None:
    """The other files' names are derived from the first one's."""
    files = cut(7, 1, 12)
    paths = [file.write(tmp_path / f"S-0000{i}-OF-00003.GGUF") for i, file in enumerate(files, start=1)]
    for path in paths:
        assert list(open_checkpoint(path).files) == paths


def test_a_file_that_is_the_only_one(tmp_path: Path) -> None:
    """If the count is 0 or 1, the file name does not matter."""
    for count in (0, 1):
        file = whole_file().set("split.count", short(count))
        assert open_checkpoint(file.write(tmp_path / "a.gguf")).files == (tmp_path / "a.gguf",)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_file(tmp_path: Path, missing: int) -> None:
    """The error names it; a missing file is not reported as damaged."""
    paths = write(tmp_path, cut(7, 1, 12))
    gone = paths.pop(missing - 1)
    gone.unlink()
    rejected_at_each(paths, gone, "3 files", "again", error=ModelNotFoundError)
    gone.mkdir()
    rejected_at_each(paths, gone, error=ModelNotFoundError)


@pytest.mark.parametrize(
    ("changed", "key", "value"),
    [
        (2, "split.no", short(2)),
        (2, "split.no", short(0)),
        (3, "split.no", None),
        (1, "split.no", short(1)),
        (2, "split.no", string("1")),
        (2, "split.count", short(4)),
        (3, "split.count", short(2)),
        (2, "split.tensors.count", whole(21)),
        (3, "split.tensors.count", None),
        (3, "split.tensors.count", string("20")),
    ],
)
def test_a_file_of_another_model(tmp_path: Path, changed: int, key: str, value: bytes | None) -> None:
    """One of the three files contradicts the others; also if that file is opened."""
    files = cut(7, 1, 12)
    files[changed - 1].set(key, value)
    paths = write(tmp_path, files)
    del paths[changed - 1]
    rejected_at_each(paths, "belongs to another model", place(tmp_path, changed), "again")
    rejected_at_each([place(tmp_path, changed)], tmp_path)


def test_files_that_changed_places(tmp_path: Path) -> None:
    """The second file has the third one's name."""
    files = cut(7, 1, 12)
    rejected_at_each(write(tmp_path, [files[0], files[2], files[1]]), place(tmp_path, 2), "another part")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    """A repeated tensor is ambiguous."""
    files = cut(7, 1, 12)
    name, dims, kind, _ = files[0].tensors[0]
    size = 4 * math.prod(dims)
    files[1].tensors.append((name, dims, kind, len(files[1].data)))
    files[1].data += files[0].data[:size]
    for file in files:
        file.set("split.tensors.count", whole(21))
    rejected_at_each(write(tmp_path, files), "'token_embd.weight' is in two of the files", "again")


@pytest.mark.parametrize("count", [None, whole(0), whole(19), whole(21), whole(-1), string("20"), ints([20])])
def test_another_number_of_tensors(tmp_path: Path, count: bytes | None) -> None:
    """The files hold another number of tensors than they all state."""
    files = [file.set("split.tensors.count", count) for file in cut(7, 1, 12)]
    rejected_at_each(write(tmp_path, files), "the 3 files hold 20 tensors", "again")


@pytest.mark.parametrize(
    "name",
    [
        "small.gguf",
        "small-1-of-3.gguf",
        "small-00001-of-00004.gguf",
        "small-00000-of-00003.gguf",
        "small-00004-of-00003.gguf",
        "small-00001-of-00003-copy.gguf",
        "small_00001_of_00003.gguf",
    ],
)
def test_a_file_that_was_renamed(tmp_path: Path, name: str) -> None:
    """The other files cannot be found from its name; a number above the count is invalid."""
    write(tmp_path, cut(7, 1, 12))
    place(tmp_path, 2).rename(tmp_path / name)
    cut(7, 1, 12)[1].write(place(tmp_path, 2))
    load_rejected(tmp_path / name, "model-00001-of-00003.gguf")


ABSURD = {
    "65535": short(65535),
    "2": short(2),
    "negative": struct.pack("<Ii", 5, -1),
    "huge": struct.pack("<IQ", 10, 2**64 - 1),
    "true": BOOL,
    "false": struct.pack("<I?", 7, False),
    "string": string("3"),
    "line break": string("3\n\x1b[2J"),
    "float": struct.pack("<If", 6, 3.0),
    "one as float": struct.pack("<If", 6, 1.0),
    "NaN": struct.pack("<If", 6, math.nan),
    "list": ints([3]),
    "empty list": ints([]),
}


@pytest.mark.parametrize("count", ABSURD.values(), ids=ABSURD)
def test_an_absurd_number_of_files(tmp_path: Path, count: bytes) -> None:
    """In all three files, in one of them, and in a model of a single file."""
    files = cut(7, 1, 12)
    for file in files:
        file.set("split.count", count)
    rejected_at_each(write(tmp_path, files), "files of a split model", "model-00001-of-00003.gguf")
    load_rejected(whole_file().set("split.count", count).write(tmp_path / "a.gguf"), "files of a split model")


@pytest.mark.parametrize("count", [0, 1])
def test_one_of_several_files_that_calls_itself_the_only_one(tmp_path: Path, count: int) -> None:
    """Whichever file it is, the rest is missing."""
    files = [file.set("split.count", short(count)) for file in cut(7, 1, 12)]
    rejected_at_each(write(tmp_path, files))


@pytest.mark.parametrize("number", [2, 65535])
def test_very_many_files_of_which_few_are_there(tmp_path: Path, number: int) -> None:
    """Reading stops at the first missing file."""
    files = cut(7, 13)
    for i, file in enumerate(files, start=1):
        file.set("split.count", short(65535)).write(place(tmp_path, i, 65535))
    files[1].set("split.no", short(number - 1)).write(place(tmp_path, number, 65535))
    path = place(tmp_path, number, 65535)
    rejected_at_each([path], place(tmp_path, 3, 65535), "65535 files", error=ModelNotFoundError)


@pytest.mark.parametrize("size", [0, 10, 24, 60, -100, -1])
def test_a_later_file_that_was_cut_short(tmp_path: Path, size: int) -> None:
    """Truncated in its header or its data: the error names that file."""
    paths = write(tmp_path, cut(7, 1, 12))
    content = paths[1].read_bytes()
    paths[1].unlink()
    paths[1].write_bytes(content[:size])
    rejected_at_each(paths, paths[1], "again")


def test_a_later_file_that_changes_after_opening(tmp_path: Path) -> None:
    """Truncated or removed between opening and loading."""
    paths = write(tmp_path, cut(7, 1, 12))
    checkpoint = open_checkpoint(paths[0])
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(silent)
    is_sentence(caught.value, CheckpointError, paths[2], "shorter")
    paths[2].unlink()
    with pytest.raises(ModelNotFoundError) as missing:
        checkpoint.load(silent)
    is_sentence(missing.value, ModelNotFoundError, paths[2])


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.attention.wq.weight", "tok_embeddings.weight"])
@pytest.mark.parametrize("instead", [True, False])
def test_a_weight_under_metas_name(tmp_path: Path, name: str, instead: bool) -> None:
    """It is unknown in this format, and never replaces the right one."""
    file = whole_file()
    theirs = next(theirs for theirs, metas in NAMES.items() if metas == name)
    if instead:
        file.change(theirs, name=name)
    else:
        dims = next(dims for n, dims, *_ in file.tensors if n == theirs)
        file.tensors.append((name, dims, 0, len(file.data)))
        file.data += bytes(4 * math.prod(dims))
    load_rejected(file.write(tmp_path / "a.gguf"), theirs if instead else name)


# --- Rotary embedding -------------------------------------------------------------------------

THETA, HEAD_DIM = 500_000.0, ARGS.head_dim
KEY = "llama.rope.scaling.original_context_length"


def converters(factor: float, original: int = 8192, low: float = 1, high: float = 4) -> list[float]:
    """Compute the divisors for Llama 3.1's RoPE scaling as llama.cpp's converter does, by wavelength.

    Source: `generate_extra_tensors` of `LlamaModel` in convert_hf_to_gguf.py, ggml-org/llama.cpp.
    """
    found = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * THETA ** (i / HEAD_DIM)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def scaled(divisors: Sequence[float], kind: int = 0, form: str = "f") -> File:
    """The small model with these divisors as its first tensor."""
    file = whole_file().set("llama.rope.freq_base", struct.pack("<If", 6, THETA))
    data = struct.pack(f"<{len(divisors)}{form}", *divisors)
    data += bytes(-len(data) % 32)
    file.tensors = [(n, d, k, o + len(data)) for n, d, k, o in file.tensors]
    file.tensors.insert(0, ("rope_freqs.weight", (len(divisors),), kind, 0))
    file.data = data + file.data
    return file


def rope(path: Path) -> tuple[RopeScaling | None, tuple[float, ...] | None]:
    args = open_checkpoint(path).args
    return args.rope_scaling, args.rope_divisors


@pytest.mark.parametrize("factor", [8.0, 32.0, 2.5, 1.5, 20.0])
@pytest.mark.parametrize("original", [8192, 4096, 131_072])
def test_llama_3_1s_rule_is_recognized(tmp_path: Path, factor: float, original: int) -> None:
    """With its factor; the original context defaults to Llama 3's if the file does not state it."""
    divisors = converters(factor, original)
    assert len(set(divisors)) >= 3  # some frequencies stay, some are blended, some divided
    file = scaled(divisors)
    if original != 8192:
        file.set(KEY, uint(original))
    path = file.write(tmp_path / "a.gguf")
    assert rope(path) == (RopeScaling(factor, original_context=original), None)
    assert "rope_freqs.weight" not in open_checkpoint(path).load(silent)


@pytest.mark.parametrize(
    "divisors",
    [
        [1.0 + i for i in range(16)],
        [4.0] * 16,
        [8.0] + [1.0] * 15,
        [1.0] * 15 + [8.0],
        [0.5] * 16,
        converters(8, 4096),
        converters(8, low=2),
        converters(8, high=8),
        [*converters(8)[:-1], 9.0],
        [*converters(8)[:8], converters(8)[8] * 1.001, *converters(8)[9:]],
        converters(0.5),
    ],
    ids=[
        "growing", "all", "first", "last", "faster", "another context", "low", "high", "last is more", "one is more",
        "a factor below 1",
    ],
)  # fmt: skip
def test_divisors_of_no_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, divisors: list[float]) -> None:
    """They are kept, and the network rotates by them: compared with the reference's own angles."""
    path = scaled(divisors).write(tmp_path / "a.gguf")
    assert rope(path) == (None, tuple(np.array(divisors, np.float32).tolist()))
    shape = {
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "norm_eps": ARGS.norm_eps,
        "rope_theta": THETA,
        "rope_factor": None,
    }
    weights = {NAMES[name]: torch.from_numpy(array) for name, array in arrays().items()}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    ids = [(7 * i * i + i) % 272 for i in range(200)]
    plain = reference.forward(weights, shape, ids).logits

    def angles(positions: Sequence[int], head_dim: int, theta: float, factor: float | None) -> torch.Tensor:
        by = [theta ** (-2 * pair / head_dim) / divisors[pair] for pair in range(head_dim // 2)]
        return torch.outer(torch.tensor(positions, dtype=torch.float64), torch.tensor(by, dtype=torch.float64))

    monkeypatch.setattr(reference, "rope_angles", angles)
    expected = reference.forward(weights, shape, ids).logits
    found = Llama.load(path, precision="fp32", device="cpu").logits(ids).double()
    assert (found - expected).norm() / expected.norm() < 1e-5
    # Divisors matter only for pairs that rotate visibly within these 200 tokens.
    if divisors[:4] != [1.0] * 4:
        assert (plain - expected).norm() / expected.norm() > 1e-3


def test_divisors_that_divide_nothing(tmp_path: Path) -> None:
    """All are 1, as with a factor of 1."""
    assert rope(scaled([1.0] * 16).write(tmp_path / "a.gguf")) == (None, None)
    assert rope(scaled(converters(1.0)).write(tmp_path / "a.gguf")) == (None, None)


def test_divisors_in_a_later_file(tmp_path: Path) -> None:
    """They are read from the file that holds them."""
    files = cut(7, 1, 12)
    divisors = [1.0 + i for i in range(16)]
    files[1].tensors.append(("rope_freqs.weight", (16,), 0, len(files[1].data)))
    files[1].data += struct.pack("<16f", *divisors)
    for file in files:
        file.set("split.tensors.count", whole(21))
    assert rope(write(tmp_path, files)[2]) == (None, tuple(divisors))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -8.0, 1e9, 1e-30, 3e38])
@pytest.mark.parametrize("at", [0, 15])
def test_a_divisor_that_cannot_be(tmp_path: Path, bad: float, at: int) -> None:
    """Its angles would be NaN, infinite or 0."""
    divisors = converters(8)
    divisors[at] = bad
    load_rejected(scaled(divisors).write(tmp_path / "a.gguf"), "rope_freqs.weight holds", f"{bad:g}", "again")


@pytest.mark.parametrize(
    ("divisors", "kind", "form", "says"),
    [
        ([1.0] * 15, 0, "f", "shape (15,)"),
        ([1.0] * 17, 0, "f", "shape (17,)"),
        ([1.0] * 32, 0, "f", "shape (32,)"),
        ([1.0] * 16, 1, "e", "F16"),
        ([1.0] * 16, 28, "d", "F64"),
        ([1] * 16, 26, "i", "I32"),
        ([0x3F80] * 16, 30, "H", "BF16"),
    ],
)
def test_divisors_of_another_kind(tmp_path: Path, divisors: list[float], kind: int, form: str, says: str) -> None:
    """Too few, too many, and types that llama.cpp does not write."""
    load_rejected(scaled(divisors, kind, form).write(tmp_path / "a.gguf"), "rope_freqs.weight", says, "(16,) in F32")


def test_divisors_in_two_dimensions(tmp_path: Path) -> None:
    """The shape (1, 16) is not (16,)."""
    file = scaled([1.0] * 16).change("rope_freqs.weight", dims=(16, 1))
    load_rejected(file.write(tmp_path / "a.gguf"), "rope_freqs.weight", "(1, 16)")


FLOAT = {value: struct.pack("<If", 6, value) for value in (0.0, 1.0, 4.0, 0.25, -1.0, math.nan)}


@pytest.mark.parametrize(
    "fields",
    [
        {"scaling.type": string("linear"), "scaling.factor": FLOAT[4.0]},
        {"scaling.type": string("yarn"), "scaling.factor": FLOAT[4.0]},
        {"scaling.type": string("longrope")},
        {"scaling.type": string("none\n")},
        {"scaling.type": uint(0)},
        {"scaling.factor": FLOAT[4.0]},
        {"scaling.factor": FLOAT[0.25]},
        {"scaling.factor": FLOAT[-1.0]},
        {"scaling.factor": FLOAT[math.nan]},
        {"scaling.factor": string("4")},
        {"scale_linear": FLOAT[4.0]},
    ],
)
def test_another_scaling(tmp_path: Path, fields: dict[str, bytes]) -> None:
    """This network does not support these; llama.cpp treats a factor without a type as linear."""
    file = whole_file()
    for field, value in fields.items():
        file.set(f"llama.rope.{field}", value)
    load_rejected(file.write(tmp_path / "a.gguf"), "RoPE scaling is of the type", error=UnsupportedError)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scaling.type": string("none")},
        {"scaling.type": string("none"), "scaling.factor": FLOAT[4.0]},
        {"scaling.type": string("linear")},
        {"scaling.type": string("linear"), "scaling.factor": FLOAT[1.0]},
        {"scaling.type": string("yarn"), "scaling.factor": FLOAT[1.0], "scaling.attn_factor": FLOAT[1.0]},
        {"scaling.factor": FLOAT[1.0]},
        {"scaling.factor": FLOAT[0.0]},
        {"scale_linear": FLOAT[1.0]},
        {"scaling.original_context_length": uint(8192)},
    ],
)
def test_what_scales_nothing(tmp_path: Path, fields: dict[str, bytes]) -> None:
    """As llama.cpp reads it; for Llama 3 its converter writes only divisors, not a type."""
    for file in (whole_file(), scaled(converters(8))):
        for field, value in fields.items():
            file.set(f"llama.rope.{field}", value)
    assert rope(file.write(tmp_path / "a.gguf")) == (RopeScaling(8.0), None)


@pytest.mark.parametrize("value", [uint(0), BOOL, string("8192"), FLOAT[0.25], struct.pack("<Ii", 5, -1)])
def test_an_original_context_that_cannot_be(tmp_path: Path, value: bytes) -> None:
    """It is only read if there are divisors."""
    load_rejected(scaled(converters(8)).set(KEY, value).write(tmp_path / "a.gguf"), KEY)


# --- Tokenizer --------------------------------------------------------------------------------

# Its merges can produce each token from its bytes, so merging by rank and by list agree.
MERGES = [
    *["t h", "e r", "i n", "th e", "r e", "Ġ the", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "ĉ ĉ", "č Ċ"],
    *["1 2", "12 3", "0 0", "00 0", "Ġ 1", "Ġ 0", "ĠĠ 1"],
    *["' s", "' S", "' t", "' re", "! !", "!! Ċ", "! Ċ", "Ġ !", "Ġ '", ". Ċ", "- t", "Ã ©", "Ġ Ã©"],
]
SPECIAL = ["<|start|>", "<|endoftext|>", "<|a|>", "<|b|>", "<|c|>", "<|eot_id|>", "<|other|>"]
META_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def tokens() -> list[str]:
    return [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]


def place_of(special: str) -> bytes:
    return uint(tokens().index(special))


def with_tokens(pattern: str, **fields: bytes | None) -> File:
    """A file with this vocabulary and a named pre-tokenizer; the embedding is padded with zeros."""
    file = copy.deepcopy(SMALL)
    for key in ("eos_token_id", "unknown_token_id"):
        file.set(f"tokenizer.ggml.{key}", None)
    texts = tokens()
    file.set("tokenizer.ggml.pre", string(pattern)).set("tokenizer.ggml.tokens", strings(texts))
    file.set("tokenizer.ggml.token_type", ints([3 if text in SPECIAL else 1 for text in texts]))
    file.set("tokenizer.ggml.merges", strings(MERGES))
    for key, value in fields.items():
        file.set(f"tokenizer.ggml.{key}", value)
    more = 4 * 64 * (len(texts) - 272)
    file.tensors = [(n, d, k, o + more if o else o) for n, d, k, o in file.tensors]
    file.change("token_embd.weight", dims=(64, len(texts)))
    file.data = bytes(more) + file.data
    return file


SMALL = whole_file()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Tokenizers by pattern: the file's, and the `tokenizers` package's with the same pre-tokenizer."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs

    folder = tmp_path_factory.mktemp("patterns")
    cut_by: dict[str, list[Any]] = {
        "llama-bpe": [
            pre_tokenizers.Split(Regex(META_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    found = {}
    for name, steps in cut_by.items():
        ours = open_checkpoint(with_tokens(name).write(folder / f"{name}.gguf")).tokenizer
        vocabulary = {text: id for id, text in enumerate(tokens())}
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in MERGES)]
        theirs = Theirs(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
        theirs.pre_tokenizer = pre_tokenizers.Sequence(steps)
        found[name] = ours, theirs
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1234", {"llama-bpe": "123|4", "smollm": "1|2|3|4", "gpt-2": "123|4"}),
        ("1200", {"llama-bpe": "12|0|0", "smollm": "1|2|0|0", "gpt-2": "12|00"}),
        (" 1", {"llama-bpe": " |1", "smollm": " |1", "gpt-2": " 1"}),
        ("  1", {"llama-bpe": " | |1", "smollm": "  |1", "gpt-2": " | 1"}),
        ("a's b're", {"llama-bpe": "a|'s| |b|'re", "smollm": "a|'s| |b|'re", "gpt-2": "a|'s| |b|'re"}),
        ("a'S", {"llama-bpe": "a|'S", "smollm": "a|'|S", "gpt-2": "a|'|S"}),
        ("!!\n", {"llama-bpe": "!!\n", "smollm": "!!|\n", "gpt-2": "!!|\n"}),
        ("-the", {"llama-bpe": "-|the", "smollm": "-|the", "gpt-2": "-|the"}),
        ("     the", {"llama-bpe": "    | the", "smollm": "    | the", "gpt-2": "    | the"}),
        ("\n\nthe", {"llama-bpe": "\n\n|the", "smollm": "\n|\n|the", "gpt-2": "\n|\n|the"}),
    ],
)
def test_the_same_tokens_cut_by_each_pattern(
    tokenizers: dict[str, tuple[Tokenizer, Any]], text: str, expected: dict[str, str]
) -> None:
    """Single or up to three digits, contractions in either case, and white space before a word."""
    for name, parts in expected.items():
        ours, theirs = tokenizers[name]
        assert "|".join(ours.token_text(id) for id in ours.encode(text)) == parts, name
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.mark.parametrize("name", ["llama-bpe", "smollm", "gpt-2"])
def test_any_text_has_the_tokenizers_packages_ids(tokenizers: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    """About a hundred random texts, and all pairs of fragments on which tokenizers often disagree."""
    ours, theirs = tokenizers[name]
    pairs = [first + second for first in FRAGMENTS for second in FRAGMENTS]

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(texts=drawn)
    def check(texts: list[str]) -> None:
        for text in texts:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text

    check()
    for text in pairs:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("pattern", ["llama-bpe", "smollm", "gpt-2"])
@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("named", [True, False])
def test_the_beginning_of_a_text(tmp_path: Path, pattern: str, add: bool | None, named: bool) -> None:
    """If the file does not say, llama.cpp adds BOS for llama-bpe only."""
    file = with_tokens(
        pattern,
        bos_token_id=place_of("<|start|>") if named else None,
        add_bos_token=None if add is None else struct.pack("<I?", 7, add),
    )
    tokenizer = open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer
    wanted = named and (add if add is not None else pattern == "llama-bpe")
    assert tokenizer.bos_id == (tokens().index("<|start|>") if wanted else None)
    assert tokenizer.encode("the", bos=True)[-1:] == [tokens().index("the")]
    assert len(tokenizer.encode("the", bos=True)) == 1 + wanted


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"eos": "<|a|>"}, ["<|a|>"]),
        ({"eot": "<|b|>"}, ["<|b|>"]),
        ({"eom": "<|c|>"}, ["<|c|>"]),
        ({"eos": "<|a|>", "eot": "<|b|>", "eom": "<|c|>"}, ["<|a|>", "<|b|>", "<|c|>"]),
        ({"eos": "<|endoftext|>", "bos": "<|start|>", "unknown": "<|other|>", "padding": "<|a|>"}, []),
    ],
)
def test_where_a_text_ends(tmp_path: Path, fields: dict[str, str], expected: list[str]) -> None:
    """Stop tokens are those that the file names and those with known names; not BOS, padding or unknown."""
    file = with_tokens("smollm", **{f"{field}_token_id": place_of(name) for field, name in fields.items()})
    tokenizer = open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer
    ends = {*expected, "<|endoftext|>", "<|eot_id|>"}
    assert tokenizer.stop_ids == {tokens().index(name) for name in ends}
    assert tokenizer.unknown == fields.get("unknown")


@pytest.mark.parametrize("value", [uint(1), string("true"), struct.pack("<If", 6, 1.0)])
def test_a_wish_for_a_beginning_that_is_no_bool(tmp_path: Path, value: bytes) -> None:
    """The field must be a boolean; any other value adds nothing."""
    file = with_tokens("llama-bpe", bos_token_id=place_of("<|start|>"), add_bos_token=value)
    assert open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer.bos_id is None


def test_a_file_that_names_no_end(tmp_path: Path) -> None:
    """Without a stop token, a text ends at the context's limit."""
    texts = ["<|x|>" if text == "<|endoftext|>" else "<|y|>" if text == "<|eot_id|>" else text for text in tokens()]
    file = with_tokens("gpt-2", tokens=strings(texts))
    assert open_checkpoint(file.write(tmp_path / "a.gguf")).tokenizer.stop_ids == set()
