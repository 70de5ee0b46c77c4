"""Out-of-memory errors, and that the memory estimates match the memory that is taken."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.cli import run
from llama_scratch.errors import OutOfMemoryError
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.model import KVCache, Transformer
from llama_scratch.precision import PRECISIONS
from llama_scratch.precision.dtypes import DTYPES
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.precision.linear import format_of
from llama_scratch.precision.memory_estimate import memory_needed
from llama_scratch.precision.network import build
from llama_scratch.precision.panels import Panels
from llama_scratch.precision.rows import Rows
from llama_scratch.system.memory import memory_errors, require_memory
from tests.helpers.checkpoints import random_weights, tiny_args

CPU = torch.device("cpu")


def free(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    """Make the machine report this number of free bytes."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(available)))


def sentence(error: OutOfMemoryError) -> str:
    message = str(error)
    assert error.exit_code == 5
    assert message.endswith(".")
    return message


# --- Messages ---------------------------------------------------------------------------------


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact to the byte, for one number or for parts."""
    free(monkeypatch, 1000)
    require_memory(1000, "It")
    require_memory({"weights": 900, "KV cache": 100}, "It")
    for needed in (1001, {"weights": 901, "KV cache": 100}):
        with pytest.raises(OutOfMemoryError):
            require_memory(needed, "It")


def test_a_refusal_says_how_much_for_what_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are in GB; parts below 0.05 GB are left out."""
    free(monkeypatch, 2.34e9)
    with pytest.raises(OutOfMemoryError) as caught:
        require_memory({"weights": 2_500_000_000, "packing": 49_000_000, "KV cache": 540_000_000}, "Llama in fp16")
    assert sentence(caught.value) == (
        "Llama in fp16 needs 3.1 GB of memory (weights 2.5, KV cache 0.5), but only 2.3 GB are free. "
        "Close other programs, or choose a smaller model, context or precision."
    )
    with pytest.raises(OutOfMemoryError) as caught:
        require_memory(3_100_000_000, "It")
    assert sentence(caught.value).startswith("It needs 3.1 GB of memory, but only 2.3 GB are free. ")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["python", "cpu", "gpu"],
)
def test_an_allocation_that_failed_is_a_sentence(error: Exception) -> None:
    """Independent of the library that raised it. The cause is kept for --debug."""
    with pytest.raises(OutOfMemoryError) as caught, memory_errors("Llama"):
        raise error
    assert sentence(caught.value).startswith("Llama does not fit into this machine's memory")
    assert caught.value.__cause__ is error
    # The free memory of the CPU does not matter for a GPU.
    assert ("GB are free" in str(caught.value)) != ("CUDA" in str(error))


def test_a_real_allocation_that_fails_is_recognized() -> None:
    """A real error of torch, for more memory than any machine has. The message has the requested size."""
    with pytest.raises(OutOfMemoryError) as caught, memory_errors("Llama"):
        torch.empty(10**18, dtype=torch.uint8)
    assert "1000000000.0 GB more were requested, and " in sentence(caught.value)


def test_other_errors_pass_through() -> None:
    """A bug is not reported as an out-of-memory error."""
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("Llama"):
        raise RuntimeError("shapes do not match")


# --- Loading ----------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_exit_code_5(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On the command line, before anything is computed."""
    free(monkeypatch, 1e6)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(["--model-dir", str(tiny_dir), "--prompt", "the"]) == 5
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("llama-scratch: Tiny-Llama in ")
    assert "GB of memory" in err
    assert "GB are free" in err
    assert err.count("\n") == 1


def test_a_context_that_is_asked_for_is_counted_and_the_models_own_is_not(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """131,072 tokens take 403 MB, plus their mask. By default 4,096 are counted, because the cache grows on demand."""
    free(monkeypatch, 2e8)
    assert Llama.load(tiny_dir, precision="bf16", device="cpu").context == 131_072
    assert Llama.load(tiny_dir, precision="bf16", device="cpu", context=4096).context == 4096
    with pytest.raises(OutOfMemoryError) as caught:
        Llama.load(tiny_dir, precision="bf16", device="cpu", context=131_072)
    assert (
        "in bf16 with a context of 131,072 tokens needs 0.9 GB of memory (KV cache 0.4, activations 0.5)"
        in sentence(caught.value)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_refused_where_it_does_not_fit(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Exactly the needed memory is enough, and one byte less is rejected."""
    args = tiny_args()
    needed = sum(memory_needed(args, precision, torch.bfloat16, 512, CPU, tied=True).values())
    free(monkeypatch, needed)
    Llama.load(tiny_dir, precision=precision, device="cpu", context=512)
    free(monkeypatch, needed - 1)
    with pytest.raises(OutOfMemoryError, match=f"in {precision} with a context of 512 tokens"):
        Llama.load(tiny_dir, precision=precision, device="cpu", context=512)


def own_bytes(model: Transformer, weights: dict[str, Tensor]) -> int:
    """Bytes of a network's matrices that are not in the file."""
    held = [model.tok_embeddings.weight]
    for form in map(format_of, model.modules()):
        if isinstance(form, Rows):
            held += [as_tensor(weight) for weight in form.weights]
        elif isinstance(form, Panels):
            held += [form.values, form.scales]
    own = {weight.data_ptr() for weight in weights.values()}
    return sum({weight.data_ptr(): weight.nbytes for weight in held if weight.data_ptr() not in own}.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_weights_that_are_predicted_are_those_that_are_made(
    tmp_path: Path, precision: str, stored: torch.dtype, tied: bool
) -> None:
    """Mapped weights of the same dtype are free. A quantized output takes memory of its own, even if it is tied."""
    args = tiny_args(n_layers=1)
    weights = {name: weight.to(stored) for name, weight in random_weights(args, tied=False).items()}
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    model, packing = build(weights, args, precision, CPU, [tmp_path / "weights"])
    packing.wait()
    predicted = memory_needed(args, precision, stored, 512, CPU, tied=tied)["weights"]
    norms = sum(weight.numel() for weight in weights.values() if weight.ndim == 1)
    made = own_bytes(model, weights)
    assert made <= predicted <= made + 4 * norms
    assert (predicted == 0) is (DTYPES.get(precision) == stored)


@pytest.mark.parametrize(("activations", "size"), [("auto", 4), ("fp32", 4), ("bf16", 2)])
def test_activations_are_counted(tiny_dir: Path, activations: str, size: int) -> None:
    """The cache takes the size of the activations, for any precision of the weights."""
    args = tiny_args()
    for precision in PRECISIONS:
        needed = memory_needed(args, precision, torch.bfloat16, 512, CPU, tied=True, activations=activations)
        assert needed["KV cache"] == 512 * args.kv_bytes_per_token(size)
    llama = Llama.load(tiny_dir, precision="bf16", activations=activations, device="cpu", context=512)
    llama.predict([1] * 512)
    assert llama.engine.cache_bytes == needed["KV cache"]


# --- The cache --------------------------------------------------------------------------------


@pytest.fixture
def network() -> Transformer:
    network = Transformer(tiny_args())
    network.load_state_dict(random_weights(tiny_args()))
    return network.eval().requires_grad_(False)


def bytes_held(cache: KVCache) -> int:
    return sum(tensor.nbytes for held in cache._layers if held is not None for tensor in held)


@pytest.mark.parametrize(("activations", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("context", [100, 256, 700, 1024])
def test_the_predicted_cache_is_the_one_that_is_taken(
    network: Transformer, activations: str, dtype: torch.dtype, context: int
) -> None:
    """The estimate is exact for a full cache."""
    cache = KVCache(network.args, context)
    with torch.inference_mode():
        network.to(dtype)(torch.zeros(1, context, dtype=torch.long), cache)
    needed = memory_needed(network.args, "bf16", torch.bfloat16, context, CPU, tied=True, activations=activations)
    assert needed["KV cache"] == bytes_held(cache)


def test_the_predicted_growth_is_the_one_that_happens(network: Transformer) -> None:
    """In every step; 0 if the tokens fit into the capacity. A rewind does not free memory."""
    cache = KVCache(network.args, 1000)
    assert cache.growth(1) == 0  # unknown before the first token
    with torch.inference_mode():
        network(torch.zeros(1, 10, dtype=torch.long), cache)
        for length in (256, 257, 512, 600, 1000):
            predicted, before = cache.growth(length), bytes_held(cache)
            network(torch.zeros(1, length - cache.length, dtype=torch.long), cache)
            assert bytes_held(cache) - before == predicted
        assert cache.capacity == 1000
        cache.rewind(3)
        assert cache.growth(1000) == 0


@pytest.mark.parametrize("how", ["predicted", "failed", "failed in the second layer"])
def test_growth_that_is_refused_leaves_the_engine_usable(
    network: Transformer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The error names the length. Short prompts still work, and the long one works once there is enough memory."""
    engine = Engine(network, 2000)
    short, long = [1, 2, 3] * 50, [1, 2, 3] * 400
    before = engine.next_logits(short).values
    with monkeypatch.context() as patch:
        if how == "predicted":
            free(patch, 1000)
        else:
            grown, layers = KVCache._grown, iter([] if how == "failed" else [0])

            def fail(cache: KVCache, held: tuple[Tensor, Tensor] | None, end: int, like: Tensor) -> Any:
                return torch.empty(1 << 60) if next(layers, None) is None else grown(cache, held, end, like)

            patch.setattr(KVCache, "_grown", fail)
        with pytest.raises(OutOfMemoryError) as caught:
            engine.next_logits(long)
        assert sentence(caught.value).startswith("A text of ")
        again = engine.next_logits(short)
        assert again.reused_tokens == len(short) - 1
        assert torch.allclose(again.values, before, rtol=1e-4, atol=1e-4)
    late = engine.next_logits(long).values
    assert torch.allclose(late, Engine(network, 2000).next_logits(long).values, rtol=1e-4, atol=1e-4)


def test_a_growth_that_fits_is_not_refused(network: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact to the byte."""
    engine = Engine(network, 2000)
    engine.next_logits([1, 2, 3])
    growth = engine._cache.growth(300)
    free(monkeypatch, growth - 1)
    with pytest.raises(OutOfMemoryError, match="A text of 300 tokens needs"):
        engine.next_logits([1, 2, 3] * 100)
    free(monkeypatch, growth)
    engine.next_logits([1, 2, 3] * 100)
