"""Hooks: values at every place, the effect of replacing them, and complete removal."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

from llama_scratch import hooks as taps_module
from llama_scratch.errors import UsageError
from llama_scratch.hooks import Hook, hooked, places
from llama_scratch.inference import engine as engine_module
from llama_scratch.inference.long_attention import attend_by_kernels
from llama_scratch.llama import Llama
from llama_scratch.model import Attention, TransformerBlock

IDS = list(range(60, 72))
T = len(IDS)


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def logits(llama: Llama) -> Tensor:
    """Logits without hooks."""
    return llama.engine.forward_with_hooks([IDS], {}, all_positions=True)


PLACES = places(3)


def expected_shape(llama: Llama, place: str) -> tuple[int, ...]:
    """Shape of a place as documented in `hooks`."""
    args = llama.args
    return {
        "q": (1, args.n_heads, T, args.head_dim),
        "k": (1, args.n_kv_heads, T, args.head_dim),
        "v": (1, args.n_kv_heads, T, args.head_dim),
        "probs": (1, args.n_heads, T, T),
        "heads": (1, T, args.n_heads, args.head_dim),
        "neurons": (1, T, args.ffn_dim),
        "logits": (1, T, args.vocab_size),
    }.get(place.split(".")[-1], (1, T, args.dim))


def run(llama: Llama, hooks: dict[str, Hook]) -> Tensor:
    return llama.engine.forward_with_hooks([IDS], hooks, all_positions=True)


def apart(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def modules_with_hooks(llama: Llama) -> list[nn.Module]:
    return [module for module in llama.engine.model.modules() if module._forward_hooks or module._forward_pre_hooks]


def block(llama: Llama, layer: int) -> TransformerBlock:
    found = llama.engine.model.layers[layer]
    assert isinstance(found, TransformerBlock)
    return found


def is_untapped(llama: Llama) -> bool:
    attentions = [module for module in llama.engine.model.modules() if isinstance(module, Attention)]
    return (
        not modules_with_hooks(llama)
        and len(attentions) == 3
        and all(each.attend is attend_by_kernels for each in attentions)
    )


def test_places_are_in_the_order_in_which_a_token_comes_by(llama: Llama) -> None:
    seen: list[str] = []

    def noting(place: str) -> Hook:
        return lambda _value, _start: seen.append(place)

    run(llama, {place: noting(place) for place in reversed(PLACES)})
    assert seen == PLACES
    assert len(PLACES) == len(set(PLACES)) == 3 * 11 + 3


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_read_and_replaced(llama: Llama, logits: Tensor, place: str) -> None:
    """Values have the documented shape. A copy changes nothing; another value changes the logits."""
    shapes: list[tuple[int, ...]] = []

    def read(value: Tensor, _start: int) -> None:
        shapes.append(tuple(value.shape))

    def same(value: Tensor, _start: int) -> Tensor:
        return value.clone()

    def other(value: Tensor, _start: int) -> Tensor:
        return value * torch.linspace(0.5, 1.5, value.shape[-1])

    explicit = place.endswith("probs")  # the explicit softmax rounds differently
    assert apart(run(llama, {place: read}), logits) <= (1e-5 if explicit else 0)
    assert shapes == [expected_shape(llama, place)]
    assert apart(run(llama, {place: same}), logits) <= (1e-5 if explicit else 0)
    assert apart(run(llama, {place: other}), logits) > 0.01
    assert is_untapped(llama)
    assert torch.equal(run(llama, {}), logits)


@pytest.mark.parametrize("place", PLACES)
def test_what_a_tap_returns_is_what_the_network_goes_on_with(llama: Llama, place: str) -> None:
    """The network continues with the returned value, and later hooks at the same place see it."""
    found: list[Tensor] = []

    def zeros(value: Tensor, _start: int) -> Tensor:
        return torch.zeros_like(value)

    def read(value: Tensor, _start: int) -> None:
        found.append(value.clone())

    with hooked(llama.engine.model, {place: zeros}), hooked(llama.engine.model, {place: read}), torch.inference_mode():
        llama.engine.model(torch.tensor([IDS]))
    assert len(found) == 1
    assert not found[0].any()


@pytest.mark.parametrize(
    "place", ["layers.1.resid_mid", "layers.1.attention.probs", "layers.1.attention.heads", "norm"]
)
def test_taps_at_one_place_run_in_the_order_in_which_they_were_put_there(llama: Llama, place: str) -> None:
    seen: list[tuple[str, float]] = []

    def setting(name: str, constant: float) -> Hook:
        def tap(value: Tensor, _start: int) -> Tensor:
            seen.append((name, float(value.flatten()[0])))
            return torch.full_like(value, constant)

        return tap

    model = llama.engine.model
    with (
        hooked(model, {place: setting("first", 1.0)}),
        hooked(model, {place: setting("second", 2.0)}),
        hooked(model, {place: setting("third", 3.0)}),
        torch.inference_mode(),
    ):
        model(torch.tensor([IDS]))
    assert [name for name, _ in seen] == ["first", "second", "third"]
    assert [value for _, value in seen[1:]] == [1.0, 2.0]


def test_an_intervened_networks_own_taps_come_before_those_that_look_at_it(llama: Llama) -> None:
    """Views show the values after interventions, and later interventions run after earlier ones."""
    place = "layers.1.resid_post"
    changed = llama.intervened({place: lambda value, _start: torch.zeros_like(value)})
    twice = changed.intervened({place: lambda value, _start: value + 1})
    for network, expected in ((changed, 0.0), (twice, 1.0)):
        found: list[Tensor] = []

        def keep(value: Tensor, _start: int, found: list[Tensor] = found) -> None:
            found.append(value.clone())

        network.engine.forward_with_hooks([IDS], {place: keep})
        assert torch.equal(found[0], torch.full_like(found[0], expected))
    assert is_untapped(llama)


def test_the_explicit_softmax_is_the_fused_one(llama: Llama, logits: Tensor) -> None:
    """Explicit and fused attention agree in every layer; each row sums to 1 and is causal."""
    found: list[Tensor] = []
    hooks: dict[str, Hook] = {
        f"layers.{layer}.attention.probs": lambda value, _start: found.append(value[0]) for layer in range(3)
    }
    assert apart(run(llama, hooks), logits) <= 1e-5
    for probs in found:
        assert (probs.sum(-1) - 1).abs().max() <= 1e-6
        assert not probs.triu(1).any()
        assert (probs >= 0).all()


def test_mid_stream_is_replaced_for_both_of_its_readers(llama: Llama) -> None:
    """Both the feed-forward's norm and the residual connection see the replaced value."""
    x = torch.randn(1, T, llama.args.dim, generator=torch.Generator().manual_seed(1))
    outputs: list[Tensor] = []
    run(
        llama,
        {
            "layers.1.resid_mid": lambda _value, _start: x,
            "layers.1.resid_post": lambda value, _start: outputs.append(value.clone()),
        },
    )
    layer = block(llama, 1)
    with torch.inference_mode():
        expected = x + layer.feed_forward(layer.ffn_norm(x))
    assert torch.allclose(outputs[0], expected, atol=1e-5)


def test_the_stream_is_what_its_parts_add_up_to(llama: Llama) -> None:
    """resid_pre + attention.out = resid_mid; resid_mid + feed_forward.out = resid_post = the next layer's resid_pre."""
    found: dict[str, Tensor] = {}

    def keeping(place: str) -> Hook:
        def tap(value: Tensor, _start: int) -> None:
            found[place] = value[0].clone()

        return tap

    run(llama, {place: keeping(place) for place in PLACES})
    stream = found["embedding"]
    for layer in range(3):
        at = f"layers.{layer}"
        assert torch.equal(found[f"{at}.resid_pre"], stream)
        assert torch.equal(found[f"{at}.resid_mid"], stream + found[f"{at}.attention.out"])
        stream = found[f"{at}.resid_mid"] + found[f"{at}.feed_forward.out"]
        assert torch.equal(found[f"{at}.resid_post"], stream)
        own = block(llama, layer)
        with torch.inference_mode():
            assert torch.allclose(
                own.attention.wo(found[f"{at}.attention.heads"].flatten(-2)), found[f"{at}.attention.out"]
            )
            assert torch.allclose(
                own.feed_forward.w2(found[f"{at}.feed_forward.neurons"]), found[f"{at}.feed_forward.out"], atol=1e-6
            )
        group = llama.args.n_heads // llama.args.n_kv_heads
        v = found[f"{at}.attention.v"].repeat_interleave(group, 0)  # (n_heads, S, head_dim)
        mixed = (found[f"{at}.attention.probs"] @ v).transpose(0, 1)
        assert torch.allclose(mixed, found[f"{at}.attention.heads"], atol=1e-6)
    assert torch.allclose(found["norm"], llama.engine.model.norm(stream), atol=1e-6)


# --- Chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["embedding", "layers.2.attention.q", "layers.2.attention.probs", "layers.0.resid_mid"]
)
def test_a_long_text_comes_in_pieces_with_their_positions(
    llama: Llama, logits: Tensor, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and attention grow from chunk to chunk; the logits match a single pass."""
    monkeypatch.setattr(engine_module, "CHUNK", 5)
    seen: list[tuple[int, tuple[int, ...]]] = []
    found = run(llama, {place: lambda value, start: seen.append((start, tuple(value.shape)))})
    assert [start for start, _ in seen] == [0, 5, 10]
    axis = 2 if ".attention." in place else 1
    assert [shape[axis] for _, shape in seen] == [5, 5, 2]
    if place.endswith("probs"):
        assert [shape[3] for _, shape in seen] == [5, 10, 12]
    assert apart(found, logits) <= 1e-5


def test_positions_go_on_behind_what_is_cached(llama: Llama) -> None:
    """With a prefix cache hit, hooks are called only for the new tokens, with their position."""
    starts: list[int] = []
    changed = llama.intervened({"layers.1.resid_mid": lambda _value, start: starts.append(start)})
    changed.predict(IDS[:7])
    changed.predict(IDS)
    assert starts == [0, 7]


def test_a_value_replaced_at_some_positions_is_so_in_pieces_too(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_six(value: Tensor, start: int) -> Tensor:
        new = value.clone()
        if start <= 6 < start + value.shape[1]:
            new[:, 6 - start] = 0
        return new

    whole = run(llama, {"layers.1.resid_post": at_six})
    monkeypatch.setattr(engine_module, "CHUNK", 5)
    assert apart(run(llama, {"layers.1.resid_post": at_six}), whole) <= 1e-5


# --- Removal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_a_run_raises(
    llama: Llama, logits: Tensor, place: str, error: type[BaseException]
) -> None:
    def tap(_value: Tensor, _start: int) -> None:
        raise error

    with pytest.raises(error):
        run(llama, {"layers.0.attention.k": lambda value, _start: value, place: tap})
    assert is_untapped(llama)
    assert torch.equal(run(llama, {}), logits)


def test_an_interrupt_at_any_point_leaves_the_network_as_it_was(llama: Llama, logits: Tensor) -> None:
    """Interrupt at every point while hooks are attached, called and detached.

    Python handles Ctrl-C when a Python function starts and when a C function returns.
    """
    changed = ("attention.probs", "attention.v", "resid_post")
    hooks: dict[str, Hook] = {f"layers.1.{place}": lambda value, _start: value * 0 for place in changed}
    files = {taps_module.__file__, contextlib.__file__}
    heard, at = 0, 0

    def hear(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal heard
        heard += frame.f_code.co_filename in files and event in ("call", "c_return")
        if heard == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    before = sys.getprofile()
    while True:
        heard, at = 0, at + 1
        sys.setprofile(hear)
        try:
            run(llama, hooks)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.setprofile(before)
        assert torch.equal(run(llama, {}), logits), at
        assert all(block(llama, layer).attention.attend is attend_by_kernels for layer in range(3)), at
        for module in modules_with_hooks(llama):  # these no longer do anything
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    assert at > 50


@pytest.mark.parametrize(
    "place",
    ["", "layers", "layers.3.resid_pre", "layers.-1.resid_pre", "layers.1.resid", "layers.².resid_pre", "output",
     "layers.1.attention", "layers.1.attention.probs ", "embedding.0", "\x1b[31mlogits"],
)  # fmt: skip
def test_a_place_that_there_is_not_is_refused_and_leaves_none_behind(llama: Llama, place: str) -> None:
    hooks: dict[str, Hook] = {"norm": lambda _value, _start: None, "layers.0.attention.q": lambda _value, _start: None}
    with pytest.raises(UsageError) as raised:
        run(llama, hooks | {place: lambda _value, _start: None})
    message = str(raised.value)
    assert "layers.2.resid_post, with a layer from 0 to 2." in message
    assert message.isprintable()
    assert is_untapped(llama)


def test_taps_in_differentiable_networks_take_gradients(llama: Llama) -> None:
    """The gradient of a logit with respect to an activation agrees with finite differences."""
    model = llama.differentiable()
    place = "layers.1.resid_mid"
    shift = torch.zeros(1, T, llama.args.dim, requires_grad=True)

    def logit(shift: Tensor) -> Tensor:
        with hooked(model, {place: lambda value, _start: value + shift}):
            found: Tensor = model(torch.tensor([IDS]))
        return found[0, -1, 7]

    (gradient,) = torch.autograd.grad(logit(shift), shift)
    step = torch.zeros_like(shift)
    step[0, -1] = torch.randn(llama.args.dim, generator=torch.Generator().manual_seed(2)) * 1e-2
    with torch.no_grad():
        difference = float(logit(shift + step) - logit(shift - step)) / 2
    assert difference == pytest.approx(float((gradient * step).sum()), rel=0.02)
    assert abs(difference) > 1e-4
