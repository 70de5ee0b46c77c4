"""/kv: norms of the keys and values that the network computes, and bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.inference.engine import Engine
from llama_scratch.llama import Llama
from llama_scratch.microscope.cache import cache, cached_layer
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Heatmap
from llama_scratch.render.pages import cache as pages
from llama_scratch.repl.commands import completions, run_command
from llama_scratch.results import Timing
from tests.helpers.sessions import assert_sentence, run, shown, started

IDS = list(range(40, 50))


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


def computed(llama: Llama, layer: int, name: str) -> Tensor:
    """A layer's keys or values, computed without the cache, (n_kv_heads, T, head_dim)."""
    found: list[Tensor] = []
    llama.engine.forward_with_hooks(
        [IDS], {f"layers.{layer}.attention.{name}": lambda x, _start: found.append(x[0].clone())}
    )
    return found[0]


def test_norms_are_those_of_what_the_network_computes(tiny: Llama) -> None:
    """Whatever was read before: a prefix is reused here, and another text was longer."""
    tiny.predict([*IDS[:4], *range(300, 340)])
    found = cache(tiny, IDS)
    assert found.tokens == len(IDS) == tiny.engine.cached_tokens
    for layer, norms in enumerate(found.layers):
        keys, values = computed(tiny, layer, "k"), computed(tiny, layer, "v")
        assert norms.layer == layer
        assert norms.keys == pytest.approx(float(keys.pow(2).sum(-1).sqrt().mean()), rel=1e-5)
        assert norms.values == pytest.approx(float(values.pow(2).sum(-1).sqrt().mean()), rel=1e-5)
        assert norms.keys != pytest.approx(norms.values, rel=0.01)
        assert norms.each_key == pytest.approx(keys.pow(2).sum(-1).sqrt().mean(0).tolist(), rel=1e-5)
        assert norms.each_value == pytest.approx(values.pow(2).sum(-1).sqrt().mean(0).tolist(), rel=1e-5)
    json.dumps(found.as_json(), allow_nan=False)


def test_a_layer_head_by_head(tiny: Llama) -> None:
    found = cached_layer(tiny, IDS, 1)
    for rows, name in ((found.keys, "k"), (found.values, "v")):
        for head, row in enumerate(computed(tiny, 1, name).pow(2).sum(-1).sqrt().tolist()):
            assert rows[head] == pytest.approx(row, rel=1e-5)
    assert [token.id for token in found.tokens] == IDS
    assert found.queries == 2
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize(("activations", "size"), [("fp32", 4), ("bf16", 2)])
def test_bytes(tiny_dir: Path, activations: str, size: int) -> None:
    """3 layers × 2 × 2 heads × 64 numbers per token, with memory for 256 tokens."""
    found = cache(Llama.load(tiny_dir, activations=activations, device="cpu"), IDS)
    assert found.bytes_per_token == 3 * 2 * 2 * 64 * size
    assert found.held_bytes == 10 * found.bytes_per_token
    assert found.taken_bytes == 256 * found.bytes_per_token
    assert (found.heads, found.head_dim) == (2, 64)
    assert found.dtype == {"fp32": "float32", "bf16": "bfloat16"}[activations]


def test_an_engine_that_has_read_nothing_holds_nothing(tiny: Llama) -> None:
    with pytest.raises(UsageError, match="The cache holds no tokens yet") as raised:
        Engine(tiny.engine.model, 10).cached(0)
    assert_sentence(raised.value)


def test_the_command_says_what_the_last_answer_reused(tiny: Llama) -> None:
    session = started(tiny)
    session.predict([90, 91, 92])
    session.predict([90, 91, 93, 94, 95])
    facts = run(session, "/kv")
    assert (facts["reused_tokens"], facts["new_tokens"]) == (2, 3)
    assert facts["shape"] == [2, 5, 64]
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1, 2]
    layer = run(session, "/kv L2")
    assert layer["layer"] == 2
    assert [len(row) for row in layer["key_norms"]] == [5, 5]
    assert len(session.state.snapshots) == 2


def test_looking_changes_no_answer(tiny: Llama) -> None:
    tiny.engine.next_logits(IDS)
    before = tiny.engine.next_logits(IDS).values  # from the cache, as in the last call
    cache(tiny, IDS)
    cached_layer(tiny, IDS, 0)
    assert tiny.engine.next_logits(IDS).values.equal(before)


@pytest.mark.parametrize(("argument", "said"), [("3", "must be an integer from 0 to 2, not 3."), ("x", "'x'")])
def test_what_cannot_be_meant_is_a_sentence(tiny: Llama, argument: str, said: str) -> None:
    session = started(tiny)
    session.predict(IDS)
    with pytest.raises(UsageError) as raised:
        run_command(session, f"/kv {argument}")
    assert said in str(raised.value)
    assert_sentence(raised.value)


def test_without_a_text_there_is_nothing_held(tiny: Llama) -> None:
    with pytest.raises(UsageError, match="There is no text yet"):
        run_command(started(tiny), "/kv")
    assert completions(started(tiny), "/kv ") == ["/kv 0", "/kv 1", "/kv 2"]


@pytest.mark.parametrize("width", [40, 80])
def test_the_pages_fit_their_terminal_and_say_everything(tiny: Llama, width: int) -> None:
    found = cache(tiny, IDS)
    assert "the last answer" not in shown(found, width)
    whole = shown(to_terminal.view(pages.page(found, Timing(prompt_tokens=10, reused_tokens=9))), width)
    layer = shown(to_terminal.view(pages.layer_page(cached_layer(tiny, IDS, 1))), width)
    assert max(map(len, [*whole.splitlines(), *layer.splitlines()])) <= width
    said = " ".join(whole.split())
    assert "Prefix cache hit in the last answer: 9 of 10 tokens; 1 was computed" in said
    assert "3 KiB per token over all layers, 30 KiB for this text. 768 KiB are allocated" in said
    assert "shared by 2 query heads" in " ".join(layer.split())
    assert "H1" in layer


def test_the_maps_show_the_norms_and_the_sentence_their_largest(tiny: Llama) -> None:
    found = cache(tiny, IDS)
    page = pages.page(found)
    keys, values = (part for part in page.parts if isinstance(part, Heatmap))
    assert keys.values == tuple(norms.each_key for norms in found.layers)
    assert values.values == tuple(norms.each_value for norms in found.layers)
    assert (keys.rows, len(keys.columns)) == (("L0", "L1", "L2"), len(IDS))
    sentence = pages.finding(found)
    assert sentence.startswith("30 KiB for 10 tokens.")
    places = re.findall(r"\(position (\d+)\) in L(\d+), mean norm ([\d.]+\d)", sentence)
    for (position, layer, norm), heatmap in zip(places, (keys, values), strict=True):
        assert heatmap.values[int(layer)][int(position)] == heatmap.scale.high
        assert float(norm) == pytest.approx(heatmap.scale.high, abs=0.05)


def test_the_sentence_about_a_layer_names_its_largest_norms(tiny: Llama) -> None:
    found = cached_layer(tiny, IDS, 1)
    places = re.findall(r"\(position (\d+)\) in H(\d+), norm", pages.layer_finding(found))
    for (position, head), norms in zip(places, (found.keys, found.values), strict=True):
        assert norms[int(head)][int(position)] == max(map(max, norms))
