"""Reader of GGUF files of the `llama` architecture.

A model is one file, or several numbered files. All tensors are memory-mapped. Quantized blocks are dequantized by the
gguf package, and only when a matrix is multiplied (see `lazy_weight`).
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import Checkpoint, WeightStorage, check_shapes, name_of, reading, tie
from llama_scratch.checkpoint.extras import Extras
from llama_scratch.checkpoint.fields import Fields
from llama_scratch.checkpoint.gguf.header import MAX_ELEMENTS, GGUFHeader, TensorInfo, read_header
from llama_scratch.checkpoint.gguf.tokenizer import read_chat, read_tokenizer
from llama_scratch.config import ORIGINAL_CONTEXT, ModelArgs, RopeScaling
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, ModelNotFoundError, UnsupportedError, sanitize
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from llama_scratch.precision.lazy_weight import Weight

# GGUF's name of a weight → Meta's name, outside and inside of a layer.
_NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}
# Tensor with the divisor of each RoPE frequency, in Llama 3.1 and later.
_ROPE_FREQS = "rope_freqs.weight"
# Field of generation_config.json → GGUF's key.
SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
# model-00002-of-00003.gguf
_NUMBERED = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)", re.IGNORECASE)


def open_gguf(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a GGUF model: read and check the header.

    Args:
        path: The file, or any of the files of a split model.
        tokenizer: Path of a tokenizer.model that replaces the file's own tokenizer.

    Raises:
        ModelNotFoundError: If one of the files is missing.
        CheckpointError: If a file is damaged or not supported.
    """
    headers = _read_headers(path)
    metadata = headers[0].metadata
    replacement = Tokenizer.from_meta(tokenizer) if tokenizer else None
    try:
        args = _model_args(headers)
        own_tokenizer, extras, warnings = (replacement, Extras(), ()) if replacement else read_tokenizer(metadata)
        chat = read_chat(metadata, own_tokenizer)
    except UnsupportedError as error:
        raise UnsupportedError(f"{headers[0].path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{headers[0].path}: {error}") from error
    shapes = {tensor.name: tensor.shape for header in headers for tensor in header.tensors}
    shapes.pop(_ROPE_FREQS, None)
    names = weight_names(args)
    check_shapes(shapes, args, headers[0].path, names)
    license = metadata.get("general.license")
    general = {key: value for key, value in metadata.items() if key.startswith(("general.", "tokenizer.chat_template"))}
    return Checkpoint(
        # "SmolLM2-135M-Instruct.Q4_1" → "SmolLM2-135M-Instruct"
        name=name_of(path),
        format="gguf",
        path=headers[0].path,
        args=args,
        tokenizer=own_tokenizer,
        load=lambda progress: tie(_weights(headers, names, progress)),
        storage=lambda _: _stored(headers),
        chat=chat,
        files=tuple(header.path for header in headers),
        license=sanitize(license) if isinstance(license, str) and license else None,
        warnings=(*warnings, *_contradictions(metadata, args)),
        extras=replace(extras, metadata=general, generation=_sampling(general)),
    )


def _read_headers(path: Path) -> list[GGUFHeader]:
    """Read the header of a file, or of all files of a model split by gguf-split."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if type(count) is int and count in (0, 1):
        return [header]
    match = _NUMBERED.fullmatch(path.name)
    if type(count) is not int or not match or int(match[4]) != count or not 1 <= int(match[2]) <= count:
        raise CheckpointError(
            f"{path} is one of {sanitize(count)} files of a split model, expected a name such as "
            "model-00001-of-00003.gguf. Rename the files to their original names."
        )
    headers: list[GGUFHeader] = []
    for number in range(1, count + 1):
        file = path.with_name(f"{match[1]}{number:05}{match[3]}")
        if not file.is_file():
            raise ModelNotFoundError(f"{file} not found, one of the {count} files of this model. {REDOWNLOAD_HINT}")
        left = MAX_ELEMENTS - sum(other.elements for other in headers)
        headers.append(header if file == path else read_header(file, left))
        split = [headers[-1].metadata.get(field) for field in ("split.no", "split.count", "split.tensors.count")]
        if split != [number - 1, count, header.metadata.get("split.tensors.count")]:
            raise CheckpointError(
                f"{file} belongs to another model than the files beside it, or is another part. {REDOWNLOAD_HINT}"
            )
    names = Counter(tensor.name for header in headers for tensor in header.tensors)
    if twice := next((name for name, times in names.items() if times > 1), None):
        raise CheckpointError(f"{path}: the tensor '{sanitize(twice)}' is in two of the files. {REDOWNLOAD_HINT}")
    if names.total() != header.metadata.get("split.tensors.count"):
        raise CheckpointError(
            f"{path}: the {count} files hold {names.total()} tensors, but their metadata state another number. "
            + REDOWNLOAD_HINT
        )
    return headers


# --- Metadata ---------------------------------------------------------------------------------


# Fields with either one value or one value per layer, as in llama.cpp.
_PER_LAYER = {"llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length"}


class _LayerFields(Fields):
    """Metadata with optional per-layer values, which must be equal in all layers."""

    def _get(self, name: str, default: Any) -> Any:
        value = super()._get(name, default)
        if not isinstance(value, list) or name not in _PER_LAYER:
            return value
        if len(value) != (n_layers := self.integer("llama.block_count")):
            raise CheckpointError(f"{name} has {len(value)} values for {n_layers} layers. {REDOWNLOAD_HINT}")
        if any(other != value[0] for other in value):
            raise UnsupportedError(f"{name} differs between layers. Use a model whose layers have the same dimensions.")
        return value[0]


def _check_supported(metadata: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if the metadata describes more than a plain Llama."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"the architecture is '{sanitize(architecture)}', expected 'llama'. Use another model.")
    # As in llama.cpp, the default type is linear, and a factor of 0 means 1.
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factors = [metadata.get(f"llama.rope.{name}", 1) for name in ("scaling.factor", "scale_linear")]
    factor = next((factor for factor in factors if factor not in (0, 1)), 1)
    plain = kind == "none" or (kind in ("linear", "yarn") and factor == 1)
    if not plain or metadata.get("llama.rope.scaling.attn_factor", 1) != 1:
        raise UnsupportedError(
            f"its RoPE scaling is of the type '{sanitize(kind)}' (factor {sanitize(factor)}), which is not supported. "
            "Use a model with Llama 3.1's RoPE scaling or none, or run this one in llama.cpp."
        )
    if experts := metadata.get("llama.expert_count"):
        raise UnsupportedError(f"it has {sanitize(experts)} experts, expected a dense Llama. Use another model.")
    if metadata.get("llama.attention.causal", True) is not True:
        raise UnsupportedError("its attention is not causal (llama.attention.causal). Use a generative model.")


def _contradictions(metadata: Mapping[str, Any], args: ModelArgs) -> Iterator[str]:
    """Warn about metadata that contradicts the tensors. The tensors take precedence."""
    stated = metadata.get("llama.vocab_size", args.vocab_size)
    if stated != args.vocab_size:
        yield (
            f"llama.vocab_size is {sanitize(stated)}, but the embedding has {args.vocab_size} rows. "
            f"{args.vocab_size} is used."
        )


def _model_args(headers: Sequence[GGUFHeader]) -> ModelArgs:
    metadata = headers[0].metadata
    _check_supported(metadata)
    fields = _LayerFields(metadata)
    tensors = {tensor.name: (header, tensor) for header in headers for tensor in header.tensors}
    if not tensors:
        raise UnsupportedError("the file has a tokenizer but no weights. Use the file of the complete model.")
    n_heads = fields.integer("llama.attention.head_count")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"the tensor 'token_embd.weight' is missing. {REDOWNLOAD_HINT}")
    args = ModelArgs(
        dim=fields.integer("llama.embedding_length"),
        n_layers=fields.integer("llama.block_count", limit=1024),
        n_heads=n_heads,
        n_kv_heads=fields.integer("llama.attention.head_count_kv", default=n_heads),
        vocab_size=tensors["token_embd.weight"][1].shape[0],
        ffn_dim=fields.integer("llama.feed_forward_length"),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("llama.rope.freq_base", default=10_000.0),
        rope_scaling=None,
        max_seq_len=fields.integer("llama.context_length"),
        head_dim=fields.integer("llama.attention.key_length", default=0),
    )
    for field in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (size := fields.integer(field, default=args.head_dim)) != args.head_dim:
            raise UnsupportedError(
                f"{field} is {size}, but the keys of a head have {args.head_dim} components. Use another model."
            )
    if _ROPE_FREQS in tensors:
        original = fields.integer("llama.rope.scaling.original_context_length", default=ORIGINAL_CONTEXT)
        return _scaled(args, _rope_divisors(*tensors[_ROPE_FREQS], args), original)
    return args


def _scaled(args: ModelArgs, divisors: Sequence[float], original_context: int) -> ModelArgs:
    """Set the divisors of the RoPE frequencies.

    If they match Llama 3.1's rule within rounding, the rule is set instead.
    """
    import torch

    from llama_scratch.model import rope_frequencies

    by_divisors = replace(args, rope_divisors=tuple(divisors))
    rule = RopeScaling(math.inf, original_context=original_context)
    # The pair with the lowest frequency determines the factor: by the rule, its frequency is linear in 1/factor.
    ends = [float(rope_frequencies(shape)[-1]) for shape in (args, by_divisors, replace(args, rope_scaling=rule))]
    if ends[0] == ends[1]:
        return args if all(divisor == 1 for divisor in divisors) else by_divisors
    factor = (ends[0] - ends[2]) / (ends[1] - ends[2]) if ends[1] > ends[2] else 0
    by_rule = replace(args, rope_scaling=replace(rule, factor=round(factor, 3)))
    if factor >= 1 and torch.allclose(rope_frequencies(by_rule), rope_frequencies(by_divisors), rtol=1e-5, atol=0):
        return by_rule
    return by_divisors


def _rope_divisors(header: GGUFHeader, tensor: TensorInfo, args: ModelArgs) -> list[float]:
    """Read the divisor of each RoPE frequency: head_dim/2 positive numbers."""
    from gguf import GGMLQuantizationType as Type

    size = args.head_dim // 2
    if tensor.shape != (size,) or tensor.type != Type.F32:
        raise CheckpointError(
            f"{_ROPE_FREQS} has the shape {tensor.shape} in {Type(tensor.type).name}, expected ({size},) in F32. "
            + REDOWNLOAD_HINT
        )
    with header.path.open("rb") as file:
        file.seek(tensor.start)
        divisors = list(struct.unpack(f"<{size}f", file.read(tensor.size)))
    # A divisor of 1 means unscaled. The range is much wider than the factors of published models.
    if (wrong := next((divisor for divisor in divisors if not 1e-6 < divisor < 1e6), None)) is not None:
        raise CheckpointError(f"{_ROPE_FREQS} holds {wrong:g}, expected about 1 to 100. {REDOWNLOAD_HINT}")
    return divisors


def _sampling(general: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's sampling defaults under the names in generation_config.json."""
    values = {field: general.get(key) for field, key in SAMPLING.items()}
    # Undo the rounding of 0.6 to float32.
    defaults = {
        field: float(f"{value:.7g}") if isinstance(value, float) else value
        for field, value in values.items()
        if type(value) in (int, float)
    }
    return {"do_sample": True, **defaults} if defaults else {}


# --- Weights ----------------------------------------------------------------------------------


def _stored(headers: Sequence[GGUFHeader]) -> WeightStorage:
    import torch
    from gguf import GGMLQuantizationType as Type

    tensors = {tensor.name: Type(tensor.type) for header in headers for tensor in header.tensors}
    plain = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    return WeightStorage(
        types=dict(Counter(type.name for type in tensors.values())),
        tied="output.weight" not in tensors,
        dtype=plain.get(tensors["token_embd.weight"], torch.float32),
    )


def _weights(headers: Sequence[GGUFHeader], names: Mapping[str, str], progress: Progress) -> dict[str, Weight]:
    """Return all weights under Meta's names. The rows of q and k are in Meta's order."""
    import numpy as np

    weights: dict[str, Weight] = {}
    total = sum(len(header.tensors) for header in headers)
    for header in headers:
        with reading(header.path):
            # Copy-on-write, because torch requires writable memory. Nothing is ever written.
            data = np.memmap(header.path, dtype=np.uint8, mode="c")
        for tensor in header.tensors:
            if tensor.name != _ROPE_FREQS:
                weights[names[tensor.name]] = _weight(header.path, tensor, data)
            progress("reading", len(weights), total)
    return weights


def _weight(path: Path, tensor: TensorInfo, data: np.memmap[Any, np.dtype[np.uint8]]) -> Weight:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize

    from llama_scratch.precision.lazy_weight import GGUFBlockWeight

    raw, type = data[tensor.start : tensor.start + tensor.size], Type(tensor.type)
    if raw.size != tensor.size:
        raise CheckpointError(f"{path} became shorter while {tensor.name} was read. {REDOWNLOAD_HINT}")
    plain = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    if type in plain:
        return torch.from_numpy(raw).view(plain[type]).view(tensor.shape)
    blocks = raw.reshape(math.prod(tensor.shape[:-1]), -1)  # (out, bytes of a row)

    def read_rows(start: int, stop: int) -> torch.Tensor:
        with np.errstate(all="ignore"):
            values = dequantize(blocks[start:stop], type)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {tensor.name} holds NaN or infinity. {REDOWNLOAD_HINT}")
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    try:
        read_rows(0, 1)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{path}: {tensor.name} is in {type.name}, which the gguf package cannot read. Use another quantization "
            "of the model, such as Q8_0 or Q4_K_M."
        ) from error
    if len(tensor.shape) == 1:
        return read_rows(0, 1)[0]
    return GGUFBlockWeight((tensor.shape[0], tensor.shape[1]), torch.from_numpy(blocks), type.name, read_rows)


def weight_names(args: ModelArgs) -> dict[str, str]:
    """Map GGUF's names of weights to Meta's.

    blk.3.attn_q.weight → layers.3.attention.wq.weight
    """
    names = dict(_NAMES)
    for layer in range(args.n_layers):
        for name, metas in _LAYER_NAMES.items():
            names[f"blk.{layer}.{name}.weight"] = f"layers.{layer}.{metas}.weight"
    return names
