"""`params.json` → `ModelArgs`: correct for the published models, and an error for invalid values."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from llama_scratch.checkpoint.meta.params import ffn_dim, parse_params
from llama_scratch.config import ModelArgs, RopeScaling
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, UnsupportedError, UsageError
from tests.helpers.checkpoints import TINY_PARAMS, tiny_args

# dim, n_layers, n_heads, ffn_dim_multiplier, multiple_of, use_scaled_rope → FFN width, factor, parameters, tied
PUBLISHED = {
    "3.2 1B": (2048, 16, 32, 1.5, 256, True, 8192, 32, 1_235_814_400, True),
    "3.2 1B, output counted": (2048, 16, 32, 1.5, 256, True, 8192, 32, 1_498_482_688, False),
    "3.2 3B": (3072, 28, 24, 1.0, 256, True, 8192, 32, 3_212_749_824, True),
    "3 8B": (4096, 32, 32, 1.3, 1024, None, 14336, None, 8_030_261_248, False),
    "3.1 8B": (4096, 32, 32, 1.3, 1024, True, 14336, 8, 8_030_261_248, False),
    "3.3 70B": (8192, 80, 64, 1.3, 4096, True, 28672, 8, 70_553_706_496, False),
}


def published(name: str) -> ModelArgs:
    """The dimensions from a published model's params.json."""
    dim, n_layers, n_heads, multiplier, multiple_of, scaled = PUBLISHED[name][:6]
    params = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": scaled,
    }
    return parse_params(json.dumps(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_shape(name: str) -> None:
    """FFN width, RoPE factor, context, and the exact number of parameters."""
    width, factor, parameters, tied = PUBLISHED[name][6:]
    args = published(name)
    assert args.ffn_dim == width
    assert args.n_parameters(tied=tied) == parameters
    assert args.rope_scaling == (None if factor is None else RopeScaling(factor, 1, 4, 8192))
    assert args.max_seq_len == (8192 if factor is None else 131_072)
    assert args.head_dim == (64 if args.dim == 2048 else 128)


@pytest.mark.parametrize(
    "field",
    [
        {"moe_args": {"num_experts": 16}},
        {"use_qk_norm": True},
        {"vision_chunk_size": 560},
        {"quantization_args": {"scheme": "int4"}},
    ],
)
def test_other_networks_are_named_and_not_called_damaged(field: dict[str, Any]) -> None:
    """Llama 4, vision models and quantized releases are unsupported, not damaged."""
    with pytest.raises(UnsupportedError) as caught:
        tiny_args(**field)
    assert REDOWNLOAD_HINT not in str(caught.value)


def test_a_scaling_by_a_factor_of_1_is_none() -> None:
    """Both ways to turn scaling off give the same `ModelArgs`."""
    args = dataclasses.replace(tiny_args(), rope_scaling=RopeScaling(1.0))
    assert args.rope_scaling is None
    assert args == tiny_args().with_rope_factor(1)


@pytest.mark.parametrize(("dim", "factor"), [(256, 32), (3072, 32), (3136, 8), (4096, 8)])
def test_the_factor_goes_by_the_width_alone(dim: int, factor: int) -> None:
    """Meta's file does not have the factor: it is 32 up to 3B's width and 8 above, independent of the other fields."""
    for others in ({}, {"n_layers": 80}, {"n_heads": 32, "n_kv_heads": 8}, {"vocab_size": 128256}):
        scaling = tiny_args(dim=dim, **others).rope_scaling
        assert scaling is not None
        assert scaling.factor == factor


def test_a_factor_in_the_file_wins_and_one_asked_for_wins_over_it() -> None:
    """Some exports write `rope_scaling_factor` in addition to Meta's fields."""
    args = tiny_args(rope_scaling_factor=16)
    assert args.rope_scaling == RopeScaling(16)
    assert args.with_rope_factor(8).rope_scaling == RopeScaling(8)
    assert args.with_rope_factor(None) is args


def test_a_factor_of_1_turns_the_scaling_off() -> None:
    """Scaling is off, and nothing else changes."""
    args = tiny_args()
    off = args.with_rope_factor(1)
    assert off.rope_scaling is None
    assert dataclasses.replace(off, rope_scaling=args.rope_scaling) == args


def test_a_factor_turns_the_scaling_on() -> None:
    """Also if the file does not."""
    assert tiny_args(use_scaled_rope=None).with_rope_factor(8).rope_scaling == RopeScaling(8)


@pytest.mark.parametrize("factor", [0, 0.5, -8, float("nan"), float("inf")])
def test_a_factor_that_makes_no_sense_is_refused(factor: float) -> None:
    """The error names the argument."""
    with pytest.raises(UsageError, match=r"expected a number of at least 1 \(`rope_factor`\)"):
        tiny_args().with_rope_factor(factor)


def test_the_feed_forward_width_is_truncated_twice_and_rounded_up() -> None:
    """For 1B: 5461.3 → 5461, 8191.5 → 8191, and up to 8192."""
    assert ffn_dim(2048, multiple_of=1, multiplier=None) == 5461
    assert ffn_dim(2048, multiple_of=1, multiplier=1.5) == 8191
    assert ffn_dim(2048, multiple_of=256, multiplier=1.5) == 8192
    assert ffn_dim(4096, multiple_of=256, multiplier=None) == 11008
    assert ffn_dim(8, multiple_of=21, multiplier=1.0) == 21
    assert ffn_dim(8, multiple_of=20, multiplier=1.0) == 40


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", True, [], float("nan"), 10**30])
def test_a_field_that_is_missing_or_no_size_is_refused(field: str, value: Any) -> None:
    """The error names the file and the field."""
    params = {name: found for name, found in (TINY_PARAMS | {field: value}).items() if found is not None}
    with pytest.raises(CheckpointError, match=rf"^some/params\.json: the field {field} is "):
        parse_params(json.dumps(params), "some/params.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_heads": 3}, "dim 256 does not divide into 3 heads"),
        ({"dim": 252, "n_heads": 4}, "dim 252 does not divide into 4 heads of an even size"),
        ({"n_kv_heads": 3}, "4 query heads"),
        ({"n_kv_heads": 8}, "4 query heads"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor is 0.5"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, expected true or false"),
        ({"n_layers": 2000}, "n_layers is 2000"),
        ({"quantization_args": {"scheme": "int4"}}, "quantized"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    """Before the network is built."""
    with pytest.raises(CheckpointError, match=says):
        tiny_args(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "<html>", "[" * 100_000])
def test_what_is_no_object_is_refused(text: str) -> None:
    """Often this is an HTML page in place of the file."""
    with pytest.raises(CheckpointError, match=r"^params\.json (is not JSON|holds a JSON)"):
        parse_params(text)


def test_the_shape_is_read_without_torch() -> None:
    """Importing torch takes seconds, and a wrong option should fail at once."""
    code = "import sys, llama_scratch.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
