"""The network against three others: tests/helpers/reference.py, Hugging Face's and Meta's."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_scratch import model
from llama_scratch.config import ModelArgs
from llama_scratch.model import KVCache, RMSNorm, Transformer, apply_rotary_emb, rope_frequencies, rotations
from tests.helpers import reference
from tests.helpers.checkpoints import random_weights, tiny_args, tiny_params
from tests.helpers.reference import Run

pytestmark = pytest.mark.reference

CONTEXT = 131_072
SHAPES: dict[str, dict[str, Any]] = {
    "two queries a key": {},
    "four queries a key": {"dim": 512, "n_heads": 8, "n_layers": 2},
    "one key for all": {"n_kv_heads": 1},
    "a key for each query": {"n_kv_heads": 4},
    "no scaling": {"use_scaled_rope": None},
}
LENGTH = 96


# --- The rotary embedding ---------------------------------------------------------------------


def angle_errors(args: ModelArgs, factor: float | None, positions: range) -> Tensor:
    """Error of the rotations against float64 at each position: the largest over the pairs, in radians."""
    ours = rotations(rope_frequencies(args), torch.tensor(positions)).to(torch.complex128)
    angles = reference.rope_angles(positions, args.head_dim, args.rope_theta, factor)
    return (ours * torch.polar(torch.ones_like(angles), -angles)).angle().abs().amax(-1)


@pytest.mark.parametrize("factor", [None, 8, 32])
def test_rotations_are_those_of_float64_at_every_position(factor: float | None) -> None:
    """The only error is float32's rounding of m·θ: under 1e-2 rad at position 131,071."""
    args = tiny_args().with_rope_factor(factor or 1)
    for start in range(0, CONTEXT, CONTEXT // 8):
        positions = range(start, start + CONTEXT // 8)
        errors = angle_errors(args, factor, positions)
        assert errors.max() <= 1e-2
        # Two roundings of at most half an ulp each: of the frequency and of the product.
        assert (errors <= 1e-6 + 2 * 2**-24 * torch.arange(start, positions.stop)).all()
    assert angle_errors(args, factor, range(8)).max() <= 1e-6


def test_rotations_are_unit_numbers() -> None:
    """Rotations preserve the length of vectors."""
    assert (rotations(rope_frequencies(tiny_args()), torch.arange(4096)).abs() - 1).abs().max() <= 1e-6


def test_factor_8_fails_where_32_is_right() -> None:
    """Short prompts hide a wrong factor: the error is 0.0015 rad at position 16, but over a turn at 80,000."""
    wrong, right = (rope_frequencies(tiny_args().with_rope_factor(factor)).double() for factor in (8, 32))
    assert float((wrong - right).abs().max() * 16) == pytest.approx(0.0015, abs=0.0001)
    assert float((wrong - right).abs().max() * 80_000) > 7
    assert angle_errors(tiny_args().with_rope_factor(8), 32, range(16, 17)).max() > 1e-3
    assert angle_errors(tiny_args().with_rope_factor(8), 32, range(80_000, 80_001)).max() > 1


def test_scaling_leaves_fast_pairs_and_divides_slow_ones() -> None:
    """Of 32 pairs with theta 500,000, 15 are unchanged, 3 interpolated and 14 divided by the factor."""
    args = tiny_args()
    assert (args.head_dim, args.rope_theta) == (64, 500_000)
    slowed = rope_frequencies(args.with_rope_factor(1)) / rope_frequencies(args)
    assert slowed[:15].eq(1).all()
    assert slowed[15:18].gt(1).all()
    assert slowed[15:18].lt(32).all()
    assert torch.allclose(slowed[18:], torch.tensor(32.0))


def test_a_turned_score_depends_on_the_distance_alone() -> None:
    """A query and a key have the same dot product at all positions with the same distance."""
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    table = rotations(rope_frequencies(tiny_args()), torch.arange(1024))
    near, far = (
        (apply_rotary_emb(q, table[m : m + 1]) * apply_rotary_emb(k, table[n : n + 1])).sum()
        for m, n in ((37, 5), (1023, 991))
    )
    assert near == pytest.approx(float(far), abs=1e-3)
    assert near != pytest.approx(float((q * k).sum()), abs=1)


def test_the_table_stays_in_float32() -> None:
    """bfloat16 angles would be off by whole turns: `.to` must not convert them, nor a checkpoint replace them."""
    network = Transformer(tiny_args(n_layers=1))
    before = network.freqs.clone()
    network.to(torch.bfloat16)
    assert network.norm.weight.dtype == torch.bfloat16
    assert torch.equal(network.freqs, before)
    assert network.freqs.dtype == torch.float32
    assert not list(network.buffers())
    assert network.state_dict().keys() == network.args.weight_shapes().keys()


def test_the_table_holds_data_when_the_network_holds_none() -> None:
    """Networks are built on the meta device and filled from a file, which does not contain the frequencies."""
    with torch.device("meta"):
        network = Transformer(tiny_args())
    assert network.norm.weight.device.type == "meta"
    assert network.freqs.device.type == "cpu"
    assert torch.equal(network.freqs, rope_frequencies(tiny_args()))


# --- The whole network and each layer ---------------------------------------------------------


def build(args: ModelArgs, weights: Mapping[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        network = Transformer(args)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def right_factor(changes: dict[str, Any]) -> float | None:
    """The RoPE factor that networks of this width were trained with."""
    return 32 if changes.get("use_scaled_rope", True) else None


def numbers(args: ModelArgs, factor: float | None) -> dict[str, Any]:
    """The arguments for the reference, with the correct RoPE factor."""
    names = ("n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta")
    return {name: getattr(args, name) for name in names} | {"rope_factor": factor}


def mild_weights(args: ModelArgs) -> dict[str, Tensor]:
    """Random weights without tripled q and k, which would sharpen the softmax and amplify rounding."""
    return {
        name: weight / 3 if ".wq." in name or ".wk." in name else weight
        for name, weight in random_weights(args).items()
    }


def random_ids(args: ModelArgs, length: int = LENGTH, seed: int = 0) -> list[int]:
    return torch.randint(args.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def watched(layers: nn.ModuleList, run: Callable[[], Tensor]) -> Run:
    """Return the logits of `run` and each layer's output."""
    residuals: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        residuals.append(output[0])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        return Run(run()[0], residuals)
    finally:
        for hook in hooks:
            hook.remove()


def run_ours(network: Transformer, ids: Sequence[int], cache: KVCache | None = None) -> Run:
    return watched(network.layers, lambda: network(torch.tensor([ids]), cache, all_positions=True))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance: the norm of the difference divided by the norm of the expected value."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def assert_same(ours: Run, theirs: Run, bound: float = 1e-4) -> None:
    for i, (a, b) in enumerate(zip(ours.residuals, theirs.residuals, strict=True)):
        assert relative(a, b) <= bound, f"layer {i}"
    assert relative(ours.logits, theirs.logits) <= bound
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))


@pytest.fixture(scope="module")
def metas() -> Iterator[ModuleType]:
    """Meta's own network, with plain layers in place of fairscale's; removed after the test."""

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool, **parallel: object):
            super().__init__(inputs, outputs, bias=bias)

    class Embedding(nn.Embedding):
        def __init__(self, tokens: int, dim: int, **parallel: object):
            super().__init__(tokens, dim)

    package = "fairscale.nn.model_parallel"
    initialize, layers = ModuleType(f"{package}.initialize"), ModuleType(f"{package}.layers")
    vars(initialize).update(get_model_parallel_world_size=lambda: 1)
    vars(layers).update(ColumnParallelLinear=Linear, RowParallelLinear=Linear, VocabParallelEmbedding=Embedding)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fairscale", "fairscale.nn", package):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, initialize.__name__, initialize)
        patch.setitem(sys.modules, layers.__name__, layers)
        try:
            yield importlib.import_module("llama_models.llama3.model")
        finally:
            sys.modules.pop("llama_models.llama3.model", None)


def build_metas(metas: ModuleType, weights: Mapping[str, Tensor], length: int, params: dict[str, Any]) -> Any:
    network = metas.Transformer(metas.ModelArgs(**params, max_batch_size=1, max_seq_len=length))
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_layer_is_that_of_the_reference(changes: dict[str, Any]) -> None:
    """Fused attention in float32 agrees with an explicit softmax in float64."""
    args = tiny_args(**changes)
    weights, ids = random_weights(args), random_ids(args)
    expected = reference.forward(weights, numbers(args, right_factor(changes)), ids)
    assert_same(run_ours(build(args, weights), ids), expected)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_layer_is_that_of_transformers(changes: dict[str, Any]) -> None:
    """Hugging Face's network in float32, with factor 32 as in its configuration for Llama 3.2."""
    args = tiny_args(**changes)
    weights, ids = random_weights(args, tied=False), random_ids(args)
    theirs = reference.transformers_llama(weights, numbers(args, right_factor(changes)))
    expected = watched(theirs.model.layers, lambda: theirs(torch.tensor([ids])).logits)
    assert_same(run_ours(build(args, weights), ids), expected)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_layer_is_that_of_metas_code(metas: ModuleType, changes: dict[str, Any]) -> None:
    """Meta's network in float32, which has a fixed factor of 8."""
    args = tiny_args(**changes)
    args = args.with_rope_factor(8 if args.rope_scaling else None)
    weights, ids = random_weights(args), random_ids(args)
    theirs = build_metas(metas, weights, LENGTH, tiny_params(**changes))
    assert_same(run_ours(build(args, weights), ids), watched(theirs.layers, lambda: theirs(torch.tensor([ids]), 0)))


def test_far_positions_are_those_of_the_others(metas: ModuleType) -> None:
    """After 100,000 tokens. Meta's code rounds angles like ours; the reference does not round them."""
    changes = {"dim": 128, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    args = tiny_args(**changes).with_rope_factor(8)
    weights, ids, far = random_weights(args), random_ids(args, 64), 100_000
    # Large values, because their mean over many tokens must be visible in the residual stream.
    past = torch.randn(2, 1, 1, far, 64, generator=torch.Generator().manual_seed(0))
    past *= torch.tensor([3.0, 30.0]).view(2, 1, 1, 1, 1)
    cache = KVCache(args)
    cache.update(0, *past)
    cache.length = far
    ours = run_ours(build(args, weights), ids, cache)

    theirs = build_metas(metas, weights, far + 64, tiny_params(**changes))
    theirs.layers[0].attention.cache_k[:, :far] = past[0].transpose(1, 2)
    theirs.layers[0].attention.cache_v[:, :far] = past[1].transpose(1, 2)
    assert_same(ours, watched(theirs.layers, lambda: theirs(torch.tensor([ids]), far)))

    before = reference.Past([past[0][0].transpose(0, 1)], [past[1][0].transpose(0, 1)])
    expected = reference.forward(weights, numbers(args, 8), ids, past=before).logits
    assert relative(ours.logits, expected) <= 1e-2  # float32's rounding of the angles
    other_factor = reference.forward(weights, numbers(args, 32), ids, past=before).logits
    assert relative(ours.logits, other_factor) > 0.5


def test_bfloat16_is_as_true_as_metas_code(metas: ModuleType) -> None:
    """With 8 bits of mantissa, both are about 1.3 % from float64, and no further from each other."""
    args = tiny_args().with_rope_factor(8)
    weights = {name: weight.bfloat16() for name, weight in mild_weights(args).items()}
    ids = random_ids(args)
    ours = run_ours(build(args, weights), ids).logits
    theirs = build_metas(metas, weights, LENGTH, tiny_params())(torch.tensor([ids]), 0)[0]
    exact = reference.forward(weights, numbers(args, 8), ids).logits
    assert ours.dtype == torch.float32
    assert relative(ours, theirs) <= 0.027
    assert relative(ours, exact) <= 1.2 * relative(theirs, exact)


def test_the_norm_rounds_before_the_weight(metas: ModuleType) -> None:
    """In bfloat16 the order matters: the result must be bit-identical to Meta's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).bfloat16()
    ours, theirs = RMSNorm(256, 1e-5), metas.RMSNorm(256, 1e-5)
    ours.weight = theirs.weight = nn.Parameter(torch.randn(256, generator=generator).bfloat16())
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(ours(x), (theirs._norm(x.float()) * theirs.weight).bfloat16())


def test_no_token_sees_a_later_one() -> None:
    """Changing the last token does not affect earlier ones, with or without a cache."""
    args = tiny_args()
    network, ids = build(args, random_weights(args)), random_ids(args)
    other = [*ids[:-1], (ids[-1] + 1) % args.vocab_size]
    for held in (0, 40):
        first, second = (
            piecewise(network, changed, [held, LENGTH - held] if held else [LENGTH]) for changed in (ids, other)
        )
        assert torch.equal(first[:-1], second[:-1])
        assert relative(first[-1], second[-1]) > 0.1


def test_a_batch_is_its_rows() -> None:
    """The sequences of a batch are independent."""
    args = tiny_args()
    network = build(args, random_weights(args))
    rows = [random_ids(args, seed=seed) for seed in (0, 1)]
    together = network(torch.tensor(rows), KVCache(args), all_positions=True)
    for row, logits in zip(rows, together, strict=True):
        assert relative(logits, run_ours(network, row).logits) <= 1e-5


def test_the_last_position_is_the_last_of_all() -> None:
    """By default, only the last position goes through the output projection."""
    args = tiny_args()
    network, tokens = build(args, random_weights(args)), torch.tensor([random_ids(args)])
    last, every = network(tokens), network(tokens, all_positions=True)
    assert last.shape == (1, 1, args.vocab_size)
    assert every.shape == (1, LENGTH, args.vocab_size)
    assert last.dtype == torch.float32
    assert relative(last[0, 0], every[0, -1]) <= 1e-5


def test_the_network_can_be_read_in_one_sitting() -> None:
    """The source is the textbook, so its length is limited."""
    assert len(Path(model.__file__).read_text(encoding="utf-8").splitlines()) < 350


# --- The cache --------------------------------------------------------------------------------

# More than the cache's initial 256 tokens, so that it grows.
LONG = 300


@pytest.fixture(scope="module")
def network() -> Transformer:
    args = tiny_args()
    return build(args, mild_weights(args))


def piecewise(network: Transformer, ids: Sequence[int], sizes: Sequence[int], cache: KVCache | None = None) -> Tensor:
    """Logits after every token, computed in chunks of these sizes."""
    cache = cache or KVCache(network.args)
    parts = torch.split(torch.tensor([ids]), list(sizes), dim=1)
    return torch.cat([network(part, cache, all_positions=True)[0] for part in parts])


@pytest.mark.parametrize(
    "sizes",
    [[LONG], [1] * LONG, [1, 7, 64, 2, 1, 181, 1, 1, 42], [256, 1, 43], [255, 2, 43]],
    ids=["one shot", "token by token", "uneven", "full, then one", "across the first 256"],
)
def test_any_way_to_cut_a_text_gives_the_same_logits(network: Transformer, sizes: list[int]) -> None:
    """Chunks with a cache give the same logits as a single pass."""
    ids = random_ids(network.args, LONG)
    cache = KVCache(network.args)
    assert relative(piecewise(network, ids, sizes, cache), run_ours(network, ids).logits) <= 1e-5
    assert cache.length == LONG


def test_a_rewound_cache_goes_on_as_if_nothing_had_followed(network: Transformer) -> None:
    """Rewind to 100 tokens and continue with other tokens, fewer and more than were removed."""
    ids, others = random_ids(network.args, LONG), random_ids(network.args, LONG, seed=1)
    cache = KVCache(network.args)
    piecewise(network, ids, [LONG], cache)
    for length in (120, LONG, 100 + 1):
        cache.rewind(100)
        assert cache.length == 100
        new = [*ids[:100], *others[100:length]]
        logits = piecewise(network, new[100:], [1, length - 101] if length > 101 else [1], cache)
        assert relative(logits, run_ours(network, new).logits[100:]) <= 1e-5


def test_growing_keeps_what_was_there() -> None:
    """The cache grows from its initial 256 tokens at the 257th token."""
    args = tiny_args(n_layers=1)
    cache = KVCache(args)
    k, v = torch.randn(2, 1, args.n_kv_heads, LONG, args.head_dim, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 200), (200, 256), (256, 257), (257, LONG)):
        held_k, held_v = cache.update(0, k[:, :, start:end], v[:, :, start:end])
        cache.length = end
        assert torch.equal(held_k, k[:, :, :end])
        assert torch.equal(held_v, v[:, :, :end])


def test_more_tokens_than_the_cache_may_hold_are_refused(network: Transformer) -> None:
    """The cache is still usable after the error."""
    ids = random_ids(network.args, 11)
    cache = KVCache(network.args, max_seq_len=10)
    piecewise(network, ids[:6], [6], cache)
    with pytest.raises(ValueError, match="11 tokens do not fit into a cache of 10"):
        network(torch.tensor([ids[6:]]), cache)
    assert cache.length == 6
    logits = piecewise(network, ids[6:10], [4], cache)
    assert relative(logits, run_ours(network, ids[:10]).logits[6:]) <= 1e-5


@pytest.mark.parametrize("length", [-1, 7])
def test_rewinding_to_what_is_not_held_is_refused(network: Transformer, length: int) -> None:
    """Memory beyond `length` contains removed tokens or is uninitialized."""
    cache = KVCache(network.args)
    piecewise(network, random_ids(network.args, 6), [6], cache)
    with pytest.raises(ValueError, match="the cache holds 6 tokens"):
        cache.rewind(length)
    assert cache.length == 6


@pytest.mark.parametrize("layer", range(3))
def test_a_pass_that_fails_in_the_middle_leaves_the_cache_whole(network: Transformer, layer: int) -> None:
    """Some layers have already written, and the cache has grown. The next call must not see that."""
    ids, others = random_ids(network.args, LONG), random_ids(network.args, LONG, seed=1)
    cache = KVCache(network.args)
    piecewise(network, ids[:200], [200], cache)

    def fail(*_: object) -> None:
        raise MemoryError

    hook = network.layers[layer].register_forward_hook(fail)
    with hook, pytest.raises(MemoryError):
        network(torch.tensor([others[200:]]), cache)
    assert cache.length == 200
    logits = piecewise(network, ids[200:], [LONG - 200], cache)
    assert relative(logits, run_ours(network, ids).logits[200:]) <= 1e-5


def test_the_cache_costs_what_its_description_says() -> None:
    """Only the key/value heads count: 32 KiB per token for Llama 3.2 1B in bfloat16."""
    args = tiny_args(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8)
    cache = KVCache(args)
    new = torch.zeros(1, args.n_kv_heads, 256, args.head_dim, dtype=torch.bfloat16)
    held = [store for layer in range(args.n_layers) for store in cache.update(layer, new, new)]
    storages = {store.untyped_storage().data_ptr(): store.untyped_storage().nbytes() for store in held}
    assert sum(storages.values()) / 256 == 32 * 1024
    assert math.prod(held[0].shape) == 8 * 256 * 64
