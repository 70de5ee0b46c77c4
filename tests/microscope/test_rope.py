"""/rope: angles against float64, and scores against the network's attention."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import RenderableType
from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope.rope import Rope, dials, rope
from llama_scratch.model import TransformerBlock
from llama_scratch.render import to_terminal
from llama_scratch.render.drawings.dials import Dials
from llama_scratch.render.pages import rope as pages
from llama_scratch.repl.commands import run_command
from tests.helpers.checkpoints import tiny_args
from tests.helpers.sessions import assert_sentence, run, shown, started

IDS = list(range(40, 60))
LAYER, HEAD = 1, 3  # with two query heads per key-value head, this one uses the second


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def found(tiny: Llama) -> Rope:
    return rope(tiny, IDS, None, LAYER, HEAD)


@pytest.fixture(scope="module")
def projected(tiny: Llama) -> tuple[Tensor, Tensor]:
    """The head's queries and keys from wq and wk, before rotation: (T, head_dim) each."""
    streams: list[Tensor] = []
    tiny.engine.forward_with_hooks([IDS], {f"layers.{LAYER}.resid_pre": lambda x, _start: streams.append(x)})
    block = tiny.engine.model.layers[LAYER]
    assert isinstance(block, TransformerBlock)
    normed = block.attention_norm(streams[0])
    q, k = (linear(normed)[0].unflatten(-1, (-1, 64)) for linear in (block.attention.wq, block.attention.wk))
    return q[:, HEAD], k[:, HEAD // 2]


def in_float64(args: ModelArgs, factor: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """θ without and with scaling, and the kind, by the formula of the reference code."""
    unscaled = args.rope_theta ** (-np.arange(0, args.head_dim, 2, dtype=np.float64) / args.head_dim)
    scaled, kinds = [], []
    for theta in unscaled:
        wavelength = 2 * np.pi / theta
        smooth = (8192 / wavelength - 1) / (4 - 1)
        kinds.append("kept" if wavelength < 8192 / 4 else "divided" if wavelength > 8192 else "smoothed")
        share = {"kept": 1.0, "divided": 0.0, "smoothed": smooth}[kinds[-1]]
        scaled.append((1 - share) * theta / factor + share * theta)
    return unscaled, np.array(scaled), kinds


def apart(a: float, b: float) -> float:
    """The distance of two angles on the circle."""
    return abs((a - b + math.pi) % math.tau - math.pi)


@pytest.mark.parametrize("position", [0, 1, 23, 3000, 131_071])
@pytest.mark.parametrize("scaled", [True, False])
def test_dials_are_those_of_a_float64_computation(position: int, scaled: bool) -> None:
    """With and without scaling; for a model without scaling, a factor of 32 is used."""
    args = tiny_args(use_scaled_rope=scaled)
    unscaled, slowed, kinds = in_float64(args, 32)
    found = dials(args, position)
    # float32 angles are less accurate at distant positions: the bound of the rotation tables.
    bound = 1e-6 + 1e-7 * position
    for dial, slow, fast, kind in zip(found, slowed, unscaled, kinds, strict=True):
        assert dial.kind == kind
        assert dial.unscaled == pytest.approx(fast, rel=1e-6)
        assert dial.scaled == pytest.approx(slow, rel=1e-5)
        assert dial.unscaled_wavelength == pytest.approx(math.tau / fast, rel=1e-6)
        assert apart(dial.unscaled_angle, position * fast) < bound
        assert apart(dial.scaled_angle, position * slow) < bound
        assert 0 <= dial.unscaled_angle <= math.tau


def test_llama_3_2_keeps_smooths_and_divides_as_it_was_trained() -> None:
    """15, 3 and 14 of 32 pairs. A factor of 8 gives different angles."""
    assert Counter(dial.kind for dial in dials(tiny_args(), 1)) == {"kept": 15, "smoothed": 3, "divided": 14}
    ours, wrong = dials(tiny_args(), 80_000), dials(tiny_args().with_rope_factor(8), 80_000)
    assert max(apart(a.scaled_angle, b.scaled_angle) for a, b in zip(ours, wrong, strict=True)) > 1
    assert [dial.unscaled for dial in ours] == [dial.unscaled for dial in wrong]


def test_the_query_before_its_turn_is_what_wq_gives(found: Rope, projected: tuple[Tensor, Tensor]) -> None:
    """Pair by pair: rotation preserves the norm and adds the angle of the position."""
    pairs = projected[0][-1].double().reshape(-1, 2).tolist()
    assert found.length == pytest.approx(float(projected[0][-1].norm()), rel=1e-5)
    for (x, y), turned, dial in zip(pairs, found.query, found.dials, strict=True):
        assert turned.length == pytest.approx(math.hypot(x, y), abs=1e-5)
        assert apart(turned.before, math.atan2(y, x)) < 1e-4 / max(turned.length, 0.1)
        assert apart(turned.after, turned.before + dial.scaled_angle) < 1e-4 / max(turned.length, 0.1)


def test_at_another_position_only_the_turn_is_another(tiny: Llama, found: Rope) -> None:
    far = rope(tiny, IDS, 5000, LAYER, HEAD)
    for ours, other, dial in zip(found.query, far.query, far.dials, strict=True):
        assert other.before == ours.before
        assert apart(other.after, other.before + dial.scaled_angle) < 1e-4 / max(other.length, 0.1)
    assert far.position == 5000
    assert far.matches == found.matches


def test_products_are_the_scores_of_attention(tiny: Llama, found: Rope, projected: tuple[Tensor, Tensor]) -> None:
    """Their softmax is the network's attention. Unrotated, they match wq and wk."""
    probs: list[Tensor] = []
    tiny.engine.forward_with_hooks([IDS], {f"layers.{LAYER}.attention.probs": lambda x, _start: probs.append(x)})
    scores = torch.tensor([match.product for match in reversed(found.matches)])
    torch.testing.assert_close(scores.softmax(-1), probs[0][0, HEAD, -1], atol=1e-6, rtol=1e-4)
    q, k = projected
    unturned = torch.tensor([match.unturned for match in reversed(found.matches)])
    torch.testing.assert_close(unturned, k @ q[-1] / 8, atol=1e-4, rtol=1e-4)
    assert [match.distance for match in found.matches] == list(range(len(IDS)))
    assert [match.token.id for match in found.matches] == IDS[::-1]


def test_of_a_long_text_the_nearest_keys_are_shown(tiny: Llama) -> None:
    """They come from the last chunk."""
    ids = [40 + i % 200 for i in range(600)]
    found = rope(tiny, ids, None, LAYER, HEAD)
    assert (len(found.matches), found.n_keys, found.position) == (24, 600, 599)
    assert [match.token.id for match in found.matches] == ids[:-25:-1]
    assert "The 24 nearest of 600 keys" in shown(view(found), 80)


def view(found: Rope) -> RenderableType:
    return to_terminal.view(pages.page(found))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("", (4, 0, 0)),
        ("7", (7, 0, 0)),
        ("2.3", (4, 2, 3)),
        ("L2.H3", (4, 2, 3)),
        ("131071 1.2", (131071, 1, 2)),
    ],
)
def test_the_command(tiny: Llama, argument: str, expected: tuple[int, int, int]) -> None:
    session = started(tiny)
    session.predict([40, 41, 42, 43, 44])
    facts = run(session, f"/rope {argument}".strip())
    assert (facts["position"], facts["layer"], facts["head"]) == expected
    assert facts["scales"]
    assert len(session.state.snapshots) == 1


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("x", "Invalid argument 'x' for /rope"),
        ("1 2", "for /rope"),
        ("2.3 7", "the position first"),
        ("-1", "for /rope"),
        ("131072", "The position must be an integer from 0 to 131071, not 131072."),
        ("3.0", "The layer must be an integer from 0 to 2, not 3."),
        ("0.4", "The head must be an integer from 0 to 3, not 4."),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(tiny: Llama, argument: str, said: str) -> None:
    session = started(tiny)
    session.predict([40, 41])
    with pytest.raises(UsageError) as raised:
        run_command(session, f"/rope {argument}")
    assert said in str(raised.value)
    assert_sentence(raised.value)


def test_the_page_says_whether_the_network_scales(tiny: Llama, found: Rope) -> None:
    assert "15 kept, 3 smoothed, 14 divided" in shown(view(found), 200)
    assert "This network uses RoPE scaling with a factor of 32" in shown(view(found), 200)
    plain = Rope(**{**vars(found), "scales": False})
    assert "does not use RoPE scaling" in shown(view(plain), 200)
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("width", [40, 80])
def test_the_page_fits_its_terminal(found: Rope, width: int) -> None:
    assert max(map(len, shown(view(found), width).splitlines())) <= width
    assert "smoothed" in shown(view(found), width)


@pytest.mark.parametrize(
    ("wavelength", "text"),
    [
        (6.283, "6.28"),
        (9.996, "10.0"),
        (12.94, "12.9"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (9_960, "10k"),
        (268_400, "268k"),
        (999_600, "1.0M"),
        (13_990_000, "14M"),
    ],
)
def test_a_wavelength_has_four_characters_at_most(wavelength: float, text: str) -> None:
    assert pages._tokens(wavelength) == text


@pytest.mark.parametrize(("angle", "text"), [(0, "0°→"), (math.pi / 2, "90°↑"), (math.pi, "180°←"), (6.28318, "0°→")])
def test_a_dial_is_degrees_and_an_arrow(angle: float, text: str) -> None:
    assert pages._dial(angle) == text


def test_the_hands_are_the_network_s_own_angles(tiny: Llama, found: Rope) -> None:
    """At position 1, at the end of the text, and at the end of the context, where slow pairs have turned."""
    assert [hands.position for hands in found.hands] == [1, len(IDS) - 1, tiny.context - 1]
    for hands in found.hands:
        for dial, angle in zip(found.dials, hands.angles, strict=True):
            frequency = dial.scaled if found.scales else dial.unscaled
            assert apart(angle, frequency * hands.position) < 0.02
    (drawn,) = (part for part in pages.page(found).parts if isinstance(part, Dials))
    assert drawn.angles == tuple(hands.angles for hands in found.hands)
    assert [hands.position for hands in rope(tiny, IDS, 1, 0, 0).hands] == [1, tiny.context - 1]


def test_the_sentence_says_which_pairs_are_slow(found: Rope) -> None:
    wavelengths = [dial.scaled_wavelength if found.scales else dial.unscaled_wavelength for dial in found.dials]
    slow = sum(wavelength > found.context for wavelength in wavelengths)
    assert found.slow_from == (len(wavelengths) - slow if slow else None)
    sentence = pages.finding(replace(found, slow_from=20, context=8192))
    assert "From pair 20 of 32 on" in sentence
    assert "8,192 tokens" in sentence
    assert "scaling slows 17 pairs, 14 of them by 32" in sentence
    assert "Each of the 32 pairs" in pages.finding(replace(found, slow_from=None))
    assert "None of the 32 pairs" in pages.finding(replace(found, slow_from=0))
    assert "scaling" not in pages.finding(replace(found, scales=False))
