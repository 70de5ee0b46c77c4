"""Weights that are no tensors yet: their rows are the whole's, and a network of them answers as one of tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.errors import CheckpointError
from llama_scratch.lazy import Joined, Lazy, Quantised, Weight, as_tensor
from llama_scratch.linear import Blocks, Embedding
from llama_scratch.model import KVCache
from llama_scratch.precision import _fbgemm_block, _output_groups, build, memory_needed
from tests.checkpoints import random_weights, tiny_args

CPU = torch.device("cpu")


def lazy(weight: Tensor) -> Lazy:
    """The weight as it would be in blocks."""
    return Quantised((weight.shape[0], weight.shape[1]), weight.numel(), lambda start, stop: weight[start:stop].clone())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sizes", [[3, 5, 1], [4], [1, 1]])
def test_joined_pieces_are_the_whole(axis: int, sizes: list[int]) -> None:
    """Every stretch of rows, whether it lies in one piece or in several."""
    pieces = [torch.randn((size, 6) if axis == 0 else (6, size)).bfloat16() for size in sizes]
    whole, joined = torch.cat(pieces, axis), Joined(pieces, axis)
    assert (joined.shape, joined.dtype, joined.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
    assert (len(joined), joined.numel()) == (len(whole), whole.numel())
    assert torch.equal(as_tensor(joined), whole)
    assert torch.equal(joined.to(torch.float32), whole.float())
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            assert torch.equal(joined.rows(start, stop), whole[start:stop])


def test_pieces_that_lie_in_one_file_are_not_copied() -> None:
    """Rows of one shard are a view of it."""
    pieces = [torch.randn(4, 3), torch.randn(4, 3)]
    assert Joined(pieces, 0).rows(5, 7).data_ptr() == pieces[1][1:].data_ptr()


@pytest.mark.parametrize("n", [1, 3, 7, 10, 100])
def test_parts_are_the_whole(n: int) -> None:
    """Parts know their share of the bytes, and parts of parts too are what they are called."""
    weight = torch.randn(10, 4)
    parts = lazy(weight).split(n)
    assert [len(part) for part in parts] == [min(n, 10 - start) for start in range(0, 10, n)]
    assert torch.equal(torch.cat([part.to(torch.float32) for part in parts]), weight)
    inner = [piece for part in parts for piece in part.split(2)]
    assert torch.equal(torch.cat([as_tensor(piece) for piece in inner]), weight)
    assert sum(part.nbytes for part in parts) == 40


def test_a_large_weight_is_turned_in_blocks() -> None:
    """No more than a few million numbers are float32 at a time on the way to another type."""
    asked: list[int] = []
    weight = torch.randn(40, 1 << 17)

    def rows(start: int, stop: int) -> Tensor:
        asked.append(stop - start)
        return weight[start:stop]

    found = Quantised((40, 1 << 17), 0, rows).to(torch.float16)
    assert found.dtype == torch.float16
    assert torch.equal(found, weight.half())
    assert set(asked) == {8}


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_multiply_what_is_lazy(rows: int) -> None:
    """Mixed with tensors, in the order in which they stand, and with more blocks than threads."""
    weights = [torch.randn(5, 1 << 19), torch.randn(3, 1 << 19), torch.randn(40, 1 << 19)]
    x = torch.randn(rows, 1 << 19)
    form = Blocks([lazy(weights[0]), weights[1].bfloat16(), lazy(weights[2])])
    expected = torch.cat([weights[0], weights[1].bfloat16().float(), weights[2]]).double()
    torch.testing.assert_close(form(x).double(), x.double() @ expected.T, rtol=1e-4, atol=0.05)


def test_an_error_while_rows_are_made_is_raised_where_they_are_multiplied() -> None:
    """Though another thread made them."""

    def rows(start: int, stop: int) -> Tensor:
        raise CheckpointError("damaged.")

    with pytest.raises(CheckpointError, match="damaged"):
        Blocks([Quantised((4, 4), 16, rows)])(torch.randn(1, 4))


def test_an_embedding_of_what_is_lazy() -> None:
    """Rows in the order of the tokens, one that comes twice too."""
    weight = torch.randn(20, 4)
    tokens = torch.tensor([[7, 0, 7, 19]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(Embedding(lazy(weight), dtype)(tokens), weight[tokens].to(dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("small", [True, False])
def test_a_network_of_them_answers_as_one_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, small: bool
) -> None:
    """Before and after packing, tied as it was, and kept lazy where that saves memory."""
    if not small:
        monkeypatch.setattr("llama_scratch.precision._SMALL", 0)
    (tmp_path / "weights").write_bytes(b"")
    tensors = random_weights(tiny_args())
    turned = {name: lazy(weight) if weight.dim() == 2 else weight for name, weight in tensors.items()}
    turned["output.weight"] = turned["tok_embeddings.weight"]
    tokens = torch.arange(12)[None]

    def logits(weights: Mapping[str, Weight], pack: bool) -> Tensor:
        model, packing = build(weights, tiny_args(), precision, CPU, [tmp_path / "weights"])
        lazily = isinstance(getattr(model.tok_embeddings, "weight", None), Lazy)
        assert lazily == (weights is turned and (precision == "int8" or (precision == "fp16" and not small)))
        if pack:
            packing.wait()
        found: Tensor = model(tokens, KVCache(tiny_args(), 16))
        return found

    for pack in (False, True):
        torch.testing.assert_close(logits(turned, pack), logits(tensors, pack), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_quantised_weights_take_no_more_memory_than_int8_needs(smollm2_path: Path) -> None:
    """At no moment between the file and the answer in int8: never all of it as float32."""
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
    # 135 MB, and the padding of fbgemm's blocks: 256 columns with AVX-512, 512 with AVX2.
    assert needed["weights"] < (184_000_000 if _fbgemm_block("int8") == 256 else 219_000_000)
    tables = 50_000_000  # of the vocabulary, which every precision has
    assert int(found) < min(1.05 * sum(needed.values()) + tables, 345_000_000)


def test_fbgemm_blocks_follow_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 blocks are twice as wide without AVX-512; an output projection gets no group that is mostly padding."""
    monkeypatch.delenv("FBGEMM_ENABLE_INSTRUCTIONS", raising=False)
    for capability, block, groups in (("AVX512", 256, 3), ("AVX2", 512, 2), ("DEFAULT", 1, 4)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr("llama_scratch.precision.packs", lambda capability=capability: capability != "DEFAULT")
        assert (_fbgemm_block("int8"), _fbgemm_block("fp16")) == (block, 1 if capability == "DEFAULT" else 512)
        assert [_output_groups(width) for width in (576, 2048)] == [groups, 4]
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("llama_scratch.precision.packs", lambda: True)
    monkeypatch.setenv("FBGEMM_ENABLE_INSTRUCTIONS", "AVX2")
    assert _fbgemm_block("int8") == 512
