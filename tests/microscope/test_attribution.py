"""Attribution against transformers, float64 and finite differences, and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from llama_scratch.errors import ContextLengthError, UsageError
from llama_scratch.hooks import Hook
from llama_scratch.llama import Llama
from llama_scratch.microscope import attribution
from llama_scratch.microscope.attention import attention_map
from llama_scratch.microscope.attribution import Attribution, Contribution, growing, why
from llama_scratch.microscope.interventions import Intervention, ablate, changed, mean_ablate, patch, steer
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.render import to_plain, to_terminal
from llama_scratch.render.page import Finding, Table
from llama_scratch.render.pages import attribution as pages
from llama_scratch.render.text import percent
from tests.helpers import reference, smollm2
from tests.helpers.checkpoints import write_meta

pytestmark = pytest.mark.reference

llama, weights, huggingfaces = smollm2.llama, smollm2.weights, smollm2.huggingfaces
PROMPT = "The capital of France is"

IDS = [300, *range(60, 71)]  # BOS and eleven others
OTHER = [300, *range(90, 101)]
SHAPE = {
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_factor": 32.0,
}
NAMES = ["embedding"] + [f"L{i}.{part}" for i in range(3) for part in ("H0", "H1", "H2", "H3", "ffn")]


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16", "int8"])
def tiny(request: pytest.FixtureRequest, tiny_dir: Path) -> Llama:
    """Packed, so that packed weights would be noticed."""
    return prepared(tiny_dir, request.param)


@pytest.fixture(scope="module")
def fp32(tiny_dir: Path) -> Llama:
    return prepared(tiny_dir, "fp32")


def prepared(path: Path, precision: str) -> Llama:
    llama = Llama.load(path, precision=precision, device="cpu")
    llama.prepare()
    return llama


@pytest.fixture(scope="module")
def paris(llama: Llama) -> Attribution:
    """Why ␣Paris."""
    return why(llama, llama.encode(PROMPT))


@pytest.fixture(scope="module")
def london(llama: Llama) -> Attribution:
    """And why not ␣London."""
    return why(llama, llama.encode(PROMPT), None, llama.tokenizer.encode(" London")[0])


@pytest.fixture(scope="module")
def stored(tiny_dir: Path) -> dict[str, Tensor]:
    """The tiny model's weights, as in its file."""
    found: dict[str, Tensor] = torch.load(tiny_dir / "consolidated.00.pth")
    return found


def without_head(stored: dict[str, Tensor], layer: int, head: int) -> dict[str, Tensor]:
    """The weights with a head ablated."""
    name = f"layers.{layer}.attention.wo.weight"
    wo = stored[name].clone()
    wo[:, head * 64 : (head + 1) * 64] = 0
    return stored | {name: wo}


def named(found: Attribution) -> dict[str, float]:
    return {contribution.name: contribution.logit for contribution in found.contributions}


# --- Direct logit attribution -----------------------------------------------------------------


@pytest.mark.parametrize("versus", [None, 17])
def test_contributions_add_up_to_the_logit_of_the_files_weights(
    tiny: Llama, stored: dict[str, Tensor], versus: int | None
) -> None:
    """In each precision: attribution uses the file's weights, not the network's."""
    found = why(tiny, IDS, 42, versus)
    logits = reference.forward(stored, SHAPE, IDS).logits[-1]
    expected = float(logits[42] - (0 if versus is None else logits[versus]))
    assert [contribution.name for contribution in found.contributions] == NAMES
    assert found.logit == pytest.approx(expected, abs=1e-3)
    assert sum(contribution.logit for contribution in found.contributions) == pytest.approx(expected, abs=1e-3)
    assert found.remainder == pytest.approx(found.logit - sum(named(found).values()))
    assert abs(found.remainder) <= 1e-3
    assert max(abs(share) for share in named(found).values()) > 0.1


def test_each_contribution_is_that_of_its_part(fp32: Llama, stored: dict[str, Tensor]) -> None:
    """In float64: the reference stream minus the one without the component."""
    found = named(why(fp32, IDS, 42))
    end = reference.forward(stored, SHAPE, IDS).residuals
    x = end[-1][-1]
    direction = stored["output.weight"][42].double() * stored["norm.weight"].double()
    direction /= (x.square().mean() + 1e-5).sqrt()
    for head in range(4):  # after the last attention, only the feed-forward reads the head
        less = without_head(stored, 2, head) | {"layers.2.feed_forward.w2.weight": torch.zeros(256, 1024)}
        whole = stored | {"layers.2.feed_forward.w2.weight": torch.zeros(256, 1024)}
        with_it, without = (reference.forward(w, SHAPE, IDS).residuals[-1][-1] for w in (whole, less))
        assert found[f"L2.H{head}"] == pytest.approx(float(direction @ (with_it - without)), abs=1e-4)
    no_ffn = stored | {"layers.2.feed_forward.w2.weight": torch.zeros(256, 1024)}
    ffn = x - reference.forward(no_ffn, SHAPE, IDS).residuals[-1][-1]
    assert found["L2.ffn"] == pytest.approx(float(direction @ ffn), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paris", "london"])
def test_real_weights_attribute_as_transformers_activations_say(
    request: pytest.FixtureRequest, huggingfaces: Any, name: str
) -> None:
    """The inputs and outputs of its o_proj and MLPs through its own norm, in float64."""
    found: Attribution = request.getfixturevalue(name)
    ids = [token.id for token in found.tokens]
    other = found.versus and found.versus.id
    heads: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    hooks = []
    for i, layer in enumerate(huggingfaces.model.layers):
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, i=i: heads.update({i: args[0][0, -1]}))
        )
        hooks.append(layer.mlp.register_forward_hook(lambda _m, _args, out, i=i: outputs.update({i: out[0, -1]})))
    try:
        theirs = huggingfaces(torch.tensor([ids]), output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    final: list[Tensor] = []
    hook = huggingfaces.model.norm.register_forward_pre_hook(lambda _m, args: final.append(args[0][0, -1].double()))
    huggingfaces(torch.tensor([ids]))
    hook.remove()
    logits = theirs.logits[0, -1].double()
    unembedding = huggingfaces.lm_head.weight.double()
    u = unembedding[found.answer.id] - (0 if other is None else unembedding[other])
    direction = u * huggingfaces.model.norm.weight.double() / (final[0].square().mean() + 1e-5).sqrt()
    expected = {"embedding": float(direction @ theirs.hidden_states[0][0, -1].double())}
    for i, layer in enumerate(huggingfaces.model.layers):
        wo = layer.self_attn.o_proj.weight.double()
        for head in range(9):
            own = slice(64 * head, 64 * head + 64)
            expected[f"L{i}.H{head}"] = float(direction @ (wo[:, own] @ heads[i][own].double()))
        expected[f"L{i}.ffn"] = float(direction @ outputs[i].double())
    assert found.answer.text == " Paris"
    assert named(found).keys() == expected.keys()
    assert named(found) == pytest.approx(expected, abs=1e-3)
    wanted = logits[found.answer.id] - (0 if other is None else logits[other])
    assert found.logit == pytest.approx(float(wanted), abs=1e-3)
    assert abs(found.remainder) <= 1e-3


@pytest.mark.slow
def test_real_claims_are_what_transformers_says_without_the_part(
    llama: Llama, paris: Attribution, london: Attribution, huggingfaces: Any
) -> None:
    """With the columns of the head in o_proj, or all of down_proj, set to 0."""
    kinds = set()
    for found, claim in [(each, claim) for each in (paris, london) for claim in each.claims]:
        part = NetworkPart.named(claim.contribution.name, llama.args)
        kinds.add(part.kind)
        layer = huggingfaces.model.layers[part.layer]
        weight = layer.mlp.down_proj.weight if part.kind == "ffn" else layer.self_attn.o_proj.weight
        before = weight.clone()
        weight[:, slice(64 * part.index, 64 * part.index + 64) if part.kind == "head" else slice(None)] = 0
        try:
            logits = huggingfaces(torch.tensor([[token.id for token in found.tokens]])).logits[0, -1]
        finally:
            weight.copy_(before)
        probabilities = logits.double().softmax(-1)
        assert claim.after == pytest.approx(float(probabilities[found.answer.id]), abs=1e-4)
        assert abs(claim.after - found.answer.probability) > 1e-3
        if found.versus:
            assert claim.versus_after == pytest.approx(float(probabilities[found.versus.id]), abs=1e-4)
    assert kinds == {"ffn", "head"}


def test_the_logit_is_the_engines_in_fp32(llama: Llama, paris: Attribution) -> None:
    found = paris
    assert found.logit == pytest.approx(float(llama.logits(PROMPT)[-1].max()), abs=1e-3)
    assert (found.answer.text, round(found.answer.probability, 3)) == (" Paris", 0.773)
    assert found.versus is None


def interventions(llama: Llama) -> Iterator[Intervention]:
    yield ablate(llama, NetworkPart(1, "head", 2))
    yield ablate(llama, NetworkPart(1, "attn"))
    yield mean_ablate(llama, NetworkPart(0, "ffn"), OTHER)
    yield patch(llama, NetworkPart(0, "layer"), OTHER, {2: 2})
    yield patch(llama, NetworkPart(2, "layer"), OTHER, {len(IDS) - 1: 3})
    yield patch(llama, NetworkPart(1, "neuron", 5), OTHER, {4: 4})
    yield steer(llama, 1, 0.7, OTHER, IDS)


@pytest.mark.parametrize("which", range(7))
def test_with_an_intervention_what_it_does_to_the_stream_is_a_contribution_too(
    tiny: Llama, fp32: Llama, which: int
) -> None:
    """The sum is the modified network's logit, whatever precision the activations had."""
    intervention = list(interventions(tiny))[which]
    found = why(changed(tiny, [intervention]), IDS, 42, 17)
    network = changed(fp32, [list(interventions(fp32))[which]])
    logits = network.engine.forward_with_hooks([IDS], {})[0, 0].double()
    loose = 0.2 if tiny.info.precision in ("bf16", "int8") else 1e-2 if tiny.info.precision == "fp16" else 1e-3
    assert found.logit == pytest.approx(float(logits[42] - logits[17]), abs=loose)
    assert sum(named(found).values()) == pytest.approx(found.logit, abs=1e-3)
    if which in (3, 4, 6):  # changes to the residual stream
        assert list(named(found)) == [*NAMES, "interventions"]
        assert abs(named(found)["interventions"]) > (0.05 if which > 3 else 0)
    else:
        assert abs(found.remainder) <= 1e-3
    if which == 0:
        assert named(found)["L1.H2"] == 0
    if which == 1:  # the output of its heads is discarded, so they have no contributions
        assert named(found)["L1.attn"] == 0
        assert list(named(found)) == [
            name.replace("L1.H0", "L1.attn") for name in NAMES if not name.startswith("L1.H") or name == "L1.H0"
        ]


# --- Gradient × input -------------------------------------------------------------------------


def finite_differences(weights: dict[str, Tensor], ids: list[int], answer: int, versus: int | None) -> list[float]:
    """The derivative of the logit by the scale of each token's embedding.

    A central difference in float64.
    """
    embedding = weights["tok_embeddings.weight"].double()
    step = 1e-5

    def logit(position: int, scale: float) -> float:
        table = torch.cat([embedding, scale * embedding[ids[position]][None]])
        own = [*ids[:position], len(embedding), *ids[position + 1 :]]
        found = reference.forward(
            weights | {"tok_embeddings.weight": table, "output.weight": weights["output.weight"]}, SHAPE, own
        ).logits[-1]
        return float(found[answer] - (0 if versus is None else found[versus]))

    return [(logit(i, 1 + step) - logit(i, 1 - step)) / (2 * step) for i in range(len(ids))]


@pytest.mark.parametrize("versus", [None, 17])
def test_gradients_are_finite_differences(tiny: Llama, stored: dict[str, Tensor], versus: int | None) -> None:
    """Also if the session's own weights are packed: gradients use the file's."""
    found = why(tiny, IDS, 42, versus)
    expected = finite_differences(stored, IDS, 42, versus)
    assert [influence.gradient_x_input for influence in found.influences] == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 0.01


def test_gradients_of_a_changed_network_are_its_own(tiny: Llama, stored: dict[str, Tensor]) -> None:
    found = why(
        changed(tiny, [ablate(tiny, NetworkPart(0, "head", 1)), ablate(tiny, NetworkPart(2, "head", 0))]), IDS, 42
    )
    expected = finite_differences(without_head(without_head(stored, 0, 1), 2, 0), IDS, 42, None)
    assert [influence.gradient_x_input for influence in found.influences] == pytest.approx(expected, abs=1e-5)


def test_a_token_whose_vector_is_replaced_has_no_gradient(fp32: Llama) -> None:
    """If it is patched before the first layer, its own embedding is not read."""
    found = why(changed(fp32, [patch(fp32, NetworkPart(0, "layer"), OTHER, {4: 4})]), IDS, 42)
    gradients = [influence.gradient_x_input for influence in found.influences]
    assert gradients[4] == 0
    assert all(gradient != 0 for i, gradient in enumerate(gradients) if i != 4)


def test_untied_weights_are_read_through_their_own_unembedding(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "Untied", tied=False)
    found = why(prepared(path, "int8"), IDS, 42)
    stored: dict[str, Tensor] = torch.load(path / "consolidated.00.pth")
    assert found.logit == pytest.approx(float(reference.forward(stored, SHAPE, IDS).logits[-1, 42]), abs=1e-3)
    assert abs(found.remainder) <= 1e-3
    expected = finite_differences(stored, IDS, 42, None)
    assert [influence.gradient_x_input for influence in found.influences] == pytest.approx(expected, abs=1e-5)


def test_the_files_weights_are_read_once(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the precision of the session."""
    for precision in ("int8", "fp32"):
        llama = Llama.load(tiny_dir, precision=precision, device="cpu")
        reads = 0
        weights = llama._weights
        assert weights is not None

        def reading(progress: Any, weights: Any = weights) -> Any:
            nonlocal reads
            reads += 1
            return weights(progress)

        monkeypatch.setattr(llama, "_weights", reading)
        why(llama, IDS)
        why(changed(llama, [ablate(llama, NetworkPart(0, "head"))]), IDS)
        assert reads == 1


# --- Leave-one-out and the claims -------------------------------------------------------------


@pytest.mark.parametrize("rows", [512, 25])
def test_each_token_is_left_out(tiny: Llama, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """In large or small batches, with the probabilities of the session's network."""
    monkeypatch.setattr(attribution, "_ROWS", rows)
    found = why(tiny, IDS, 42, 17)
    for i, influence in enumerate(found.influences):
        probabilities = tiny.logits([*IDS[:i], *IDS[i + 1 :]])[-1].double().softmax(-1)
        assert (influence.position, influence.token) == (i, tiny.token(IDS[i]))
        # Batching changes rounding, which is visible in bfloat16.
        near = 0.05 if tiny.info.precision in ("bf16", "int8") else 1e-3
        assert influence.without == pytest.approx(float(probabilities[42]), rel=near)
        assert influence.versus_without == pytest.approx(float(probabilities[17]), rel=near)


def test_a_long_text_leaves_out_those_that_the_gradient_ranks_first(fp32: Llama) -> None:
    """Sixteen, and the page says so."""
    ids = [300, *range(40, 70)]
    found = why(fp32, ids)
    tried = {influence.position for influence in found.influences if influence.without is not None}
    ranked = sorted(found.influences, key=lambda influence: -abs(influence.gradient_x_input or 0.0))
    assert tried == {influence.position for influence in ranked[:16]}
    assert len(found.influences) == 31
    assert "16 of 31 tokens were left out" in drawn(found, 80)
    assert "16 of 31 tokens were left out" in drawn(found, None)
    assert "Each token was left out once" in drawn(why(fp32, ids[:16]), 80)


def test_a_text_of_one_token_has_none_to_leave_out(tiny: Llama) -> None:
    found = why(tiny, [300])
    assert [(influence.without, influence.versus_without) for influence in found.influences] == [(None, None)]
    assert abs(found.remainder) <= 1e-3
    assert "Leave-one-out needs a text of at least two tokens." in drawn(found, 80)


def test_the_strongest_parts_are_tried_out(fp32: Llama, stored: dict[str, Tensor]) -> None:
    """The three largest by absolute value; ablated in float64 they give the same."""
    found = why(fp32, IDS, 42, 17)
    ranked = sorted(found.contributions[1:], key=lambda contribution: -abs(contribution.logit))
    assert [claim.contribution for claim in found.claims] == ranked[:3] == found.strongest[:3]
    for claim in found.claims:
        part = NetworkPart.named(claim.contribution.name, fp32.args)
        less = without_head(stored, part.layer, part.index)
        if part.kind == "ffn":
            less = stored | {f"layers.{part.layer}.feed_forward.w2.weight": torch.zeros(256, 1024)}
        probabilities = reference.forward(less, SHAPE, IDS).logits[-1].softmax(-1)
        assert claim.after == pytest.approx(float(probabilities[42]), rel=1e-3)
        assert claim.versus_after == pytest.approx(float(probabilities[17]), rel=1e-3)


def test_neither_the_embedding_nor_an_intervention_is_a_claim(fp32: Llama) -> None:
    """They cannot be ablated."""
    found = why(changed(fp32, [steer(fp32, 2, 5.0, OTHER, IDS)]), IDS)
    ranked = sorted(found.contributions, key=lambda contribution: -abs(contribution.logit))
    assert ranked[0].name == "interventions"
    assert not {"embedding", "interventions"} & {claim.contribution.name for claim in found.claims}
    assert len(found.claims) == 3


# --- Arguments, errors and cancellation -------------------------------------------------------


def test_without_a_token_it_is_the_answer(tiny: Llama) -> None:
    prediction = tiny.predict(IDS)
    found = why(tiny, IDS)
    assert found.answer.id == prediction.next.id
    assert found.answer.probability == pytest.approx(prediction.next.probability, abs=1e-6)
    assert tuple(token.id for token in found.tokens) == tuple(IDS)
    other = why(tiny, IDS, 42, prediction.next.id)
    assert other.versus is not None
    assert other.versus.probability == pytest.approx(prediction.next.probability, abs=1e-6)
    assert other.logit < 0
    assert json.loads(json.dumps(other.as_json(), allow_nan=False)) == other.as_json()


@pytest.mark.parametrize(
    ("ids", "answer", "versus", "said"),
    [
        ([], None, None, "The prompt is empty"),
        ([10**9], None, None, "1000000000 is not a token id"),
        (IDS, 10**9, None, "1000000000 is not a token id"),
        (IDS, -1, None, "-1 is not a token id"),
        (IDS, None, 556, "556 is not a token id"),
        (IDS, 42, 42, "Both tokens are '*'"),
    ],
)
def test_what_cannot_be_attributed_is_a_sentence(
    fp32: Llama, ids: list[int], answer: int | None, versus: int | None, said: str
) -> None:
    with pytest.raises(UsageError) as raised:
        why(fp32, ids, answer, versus)
    assert str(raised.value).startswith(said)


def test_a_text_beyond_the_context_is_refused(tiny_dir: Path) -> None:
    short = Llama.load(tiny_dir, precision="fp32", device="cpu", context=8)
    with pytest.raises(ContextLengthError):
        why(short, IDS)


def test_an_interruption_anywhere_leaves_the_network_as_it_was(tiny_dir: Path) -> None:
    """At each progress call all hooks are removed; the next prediction is correct."""
    llama = prepared(tiny_dir, "int8")
    network = changed(llama, [ablate(llama, NetworkPart(1, "head", 2))])
    expected = network.engine.forward_with_hooks([IDS], {})
    why(network, IDS)  # reads the file's weights
    stages: list[str] = []
    why(network, IDS, progress=lambda stage, _done, _total: stages.append(stage))
    assert {"attributing", "leaving out", "ablating"} <= set(stages)
    for at in range(len(stages)):
        calls = 0

        def interrupt(_stage: str, _done: int, _total: int, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            why(network, IDS, progress=interrupt)
        for model in (llama.engine.model, llama.differentiable()):
            assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert torch.equal(network.engine.forward_with_hooks([IDS], {}), expected)


def test_progress_ends_at_its_total(fp32: Llama) -> None:
    """And never decreases within a stage."""
    told: dict[str, list[tuple[int, int]]] = {}
    why(fp32, IDS, progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    for reports in told.values():
        assert reports == sorted(reports)
        assert all(0 <= done <= total for done, total in reports)
    assert told["attributing"][-1] == (6, 6)


def test_what_a_tap_replaces_between_the_parts_is_called_interventions(fp32: Llama) -> None:
    """A hook that does not come from an `Intervention` counts as well."""
    hooks: dict[str, Hook] = {"layers.1.resid_mid": lambda value, _start: value * 1.5}
    found = why(fp32.intervened(hooks), IDS, 42)
    logits = fp32.intervened(hooks).engine.forward_with_hooks([IDS], {})[0, 0]
    assert found.logit == pytest.approx(float(logits[42]), abs=1e-3)
    assert abs(named(found)["interventions"]) > 1e-2


# --- The page ---------------------------------------------------------------------------------


def drawn(found: Attribution, width: int | None) -> str:
    """The page on a terminal, joined into one line.

    Without a width, as plain text for screen readers.
    """
    page = pages.page(found)
    console = Console(width=width or 10_000, color_system=None)
    with console.capture() as captured:
        console.print(to_terminal.view(page) if width else to_plain.plain(page), markup=False, highlight=False)
    return " ".join(captured.get().split())


@pytest.mark.parametrize("width", [80, 40, None])
def test_the_page_says_what_was_found(paris: Attribution, london: Attribution, width: int | None) -> None:
    found, shown = london, drawn(london, width)
    assert "77.3 %" in shown
    assert f"logit difference {found.logit:+.2f}" in shown
    ranked = sorted(found.contributions, key=lambda contribution: -abs(contribution.logit))
    for contribution in ranked[:10]:
        assert contribution.name in shown
        assert f"{contribution.logit:+.2f}" in shown
    others = f"{sum(contribution.logit for contribution in ranked[10:]):+.2f}"
    assert re.search(rf"291 others,?( logit)? {re.escape(others)}", shown)
    for claim in found.claims:
        assert f"{claim.contribution.name}" in shown
        assert f"77.3 → {percent(claim.after)}" in shown
    assert f"up to rounding ({found.remainder:+.1e})" in shown
    assert shown.index("Leave-one-out:") > shown.index("Zero ablation of the strongest")
    assert "logit 17.37." in drawn(paris, width)


def left_out(found: Attribution) -> Table:
    """The table of leave-one-out."""
    return [part for part in pages.page(found).parts if isinstance(part, Table)][-1]


def test_leave_one_out_shows_one_measure_the_fall_of_the_answer(paris: Attribution) -> None:
    """␣France speaks for ␣Paris, although its gradient × input is negative. The last token has no bar."""
    falls = {influence.position: influence.fall for influence in paris.influences}
    for influence in paris.influences:
        assert influence.without is not None
        assert influence.fall == pytest.approx(paris.answer.probability - influence.without, abs=1e-6)
    rows = left_out(paris).rows
    names = [row[0].text for row in rows]
    assert names == [*(paris.tokens[i].text for i in sorted(range(4), key=lambda i: -(falls[i] or 0))), "␣is (last)"]
    bars = {row[0].text: row[-2].bar for row in rows}
    assert bars["␣is (last)"] is None
    shown = [bar for bar in bars.values() if bar is not None]
    assert shown == sorted(shown, reverse=True)
    assert max(shown) == 1
    assert bars[" France"] == pytest.approx(1, abs=0.01)  # ␣capital and ␣France take away all but 0.1 and 0.2 %
    france = next(row for row in rows if row[0].text == " France")
    assert (france[1].text, france[-1].text, france[-1].style) == ("0.2 %", "-0.73", "dim")
    assert "␣Paris falls from 77.3 % to 0.2 %" in france[-2].hover


def test_leave_one_out_of_two_answers_shows_the_fall_of_their_difference(london: Attribution) -> None:
    """␣France is first with the longest bar: it decides between the two capitals."""
    table = left_out(london)
    assert "logit difference" in table.title
    assert table.rows[0][0].text == " France"
    assert table.rows[0][-2].bar == 1
    for influence in london.influences:
        assert london.versus is not None
        assert influence.without is not None
        assert influence.versus_without is not None
        after = torch.tensor(influence.without).log() - torch.tensor(influence.versus_without).log()
        assert influence.fall == pytest.approx(london.answer.logprob - london.versus.logprob - float(after), abs=1e-3)


def test_a_token_that_speaks_against_the_answer_has_a_bar_to_the_left(fp32: Llama) -> None:
    found = why(fp32, IDS, 42)
    signs = {influence.position: influence.fall for influence in found.influences[:-1]}
    assert min(fall or 0.0 for fall in signs.values()) < 0 < max(fall or 0.0 for fall in signs.values())
    bars = [row[-2].bar for row in left_out(found).rows[:-1]]
    assert max(map(abs, (bar or 0.0 for bar in bars))) <= 1
    assert [(bar or 0.0) > 0 for bar in bars] == sorted(((bar or 0.0) > 0 for bar in bars), reverse=True)
    assert (bars[0] or 0.0) > 0


def test_the_attention_of_a_head_comes_with_its_ablation(llama: Llama, paris: Attribution, fp32: Llama) -> None:
    claims = {claim.contribution.name: claim for claim in paris.claims}
    expected = attention_map(llama, llama.encode(PROMPT), 23, 4)[-1]
    assert claims["L23.H4"].attended == 3 == int(expected.argmax())
    assert claims["L23.H4"].attention == pytest.approx(float(expected[3]), abs=1e-6)
    assert (claims["L29.ffn"].attended, claims["L29.ffn"].attention) == (None, None)
    for claim in why(fp32, IDS, 42).claims:
        part = NetworkPart.named(claim.contribution.name, fp32.args)
        if part.kind == "head":
            row = attention_map(fp32, IDS, part.layer, part.index)[-1]
            assert claim.attended == int(row.argmax())
            assert claim.attention == pytest.approx(float(row.max()), abs=1e-6)


def test_the_finding_names_the_components_that_the_answer_depends_on(paris: Attribution, london: Attribution) -> None:
    """The two whose ablation takes away half of the answer or more, with the numbers of the result."""
    assert pages.page(paris).parts[0] == Finding(pages.finding(paris))
    assert [claim.contribution.name for claim in paris.decisive] == ["L29.ffn", "L23.H4"]
    for claim in paris.decisive:
        assert claim.after <= paris.answer.probability / 2
        assert percent(claim.after) in pages.finding(paris)
    for said in ("L29.ffn", "L23.H4", "90.3 % of its attention on ␣France", "␣Paris falls from 77.3 % to 10.0 %"):
        assert said in pages.finding(paris)
    assert "L28.ffn" not in pages.finding(paris)  # ablating it changes little
    (head,) = london.decisive
    assert head.contribution.name == "L23.H4"
    assert f"from {london.measure:+.2f} to {london.measure - head.fall:+.2f}" in pages.finding(london)


def test_without_a_decisive_component_the_finding_says_so(llama: Llama) -> None:
    found = why(llama, llama.encode("The opposite of hot is"))
    assert not found.decisive
    sentence = pages.finding(found)
    assert sentence.startswith("No single component of the 3 strongest decides ␣cold (68.4 %)")
    assert f"to {percent(min(claim.after for claim in found.claims))}" in sentence


def test_a_short_text_has_its_first_table_before_the_weights_are_read(tiny_dir: Path) -> None:
    """Leave-one-out needs no gradients; the last step is the whole attribution."""
    llama = prepared(tiny_dir, "int8")
    stages: list[str] = []
    steps = growing(llama, IDS, 42, progress=lambda stage, _done, _total: stages.append(stage))
    first = next(steps)
    once = "reading the weights in fp32, once"
    assert once not in stages
    assert all(influence.fall is not None for influence in first.influences)
    assert not first.contributions
    table = pages.growing(first, "Reading", 5).parts[0]
    assert isinstance(table, Table)
    assert len(table.rows) == 5
    second, third = steps
    assert once in stages
    assert second.contributions == third.contributions
    assert not second.claims
    assert third.contributions == why(llama, IDS, 42).contributions
    assert len(third.claims) == 3
    table = pages.growing(second, "Ablating", 50).parts[0]
    assert isinstance(table, Table)
    assert table.title == "Direct logit attribution"


def test_a_page_of_parts_that_say_nothing_has_no_bars() -> None:
    """Even if all contributions are 0."""
    zero = tuple(Contribution(name, 0.0) for name in NAMES)
    why_nothing = Attribution((), _candidate(), None, 0.0, zero, 0.0, (), ())
    assert all(not cell.bar for part in (pages._contributions(why_nothing),) for row in part.rows for cell in row)


def _candidate() -> Any:
    from llama_scratch.results import Candidate

    return Candidate(1, "a", -1.0)
