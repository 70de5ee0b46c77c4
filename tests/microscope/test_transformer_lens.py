"""TransformerLens as a second reference: same weights, same names, same numbers.

Its HookedTransformer is an independent implementation, which shares code neither with this package nor with
transformers. Install a release before 4.0 by hand: `pip install "transformer-lens>=3,<4"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.llama import Llama
from llama_scratch.microscope.attribution import why
from llama_scratch.microscope.lens import lens
from llama_scratch.microscope.neurons import neurons
from tests.helpers.checkpoints import write_meta

pytestmark = pytest.mark.reference

transformer_lens: Any = pytest.importorskip("transformer_lens")
try:
    transformer_lens.HookedTransformer  # noqa: B018
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

T = 96
IDS = [(17 + 91 * i + i * i) % 300 for i in range(T)]
# Our place → theirs, with the permutation to heads first: theirs are (B, T, heads, head_dim).
HEADS_FIRST = (0, 2, 1, 3)
PLACES: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "resid_pre": ("hook_resid_pre", None),
    "attention.q": ("attn.hook_rot_q", HEADS_FIRST),
    "attention.k": ("attn.hook_rot_k", HEADS_FIRST),
    "attention.v": ("attn.hook_v", HEADS_FIRST),
    "attention.probs": ("attn.hook_pattern", None),
    "attention.heads": ("attn.hook_z", None),
    "attention.out": ("hook_attn_out", None),
    "resid_mid": ("hook_resid_mid", None),
    "feed_forward.neurons": ("mlp.hook_post", None),
    "feed_forward.out": ("hook_mlp_out", None),
    "resid_post": ("hook_resid_post", None),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that both have the same weights to the last bit."""
    return write_meta(tmp_path_factory.mktemp("witness") / "Tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(path: Path) -> Llama:
    return Llama.load(path, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(path: Path, ours: Llama) -> Any:
    """A HookedTransformer with the file's weights, with the norms' weights folded in."""
    args = ours.args
    assert args.rope_scaling is not None
    config = transformer_lens.HookedTransformerConfig(
        n_layers=args.n_layers,
        d_model=args.dim,
        n_ctx=128,
        d_head=args.head_dim,
        n_heads=args.n_heads,
        n_key_value_heads=args.n_kv_heads,
        d_mlp=args.ffn_dim,
        d_vocab=args.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        eps=args.norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=args.head_dim,
        rotary_base=int(args.rope_theta),
        rotary_adjacent_pairs=True,  # as in Meta's files
        use_NTK_by_parts_rope=True,
        NTK_by_parts_factor=args.rope_scaling.factor,
        NTK_original_ctx_len=args.rope_scaling.original_context,
        final_rms=True,
        init_weights=False,
        device="cpu",
        dtype=torch.float32,
    )
    model = transformer_lens.HookedTransformer(config)
    weights = torch.load(path / "consolidated.00.pth", weights_only=True)
    processing = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(_converted(weights, args), fold_ln=True, **processing)
    return model


def _converted(weights: Mapping[str, Any], args: Any) -> dict[str, Tensor]:
    """Convert names and shapes: one matrix per head, inputs first.

    Biases, which Llama does not have, are zeros.
    """
    found = {
        "embed.W_E": weights["tok_embeddings.weight"],
        "ln_final.w": weights["norm.weight"],
        "unembed.W_U": weights["output.weight"].T,
        "unembed.b_U": torch.zeros(args.vocab_size),
    }
    for layer in range(args.n_layers):
        mine, theirs = f"layers.{layer}.", f"blocks.{layer}."
        found[f"{theirs}ln1.w"] = weights[f"{mine}attention_norm.weight"]
        found[f"{theirs}ln2.w"] = weights[f"{mine}ffn_norm.weight"]
        for name, their_name in (("wq", "Q"), ("wk", "_K"), ("wv", "_V")):
            weight = weights[f"{mine}attention.{name}.weight"].unflatten(0, (-1, args.head_dim)).transpose(1, 2)
            underscore, letter = their_name[:-1], their_name[-1]
            found[f"{theirs}attn.{underscore}W_{letter}"] = weight  # (heads, dim, head_dim)
            found[f"{theirs}attn.{underscore}b_{letter}"] = torch.zeros(len(weight), args.head_dim)
        wo = weights[f"{mine}attention.wo.weight"].T.unflatten(0, (-1, args.head_dim))  # (n_heads, head_dim, dim)
        found[f"{theirs}attn.W_O"], found[f"{theirs}attn.b_O"] = wo, torch.zeros(args.dim)
        for name, their_name in (("w1", "W_gate"), ("w3", "W_in"), ("w2", "W_out")):
            found[f"{theirs}mlp.{their_name}"] = weights[f"{mine}feed_forward.{name}.weight"].T
        found[f"{theirs}mlp.b_in"], found[f"{theirs}mlp.b_out"] = torch.zeros(args.ffn_dim), torch.zeros(args.dim)
    return found


@pytest.fixture(scope="module")
def cached(theirs: Any) -> tuple[Tensor, Any]:
    """Their logits and all activations."""
    with torch.inference_mode():
        logits, cache = theirs.run_with_cache(torch.tensor([IDS]))
    return logits, cache


@pytest.mark.parametrize("layer", range(3))
def test_activations_are_theirs(ours: Llama, cached: tuple[Tensor, Any], layer: int) -> None:
    """At every place that both have, in every layer, within 1e-4 relative."""
    values: dict[str, Tensor] = {}
    hooks = {f"layers.{layer}.{place}": lambda x, _start, place=place: values.update({place: x}) for place in PLACES}
    ours.engine.forward_with_hooks([IDS], hooks)
    for place, (name, order) in PLACES.items():
        expected = cached[1][f"blocks.{layer}.{name}"]
        expected = expected if order is None else expected.permute(order)
        assert values[place].shape == expected.shape, place
        assert (values[place] - expected).norm() < 1e-4 * expected.norm(), place


def test_logits_are_theirs(ours: Llama, cached: tuple[Tensor, Any]) -> None:
    found = ours.logits(IDS)
    assert (found - cached[0][0]).norm() < 1e-4 * found.norm()
    assert found.argmax(-1).equal(cached[0][0].argmax(-1))


def test_an_ablated_head_is_theirs(ours: Llama, theirs: Any) -> None:
    """Both with head 2 of layer 1 ablated, which has an effect."""

    def off(z: Tensor, _start: Any = None, **_hook: Any) -> Tensor:
        return z.index_fill(2, torch.tensor([2]), 0)  # (B, T, n_heads, head_dim) in both

    found = ours.engine.forward_with_hooks([IDS], {"layers.1.attention.heads": off}, all_positions=True)
    with torch.inference_mode():
        expected = theirs.run_with_hooks(torch.tensor([IDS]), fwd_hooks=[("blocks.1.attn.hook_z", off)])
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (found[0] - ours.logits(IDS)).norm() > 1e-2 * expected.norm()


def test_the_logit_lens_is_theirs(ours: Llama, theirs: Any, cached: tuple[Tensor, Any]) -> None:
    """The top prediction after the embedding and each layer, at every position."""
    found = lens(ours, IDS, 0, T)
    for layer, row in enumerate(found.layers):
        with torch.inference_mode():
            stream = cached[1].accumulated_resid(layer=-1, apply_ln=True)[layer, 0]  # (T, dim)
            best = (stream @ theirs.W_U).log_softmax(-1).max(-1)
        assert [guess.id for guess in row.guesses] == best.indices.tolist()
        assert [guess.logprob for guess in row.guesses] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(found.layers) == 4


def test_attribution_is_theirs(ours: Llama, theirs: Any) -> None:
    """The contributions of the embedding, every head and every feed-forward layer."""
    ids = IDS[:16]
    found = why(ours, ids)
    with torch.inference_mode():
        _, cache = theirs.run_with_cache(torch.tensor([ids]))
        parts, names = cache.decompose_resid(layer=-1, pos_slice=-1, mode="mlp", return_labels=True)
        heads, head_names = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
        stack = cache.apply_ln_to_stack(torch.cat([parts, heads]), pos_slice=-1)[:, 0]  # (parts, dim)
        logits = (stack @ theirs.W_U[:, found.answer.id]).tolist()
    expected = {_our_name(name): logit for name, logit in zip([*names, *head_names], logits, strict=True)}
    assert {each.name: each.logit for each in found.contributions} == pytest.approx(expected, abs=1e-4)
    assert len(expected) == 1 + 3 * (4 + 1)


def _our_name(name: str) -> str:
    """embed → embedding, 0_mlp_out → L0.ffn, L0H3 → L0.H3"""
    return re.sub(r"^(\d+)_mlp_out$", r"L\1.ffn", name).replace("H", ".H").replace("embed", "embedding")


def test_neurons_are_theirs(ours: Llama, theirs: Any) -> None:
    """The contribution of each of the strongest neurons to the answer."""
    ids = IDS[:16]
    found = neurons(ours, ids, 1, count=5)
    with torch.inference_mode():
        _, cache = theirs.run_with_cache(torch.tensor([ids]))
        for neuron in found.neurons:
            write = cache["blocks.1.mlp.hook_post"][0, -1, neuron.index] * theirs.W_out[1, neuron.index]
            logit = cache.apply_ln_to_stack(write[None, None], pos_slice=-1)[0, 0] @ theirs.W_U[:, found.answer.id]
            assert neuron.contribution == pytest.approx(float(logit), abs=1e-5)
            assert neuron.strength == pytest.approx(float(write.norm()), rel=1e-4)
