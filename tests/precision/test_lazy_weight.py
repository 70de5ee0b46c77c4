"""Lazy weights: their rows equal the rows of a tensor, and a network with them gives the same results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.errors import CheckpointError
from llama_scratch.model import KVCache
from llama_scratch.precision.lazy_weight import (
    GGUFBlockWeight,
    LazyWeight,
    ShardedWeight,
    Weight,
    as_tensor,
    kernel_operands,
)
from llama_scratch.precision.linear import Embedding
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.precision.network import build
from llama_scratch.precision.rows import Rows
from tests.helpers import weights
from tests.helpers.checkpoints import random_weights, tiny_args

CPU = torch.device("cpu")


def lazy(weight: Tensor) -> LazyWeight:
    """The weight as if in quantized blocks."""
    shape = weight.shape[0], weight.shape[1]
    blocks = torch.empty(shape, dtype=torch.uint8)  # one byte each
    return GGUFBlockWeight(shape, blocks, "a test", lambda start, stop: weight[start:stop].clone())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sizes", [[3, 5, 1], [4], [1, 1]])
def test_joined_pieces_are_the_whole(axis: int, sizes: list[int]) -> None:
    """Any range of rows, within one shard or across several."""
    pieces = [torch.randn((size, 6) if axis == 0 else (6, size)).bfloat16() for size in sizes]
    whole, joined = torch.cat(pieces, axis), ShardedWeight(pieces, axis)
    assert (joined.shape, joined.dtype, joined.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
    assert (len(joined), joined.numel()) == (len(whole), whole.numel())
    assert torch.equal(as_tensor(joined), whole)
    assert torch.equal(joined.to(torch.float32), whole.float())
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert torch.equal(joined.rows(start, stop), whole[start:stop])


def test_pieces_that_lie_in_one_file_are_not_copied() -> None:
    """Rows of one shard are a view."""
    pieces = [torch.randn(4, 3), torch.randn(4, 3)]
    assert ShardedWeight(pieces, 0).rows(5, 7).data_ptr() == pieces[1][1:].data_ptr()


@pytest.mark.parametrize("n", [1, 3, 7, 10, 100])
def test_parts_are_the_whole(n: int) -> None:
    """Parts know their fraction of the bytes; parts of parts work too."""
    weight = torch.randn(10, 4)
    parts = lazy(weight).split(n)
    assert [len(part) for part in parts] == [min(n, 10 - start) for start in range(0, 10, n)]
    assert torch.equal(torch.cat([part.to(torch.float32) for part in parts]), weight)
    inner = [piece for part in parts for piece in part.split(2)]
    assert torch.equal(torch.cat([as_tensor(piece) for piece in inner]), weight)
    assert sum(part.nbytes for part in parts) == 40


def test_a_large_weight_is_turned_in_blocks() -> None:
    """At most a few million numbers are float32 at a time during the conversion to another dtype."""
    asked: list[int] = []
    weight = torch.randn(40, 1 << 17)

    def rows(start: int, stop: int) -> Tensor:
        asked.append(stop - start)
        return weight[start:stop]

    found = GGUFBlockWeight((40, 1 << 17), torch.empty(0, dtype=torch.uint8), "a test", rows).to(torch.float16)
    assert found.dtype == torch.float16
    assert torch.equal(found, weight.half())
    assert set(asked) == {8}


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_multiply_what_is_lazy(rows: int) -> None:
    """Mixed with tensors, in the given order, and with more blocks than threads."""
    weights = [torch.randn(5, 1 << 19), torch.randn(3, 1 << 19), torch.randn(40, 1 << 19)]
    x = torch.randn(rows, 1 << 19)
    form = Rows([lazy(weights[0]), weights[1].bfloat16(), lazy(weights[2])])
    expected = torch.cat([weights[0], weights[1].bfloat16().float(), weights[2]]).double()
    torch.testing.assert_close(form(x).double(), x.double() @ expected.T, rtol=1e-4, atol=0.05)


def test_an_error_while_rows_are_made_is_raised_where_they_are_multiplied() -> None:
    """Even if another thread converts the rows."""

    def rows(start: int, stop: int) -> Tensor:
        raise CheckpointError("damaged.")

    with pytest.raises(CheckpointError, match="damaged"):
        Rows([GGUFBlockWeight((4, 4), torch.empty(4, 4, dtype=torch.uint8), "a test", rows)])(torch.randn(1, 4))


@pytest.mark.parametrize("form", ["Q8_0", "Q6_K", "a test"])
def test_an_embedding_of_what_is_lazy(way: str, form: str) -> None:
    """Rows in the order of the tokens, including duplicates."""
    weight = lazy(torch.randn(20, 256)) if form == "a test" else weights.weight(form, 20, 256)
    tokens = torch.tensor([[7, 0, 7, 19]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(Embedding(weight, dtype)(tokens), as_tensor(weight)[tokens].to(dtype))


def test_the_weights_that_the_kernels_take() -> None:
    """Contiguous tensors of 32 and 16 bits, shards stacked along the rows, and blocks in known formats."""
    plain = torch.randn(6, 4)
    for name, dtype in weights.FLOATS.items():
        tensor = plain.to(dtype)
        assert names(kernel_operands(tensor)) == [(tensor.data_ptr(), name)]
        assert names(kernel_operands(ShardedWeight([tensor[:2], tensor[2:]], 0))) == [
            (tensor.data_ptr(), name),
            (tensor[2:].data_ptr(), name),
        ]
        assert kernel_operands(ShardedWeight([tensor[:, :2], tensor[:, 2:]], 1)) == []
        assert kernel_operands(ShardedWeight([tensor[:, :2].contiguous(), tensor[:, 2:].contiguous()], 1)) == []
        assert kernel_operands(ShardedWeight([tensor[:2], tensor.T[:, :4].T[:, :4]], 0)) != []
        assert kernel_operands(ShardedWeight([tensor[:4], tensor[:4].T], 0)) == []
        assert kernel_operands(tensor.T) == kernel_operands(tensor[:, :2]) == []
    for dtype in (torch.float64, torch.int8, torch.uint8):
        assert kernel_operands(plain.to(dtype)) == []
    blocks = torch.zeros(6, 72, dtype=torch.uint8)
    for form in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        weight = GGUFBlockWeight((6, 64), blocks, form, lambda *_: plain)
        assert names(kernel_operands(weight)) == [(blocks.data_ptr(), form)]
        assert kernel_operands(weight.split(3)[0]) == []
    for form in ("Q2_K", "Q3_K", "IQ4_NL", "q8_0", "int8", ""):
        assert kernel_operands(GGUFBlockWeight((6, 64), blocks, form, lambda *_: plain)) == []


def names(parts: Sequence[tuple[Tensor, str]]) -> list[tuple[int, str]]:
    return [(tensor.data_ptr(), name) for tensor, name in parts]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("small", [True, False])
def test_a_network_of_them_answers_as_one_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, precision: str, small: bool
) -> None:
    """Before and after packing, with tied weights, and lazy if that saves memory or the kernels support it."""
    if not small:
        monkeypatch.setattr("llama_scratch.precision.rows._SMALL_MODEL", 0)
    (tmp_path / "weights").write_bytes(b"")
    turned: dict[str, Weight] = {}
    for name, weight in random_weights(tiny_args(), tied=False).items():
        turned[name] = weight
        if weight.dim() == 2:
            blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            turned[name] = weights.quantized("Q8_0", torch.from_numpy(blocks))
    turned["output.weight"] = turned["tok_embeddings.weight"]
    tensors = {name: as_tensor(weight) for name, weight in turned.items()}
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    tokens = torch.arange(12)[None]
    some = precision in ("fp32", "fp16") and (way == "kernels" or not small)

    def logits(weights: Mapping[str, Weight], precision: str, pack: bool) -> tuple[Tensor, bool]:
        model, packing = build(weights, tiny_args(), precision, CPU, [tmp_path / "weights"])
        if pack:
            packing.wait()
        found: Tensor = model(tokens, KVCache(tiny_args(), 16))
        return found, isinstance(getattr(model.tok_embeddings, "weight", None), LazyWeight)

    for pack in (False, True):
        found, lazily = logits(turned, precision, pack)
        assert lazily or not (some or precision == "int8")
        assert not (lazily and precision == "bf16")
        # Blocks that are not converted are exact.
        expected, never = logits(tensors, "fp32" if lazily and precision == "fp16" else precision, pack)
        assert not never
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantized_weights_take_no_more_memory_than_int8_needs(smollm2_path: Path) -> None:
    """Peak memory from the file to an answer in int8: the whole weights are never float32."""
    program = """
import sys, threading, time
from pathlib import Path
from llama_scratch import Llama
import torch, gguf, numpy
def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) << 10
torch.set_num_threads(1)
before, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.005)
threading.Thread(target=watch).start()
llama = Llama.load(sys.argv[1], precision="int8", device="cpu")
llama.predict("The capital of France is")
llama.prepare()
found = llama.predict("The capital of France is").next.text
done = True
print(found, most - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, smollm2_path], capture_output=True, text=True, check=True, timeout=120
    )
    token, found = result.stdout.split()
    assert token == "Paris"
    needed = memory_needed(open_checkpoint(smollm2_path).args, "int8", None, 512, CPU, tied=True)
    assert needed["weights"] < 143_500_000  # 135 million weights, and 2 bytes of scale per 32 weights
    tables = 50_000_000  # of the vocabulary, in every precision
    assert int(found) < min(1.05 * sum(needed.values()) + tables, 345_000_000)
