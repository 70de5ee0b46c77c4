"""`Llama.inspect`: its results, when they are computed, and their display."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from llama_scratch import LlamaScratchError
from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope import interventions as made
from llama_scratch.microscope.attribution import why
from llama_scratch.microscope.inspection import Inspection
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.microscope.patching import trace
from llama_scratch.render import display
from tests.helpers import reference

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


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(tiny_dir: Path) -> Any:
    """Hidden states and attentions of transformers with the same weights and ids."""
    weights = {name: weight.float() for name, weight in torch.load(tiny_dir / "consolidated.00.pth").items()}
    network = reference.transformers_llama(weights, SHAPE)
    return network(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)


@pytest.fixture
def found(llama: Llama) -> Inspection:
    return llama.inspect(IDS)


@contextmanager
def runs(llama: Llama) -> Iterator[list[int]]:
    """Record a 1 for each run of the network or one of its layers."""
    calls: list[int] = []
    model = llama.engine.model
    handles = [
        module.register_forward_pre_hook(lambda _module, _args: calls.append(1)) for module in (model, *model.layers)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def near(a: Tensor, b: Tensor) -> bool:
    return float((a.double() - b.double()).norm() / b.double().norm()) <= 1e-4


# --- Results ----------------------------------------------------------------------------------


def test_a_prompt_is_text_or_ids(llama: Llama) -> None:
    """As for every other method: a text gets its BOS, ids stay unchanged."""
    text = llama.inspect("the rest")
    assert list(text.ids) == llama.encode("the rest")
    assert text.ids[0] == 300
    assert [token.id for token in text.tokens] == list(text.ids)
    assert llama.inspect((1, 2)).ids == [1, 2]
    assert text.prediction.next.id == llama.predict("the rest").next.id


def test_the_residual_stream_is_that_of_transformers(found: Inspection, theirs: Any) -> None:
    """(T, dim) before each layer, and after the last one before the final norm."""
    assert len(found.residual) == 4
    for layer in range(3):
        assert found.residual[layer].shape == (T, 256)
        assert near(found.residual[layer], theirs.hidden_states[layer][0])
        assert torch.equal(found.residual[layer], found.activations(f"layers.{layer}.resid_pre"))
    norm = found._llama.engine.model.norm
    assert near(norm(found.residual[3]), theirs.hidden_states[3][0])
    assert torch.equal(found.residual[3], found.residual[-1])
    assert torch.equal(found.residual[0], found.residual[-4])


def test_attention_is_that_of_transformers(found: Inspection, theirs: Any) -> None:
    assert len(found.attention) == 3
    for layer in range(3):
        assert found.attention[layer].shape == (4, T, T)
        assert near(found.attention[layer], theirs.attentions[layer][0])
        for head in range(4):
            assert near(found.attention[layer, head], theirs.attentions[layer][0, head])
    assert torch.equal(found.attention[-1], found.attention[2])
    assert torch.equal(found.attention[-1, -1], found.attention[2, 3])


def test_loops_end(found: Inspection) -> None:
    """Iteration covers the layers, as with a list."""
    assert [value.shape for value in found.residual] == [(T, 256)] * 4
    assert [value.shape for value in found.attention] == [(4, T, T)] * 3


def test_an_index_that_there_is_not_says_which_there_are(found: Inspection) -> None:
    places: list[tuple[Callable[[], object], str]] = [
        (lambda: found.residual[4], "The residual stream index must be from -4 to 3, not 4."),
        (lambda: found.residual[-5], "The residual stream index must be from -4 to 3, not -5."),
        (lambda: found.attention[3], "The layer index must be from -3 to 2, not 3."),
        (lambda: found.attention[0, 4], "The head index must be from -4 to 3, not 4."),
        (lambda: found.attention[0, -5], "The head index must be from -4 to 3, not -5."),
    ]
    for place, said in places:
        with pytest.raises(IndexError) as raised:
            place()
        assert str(raised.value) == said


def test_views_are_those_of_the_microscope(llama: Llama, found: Inspection) -> None:
    """With the ids of the prompt, and the given arguments."""
    llama.predict(IDS)  # so that the cache is the same for all of them
    assert found.attribution() == why(llama, IDS)
    assert found.attribution(42, 17) == why(llama, IDS, 42, 17)
    assert found.trace(OTHER) == trace(llama, IDS, OTHER)
    assert found.lens(first=2, count=3).as_json() == found.lens(2, 3).as_json() != found.lens().as_json()
    assert found.heads(1).as_json() != found.heads().as_json()
    assert found.head(1, 2).as_json() != found.head(1, 3).as_json()
    assert found.neurons(1, 3).as_json() != found.neurons(2, 3).as_json()
    assert found.activations("logits").shape == (len(found.ids), 556)


def test_a_token_is_an_id_or_its_text(llama: Llama, found: Inspection) -> None:
    id = llama.tokenizer.encode("th")[0]
    assert found.attribution("th", 17) == found.attribution(id, 17)
    special = llama.tokenizer.special_tokens["<|eot_id|>"]
    assert found.attribution("<|eot_id|>").answer.id == special


# --- Laziness ---------------------------------------------------------------------------------


def test_nothing_is_computed_before_it_is_asked_for(llama: Llama) -> None:
    with runs(llama) as calls:
        found = llama.inspect(IDS)
        network = found.ablate("L1.H2", "L2").ablate("L0.N5")
        _ = (found.residual, found.attention, len(found.residual), found.tokens, network.tokens)
        assert calls == []
        assert found.prediction is found.prediction
        assert sum(calls) == 4  # the network once, and each of its layers


def test_one_layer_is_kept_at_a_time(found: Inspection) -> None:
    """The object keeps no activations."""
    residual, attention = found.residual, found.attention
    before = set(vars(found)), set(vars(residual)), set(vars(attention))
    _ = residual[1], attention[1], found.attribution(), found.residual[2]
    assert (set(vars(found)), set(vars(residual)), set(vars(attention))) == before
    assert not any(isinstance(value, Tensor) for value in vars(found).values())
    _ = found.prediction
    assert set(vars(found)) == before[0] | {"prediction"}


# --- Interventions ----------------------------------------------------------------------------


def test_what_was_changed_is_another_inspection(llama: Llama, found: Inspection) -> None:
    part = NetworkPart(1, "head", 2)
    expected = made.changed(llama, [made.ablate(llama, part)]).predict(IDS).next
    network = found.ablate("L1.H2")
    assert network is not found
    assert network.prediction.next.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert found.prediction.next.logprob == pytest.approx(llama.predict(IDS).next.logprob, abs=1e-5)
    assert (found.interventions, [each.label for each in network.interventions]) == ((), ["-L1.H2"])
    assert not network.activations("layers.1.attention.heads")[:, 2].any()
    assert {each.name: each.logit for each in network.attribution().contributions}["L1.H2"] == 0


def test_changes_follow_one_another(llama: Llama, found: Inspection) -> None:
    """In this order, with activations from the unmodified network."""
    network = found.ablate("L0.H0", "L1", mean=True).patch(OTHER, "L2", {3: 5}).steer(1, 2.0, OTHER, IDS)
    assert [each.label for each in network.interventions][:3] == ["~L0.H0", "~L1", "L2@3"]
    changes = [
        made.mean_ablate(llama, NetworkPart(0, "head", 0), IDS),
        made.mean_ablate(llama, NetworkPart(1, "layer"), IDS),
        made.patch(llama, NetworkPart(2, "layer"), OTHER, {3: 5}),
        made.steer(llama, 1, 2.0, OTHER, IDS),
    ]
    expected = made.changed(llama, changes)
    place = "layers.2.resid_post"
    assert torch.equal(network.activations(place), llama.inspect(IDS)._with(*changes).activations(place))
    assert network.prediction.next == expected.predict(IDS).next
    before, after = llama.predict(IDS), network.prediction
    effect = network.effect(top=3)
    assert effect.labels == tuple(each.label for each in network.interventions)
    pairs = {pair[0].id: pair for pair in effect.tokens}
    assert pairs[before.next.id][0].logprob == pytest.approx(before.next.logprob, abs=1e-5)
    assert pairs[after.next.id][1].logprob == pytest.approx(after.next.logprob, abs=1e-5)
    assert effect.kl_bits > 0.01
    assert found.effect().kl_bits == 0


@pytest.mark.parametrize("positions", [3, [3], {3: 3}, (3,)], ids=str)
def test_positions_are_one_or_several_or_pairs(found: Inspection, positions: Any) -> None:
    expected = found.patch(OTHER, "L1", {3: 3})
    network = found.patch(OTHER, "L1", positions)
    assert network.interventions[0].label == "L1@3"
    assert torch.equal(network.residual[2], expected.residual[2])
    assert not torch.equal(network.residual[2], found.residual[2])


def test_patching_everything_gives_the_other_prompts_answer(found: Inspection, llama: Llama) -> None:
    network = found.patch(OTHER, "L0", range(T))
    assert network.prediction.next.id == llama.predict(OTHER).next.id
    assert network.interventions[0].label == "L0@all"


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda x: x.ablate("L3"), "The layer must be an integer from 0 to 2, not 3."),
        (lambda x: x.ablate("L0", "nothing"), "'nothing' is not the name of a part"),
        (lambda x: x.ablate("L0.H4", mean=True), "The head must be an integer from 0 to 3, not 4."),
        (lambda x: x.patch(OTHER, "L1", T), f"position in this text must be an integer from 0 to {T - 1}, not {T}."),
        (lambda x: x.patch(OTHER, "L1", -1), "not -1."),
        (lambda x: x.patch([300], "L1", 3), "The position in the other text must be an integer from 0 to 0, not 3."),
        (lambda x: x.patch(OTHER, "L9", 3), "not 9."),
        (lambda x: x.patch([], "L1", 0), "The prompt is empty"),
        (lambda x: x.patch(OTHER, "L1", 0.5), "not 0.5."),
        (lambda x: x.patch(OTHER, "L1", True), "not True."),
        (lambda x: x.patch(OTHER, "L1", "3"), "not '3'."),
        (lambda x: x.patch(OTHER, "L1", [1, 2.0]), "not 2.0."),
        (lambda x: x.patch(OTHER, "L1", {1: 1.5}), "The position in the other text must be an integer"),
        (lambda x: x.patch(OTHER, "L1", None), "not None."),
        (lambda x: x.ablate(5), "'5' is not the name of a part, such as L5"),
        (lambda x: x.steer(3, 1.0, OTHER, IDS), "The layer must be an integer from 0 to 2, not 3."),
        (lambda x: x.steer(1, float("nan"), OTHER, IDS), "finite number, not nan"),
        (lambda x: x.steer(1, 1.0, OTHER, [1.5]), "1.5 is not a token id of this model; ids go from 0 to"),
        (lambda x: x.effect(0), "must be at least 1, not 0."),
        (lambda x: x.attribution(True), "True is not a token id"),
        (lambda x: x.attribution(1.5), "1.5 is not a token id"),
        (lambda x: x.attribution(1, 2.5), "2.5 is not a token id"),
        (lambda x: x.steer(1, 1.0, OTHER, [10**6]), "1000000 is not a token id"),
        (lambda x: x.attribution("the rest of it"), "Words need a leading space: ' Paris'."),
        (lambda x: x.attribution(""), "'' is 0 tokens, not one"),
        (lambda x: x.attribution(10**6), "1000000 is not a token id"),
        (lambda x: x.attribution(42, 42), "two different tokens"),
        (lambda x: x.trace([1]), "The texts have 12 and 1 tokens"),
        (lambda x: x.activations("layers.1.nothing"), "There is no place 'layers.1.nothing'"),
        (lambda x: x.head(0, 4), "The head must be an integer from 0 to 3, not 4."),
        (lambda x: x.head(0, -1), "The head must be an integer from 0 to 3, not -1."),
        (lambda x: x.heads(-1), "The layer must be an integer from 0 to 2, not -1."),
        (lambda x: x.heads(0.5), "The layer must be an integer from 0 to 2, not 0.5."),
        (lambda x: x.neurons(3), "The layer must be an integer from 0 to 2, not 3."),
        (lambda x: x.neurons(0.5), "The layer must be an integer from 0 to 2, not 0.5."),
        (lambda x: x.lens(first=0.5), "The position in this text must be an integer"),
        (lambda x: x.lens(first=T), f"not {T}."),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(found: Inspection, work: Callable[[Inspection], object], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        work(found)
    assert said in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("prompt", [[], [556], [-1]], ids=str)
def test_a_prompt_that_cannot_be_read_is_refused_at_once(llama: Llama, prompt: list[int]) -> None:
    with pytest.raises(LlamaScratchError):
        llama.inspect(prompt)


# --- Display ----------------------------------------------------------------------------------

SHOWN: dict[str, Callable[[Inspection], Any]] = {
    "inspection": lambda x: x,
    "changed": lambda x: x.ablate("L1.H2"),
    "lens": lambda x: x.lens(),
    "heads": lambda x: x.heads(),
    "heads of a layer": lambda x: x.heads(1),
    "head": lambda x: x.head(1, 2),
    "attribution": lambda x: x.attribution(),
    "attribution versus": lambda x: x.attribution(42, 17),
    "neurons": lambda x: x.neurons(1),
    "trace": lambda x: x.trace(OTHER),
    "effect": lambda x: x.ablate("L1").effect(),
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_result_prints_itself(found: Inspection, name: str) -> None:
    """With rich, within a wide and a narrow width; in a notebook, as a page."""
    result = SHOWN[name](found)
    for width in (80, 40):
        console = Console(width=width, color_system=None)
        with console.capture() as captured:
            console.print(result)
        lines = captured.get().splitlines()
        assert len([line for line in lines if line.strip()]) >= 3
        assert max(map(len, lines)) <= width
    shown = result._repr_html_()
    matched = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*" onload="[^"]*"></iframe>', shown, re.DOTALL)
    assert matched is not None
    page = html.unescape(matched[1])
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert html.escape(display.page_of(result).title) in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']https?:""", page)


def test_what_is_shown_of_an_inspection_is_its_prompt_and_its_answer(llama: Llama) -> None:
    found = llama.inspect("the rest")
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(found)
        console.print(found.ablate("L1.H2"))
    shown = captured.get()
    assert "th" in shown
    assert f"{100 * found.prediction.next.probability:.1f} %" in shown
    assert "With -L1.H2" in shown


def test_public_methods_are_documented_and_typed() -> None:
    for name, member in inspect.getmembers(Inspection):
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            function = member.fget if isinstance(member, property) else member
            assert function is not None
            assert inspect.getdoc(member), name
            assert "return" in function.__annotations__, name
