"""GGUF's tensor types: blocks are dequantized as in ggml, and plain numbers are memory-mapped."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError
from llama_scratch.precision.lazy_weight import LazyWeight, as_tensor
from llama_scratch.system.progress import silent
from tests.helpers import reference
from tests.helpers.gguf_files import File, load_rejected, uint, whole_file
from tests.helpers.gguf_reference import KINDS, OTHERS, Floats, dequantize, digest, random_blocks

pytestmark = pytest.mark.reference

# Rows have one or two blocks of 256.
ARGS = ModelArgs(256, 1, 4, 2, 272, 512, 2**-17, 10_000.0, None, 512)
# GGUF's name → Meta's name and the shape.
MATRICES = {
    "token_embd": ("tok_embeddings", (272, 256)),
    "blk.0.attn_q": ("layers.0.attention.wq", (256, 256)),
    "blk.0.attn_k": ("layers.0.attention.wk", (128, 256)),
    "blk.0.attn_v": ("layers.0.attention.wv", (128, 256)),
    "blk.0.attn_output": ("layers.0.attention.wo", (256, 256)),
    "blk.0.ffn_gate": ("layers.0.feed_forward.w1", (512, 256)),
    "blk.0.ffn_down": ("layers.0.feed_forward.w2", (256, 512)),
    "blk.0.ffn_up": ("layers.0.feed_forward.w3", (512, 256)),
}
NORMS = {"blk.0.attn_norm": "layers.0.attention_norm", "blk.0.ffn_norm": "layers.0.ffn_norm", "output_norm": "norm"}
IDS = [0, 7, 7, 255, 256, 271, 100, 64, 3]
# Results of ggml's own functions for `random_blocks(kind, 4, 512)`; see tests.helpers.gguf_reference.
GGML = {
    "Q4_0": "5b3795b4802274e0",
    "Q4_1": "0a0921d421fec956",
    "Q5_0": "bb5c0ee68a4ef0bc",
    "Q5_1": "de9b6f84d5017b88",
    "Q8_0": "21ba53610258b949",
    "Q4_K": "d22dfb56e10a0ac8",
    "Q5_K": "163c009da2cd5420",
    "Q6_K": "85a98ba6324bb706",
    "Q2_K": "b27285fa6bb451f2",
    "Q3_K": "271280864add1cad",
    "IQ2_XXS": "3803c8f6cf70d63e",
    "IQ2_XS": "e58787bf20e10713",
    "IQ3_XXS": "1dda5942e488b84e",
    "IQ1_S": "48fced6a806d5a9d",
    "IQ4_NL": "c31b3a3a31d20264",
    "IQ3_S": "a5747ab9e1c5f855",
    "IQ2_S": "dff601287f49e216",
    "IQ4_XS": "23373d9a5dac0eed",
    "TQ1_0": "36e709c0eaa34ee9",
    "TQ2_0": "214f6b8d884a96b8",
}

Content = Callable[[str, tuple[int, int]], tuple[int, bytes]]


def model_file(content: Content) -> File:
    """A model whose matrices have the given content (type number and bytes, by name and shape). Norms are about 1."""
    file = whole_file()
    for key, value in {
        "embedding_length": ARGS.dim,
        "block_count": ARGS.n_layers,
        "feed_forward_length": ARGS.ffn_dim,
        "attention.head_count": ARGS.n_heads,
        "attention.head_count_kv": ARGS.n_kv_heads,
    }.items():
        file.set(f"llama.{key}", uint(value))
    file.tensors, file.data = [], b""
    parts: dict[str, tuple[tuple[int, ...], int, bytes]]
    parts = {name: (shape, *content(name, shape)) for name, (_, shape) in MATRICES.items()}
    chance = np.random.default_rng(0)
    parts |= {name: ((256,), 0, chance.normal(1, 0.1, 256).astype("<f4").tobytes()) for name in NORMS}
    for name, (shape, kind, data) in parts.items():
        file.tensors.append((f"{name}.weight", tuple(reversed(shape)), kind, len(file.data)))
        file.data += data + bytes(-len(data) % 32)
    return file


def some_rows(kind: str, name: str, columns: int) -> bytes:
    """17 rows of random blocks, different for each name, that give weights up to about 0.2."""
    spread = {"4_0": 0.02, "4_1": 0.01, "5_0": 0.01, "5_1": 0.005, "8_0": 0.001, "4_K": 2e-4, "5_K": 1e-4}
    return random_blocks(kind, 17, columns, seed=name, spread=spread.get(kind[1:], 5e-5))


def blocks(kind: str) -> Content:
    """All matrices in one type, with these rows repeated: dequantizing unique rows in the reference is slow."""

    def content(name: str, shape: tuple[int, int]) -> tuple[int, bytes]:
        rows, columns = shape
        data = some_rows(kind, name, columns)
        return KINDS[kind].number, (data * (rows // 17 + 1))[: len(data) // 17 * rows]

    return content


def values(kind: str, name: str, shape: tuple[int, int]) -> Floats:
    """The dequantized values of that content."""
    rows, columns = shape
    found = dequantize(kind, some_rows(kind, name, columns)).reshape(17, columns)
    return np.resize(found, (rows, columns))


# --- Blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_says_what_ggml_says(kind: str) -> None:
    """Bitwise equal to recorded results of ggml's own functions."""
    assert digest(dequantize(kind, random_blocks(kind, 4, 512))) == GGML[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_become_the_numbers_that_ggml_defines(tmp_path: Path, kind: str) -> None:
    """Bitwise equal in float32, for all rows and any range of rows; nothing is dequantized before."""
    weights = open_checkpoint(model_file(blocks(kind)).write(tmp_path / "a.gguf")).load(silent)
    chance = random.Random(0)
    for name, (metas, shape) in MATRICES.items():
        held, numbers = weights[f"{metas}.weight"], values(kind, name, shape)
        assert isinstance(held, LazyWeight)
        assert (held.shape, held.dtype) == (shape, torch.float32)
        assert held.nbytes == numbers.size // KINDS[kind].weights * KINDS[kind].size
        assert np.array_equal(held.to(torch.float32).numpy(), numbers), name
        for _ in range(5):
            start, stop = sorted(chance.sample(range(len(numbers) + 1), 2))
            assert np.array_equal(held.rows(start, stop).numpy(), numbers[start:stop]), (name, start, stop)
    for name in NORMS.values():
        assert isinstance(weights[f"{name}.weight"], Tensor)


@pytest.mark.parametrize("kind", KINDS | OTHERS)
def test_a_weight_of_any_type_of_blocks(tmp_path: Path, kind: str) -> None:
    """ggml's own result for the same bytes, also for types that are not officially supported."""
    data = random_blocks(kind, 4, 512)
    rows = [data[i * len(data) // 4 :][: len(data) // 4] for i in range(4)]
    file = model_file(
        lambda name, shape: (
            ((KINDS | OTHERS)[kind].number, b"".join(rows * 64)) if "down" in name else blocks("Q4_0")(name, shape)
        )
    )
    weight = as_tensor(open_checkpoint(file.write(tmp_path / "a.gguf")).load(silent)["layers.0.feed_forward.w2.weight"])
    assert digest(weight[:4].flatten().numpy()) == GGML[kind]
    assert all(torch.equal(weight[i : i + 4], weight[:4]) for i in range(0, 256, 4))


@pytest.mark.parametrize("kind", [kind for kind in Quant if kind.name not in {*GGML, "F32", "F16", "BF16"}])
def test_no_other_type_is_taken_for_one_of_these(tmp_path: Path, kind: Quant) -> None:
    """Either the gguf package supports the type, or an error names the tensor and its type."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = bytes(range(64)) * (256 * 512 // size * n_bytes // 64)
    file = model_file(
        lambda name, shape: (int(kind), data) if name == "blk.0.ffn_down" else blocks("Q4_0")(name, shape)
    )
    path = file.write(tmp_path / "a.gguf")
    try:
        theirs = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(256, -1), kind)
    except NotImplementedError:
        load_rejected(path, f"blk.0.ffn_down.weight is in {kind.name}", "another quantization")
    else:
        ours = as_tensor(open_checkpoint(path).load(silent)["layers.0.feed_forward.w2.weight"])
        assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "BF16", "F16"])
def test_a_norm_in_any_type(tmp_path: Path, kind: str, padded: bool) -> None:
    """llama.cpp keeps norms in F32, other programs need not; a norm is dequantized at once.

    It is the last tensor, after which writers may or may not pad the file to the alignment.
    """
    file = model_file(blocks("Q4_0"))
    numbers = np.linspace(0.5, 1.5, 256, dtype=np.float32)
    data = random_blocks(kind, 1, 256) if kind in KINDS else gguf.quants.quantize(numbers, Quant[kind]).tobytes()
    assert file.tensors[-1][0] == "output_norm.weight"
    file.data = file.data[: file.tensors[-1][3]] + data + bytes(-len(data) % 32 if padded else 0)
    file.change("output_norm.weight", kind=int(Quant[kind]))
    norm = open_checkpoint(file.write(tmp_path / "a.gguf")).load(silent)["norm.weight"]
    assert isinstance(norm, Tensor)
    assert norm.shape == (256,)
    if kind in KINDS:
        assert np.array_equal(norm.numpy(), dequantize(kind, data))
    else:
        assert torch.equal(norm, torch.from_numpy(numbers).to(norm.dtype))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_1"])
def test_a_quantized_model_answers_as_its_numbers_do(tmp_path: Path, kind: str) -> None:
    """The logits match the float64 reference on the dequantized values."""
    path = model_file(blocks(kind)).write(tmp_path / "a.gguf")
    llama = Llama.load(path, precision="fp32", device="cpu")
    weights = {
        f"{meta}.weight": torch.from_numpy(values(kind, name, shape)) for name, (meta, shape) in MATRICES.items()
    }
    loaded = open_checkpoint(path).load(silent)
    weights |= {f"{name}.weight": as_tensor(loaded[f"{name}.weight"]) for name in NORMS.values()}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    shape = {"n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 2**-17, "rope_theta": 1e4, "rope_factor": None}
    found, wanted = llama.logits(IDS).double(), reference.forward(weights, shape, IDS).logits
    assert wanted.std() > 0.5
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_types_mixed_as_llama_cpp_mixes_them(tmp_path: Path) -> None:
    """Q4_K_M has some matrices in Q6_K; each is read by its own type, and both are counted."""
    kinds = {name: "Q6_K" if name in ("token_embd", "blk.0.attn_v", "blk.0.ffn_down") else "Q4_K" for name in MATRICES}
    path = model_file(lambda name, shape: blocks(kinds[name])(name, shape)).write(tmp_path / "a.gguf")
    checkpoint = open_checkpoint(path)
    assert checkpoint.storage(silent).types == {"Q6_K": 3, "Q4_K": 5, "F32": 3}
    weights = checkpoint.load(silent)
    for name, (metas, shape) in MATRICES.items():
        assert np.array_equal(as_tensor(weights[f"{metas}.weight"]).numpy(), values(kinds[name], name, shape))


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_rows_that_are_no_whole_blocks(tmp_path: Path, kind: str) -> None:
    """A block never spans two rows: such a shape is rejected with the tensor's name."""
    file = model_file(blocks("Q4_0"))
    held = (KINDS | OTHERS)[kind]
    columns = 512 + held.weights // 2
    file.change("blk.0.ffn_down.weight", dims=(columns, 256), kind=held.number)
    file.data += bytes(columns * 256)
    load_rejected(file.write(tmp_path / "a.gguf"), f"'blk.0.ffn_down.weight' of shape (256, {columns})")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_scale_that_is_no_number(tmp_path: Path, kind: str, value: float) -> None:
    """NaN in the float16 scales of a row's last block: earlier rows are read, and this one is rejected."""
    for place in KINDS[kind].halves:
        file = model_file(blocks(kind))
        start = next(offset for name, _, _, offset in file.tensors if name == "blk.0.ffn_gate.weight")
        block = 256 // KINDS[kind].weights * 5 - 1  # the last one of row 4
        data = bytearray(file.data)
        struct.pack_into("<e", data, start + block * KINDS[kind].size + place, value)
        file.data = bytes(data)
        weight = open_checkpoint(file.write(tmp_path / "a.gguf")).load(silent)["layers.0.feed_forward.w1.weight"]
        assert isinstance(weight, LazyWeight)
        assert weight.rows(0, 4).isfinite().all()
        assert weight.rows(5, 512).isfinite().all()
        with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate\.weight holds NaN or infinity"):
            weight.rows(4, 5)


# --- Plain numbers ----------------------------------------------------------------------------

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plain(kind: str) -> Content:
    """Random numbers of one type."""

    def content(name: str, shape: tuple[int, int]) -> tuple[int, bytes]:
        chance = np.random.default_rng(list(name.encode()))
        numbers = chance.normal(size=shape).astype(np.float32) / 8
        return int(Quant[kind]), gguf.quants.quantize(numbers, Quant[kind]).tobytes()

    return content


@pytest.fixture
def warned_each_time() -> Iterator[None]:
    """Make torch repeat warnings that it normally shows once per process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.filterwarnings("error")  # torch warns about memory that is not writable
@pytest.mark.usefixtures("warned_each_time")
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_numbers_are_mapped_as_they_lie(tmp_path: Path, kind: str) -> None:
    """Bits and type stay the same without a copy: later writes to the file are visible in the weights."""
    content = plain(kind)
    path = model_file(content).write(tmp_path / "a.gguf")
    weights = open_checkpoint(path).load(silent)
    places = {tensor.name: int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors}
    for name, (metas, shape) in MATRICES.items():
        weight = weights[f"{metas}.weight"]
        assert isinstance(weight, Tensor)
        assert (tuple(weight.shape), weight.dtype) == (shape, PLAIN[kind])
        with path.open("r+b") as file:
            file.seek(places[f"{name}.weight"])
            first = file.read(weight.element_size())
            file.seek(places[f"{name}.weight"])
            file.write(torch.tensor([3.5], dtype=weight.dtype).view(torch.uint8).numpy().tobytes())
        assert weight[0, 0] == 3.5
        with path.open("r+b") as file:
            file.seek(places[f"{name}.weight"])
            file.write(first)
        assert weight.contiguous().view(torch.uint8).numpy().tobytes() == content(name, shape)[1], name


@pytest.mark.parametrize("kind", PLAIN)
def test_the_embeddings_type_is_known_before_it_is_read(tmp_path: Path, kind: str) -> None:
    """It decides the default precision."""
    checkpoint = open_checkpoint(model_file(plain(kind)).write(tmp_path / "a.gguf"))
    assert checkpoint.storage(silent).dtype == PLAIN[kind] == checkpoint.load(silent)["tok_embeddings.weight"].dtype


# --- Alignment and offsets ---------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [1, 2, 4, 12, 24])
def test_an_alignment_that_the_format_does_not_allow(tmp_path: Path, alignment: int) -> None:
    """A power of two of at least 8: four-byte numbers must not be mapped across a boundary."""
    file = whole_file().set("general.alignment", uint(alignment))
    file.alignment = alignment
    load_rejected(file.write(tmp_path / "a.gguf"), "general.alignment", alignment)


def test_a_tensor_of_a_million_dimensions(tmp_path: Path) -> None:
    """Rejected before the dimensions are read."""
    dims = struct.pack("<Q", 1 << 40) * (1 << 20)
    path = tmp_path / "a.gguf"
    path.write_bytes(File(n_tensors=1).header()[:24] + struct.pack("<Q1sI", 1, b"t", 1 << 20) + dims + bytes(64))
    load_rejected(path, "1048576 dimensions")


def test_the_smallest_alignment(tmp_path: Path) -> None:
    """An alignment of 8 bytes."""
    file = whole_file()
    wanted = open_checkpoint(file.write(tmp_path / "a.gguf")).load(silent)
    file.set("general.alignment", uint(8)).alignment = 8
    found = open_checkpoint(file.write(tmp_path / "b.gguf")).load(silent)
    assert all(torch.equal(as_tensor(found[name]), as_tensor(wanted[name])) for name in wanted)
