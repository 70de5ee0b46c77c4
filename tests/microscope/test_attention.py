"""Attention maps and head kinds, against transformers on SmolLM2 and direct sums."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch import hooks as taps_module
from llama_scratch import model as model_module
from llama_scratch.errors import ContextLengthError, UsageError
from llama_scratch.hooks import Hook
from llama_scratch.inference import engine as engine_module
from llama_scratch.llama import Llama
from llama_scratch.microscope import attention as attention_module
from llama_scratch.microscope.attention import (
    KINDS,
    THRESHOLD,
    Heads,
    Scores,
    SmallMap,
    attention_map,
    head,
    head_scores,
    heads,
    repeated,
)
from llama_scratch.microscope.interventions import ablate, changed
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.microscope.surprisal import surprisal
from llama_scratch.model import attend, attend_with, attention_probs, causal_mask
from llama_scratch.render import to_terminal
from llama_scratch.render.page import Finding, Gallery, Heatmap, Page, Table
from llama_scratch.render.pages import attention as pages
from llama_scratch.render.text import percent
from llama_scratch.repl.commands import run_command
from llama_scratch.repl.session import Session
from tests.helpers import ROOT, smollm2
from tests.helpers.checkpoints import tiny_params, write_meta
from tests.helpers.sessions import shown, started

pytestmark = pytest.mark.reference

llama, weights, huggingfaces = smollm2.llama, smollm2.weights, smollm2.huggingfaces
IDS = [60 + i % 90 for i in range(40)]


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture
def session(tiny: Llama) -> Session:
    session = started(tiny)
    session.predict("there is the text of it")
    return session


def theirs(huggingfaces: Any, ids: list[int]) -> Tensor:
    """transformers' eager attention, (n_layers, n_heads, T, T)."""
    with torch.inference_mode():
        return torch.cat(huggingfaces(torch.tensor([ids]), output_attentions=True).attentions)


# --- Maps -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_heads_map_is_that_of_transformers(llama: Llama, huggingfaces: Any) -> None:
    ids = llama.encode(smollm2.TEXTS["prose"])[:64]
    expected = theirs(huggingfaces, ids)
    assert expected.shape == (30, 9, 64, 64)
    for layer in (0, 1, 8, 16, 18, 29):  # the scores below cover all layers
        found = attention_map(llama, ids, layer)
        assert (found - expected[layer]).abs().max() <= 1e-4
        assert found.dtype == torch.float32


def test_rows_add_up_to_one_and_nothing_sees_what_comes_later(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a text in chunks. A head's map equals its slice of the layer's."""
    whole = attention_map(tiny, IDS, 1)
    assert whole.shape == (4, 40, 40)
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    found = attention_map(tiny, IDS, 1)
    assert (found - whole).abs().max() <= 1e-5
    assert (found.sum(-1) - 1).abs().max() <= 1e-5
    assert not found.triu(1).any()
    assert (found.tril() >= 0).all()
    for index in range(4):
        assert torch.equal(attention_map(tiny, IDS, 1, index), found[index])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (6, 6), (5, 12)])
def test_the_explicit_softmax_is_the_fused_one(T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(T)
    q = 2 * torch.randn(2, 8, T, 16, generator=generator)
    k, v = (torch.randn(2, 2, S, 16, generator=generator) for _ in range(2))
    mask = causal_mask(T, S, torch.device("cpu"))
    probs = attention_probs(q, k, mask)
    assert probs.shape == (2, 8, T, S)
    assert (attend_with(probs, v) - attend(q, k, v, mask)).abs().max() <= 1e-5


def test_a_changed_networks_attention_is_seen_changed(tiny: Llama) -> None:
    """With queries of zero all keys have equal shares, in that layer alone.

    Scores are measured per network.
    """
    changed = tiny.intervened({"layers.1.attention.q": lambda value, _start: torch.zeros_like(value)})
    even = (1 / torch.arange(1, 41)).expand(40, 40).T.tril()
    assert (attention_map(changed, IDS, 1) - even).abs().max() <= 1e-6
    assert (attention_map(tiny, IDS, 1) - even).abs().max() > 0.1
    assert torch.equal(attention_map(changed, IDS, 0), attention_map(tiny, IDS, 0))
    before, after = head_scores(tiny), head_scores(changed)
    assert before[:4] == after[:4]
    assert [scores.previous for scores in after[4:8]] == pytest.approx([sum(1 / t for t in range(2, 102)) / 100] * 4)
    assert head_scores(tiny) is before
    assert head_scores(changed) is after


@pytest.mark.parametrize(
    ("layer", "index", "message"),
    [
        (3, None, "The layer must be an integer from 0 to 2, not 3."),
        (3, 0, "The layer must be an integer from 0 to 2, not 3."),
        (1, 4, "The head must be an integer from 0 to 3, not 4."),
        (-1, None, "The layer must be an integer from 0 to 2, not -1."),
        (1, -1, "The head must be an integer from 0 to 3, not -1."),
    ],
)
def test_a_layer_or_head_that_there_is_not_is_refused(tiny: Llama, layer: int, index: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attention_map(tiny, IDS, layer, index)
    if index is None:
        with pytest.raises(UsageError, match=message):
            heads(tiny, IDS, layer)
    else:
        with pytest.raises(UsageError, match=message):
            head(tiny, IDS, layer, index)


def test_a_text_that_cannot_be_run_is_refused(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, precision="fp32", device="cpu", context=8)
    for ids, error in (([], UsageError), ([60] * 9, ContextLengthError), ([10**6], UsageError)):
        for look in (
            lambda ids: attention_map(llama, ids, 0),
            lambda ids: heads(llama, ids),
            lambda ids: head(llama, ids, 0, 0),
        ):
            with pytest.raises(error):
                look(ids)


# --- Kinds of heads ---------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_those_of_transformers_attention(llama: Llama, huggingfaces: Any) -> None:
    """The four means, summed position by position."""
    ids = repeated(llama)
    n, probs = len(ids) // 2, theirs(huggingfaces, ids).double()
    assert ids[:n] == ids[n:]
    assert len(set(ids)) == n == 50
    again = range(n, 2 * n)
    expected = {
        "previous": [probs[..., t, t - 1] for t in range(1, 2 * n)],
        "first": [probs[..., t, 0] for t in range(1, 2 * n)],
        "duplicate": [probs[..., t, ids.index(ids[t])] for t in again],
        "induction": [probs[..., t, ids.index(ids[t]) + 1] for t in again],
    }
    found = head_scores(llama)
    assert [(scores.layer, scores.head) for scores in found] == [(i, j) for i in range(30) for j in range(9)]
    for name, shares in expected.items():
        means = torch.stack(shares).mean(0).flatten().tolist()
        assert [getattr(scores, name) for scores in found] == pytest.approx(means, abs=1e-4)


def test_the_heads_of_the_docs_are_smollm2s(llama: Llama) -> None:
    """The numbers of heads and the highest scores in the chapter 13-induction.md."""
    found = head_scores(llama)
    docs = (ROOT / "llama_scratch" / "book" / "13-induction.md").read_text()
    for kind in KINDS:
        own = sorted((each for each in found if each.kind == kind), key=lambda each: -each.best[1])
        (row,) = (line.replace("*", "") for line in docs.splitlines() if line.strip("|* ").startswith(kind))
        _, _, count, strongest, _ = (cell.strip() for cell in row.split("|"))
        assert int(count) == len(own)
        named = [entry.split() for entry in strongest.split(", ")]
        assert [name for name, _ in named] == [each.name for each in own[: len(named)]]
        for (_, score), each in zip(named, own, strict=False):
            assert float(score) == pytest.approx(each.best[1], abs=0.01)


def test_without_its_induction_heads_smollm2_cannot_repeat(llama: Llama) -> None:
    """As in the chapter 13-induction.md: bits per random token in both halves, and ` rug`."""
    ids, six = repeated(llama), [each for each in head_scores(llama) if each.kind == "induction"]
    text = "The cat sat on the mat. The dog lay on the rug. The cat sat on the mat. The dog lay on the"

    def without(some: Sequence[Scores]) -> Llama:
        def tap(layer: int) -> Hook:
            own = [each.head for each in some if each.layer == layer]

            def off(value: Tensor, _start: int) -> Tensor:
                value[:, :, own] = 0  # (B, T, n_heads, head_dim)
                return value

            return off

        return llama.intervened(
            {f"layers.{layer}.attention.heads": tap(layer) for layer in {each.layer for each in some}}
        )

    best = max(six, key=lambda each: each.induction)
    for some, first, second, rug in (((), 20.3, 3.4, 0.64), ((best,), 20.2, 6.4, 0.56), (six, 20.2, 13.4, 0.02)):
        network = without(some)
        bits = [token.bits or 0.0 for token in surprisal(network, ids).tokens]
        assert sum(bits[1:50]) / 49 == pytest.approx(first, abs=0.1)
        assert sum(bits[51:]) / 49 == pytest.approx(second, abs=0.1)
        after = network.logits(text)[-1].softmax(-1)
        assert float(after[llama.encode(" rug")[0]]) == pytest.approx(rug, abs=0.01)


@pytest.mark.parametrize("bos", [True, False])
def test_a_head_that_looks_at_one_place_is_of_that_kind(
    tiny: Llama, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four heads, each perfect at one kind, with and without a BOS token."""
    if not bos:
        monkeypatch.setattr(tiny.tokenizer, "bos_id", None)
    llama = tiny.intervened({})  # a network without cached scores
    ids = repeated(llama)
    first, n = int(bos), 50
    assert len(ids) == 2 * n + first
    assert ids[first : first + n] == ids[first + n :]
    assert (ids[0] == 300) == bos
    assert max(ids[first:]) < 300  # no special token
    T = len(ids)

    def one_hot(back: int) -> Tensor:
        return torch.stack([torch.eye(T)[max(0, t - back)] for t in range(T)])

    perfect = torch.stack([one_hot(1), one_hot(T), one_hot(n), one_hot(n - 1)])
    monkeypatch.setattr(taps_module, "attention_probs", lambda q, k, mask: perfect[None])
    found = head_scores(llama)[:4]
    assert [scores.kind for scores in found] == list(KINDS)
    assert [scores.best[1] for scores in found] == pytest.approx([1.0] * 4)
    assert [round(scores.duplicate, 6) for scores in found] == [0, 0 if bos else 0.02, 1, 0]
    assert [round(scores.induction, 6) for scores in found] == [0, 0, 0, 1]


def test_a_small_context_gets_a_shorter_sequence(tiny_dir: Path) -> None:
    for context, length in ((10, 9), (9, 9), (3, 3)):
        llama = Llama.load(tiny_dir, precision="fp32", device="cpu", context=context)
        assert len(repeated(llama)) == length
        assert all(0 <= scores.induction <= 1 for scores in head_scores(llama))


def test_a_kind_takes_a_score_that_is_high_enough() -> None:
    assert Scores(0, 1, 0.1, 0.2, 0.3, THRESHOLD).kind == "induction"
    assert Scores(0, 1, 0.1, 0.2, THRESHOLD - 0.01, 0.0).kind is None
    assert Scores(2, 1, 0.1, 0.9, 0.8, 0.0).as_json() == {
        "layer": 2, "head": 1, "previous": 0.1, "first": 0.9, "duplicate": 0.8, "induction": 0.0, "kind": "first token",
    }  # fmt: skip


def test_scores_are_measured_once_for_a_network_and_go_with_it(tiny_dir: Path) -> None:
    llama = Llama.load(tiny_dir, precision="fp32", device="cpu")
    runs: list[int] = []
    handle = llama.engine.model.register_forward_pre_hook(lambda _model, _args: runs.append(1))
    assert head_scores(llama) is head_scores(llama)
    assert len(runs) == 1
    handle.remove()
    held = len(attention_module._known)
    del llama
    gc.collect()
    assert len(attention_module._known) < held


# --- Small maps, and memory -------------------------------------------------------------------


def close(some: Sequence[SmallMap], others: Sequence[SmallMap]) -> bool:
    """Equal up to rounding: the explicit softmax of other layers changes later digits."""
    a, b = (
        torch.tensor([[[value or 0.0 for value in row] for row in each.values] for each in maps])
        for maps in (some, others)
    )
    return [each.scores for each in some] == [each.scores for each in others] and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("T", "P", "step"), [(1, 1, 1), (24, 24, 1), (25, 13, 2), (40, 20, 2), (73, 19, 4)])
@pytest.mark.parametrize("chunk", [512, 7])
def test_a_small_map_has_the_highest_share_of_each_field(
    tiny: Llama, T: int, P: int, step: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop over the whole map computes it; a layer's maps equal those among all."""
    ids = [60 + i % 90 for i in range(T)]
    _ = head_scores(tiny)
    monkeypatch.setattr(engine_module, "CHUNK", chunk)
    found = heads(tiny, ids)
    assert [(each.scores.layer, each.scores.head) for each in found.maps] == [
        (i, j) for i in range(3) for j in range(4)
    ]
    assert close(heads(tiny, ids, 1).maps, found.maps[4:8])
    whole = attention_map(tiny, ids, 1)
    for index, small in enumerate(found.maps[4:8]):
        assert (small.step, len(small.values)) == (step, P)
        for i, row in enumerate(small.values):
            assert len(row) == P
            for j, value in enumerate(row):
                field = whole[index, i * step : (i + 1) * step, j * step : (j + 1) * step]
                assert value == (pytest.approx(float(field.max()), abs=1e-5) if j <= i else None)


def test_layers_maps_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2,000 tokens and twelve layers, at most two have maps in memory."""
    directory = write_meta(tmp_path / "model", params=tiny_params(dim=64, n_layers=12, n_heads=2, n_kv_heads=1))
    llama = Llama.load(directory, precision="fp32", device="cpu")
    alive, most, made = 0, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        nonlocal alive, most, made
        probs = model_module.attention_probs(q, k, mask)
        alive, made = alive + 1, made + 1
        most = max(most, alive)
        weakref.finalize(probs, gone)
        return probs

    monkeypatch.setattr(taps_module, "attention_probs", counted)
    found = heads(llama, [60 + i % 200 for i in range(2000)])
    assert len(found.maps) == 24
    assert found.maps[0].step == 84
    assert made == 12 * (4 + 1)  # chunks of the text, and the random sequence
    assert most <= 2


# --- One head ---------------------------------------------------------------------------------


def test_a_head_has_its_rows_and_the_last_tokens_links(tiny: Llama) -> None:
    ids = [60 + i % 90 for i in range(100)]
    probs, found = attention_map(tiny, ids, 2, 1), head(tiny, ids, 2, 1)
    assert (found.first, len(found.probs), len(found.tokens)) == (36, 64, 100)
    assert torch.equal(torch.tensor(found.probs), probs[36:])
    assert found.scores == head_scores(tiny)[9]
    order = probs[-1].argsort(descending=True)[:8].tolist()
    assert list(found.links) == [(position, float(probs[-1, position])) for position in order]
    early = head(tiny, ids, 2, 1, 10)
    assert torch.equal(torch.tensor(early.probs), probs[10:74])
    assert early.links == found.links
    facts = found.as_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert torch.equal(torch.tensor(facts["probs"]), probs[36:])
    assert facts["links"][0] == {"position": order[0], "probability": float(probs[-1, order[0]])}
    with pytest.raises(UsageError, match="position in this text must be an integer from 0 to 99, not 100"):
        head(tiny, ids, 2, 1, 100)


# --- The pages --------------------------------------------------------------------------------


def of(page: Page, kind: type[Any]) -> list[Any]:
    return [part for part in page.parts if isinstance(part, kind)]


def view(page: Page, width: int = 80) -> str:
    return " ".join(shown(to_terminal.view(page), width).split())


def named(found: Heads, kinds: dict[tuple[int, int], tuple[str, float]]) -> Heads:
    """The same heads with given scores, by default 0.1."""
    maps = []
    for each in found.maps:
        kind, score = kinds.get((each.scores.layer, each.scores.head), ("first token", 0.1))
        values = [score if kind == other else 0.0 for other in KINDS]
        scores = Scores(each.scores.layer, each.scores.head, *values)
        maps.append(type(each)(scores, each.step, each.values))
    return Heads(found.layer, found.tokens, tuple(maps))


def test_all_heads_stand_in_a_table_by_their_kinds(tiny: Llama) -> None:
    """The longer side is vertical, and the strongest heads are named.

    The strongest heads of each kind are drawn, or all heads.
    """
    kinds = {(0, 1): ("induction", 0.9), (2, 3): ("induction", 0.8), (1, 0): ("previous token", 0.5)}
    found = named(heads(tiny, IDS), kinds)
    page = pages.heads(found)
    (table,) = of(page, Heatmap)
    assert table.rows == ("H0", "H1", "H2", "H3")
    assert table.columns == ("0", "1", "2")
    assert table.texts == (("·", "P", "·"), ("I", "·", "·"), ("·", "·", "·"), ("·", "·", "I"))
    assert [table.values[1][0], table.values[3][2], table.values[0][1], table.values[0][0]] == [0.9, 0.8, 0.5, 0.1]
    (strongest,) = of(page, Table)
    assert [[cell.text for cell in row] for row in strongest.rows] == [
        ["P previous token", "1", "L1.H0 0.50"],
        ["F first token", "0", ""],
        ["D duplicate token", "0", ""],
        ["I induction", "2", "L0.H1 0.90, L2.H3 0.80"],
    ]
    (gallery,) = of(page, Gallery)
    assert [heatmap.title for heatmap in gallery.maps] == ["L1.H0 P 0.50", "L0.H1 I 0.90", "L2.H3 I 0.80"]
    assert gallery.maps[1].values == found.maps[1].values
    (whole,) = of(pages.heads(found, whole=True), Gallery)
    assert [heatmap.title for heatmap in whole.maps[:2]] == ["L0.H0", "L0.H1 I 0.90"]
    assert len(whole.maps) == 12
    assert "rows are heads, columns are layers" in view(page)
    assert of(pages.heads(named(found, {})), Gallery) == []  # nothing to draw


def test_layers_go_across_even_if_there_are_more_of_them_than_heads(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "model", params=tiny_params(dim=128, n_layers=3, n_heads=2, n_kv_heads=1))
    found = heads(Llama.load(directory, precision="fp32", device="cpu"), IDS)
    (table,) = of(pages.heads(found), Heatmap)
    assert (table.rows, table.columns) == (("H0", "H1"), ("0", "1", "2"))
    assert list(table.values[1]) == [found.maps[i].scores.best[1] for i in (1, 3, 5)]


def test_the_finding_counts_the_heads_of_each_kind(tiny: Llama) -> None:
    found = heads(tiny, IDS)
    kinds = {(0, 1): ("induction", 0.9), (2, 3): ("induction", 0.8), (1, 0): ("previous token", 0.5)}
    sentence = pages.heads_finding(named(found, kinds))
    assert "the 12 heads include 2 induction and 1 previous-token head." in sentence
    assert sentence.endswith("The strongest induction head is L0.H1 (0.90).")
    assert "none of the 12 heads" in pages.heads_finding(named(found, {}))


def test_the_map_of_heads_has_a_hue_and_a_letter_per_kind(tiny: Llama) -> None:
    kinds = {(0, 1): ("induction", 0.9), (1, 0): ("previous token", 0.5), (1, 1): ("first token", 0.9)}
    (table,) = of(pages.heads(named(heads(tiny, IDS), kinds)), Heatmap)
    assert table.shade(1, 0) == ("pink", 0.9)
    assert table.shade(0, 1) == ("blue", 0.5)
    assert table.shade(1, 1) == ("gray", 0.9)
    assert table.shade(3, 2) == ("gray", 0.1)
    assert [kind.letter for kind in table.scale.kinds] == ["P", "F", "D", "I", "·"]


def test_a_layers_page_has_all_its_heads(tiny: Llama) -> None:
    page = pages.heads(named(heads(tiny, IDS, 1), {(1, 2): ("duplicate token", 0.7)}))
    (table,) = of(page, Table)
    assert [cell.text for cell in table.rows[2]] == ["H2", "0.00", "0.00", "0.70", "0.00", "duplicate"]
    (gallery,) = of(page, Gallery)
    assert [heatmap.title for heatmap in gallery.maps] == ["L1.H0", "L1.H1", "L1.H2 D 0.70", "L1.H3"]
    assert "Heads of layer 1" in view(page, 40)


def test_a_heads_page_says_what_kind_it_is_and_what_the_last_token_looks_at(tiny: Llama) -> None:
    found = head(tiny, IDS, 1, 2)

    def page(scores: Scores) -> Page:
        return pages.head(replace(found, scores=scores))

    assert "L1.H2 looks like an induction head: on random tokens, 80.0 % of its attention goes to the" in view(
        page(Scores(1, 2, 0.1, 0.2, 0.3, 0.8))
    )
    assert "a first-token head: on random tokens, 50.0 % of its attention goes to the first token." in view(
        page(Scores(1, 2, 0.1, 0.5, 0.3, 0.2))
    )
    assert "none of the four types: on random tokens, at most 30.0 % of its attention goes to the earlier" in view(
        page(Scores(1, 2, 0.1, 0.2, 0.3, 0.0))
    )
    drawn = pages.head(found)
    (table,) = of(drawn, Heatmap)
    assert table.rows == table.columns == tuple(token.text for token in found.tokens)
    assert table.values[3] == (*found.probs[3][:4], *[None] * 36)
    assert table.window.more.format(5) == "/attention L1.H2 5"
    links, scores = of(drawn, Table)
    assert [row[1].bar for row in scores.rows] == list(vars(found.scores).values())[2:]
    assert [(int(row[0].text), row[2].bar) for row in links.rows] == list(found.links)


def test_a_head_comes_with_the_answer_without_it(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass gives the map and the answer; the map is that of the unchanged network."""
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    found = head(tiny, IDS, 1, 2)
    assert torch.equal(torch.tensor(found.probs), attention_map(tiny, IDS, 1, 2))
    without = changed(tiny, [ablate(tiny, NetworkPart(1, "head", 2))]).logits(IDS)[-1].double().softmax(-1)
    assert found.answer.id == found.ablated.id == tiny.predict(IDS).next.id
    assert found.answer.probability == pytest.approx(tiny.predict(IDS).next.probability, abs=1e-6)
    assert found.ablated.probability == pytest.approx(float(without[found.answer.id]), abs=1e-6)
    assert abs(found.ablated.probability - found.answer.probability) > 1e-5
    given = replace(found.answer, logprob=-1.0)
    assert head(tiny, IDS, 1, 2, answer=given).answer is given


def test_a_heads_json_has_the_first_position_and_the_score_of_that_name(tiny: Llama) -> None:
    found = head(tiny, IDS, 1, 2, 5)
    facts = found.as_json()
    assert (facts["layer"], facts["head"], facts["kind"], facts["first"]) == (1, 2, found.scores.kind, 5)
    names = ("previous", "first", "duplicate", "induction")
    assert facts["scores"] == {name: getattr(found.scores, name) for name in names}
    assert facts["ablated"]["probability"] == found.ablated.probability


def test_the_finding_of_a_head_is_measured_in_this_text(llama: Llama) -> None:
    """L23.H4 is the head that reads the country."""
    found = head(llama, llama.encode("The capital of France is"), 23, 4)
    assert found.links[0][0] == 3
    assert found.links[0][1] == pytest.approx(0.903, abs=0.001)
    assert (found.answer.text, round(found.ablated.probability, 3)) == (" Paris", 0.141)
    page = pages.head(found)
    assert page.parts[0] == Finding(pages.finding(found))
    for said in ("L23.H4", "␣is looks at ␣France (90.3 %", "␣Paris falls from 77.3 % to 14.1 %"):
        assert said in pages.finding(found)
    text = view(page)
    assert text.index("90.3 %") < text.index("random tokens")  # what it does here comes first
    (drawn,) = of(page, Heatmap)
    assert drawn.hover(4, 3) == "␣is looks at ␣France: 90.3 %"
    links = of(page, Table)[0]
    assert links.rows[0][2].hover == "␣is looks at ␣France: 90.3 %"


def test_a_head_that_looks_everywhere_looks_at_no_single_token(tiny: Llama) -> None:
    found = replace(head(tiny, list(range(60, 70)), 1, 2), links=((9, 0.4), (3, 0.3)))
    assert "no single token: at most 40.0 % of its attention, at itself" in pages.finding(found)
    assert "looks at itself (50.0 %" in pages.finding(replace(found, links=((9, 0.5), (3, 0.3))))
    same = replace(found, ablated=found.answer)
    assert f"stays at {percent(found.answer.probability)}" in pages.finding(same)


def test_a_long_texts_map_has_what_stands_in_front_in_one_column(tiny: Llama) -> None:
    ids = [60 + i % 90 for i in range(100)]
    found = head(tiny, ids, 1, 2)
    (table,) = of(pages.head(found), Heatmap)
    assert (len(table.rows), len(table.columns), table.columns[0]) == (64, 65, "…")
    for row in table.values:
        assert sum(value or 0.0 for value in row) == pytest.approx(1, abs=1e-5)
    assert "Shown: 64 of 100 positions. /attention L1.H2 N starts at position N." in view(pages.head(found))


# --- /attention -------------------------------------------------------------------------------


def answered(session: Session, line: str) -> tuple[dict[str, Any], str]:
    """The facts, which are JSON, and the view at 80 columns."""
    reply = run_command(session, line)[1]
    assert reply is not None
    assert reply.view is not None
    return json.loads(json.dumps(reply.facts, allow_nan=False)), shown(reply.view, 80)


def test_without_an_argument_it_shows_all_heads(session: Session) -> None:
    facts, view = answered(session, "/attention")
    assert facts == {"layer": None, "heads": [scores.as_json() for scores in head_scores(session.llama)]}
    assert "Heads by kind" in view
    assert session.state.page is not None
    (gallery,) = of(session.state.page, Gallery)
    assert len(gallery.maps) == 12  # a picture has them all


@pytest.mark.parametrize("name", ["1", "L1", "l1"])
def test_a_layer_by_its_names(session: Session, name: str) -> None:
    facts, view = answered(session, f"/attention {name}")
    assert facts == {"layer": 1, "heads": [scores.as_json() for scores in head_scores(session.llama)[4:8]]}
    assert "Heads of layer 1" in view


@pytest.mark.parametrize("name", ["1.3", "L1.H3", "l1.h3", "L1.3"])
def test_a_head_by_its_names(session: Session, name: str) -> None:
    facts, view = answered(session, f"/attention {name}")
    prediction = session.llama.predict(session.ids).next
    expected = head(session.llama, session.ids, 1, 3, answer=prediction).as_json()
    for key in ("answer", "ablated"):  # the cache changes the last digits of the answer
        assert facts.pop(key) == pytest.approx(expected.pop(key), abs=1e-6)
    assert facts == expected
    assert "L1.H3" in view
    assert facts["probs"] == attention_map(session.llama, session.ids, 1, 3).tolist()


def test_a_position_is_where_the_map_begins(session: Session) -> None:
    answered(session, "/attention L1.H3 4")
    assert session.state.page is not None
    assert of(session.state.page, Heatmap)[0].window.first == 4
    session.predict([60 + i % 90 for i in range(100)])
    assert answered(session, "/attention L1.H3 4")[0]["first"] == 4
    assert answered(session, "/attention L1.H3 50")[0]["first"] == 36
    session.change_settings(plain=True)
    assert "L1.H3" in answered(session, "/attention L1.H3")[1]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("3", "The layer must be an integer from 0 to 2, not 3."),
        ("L1.H4", "The head must be an integer from 0 to 3, not 4."),
        ("x", "'x' is not the name of a part"),
        ("L1.ffn", "Invalid argument 'L1.ffn' for /attention. Give a layer such as L5"),
        ("L1 3", "Invalid argument 'L1 3' for /attention"),
        ("L1.H2 x", "Invalid value 'x' for the position. Use a whole number, at least 0."),
        ("L1.H2 99", "The position in this text must be an integer"),
    ],
)
def test_what_there_is_not_gets_a_sentence(session: Session, argument: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        run_command(session, f"/attention {argument}")
    assert str(raised.value).startswith(message)


def test_without_a_text_there_is_nothing_to_look_at(tiny: Llama) -> None:
    for line in ("/attention", "/attention L1", "/attention L1.H1"):
        with pytest.raises(UsageError, match="There is no text yet"):
            run_command(started(tiny), line)
