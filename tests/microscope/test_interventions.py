"""Ablation, patching and steering, against transformers with changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from llama_scratch.errors import CheckpointError, UsageError
from llama_scratch.hooks import Hook
from llama_scratch.inference import engine as engine_module
from llama_scratch.llama import Llama
from llama_scratch.microscope import patching as tracing
from llama_scratch.microscope.activations import activations, residuals
from llama_scratch.microscope.effect import effect
from llama_scratch.microscope.interventions import Intervention, ablate, changed, mean_ablate, patch, steer
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.microscope.patching import Trace, trace
from llama_scratch.model import Attention
from llama_scratch.render import to_terminal
from llama_scratch.render.pages import patching
from tests.helpers import reference
from tests.helpers.checkpoints import tiny_args

pytestmark = pytest.mark.reference

IDS = [300, *range(60, 71)]  # BOS and eleven others
OTHER = [300, *range(90, 101)]
T = len(IDS)
SHAPE = {
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_factor": 32.0,
}
# A part of each kind.
PARTS = ["L1.H2", "L0.H3", "L2.attn", "L1.ffn", "L1.N77", "L1", "L0", "L2"]


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def huggingfaces(tiny_dir: Path) -> Any:
    """transformers with the same weights."""
    weights = {name: weight.float() for name, weight in torch.load(tiny_dir / "consolidated.00.pth").items()}
    return reference.transformers_llama(weights, SHAPE)


def part(name: str) -> NetworkPart:
    return NetworkPart.named(name, tiny_args())


def logits_of(llama: Llama, ids: Sequence[int] = IDS) -> Tensor:
    """The logits after every token, (T, vocab_size), from a separate forward pass."""
    return llama.engine.forward_with_hooks([ids], {}, all_positions=True)[0]


def theirs(huggingfaces: Any, ids: Sequence[int] = IDS) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = huggingfaces(torch.tensor([ids])).logits[0]
    return logits


def apart(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def is_untapped(llama: Llama) -> bool:
    modules = list(llama.engine.model.modules())
    attends = {module.attend for module in modules if isinstance(module, Attention)}
    return len(attends) == 1 and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def interventions(llama: Llama) -> list[Intervention]:
    """One of each kind."""
    return [
        ablate(llama, part("L1.H2")),
        mean_ablate(llama, part("L1.ffn"), OTHER),
        patch(llama, part("L2"), OTHER, {3: 5}),
        steer(llama, 0, 1.5, OTHER, IDS),
    ]


# --- Ablation ---------------------------------------------------------------------------------


def slices(huggingfaces: Any, which: NetworkPart) -> list[Tensor]:
    """The output weights of a component in transformers, as views."""
    layer = huggingfaces.model.layers[which.layer]
    o_proj, down_proj = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
    return {
        "head": [o_proj[:, 64 * which.index : 64 * which.index + 64]],
        "attn": [o_proj],
        "ffn": [down_proj],
        "neuron": [down_proj[:, which.index : which.index + 1]],
        "layer": [o_proj, down_proj],
    }[which.kind]


@contextmanager
def zeroed(weights: Sequence[Tensor]) -> Iterator[None]:
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    try:
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)


@pytest.mark.parametrize("name", PARTS)
def test_an_ablated_part_is_transformers_without_its_weights(llama: Llama, huggingfaces: Any, name: str) -> None:
    """With its columns of o_proj or down_proj set to 0; after every token."""
    before = theirs(huggingfaces)
    with zeroed(slices(huggingfaces, part(name))):
        expected = theirs(huggingfaces)
    found = logits_of(changed(llama, [ablate(llama, part(name))]))
    assert apart(found, expected) <= 1e-4
    # A neuron is one of a thousand.
    assert apart(expected, before) > (1e-3 if name == "L1.N77" else 0.02)
    assert apart(logits_of(llama), before) <= 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_an_ablated_part_writes_nothing_in_each_precision(tiny_dir: Path, precision: str) -> None:
    """Also with packed layers: only the residual stream passes."""
    other = Llama.load(tiny_dir, precision=precision, device="cpu")
    other.prepare()
    network = changed(other, [ablate(other, part("L1"))])
    places = [f"layers.1.{place}" for place in ("resid_pre", "attention.out", "feed_forward.out", "resid_post")]
    before, attention, feed_forward, after = activations(network, IDS, places)
    assert not attention.any()
    assert not feed_forward.any()
    assert torch.equal(before, after)


def mean_hook(huggingfaces: Any, which: NetworkPart, ids: Sequence[int]) -> Callable[[], Any]:
    """Replace the output of a component in transformers by its mean over a text.

    Returns the function that removes the hook.
    """
    layer = huggingfaces.model.layers[which.layer]
    module, own = {
        "head": (layer.self_attn.o_proj, slice(64 * which.index, 64 * which.index + 64)),
        "neuron": (layer.mlp.down_proj, slice(which.index, which.index + 1)),
        "attn": (layer.self_attn.o_proj, slice(None)),  # linear, so the mean passes through
        "ffn": (layer.mlp.down_proj, slice(None)),
    }[which.kind]
    seen: list[Tensor] = []
    reading = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, :, own].clone()))
    theirs(huggingfaces, ids)
    reading.remove()

    def replace(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        value = args[0].clone()
        value[..., own] = seen[0].mean(0)
        return (value,)

    remove: Callable[[], Any] = module.register_forward_pre_hook(replace).remove
    return remove


@pytest.mark.parametrize("name", [name for name in PARTS if "." in name])
@pytest.mark.parametrize("ids", [OTHER, IDS, OTHER[:1]], ids=["another text", "this text", "one token"])
def test_a_mean_is_that_of_transformers_activations(llama: Llama, huggingfaces: Any, name: str, ids: list[int]) -> None:
    remove = mean_hook(huggingfaces, part(name), ids)
    try:
        expected = theirs(huggingfaces)
    finally:
        remove()
    intervention = mean_ablate(llama, part(name), ids)
    assert apart(logits_of(changed(llama, [intervention])), expected) <= 1e-4
    assert apart(expected, logits_of(llama)) > 1e-4
    assert f"{len(ids)} token{'s' if len(ids) > 1 else ''}." in intervention.meaning


def test_a_layers_mean_is_that_of_what_its_two_halves_write(llama: Llama) -> None:
    places = ("layers.1.attention.out", "layers.1.feed_forward.out")
    means = [value.mean(0) for value in activations(llama, OTHER, places)]
    found = activations(changed(llama, [mean_ablate(llama, part("L1"), OTHER)]), IDS, places)
    for value, mean in zip(found, means, strict=True):
        assert torch.equal(value, mean.expand(T, -1))


# --- Patching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_patching_a_text_with_itself_changes_nothing(llama: Llama, name: str) -> None:
    """At one position or at all of them, bit for bit."""
    for positions in ([4], range(T)):
        network = changed(llama, [patch(llama, part(name), IDS, {at: at for at in positions})])
        assert torch.equal(logits_of(network), logits_of(llama))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_patching_the_whole_stream_gives_the_other_texts_answer(llama: Llama, layer: int) -> None:
    network = changed(llama, [patch(llama, part(f"L{layer}"), OTHER, {at: at for at in range(T)})])
    assert apart(logits_of(network), logits_of(llama, OTHER)) <= 1e-6
    assert network.predict(IDS).next.id == llama.predict(OTHER).next.id != llama.predict(IDS).next.id


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("positions", [{4: 4}, {T - 1: 2}, {1: 5, 2: 6, 7: 0}], ids=str)
def test_a_patch_is_what_transformers_makes_of_the_others_activation(
    llama: Llama, huggingfaces: Any, name: str, positions: dict[int, int]
) -> None:
    """Copied by hooks of transformers, from one position to another."""
    which = part(name)
    layer = huggingfaces.model.layers[which.layer]
    module, own = {
        "head": (layer.self_attn.o_proj, slice(64 * which.index, 64 * which.index + 64)),
        "neuron": (layer.mlp.down_proj, slice(which.index, which.index + 1)),
        "attn": (layer.self_attn.o_proj, slice(None)),
        "ffn": (layer.mlp.down_proj, slice(None)),
        "layer": (layer, slice(None)),
    }[which.kind]
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].clone())
        value = args[0].clone()
        if len(seen) > 1:
            for here, there in positions.items():
                value[0, here, own] = seen[0][0, there, own]
        return (value, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        theirs(huggingfaces, OTHER)
        expected = theirs(huggingfaces)
    finally:
        handle.remove()
    found = logits_of(changed(llama, [patch(llama, which, OTHER, positions)]))
    assert apart(found, expected) <= 1e-4
    first = min(positions)
    assert torch.equal(found[:first], logits_of(llama)[:first])  # causal: earlier positions do not change
    assert apart(found[first:], logits_of(llama)[first:]) > 1e-5


def test_positions_that_the_other_text_has_not_are_refused(llama: Llama) -> None:
    for wrong in ({0: T}, {0: 0, 1: -1}):
        with pytest.raises(UsageError, match=f"position in the other text must be an integer from 0 to {T - 1}"):
            patch(llama, part("L1"), OTHER, wrong)
    with pytest.raises(UsageError, match="The prompt is empty"):
        patch(llama, part("L1"), [], {0: 0})


@pytest.mark.parametrize(("positions", "label"), [({3: 3}, "L1@3"), ({3: 5, 6: 0}, "L1@3,6"), (None, "L1@all")])
def test_a_patch_is_named_after_its_positions(llama: Llama, positions: dict[int, int] | None, label: str) -> None:
    found = patch(llama, part("L1"), OTHER, positions or {at: at for at in range(T)})
    assert found.label == label
    assert found.meaning.startswith(f"{label} is patched from '…")
    assert patch(llama, part("L1"), OTHER[:1], {0: 0}).label == "L1@0"


# --- Steering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
def test_steering_adds_the_difference_behind_the_layer(llama: Llama, huggingfaces: Any, layer: int) -> None:
    """As in transformers, with its own hook."""
    toward, away = [300, 5, 6], [300, 5, 9, 10]
    ends: list[Tensor] = []
    handle = huggingfaces.model.layers[layer].register_forward_hook(lambda _m, _args, out: ends.append(out[0, -1]))
    theirs(huggingfaces, toward)
    theirs(huggingfaces, away)
    handle.remove()
    direction = 2.5 * (ends[0] - ends[1])
    handle = huggingfaces.model.layers[layer].register_forward_hook(lambda _m, _args, out: out + direction)
    try:
        expected = theirs(huggingfaces)
    finally:
        handle.remove()
    intervention = steer(llama, layer, 2.5, toward, away)
    assert apart(logits_of(changed(llama, [intervention])), expected) <= 1e-4
    assert apart(expected, logits_of(llama)) > 0.05
    assert intervention.label == f"+2.5·(\\x06−␣)@L{layer}"  # named by the first difference
    assert f"a vector of norm {float(direction.norm()):.3g}." in intervention.meaning


def test_steering_by_nothing_changes_nothing(llama: Llama) -> None:
    """With a scale of 0, or two equal texts."""
    for intervention in (steer(llama, 1, 0.0, OTHER, IDS), steer(llama, 1, 3.0, IDS, IDS)):
        assert torch.equal(logits_of(changed(llama, [intervention])), logits_of(llama))


def test_steering_back_is_a_minus(llama: Llama) -> None:
    intervention = steer(llama, 1, -2.0, list(b"abc"), list(b"abd"))
    assert intervention.label == "-2·(c−d)@L1"
    there, back = (steer(llama, 1, scale, OTHER, IDS) for scale in (1.0, -1.0))
    assert apart(logits_of(changed(llama, [there, back])), logits_of(llama)) <= 1e-5


@pytest.mark.parametrize("scale", [-1e39, 3.4e38, 1e21])
def test_a_direction_that_is_too_long_for_numbers_is_refused(llama: Llama, scale: float) -> None:
    """With the last scale the vector is finite, but not its square in the next norm."""
    with pytest.raises(UsageError, match="steering vector overflow"):
        steer(llama, 1, scale, OTHER, IDS)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 10**400], ids=str)
def test_a_scale_that_is_no_number_is_refused(llama: Llama, scale: float) -> None:
    with pytest.raises(UsageError, match=r"^The scale must be a finite number, not "):
        steer(llama, 1, scale, OTHER, IDS)


def test_an_intervention_is_the_same_as_itself_alone(llama: Llama) -> None:
    """It can be compared and hashed, although its hooks hold tensors."""
    first, second = (steer(llama, 1, 1.0, OTHER, IDS) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2
    assert [second, first].index(first) == 1


def test_a_network_that_is_changed_beyond_all_numbers_is_not_called_damaged(llama: Llama) -> None:
    """Its weights are intact. Without interventions the message would name them."""
    network = llama.intervened({"layers.1.resid_post": lambda value, _start: value * math.inf})
    for run in (lambda: network.predict(IDS), lambda: network.logits(IDS), lambda: logits_of(network)):
        with pytest.raises(UsageError) as raised:
            run()
        assert not isinstance(raised.value, CheckpointError)
        assert "choose a smaller scale." in str(raised.value)


@pytest.mark.parametrize("layer", [-1, 3, 0.5, True, "1"])
def test_a_layer_that_there_is_not_is_refused(llama: Llama, layer: Any) -> None:
    with pytest.raises(UsageError, match=f"^The layer must be an integer from 0 to 2, not {layer!r}.$"):
        steer(llama, layer, 1.0, OTHER, IDS)


@pytest.mark.parametrize("top", [0, -3])
def test_an_effect_on_no_token_is_refused(llama: Llama, top: int) -> None:
    with pytest.raises(UsageError, match=f"must be at least 1, not {top}.$"):
        effect(llama, llama, IDS, [], top)


# --- Several, pieces, and the cache -----------------------------------------------------------


def test_interventions_act_in_their_order(llama: Llama) -> None:
    """At the same place, the later replacement wins; steering vectors add up."""
    off, mean = ablate(llama, part("L1.ffn")), mean_ablate(llama, part("L1.ffn"), OTHER)
    for first, second in ((off, mean), (mean, off)):
        assert torch.equal(logits_of(changed(llama, [first, second])), logits_of(changed(llama, [second])))
    one, two = steer(llama, 1, 1.0, OTHER, IDS), steer(llama, 1, 0.5, IDS, OTHER)
    place = "layers.1.resid_post"
    (plain,) = activations(llama, IDS, [place])
    (both,) = activations(changed(llama, [one, two]), IDS, [place])
    half = steer(llama, 1, 0.5, OTHER, IDS)
    (expected,) = activations(changed(llama, [half]), IDS, [place])
    assert torch.allclose(both, expected, atol=1e-4)
    assert apart(both, plain) > 0.01


def test_all_interventions_at_once_are_as_if_one_after_the_other(llama: Llama) -> None:
    every = interventions(llama)
    one_by_one = llama
    for intervention in every:
        one_by_one = changed(one_by_one, [intervention])
    assert torch.equal(logits_of(changed(llama, every)), logits_of(one_by_one))
    outcomes = [logits_of(changed(llama, every[:count])) for count in range(5)]
    assert all(apart(a, b) > 1e-3 for a, b in pairwise(outcomes))


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["L1", "L1.H2", "L2.ffn", "L1.N77"])
def test_positions_are_met_in_texts_that_go_in_pieces(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """Only the second and the eighth token are patched, whichever chunk they are in."""
    network = changed(llama, [patch(llama, part(name), OTHER, {1: 1, 7: 3})])
    whole = logits_of(network)
    place = part(name).place
    values = [part(name).of(activations(model, ids, [place])[0]) for model, ids in ((network, IDS), (llama, OTHER))]
    (before,) = activations(llama, IDS, [place])
    monkeypatch.setattr(engine_module, "CHUNK", chunk)
    assert apart(logits_of(network), whole) <= 1e-5
    assert apart(network.logits(IDS), whole) <= 1e-5
    assert apart(network.predict(IDS).next.logprob * torch.ones(1), whole[-1].log_softmax(-1).max()[None]) <= 1e-4
    found = part(name).of(activations(network, IDS, [place])[0])
    assert torch.allclose(found, values[0], atol=1e-4)
    assert torch.allclose(found[[1, 7]], values[1][[1, 3]], atol=1e-4)
    assert torch.allclose(found[0], part(name).of(before)[0], atol=1e-4)
    mean, expected = mean_ablate(llama, part(name), OTHER), values[1].mean(0)  # computed in chunks
    if part(name).kind != "layer":
        (written,) = activations(changed(llama, [mean]), IDS, [place])
        assert torch.allclose(part(name).of(written), expected.expand(T, -1), atol=1e-4)


def test_a_changed_network_has_a_cache_of_its_own(llama: Llama) -> None:
    """Token by token it predicts the same as at once.

    The cache of the original network stays valid.
    """
    llama.predict(IDS[:6])
    cached = llama.engine.cached_tokens
    expected = llama.predict(IDS).next
    llama.predict(IDS[:6])
    for intervention in interventions(llama):
        network = changed(llama, [intervention])
        assert network.engine.cached_tokens == 0
        whole = logits_of(network)
        for count in range(1, T + 1):
            found = network.engine.next_logits(IDS[:count])
            assert found.reused_tokens == count - 1
            assert apart(found.values, whole[count - 1]) <= 1e-4
        steps = [step.id for step in network.generate(IDS, max_new_tokens=5)]
        ids = list(IDS)
        for id in steps:
            assert id == int(logits_of(network, ids)[-1].argmax())
            ids.append(id)
        assert llama.engine.cached_tokens == cached
        assert is_untapped(llama)
    after = llama.predict(IDS)
    assert after.timing.reused_tokens == cached
    assert after.next.logprob == pytest.approx(expected.logprob, abs=1e-5)


def test_the_intact_network_is_untouched_bit_for_bit(llama: Llama) -> None:
    before = logits_of(llama)
    for intervention in interventions(llama):
        network = changed(llama, [intervention])
        assert not torch.equal(logits_of(network), before)
        assert torch.equal(logits_of(llama), before)
        network.predict(IDS)
        assert torch.equal(logits_of(llama), before)
    assert changed(llama, []) is llama


def test_an_interruption_anywhere_leaves_both_networks_whole(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """During an intervention, a prediction with it, and causal tracing."""
    monkeypatch.setattr(engine_module, "CHUNK", 4)
    before = logits_of(llama)
    network = changed(llama, [ablate(llama, part("L1.H2")), steer(llama, 1, 1.0, OTHER, IDS)])
    expected = logits_of(network)
    works: list[Callable[[Any], object]] = [
        lambda progress: mean_ablate(llama, part("L1"), OTHER, progress),
        lambda progress: patch(llama, part("L1"), OTHER, {1: 1}, progress),
        lambda progress: steer(llama, 1, 1.0, OTHER, IDS, progress),
        lambda progress: changed(llama, interventions(llama)).predict(IDS, progress=progress),
        lambda progress: trace(network, IDS, OTHER, progress),
        lambda progress: effect(llama, network, [5, *IDS], [], progress=progress),
    ]
    for work in works:
        calls = 0

        def count(_stage: str, _done: int, _total: int) -> None:
            nonlocal calls
            calls += 1

        network.engine.next_logits([1])  # so that the cache has no common prefix
        llama.engine.next_logits([1])
        work(count)
        total = calls
        assert total > 1
        for at in range(1, total + 1):
            calls = 0

            def interrupt(_stage: str, _done: int, _total: int, at: int = at) -> None:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise KeyboardInterrupt

            network.engine.next_logits([1])
            llama.engine.next_logits([1])
            with pytest.raises(KeyboardInterrupt):
                work(interrupt)
            assert is_untapped(llama)
    assert torch.equal(logits_of(llama), before)
    assert torch.equal(logits_of(network), expected)


def test_an_error_in_a_tap_leaves_no_hook(llama: Llama) -> None:
    def broken(_value: Tensor, _start: int) -> Tensor:
        raise ValueError("broken")

    hooks: dict[str, Hook] = {"layers.1.attention.q": lambda value, _start: value, "layers.2.resid_pre": broken}
    with pytest.raises(ValueError, match="broken"):
        llama.intervened(hooks).predict(IDS)
    assert is_untapped(llama)


# --- Before and after -------------------------------------------------------------------------


def test_an_effect_is_the_difference_of_two_answers(llama: Llama, huggingfaces: Any) -> None:
    """The top tokens of either, with both probabilities, as in transformers."""
    which = part("L1.ffn")
    p = theirs(huggingfaces)[-1].double().log_softmax(-1)
    with zeroed(slices(huggingfaces, which)):
        q = theirs(huggingfaces)[-1].double().log_softmax(-1)
    found = effect(llama, changed(llama, [ablate(llama, which)]), IDS, ["-L1.ffn"], top=3)
    assert {before.id for before, _ in found.tokens} == {*p.topk(3).indices.tolist(), *q.topk(3).indices.tolist()}
    for before, after in found.tokens:
        assert before.id == after.id
        assert before.logprob == pytest.approx(float(p[before.id]), abs=1e-3)
        assert after.logprob == pytest.approx(float(q[after.id]), abs=1e-3)
    # From before to after: weighted by the probabilities before.
    kl = float((p.exp() * (p - q)).sum()) / 0.6931471805599453
    back = float((q.exp() * (q - p)).sum()) / 0.6931471805599453
    assert abs(kl - back) > 4e-3
    assert found.kl_bits == pytest.approx(kl, abs=1e-3)
    facts = found.as_json()
    assert facts["before"]["id"] == int(p.argmax())
    assert facts["after"]["id"] == int(q.argmax())
    assert facts["interventions"] == ["-L1.ffn"]
    assert [pair[0].id for pair in found.answers] == list(dict.fromkeys([int(p.argmax()), int(q.argmax())]))


def test_nothing_has_no_effect(llama: Llama) -> None:
    found = effect(llama, llama, IDS, [])
    assert found.kl_bits == 0
    assert all(before == after for before, after in found.tokens)
    assert len(found.answers) == 1


# --- Causal tracing ---------------------------------------------------------------------------


def single(llama: Llama, layer: int, position: int, found: Trace) -> float:
    """The normalized logit difference for one patch."""

    def difference(logits: Tensor) -> float:
        return float(logits[-1, found.second_answer.id] - logits[-1, found.first_answer.id])

    clean, corrupt = difference(logits_of(llama)), difference(logits_of(llama, OTHER))
    if layer < 3:
        tap = patch(llama, part(f"L{layer}"), OTHER, {position: position}).hooks[f"layers.{layer}.resid_pre"]
        network = llama.intervened({f"layers.{layer}.resid_pre": tap})
        return (difference(logits_of(network)) - clean) / (corrupt - clean)
    return float(position == T - 1)  # after the last layer only the last position matters


@pytest.mark.parametrize("rows", [512, 30])
@pytest.mark.parametrize("intervened", [False, True])
def test_each_value_of_a_trace_is_that_of_one_patch(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, intervened: bool, rows: int
) -> None:
    """With the original and a modified network, in large and small batches."""
    monkeypatch.setattr(tracing, "_ROWS", rows)
    network = changed(llama, interventions(llama)) if intervened else llama
    found = trace(network, IDS, OTHER)
    assert len(found.moved) == 4
    for layer, row in enumerate(found.moved):
        assert list(row) == pytest.approx([single(network, layer, at, found) for at in range(T)], abs=1e-4)
    assert found.first_answer.id == int(logits_of(network)[-1].argmax())
    assert found.second_answer.id == int(logits_of(network, OTHER)[-1].argmax())
    assert found.first_answer.probability == pytest.approx(network.predict(IDS).next.probability, abs=1e-5)
    assert [token.id for token in found.second] == OTHER
    assert found.moved[0][0] == pytest.approx(0, abs=1e-5)  # the texts share their first token
    assert found.moved[3][-1] == pytest.approx(1, abs=1e-5)
    assert max(map(abs, found.moved[1])) > 0.1
    assert is_untapped(llama)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_a_trace_in_each_precision(tiny_dir: Path, precision: str) -> None:
    """The last row is exact in each precision: no layer comes after it."""
    other = Llama.load(tiny_dir, precision=precision, device="cpu")
    other.prepare()
    found = trace(other, IDS, OTHER)
    assert found.first_answer.id == other.predict(IDS).next.id
    assert found.moved[3] == (*[pytest.approx(0, abs=1e-6)] * (T - 1), pytest.approx(1, abs=1e-6))


def test_texts_that_cannot_be_traced_are_a_sentence(llama: Llama) -> None:
    for ids, other, said in (
        (IDS, IDS, r"Both texts are answered with '.*'"),
        (IDS, OTHER[:5], "The texts have 12 and 5 tokens"),
        ([], [], "The prompt is empty"),
    ):
        with pytest.raises(UsageError, match=said):
            trace(llama, ids, other)


def test_a_traces_page_has_a_row_for_each_layer_and_one_for_the_end(llama: Llama) -> None:
    page = patching.page(trace(llama, IDS, OTHER))
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(to_terminal.view(page), markup=False, highlight=False)
    shown = captured.get()
    assert [line.split()[0] for line in shown.splitlines() if line.startswith((" L", " end"))] == [
        "L0", "L1", "L2", "end"
    ]  # fmt: skip


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("L5", NetworkPart(5, "layer")),
        ("l0.attn", NetworkPart(0, "attn")),
        ("1.attention", NetworkPart(1, "attn")),
        ("L2.ffn", NetworkPart(2, "ffn")),
        ("L2.mlp", NetworkPart(2, "ffn")),
        ("L2.feed_forward", NetworkPart(2, "ffn")),
        ("L1.H3", NetworkPart(1, "head", 3)),
        ("1.3", NetworkPart(1, "head", 3)),
        (" L1.h0 ", NetworkPart(1, "head", 0)),
        ("L1.N1023", NetworkPart(1, "neuron", 1023)),
        ("L1.n7", NetworkPart(1, "neuron", 7)),
    ],
)
def test_parts_have_the_names_that_people_give_them(name: str, expected: NetworkPart) -> None:
    args = tiny_args(n_layers=6)
    assert NetworkPart.named(name, args) == expected
    assert NetworkPart.named(expected.name, args) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("L3", "The layer must be an integer from 0 to 2, not 3."),
        ("L999999", "not 999999."),
        ("L1.H4", "The head must be an integer from 0 to 3, not 4."),
        ("L1.N1024", "The neuron must be an integer from 0 to 1023, not 1024."),
        ("", "'' is not the name of a part"),
        ("L", "'L' is not the name of a part"),
        ("L1.", "is not the name of a part"),
        ("L-1", "is not the name of a part"),
        ("L1.H", "is not the name of a part"),
        ("L1.q", "is not the name of a part"),
        ("L²", "is not the name of a part"),
        ("head", "is not the name of a part"),
        ("L1.H3.x", "is not the name of a part"),
        ("\x1b[31mL1", "'\\x1b[31mL1' is not the name of a part"),
        ("L" + "1" * 500, "is not the name of a part"),
    ],
)
def test_a_part_that_there_is_not_is_a_sentence(name: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        NetworkPart.named(name, tiny_args())
    assert said in str(raised.value)
    assert len(str(raised.value)) < 250


@given(st.text(alphabet="Ll012.HhNnatfmp- @", max_size=12))
def test_a_name_is_a_part_or_refused(name: str) -> None:
    try:
        found = NetworkPart.named(name, tiny_args())
    except UsageError:
        return
    assert NetworkPart.named(found.name, tiny_args()) == found


def test_residuals_are_the_streams_before_each_layer_and_the_end(llama: Llama, huggingfaces: Any) -> None:
    found = residuals(llama, IDS)
    expected = theirs_hidden(huggingfaces)
    assert found.shape == (4, T, 256)
    for ours, other in zip(found, expected, strict=True):
        assert apart(ours, other) <= 1e-4


def theirs_hidden(huggingfaces: Any) -> list[Tensor]:
    """The residual stream of transformers, before the final norm."""
    end: list[Tensor] = []
    handle = huggingfaces.model.norm.register_forward_pre_hook(lambda _module, args: end.append(args[0][0]))
    hidden = huggingfaces(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    handle.remove()
    return [*(state[0] for state in hidden[:-1]), end[0]]
