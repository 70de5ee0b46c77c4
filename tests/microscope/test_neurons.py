"""/neurons: outputs add up to the feed-forward, and direct effects are exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope.neurons import Neurons, columns, neurons
from llama_scratch.model import TransformerBlock
from llama_scratch.render import to_terminal
from llama_scratch.render.pages import neurons as pages
from llama_scratch.repl.commands import run_command
from tests.helpers.sessions import assert_sentence, run, shown, started

IDS = list(range(40, 56))
LAYER = 1


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def found(tiny: Llama) -> Neurons:
    return neurons(tiny, IDS, LAYER)


def tapped(llama: Llama, *places: str) -> list[Tensor]:
    """The activations at places at the last token."""
    found: list[Tensor] = []
    llama.engine.forward_with_hooks(
        [IDS], {place: lambda x, _start: found.append(x[0, -1].float()) for place in places}
    )
    return found


@pytest.fixture(scope="module")
def expected(tiny: Llama, tiny_dir: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, output norms, and direct effects of all neurons, (ffn_dim, vocab).

    They come from the file's weights alone.
    """
    weights = torch.load(tiny_dir / "consolidated.00.pth", weights_only=True)
    activations, stream = tapped(tiny, f"layers.{LAYER}.feed_forward.neurons", "layers.2.resid_post")
    writes = activations[:, None] * weights[f"layers.{LAYER}.feed_forward.w2.weight"].float().T
    rms = (stream.pow(2).mean() + 1e-5).sqrt()
    logits = (writes / rms * weights["norm.weight"].float()) @ weights["output.weight"].float().T
    return activations, writes.pow(2).sum(-1).sqrt(), logits


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 1e-3), ("int8", 1e-3), ("bf16", 1e-2)])
def test_all_neurons_add_up_to_the_feed_forward(tiny_dir: Path, precision: str, bound: float) -> None:
    """With weights in every format: the columns are the ones it multiplies with."""
    llama = Llama.load(tiny_dir, precision=precision, device="cpu")
    llama.prepare()
    activations, out = tapped(llama, f"layers.{LAYER}.feed_forward.neurons", f"layers.{LAYER}.feed_forward.out")
    block = llama.engine.model.layers[LAYER]
    assert isinstance(block, TransformerBlock)
    dtype = llama.engine.model.norm.weight.dtype
    every = columns(block.feed_forward.w2, torch.arange(llama.args.ffn_dim), llama.args.ffn_dim, dtype)
    assert every.shape == (llama.args.ffn_dim, llama.args.dim)
    assert (activations @ every - out).norm() < bound * out.norm()


def test_the_strongest_and_what_they_push(found: Neurons, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """Ranked by output norm; tokens by their logits, best first."""
    activations, strengths, logits = expected
    assert [neuron.index for neuron in found.neurons] == strengths.topk(10).indices.tolist()
    for neuron in found.neurons:
        push = logits[neuron.index]
        assert neuron.activation == pytest.approx(float(activations[neuron.index]), rel=1e-4)
        assert neuron.strength == pytest.approx(float(strengths[neuron.index]), rel=1e-4)
        assert [token.id for token in neuron.promoted] == push.topk(3).indices.tolist()
        assert [token.id for token in neuron.suppressed] == push.topk(2, largest=False).indices.tolist()
        assert [token.logit for token in neuron.promoted] == pytest.approx(push.topk(3).values.tolist(), abs=1e-5)
        assert neuron.contribution == pytest.approx(float(push[found.answer.id]), abs=1e-5)


def test_the_contribution_of_all_is_that_of_the_feed_forward(
    tiny: Llama, found: Neurons, expected: tuple[Tensor, Tensor, Tensor]
) -> None:
    assert found.answer.id == tiny.predict(IDS).next.id
    assert found.contribution == pytest.approx(float(expected[2][:, found.answer.id].sum()), abs=1e-4)
    assert found.n_neurons == tiny.args.ffn_dim
    assert found.token.id == IDS[-1]
    json.dumps(found.as_json(), allow_nan=False)


def test_weights_of_16_bits_find_the_same_neurons(tiny_dir: Path, found: Neurons) -> None:
    half = Llama.load(tiny_dir, precision="fp16", device="cpu")
    again = neurons(half, IDS, LAYER)
    assert [neuron.index for neuron in again.neurons] == [neuron.index for neuron in found.neurons]
    assert again.neurons[0].contribution == pytest.approx(found.neurons[0].contribution, abs=1e-3)


def test_a_text_in_pieces_ends_with_its_last_token(tiny: Llama) -> None:
    ids = [40 + i % 200 for i in range(600)]
    found = neurons(tiny, ids, 2, 1)
    values: list[Tensor] = []
    tiny.engine.forward_with_hooks([ids], {"layers.2.feed_forward.neurons": lambda x, _start: values.append(x[0])})
    assert len(values) > 1
    assert found.neurons[0].activation == pytest.approx(float(values[-1][-1, found.neurons[0].index]), rel=1e-5)


def test_an_intervention_is_seen(tiny: Llama, found: Neurons) -> None:
    """Neurons with an input of zero have no output."""
    changed = neurons(tiny.intervened({f"layers.{LAYER}.resid_mid": lambda x, _start: x * 0}), IDS, LAYER)
    assert [neuron.strength for neuron in changed.neurons] == [0] * 10
    assert changed.contribution == 0 != found.contribution


def test_a_neuron_that_is_switched_off_writes_nothing(tiny: Llama, found: Neurons) -> None:
    """The view shows activations after the intervention at the same place."""
    best = torch.tensor([found.neurons[0].index])
    hooks = {f"layers.{LAYER}.feed_forward.neurons": lambda x, _start: x.index_fill(-1, best, 0)}
    changed = neurons(tiny.intervened(hooks), IDS, LAYER)
    assert changed.neurons[0].index == found.neurons[1].index


def test_the_command(tiny: Llama) -> None:
    session = started(tiny)
    session.predict(IDS)
    assert len(run(session, "/neurons 1")["neurons"]) == 10
    facts = run(session, "/neurons L2 3")
    assert (facts["layer"], len(facts["neurons"]), facts["of"]) == (2, 3, tiny.args.ffn_dim)
    assert len(neurons(tiny, IDS, 0, 100_000).neurons) == tiny.args.ffn_dim
    assert len(session.state.snapshots) == 1


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("", "/neurons needs an argument"),
        ("3", "The layer must be an integer from 0 to 2, not 3."),
        ("x", "Invalid value 'x' for /neurons"),
        ("1 x", "Invalid value 'x' for COUNT"),
        ("1 0", "Invalid value '0' for COUNT"),
        ("1.5", "Invalid value '1.5' for /neurons"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(tiny: Llama, argument: str, said: str) -> None:
    session = started(tiny)
    session.predict(IDS)
    with pytest.raises(UsageError) as raised:
        run_command(session, f"/neurons {argument}")
    assert said in str(raised.value)
    assert_sentence(raised.value)


def test_progress_is_told_and_may_end_it(tiny: Llama) -> None:
    def interrupting(stage: str, _done: int, _total: int) -> None:
        if stage == "neurons":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neurons(tiny, IDS, LAYER, progress=interrupting)


@pytest.mark.parametrize("width", [40, 80])
def test_the_page_fits_its_terminal(found: Neurons, width: int) -> None:
    text = shown(to_terminal.view(pages.page(found)), width)
    assert max(map(len, text.splitlines())) <= width
    for neuron in found.neurons:
        assert text.count(f" {neuron.index} ") >= 3
