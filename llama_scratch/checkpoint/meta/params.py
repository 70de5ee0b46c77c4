"""Convert between Meta's `params.json` and `ModelArgs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_scratch.checkpoint.fields import Fields
from llama_scratch.config import ORIGINAL_CONTEXT, SCALED_CONTEXT, ModelArgs, RopeScaling
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, UnsupportedError, sanitize

PARAMS = "params.json"
# Fields of Llama 4 and the vision models, whose architectures are not supported.
_OTHER_NETWORKS = (
    "moe_args",
    "use_qk_norm",
    "nope_layer_interval",
    "attention_chunk_size",
    "vision_args",
    "vision_chunk_size",
    "vision_num_cross_attention_layers",
)
# `multiple_of` and `ffn_dim_multiplier` of Meta's models: 3.2 1B, 3.2 3B, 70B, 8B, and earlier models.
_USUAL: list[tuple[int, float | None]] = [(256, 1.5), (256, 1.0), (4096, 1.3), (1024, 1.3), (256, None)]


def parse_params(text: str, path: str = PARAMS) -> ModelArgs:
    """Parse Meta's `params.json`.

    Args:
        text: Content of the file.
        path: The file to name in errors.

    Raises:
        UnsupportedError: If the architecture or the quantization is not supported.
        CheckpointError: If the text is not JSON, lacks a field or has an invalid value.
    """
    try:
        params = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({sanitize(error)}). {REDOWNLOAD_HINT}") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds a JSON {type(params).__name__}, expected an object. {REDOWNLOAD_HINT}")
    if "quantization_args" in params:
        raise UnsupportedError(
            f"{path} belongs to Meta's quantized release {_release(params)}, which is not supported. "
            "Use the bf16 release of the model."
        )
    try:
        return _model_args(Fields(params))
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removesuffix('.')}. {REDOWNLOAD_HINT}") from error


def _model_args(fields: Fields) -> ModelArgs:
    if other := next((field for field in _OTHER_NETWORKS if fields.values.get(field)), None):
        raise UnsupportedError(f"the field {other} is not part of the Llama 3 architecture. Use a Llama 3 text model.")
    dim = fields.integer("dim")
    n_heads = fields.integer("n_heads")
    scaling = None
    if fields.boolean("use_scaled_rope", default=False):
        # Meta's file does not state the factor. The 3.2 models (1B: dim 2048, 3B: 3072) were
        # trained with 32, larger ones with 8.
        factor = fields.number("rope_scaling_factor", default=32.0 if dim <= 3072 else 8.0)
        if factor < 1:
            raise CheckpointError(f"rope_scaling_factor is {factor:g}, expected at least 1.")
        scaling = RopeScaling(factor)
    return ModelArgs(
        dim=dim,
        n_layers=fields.integer("n_layers", limit=1024),
        n_heads=n_heads,
        n_kv_heads=fields.integer("n_kv_heads"),
        vocab_size=fields.integer("vocab_size"),
        ffn_dim=ffn_dim(
            dim,
            multiple_of=fields.integer("multiple_of"),
            multiplier=fields.number("ffn_dim_multiplier", default=None),
        ),
        norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_theta"),
        rope_scaling=scaling,
        # Meta's files do not have these two fields. `convert` writes them if they differ from the defaults.
        max_seq_len=fields.integer("context_length", default=SCALED_CONTEXT if scaling else ORIGINAL_CONTEXT),
        head_dim=fields.integer("head_dim", default=0),
    )


def _release(params: Mapping[str, Any]) -> str:
    """Return Meta's name of a quantized release, or its scheme."""
    arguments = params["quantization_args"]
    if "lora_args" in params:
        return "int4-qlora-eo8"
    if isinstance(arguments, dict) and arguments.get("spinquant"):
        return "int4-spinquant-eo8"
    if isinstance(arguments, dict) and arguments.get("scheme") is None:
        return "in int4"
    return f"'{sanitize(arguments['scheme'] if isinstance(arguments, dict) else arguments)}'"


def format_params(args: ModelArgs, name: str) -> str:
    """Format hyperparameters as Meta's `params.json`, the inverse of `parse_params`.

    Args:
        args: The hyperparameters.
        name: The model to name in errors.

    Raises:
        CheckpointError: If Meta's format cannot represent the hyperparameters.
    """
    multiple_of, multiplier = _ffn_fields(args.dim, args.ffn_dim)
    params: dict[str, Any] = {
        "dim": args.dim,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "n_layers": args.n_layers,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "vocab_size": args.vocab_size,
    }
    if args.head_dim * args.n_heads != args.dim:
        params["head_dim"] = args.head_dim
    if args.rope_scaling:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": args.rope_scaling.factor}
    if args.rope_divisors or (args.rope_scaling and args.rope_scaling != RopeScaling(args.rope_scaling.factor)):
        raise CheckpointError(
            f"{sanitize(name)} scales its rotary embedding differently from Llama 3.1. Meta's {PARAMS} cannot "
            "represent this. Use `to=gguf`."
        )
    params = {field: value for field, value in params.items() if value is not None}
    by_rule = parse_params(json.dumps(params))
    if by_rule.max_seq_len != args.max_seq_len:
        params["context_length"] = args.max_seq_len
    if parse_params(json.dumps(params)) != args:
        raise CheckpointError(f"Meta's {PARAMS} cannot represent {sanitize(args, 300)}. Use another format.")
    return json.dumps(params, indent=2) + "\n"


def _ffn_fields(dim: int, width: int) -> tuple[int, float | None]:
    """Find values of `multiple_of` and `ffn_dim_multiplier` that give a width, preferably Meta's."""
    usual = (pair for pair in _USUAL if ffn_dim(dim, multiple_of=pair[0], multiplier=pair[1]) == width)
    hidden = ffn_dim(dim, multiple_of=1, multiplier=None)
    # With multiple_of = width, every hidden size up to the width is rounded up to the width.
    return next(usual, (width, None if hidden <= width else width / hidden))


def ffn_dim(dim: int, *, multiple_of: int, multiplier: float | None) -> int:
    """Compute the width of the feed-forward layer.

    It is 2/3 of 4·dim, times `multiplier`, rounded up to a multiple of `multiple_of`. The first two products are
    truncated to integers (1B: 5461 → 8191 → 8192). Source: `FeedForward` in Meta's llama-models.

    Args:
        dim: Width of the residual stream.
        multiple_of: As in params.json.
        multiplier: `ffn_dim_multiplier` in params.json.

    >>> ffn_dim(2048, multiple_of=256, multiplier=1.5)
    8192
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)
