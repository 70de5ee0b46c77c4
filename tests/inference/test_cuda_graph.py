"""The static cache for a CUDA graph on the CPU, and the graph itself if there is a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_scratch.inference.cuda_graph import DecodeGraph, StaticCache
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.model import KVCache, Transformer
from tests.helpers.checkpoints import random_weights, tiny_args

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU: CUDA is missing")


@pytest.fixture(scope="module")
def network() -> Transformer:
    # Without tripled q and k, which would amplify rounding from a different order of sums.
    weights = random_weights(tiny_args())
    calm = {name: weight / 3 if ".wq." in name or ".wk." in name else weight for name, weight in weights.items()}
    network = Transformer(tiny_args())
    network.load_state_dict(calm)
    return network.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(556, (1, length), generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def step(network: Transformer, cache: KVCache, static: StaticCache, token: Tensor) -> Tensor:
    """Run one token, like `DecodeGraph`."""
    static.position.fill_(cache.length)
    logits: Tensor = network(token, static)
    cache.advance(1)
    return logits


def spoil(cache: KVCache) -> None:
    """Uninitialized memory can contain any value; fill it with the most harmful one."""
    for held in cache._layers:
        for store in held or ():
            store[:, :, cache.length :] = torch.nan


def test_a_static_cache_is_the_growing_one_token_by_token(network: Transformer) -> None:
    """In the growing cache's memory, after a prompt, the logits of every token match a single pass."""
    tokens = ids(60)
    cache = KVCache(network.args, 100)
    network(tokens[:, :20], cache)
    spoil(cache)
    static = StaticCache(cache, CPU)
    expected = network(tokens, all_positions=True)[0]
    for position in range(20, 60):
        logits = step(network, cache, static, tokens[:, position : position + 1])
        assert relative(logits[0, 0], expected[position]) <= 1e-5
    assert cache.length == 60
    after = network(ids(10, seed=1), cache)  # the growing cache continues from the tokens that the static one wrote
    assert relative(after, network(torch.cat([tokens, ids(10, seed=1)], 1))) <= 1e-5


def test_a_static_cache_is_made_anew_when_the_cache_has_grown(network: Transformer) -> None:
    """After growth from 256 to 512 tokens, the contents have been copied and the old static cache is invalid."""
    tokens = ids(280)
    cache = KVCache(network.args, 600)
    network(tokens[:, :250], cache)
    expected = network(tokens, all_positions=True)[0]
    static = None
    for position in range(250, 280):
        token = tokens[:, position : position + 1]
        if cache.length < cache.capacity:
            if static is None or static.length != cache.capacity:
                spoil(cache)
                static = StaticCache(cache, CPU)
            logits = step(network, cache, static, token)
        else:
            logits = network(token, cache)
        assert relative(logits[0, 0], expected[position]) <= 1e-5
    assert cache.capacity == 512


def test_what_was_rewound_is_not_seen(network: Transformer) -> None:
    """Tokens after the position, from a longer previous prompt, are masked."""
    tokens = ids(40)
    cache = KVCache(network.args, 100)
    network(tokens, cache)
    for held in cache._layers:
        for store in held or ():
            store[:, :, 30:] = 1e4
    cache.rewind(30)
    logits = step(network, cache, StaticCache(cache, CPU), tokens[:, 30:31])
    assert relative(logits[0, 0], network(tokens[:, :31])[0, 0]) <= 1e-5


def test_a_static_cache_changes_no_shape(network: Transformer) -> None:
    """A graph needs the same shapes and the same memory at each position."""
    cache = KVCache(network.args, 100)
    network(ids(20), cache)
    static = StaticCache(cache, CPU)
    shapes, places = set(), set()
    for _ in range(3):
        step(network, cache, static, ids(1))
        k, v = static._layers[0] or (torch.empty(0), torch.empty(0))
        shapes.add((static.mask(1, CPU).shape, static.positions(1, CPU).shape, k.shape))
        places.add((k.data_ptr(), v.data_ptr()))
    assert shapes == {((1, 100), (1,), (1, 2, 100, 64))}
    assert len(places) == 1
    assert cache.length == 23


def test_a_static_cache_needs_memory(network: Transformer) -> None:
    """A cache that was never used has no memory to write to."""
    with pytest.raises(ValueError, match="no memory yet"):
        network(ids(1), StaticCache(KVCache(network.args, 100), CPU))


def test_a_token_fits_where_the_cache_has_room_and_was_used(network: Transformer) -> None:
    """The first prompt and tokens that grow the cache run without a graph."""
    cache = KVCache(network.args, 300)
    graph = DecodeGraph(network, cache)
    assert not graph.fits()
    for length, fits in ((255, True), (1, False), (1, True), (42, True), (1, False)):
        network(ids(length), cache)
        assert graph.fits() is fits
    cache.rewind(0)
    assert not graph.fits()


def test_the_engine_uses_a_graph_on_a_gpu_alone(network: Transformer) -> None:
    """On a CPU, there is no launch overhead to save."""
    assert Engine(network, 100)._graph is None


# --- On a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(network: Transformer) -> Transformer:
    moved = copy.deepcopy(network).to("cuda")
    moved.freqs = moved.freqs.to("cuda")
    return moved


def greedy(engine: Engine, prompt: Sequence[int], steps: int) -> tuple[list[int], list[Tensor]]:
    sequence, logits = list(prompt), []
    for _ in range(steps):
        logits.append(engine.next_logits(sequence).values.clone())
        sequence.append(int(logits[-1].argmax()))
    return sequence, logits


@needs_cuda
def test_a_replayed_graph_says_what_the_network_says(on_gpu: Transformer) -> None:
    """Including growth of the cache at 256 tokens, and after a rewind."""
    engine, plain = Engine(on_gpu, 600), Engine(on_gpu, 600)
    assert engine._graph is not None
    plain._graph = None
    for prompt in (ids(240)[0].tolist(), ids(100, seed=1)[0].tolist()):
        ours, theirs = greedy(engine, prompt, 40), greedy(plain, prompt, 40)
        assert ours[0] == theirs[0]
        assert all(relative(a, b) <= 1e-4 for a, b in zip(ours[1], theirs[1], strict=True))


@needs_cuda
@pytest.mark.parametrize("activations", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_every_precision_generates_on_a_gpu(tiny_dir: Path, precision: str, activations: str) -> None:
    """Compare the first token's probability with fp32 on the CPU."""
    llama = Llama.load(tiny_dir, precision=precision, activations=activations, device="cuda")
    expected = Llama.load(tiny_dir, precision="fp32", device="cpu").predict("the nation").next
    assert llama.info.precision == ("bf16" if precision == "auto" else precision)
    llama.prepare()
    assert len(llama.complete("the nation", 20).ids) == 20
    assert llama.predict("the nation").next.logprob == pytest.approx(expected.logprob, abs=0.2)
