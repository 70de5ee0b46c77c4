"""Writer of GGUF files of the `llama` architecture.

The metadata keys are those of llama.cpp's converter. Matrices keep their dtype. Norms become float32, as llama.cpp
requires.
Source: convert_hf_to_gguf.py in ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.byte_level_bpe import TokenizerParts, tokenizer_parts
from llama_scratch.checkpoint.gguf.reader import SAMPLING, weight_names
from llama_scratch.checkpoint.gguf.tokenizer import kind_of
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs, is_tied
from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer, replace_surrogates

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

    from llama_scratch.precision.lazy_weight import Weight

_ROPE_FREQS = "rope_freqs.weight"
# Metadata that describes the new file and is not copied from the source.
_OURS = {"general.alignment", "general.file_type", "general.quantization_version", "tokenizer.chat_template"}


def write_gguf(checkpoint: Checkpoint, weights: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write a model into a new GGUF file.

    Args:
        checkpoint: The model.
        weights: Its weights, under Meta's names.
        path: The new file.
        progress: Called with the number of tensors written.

    Raises:
        CheckpointError: If GGUF cannot hold the model.
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    from llama_scratch.precision.lazy_weight import as_tensor

    types = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    writer = GGUFWriter(path, "llama")
    try:
        _add_shape(writer, checkpoint)
        writer.add_file_type(types[weights[EMBEDDING].dtype][1])
        _add_tokenizer(writer, checkpoint)
        _add_metadata(writer, checkpoint)
        theirs = {metas: name for name, metas in weight_names(checkpoint.args).items()} | {_ROPE_FREQS: _ROPE_FREQS}
        kept: dict[str, Weight] = {}
        if (divisors := _rope_divisors(checkpoint.args)) is not None:
            kept[_ROPE_FREQS] = divisors
        kept |= {name: w for name, w in weights.items() if name != OUTPUT or not is_tied(weights)}
        for name, weight in kept.items():
            dtype = _stored_type(weight)
            size = weight.numel() * dtype.itemsize
            writer.add_tensor_info(theirs[name], weight.shape, dtype, size, raw_dtype=types[dtype][0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, weight in enumerate(kept.values(), start=1):
            tensor = as_tensor(weight, _stored_type(weight)).contiguous()
            writer.write_tensor_data(_plain(tensor.view(torch.uint8).numpy()))
            progress("writing", done, len(kept))
    finally:
        writer.close()


def _plain(data: Any) -> Any:
    """Replace `tofile` by `file.write`: numpy's turns Ctrl-C into a TypeError."""
    import numpy as np

    class Plain(np.ndarray[Any, Any]):
        def tofile(self, file: Any, *_: Any) -> None:
            file.write(self.data)

    return data.view(Plain)


def _stored_type(weight: Weight) -> Any:
    """Return the torch dtype that a weight is written in."""
    import torch

    return torch.float32 if len(weight.shape) == 1 else weight.dtype


def _rope_divisors(args: ModelArgs) -> Tensor | None:
    """Return the RoPE frequency divisors, (head_dim/2,) float32; None if unscaled."""
    from llama_scratch.model import rope_frequencies

    if args.rope_scaling is None and args.rope_divisors is None:
        return None
    return rope_frequencies(replace(args, rope_scaling=None, rope_divisors=None)) / rope_frequencies(args)


def _add_shape(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    from gguf import GGUFType

    args = checkpoint.args
    writer.add_type(GGUFType.MODEL)
    name = checkpoint.extras.metadata.get("general.name")
    writer.add_name(replace_surrogates(name if isinstance(name, str) and name else checkpoint.name))
    writer.add_license(replace_surrogates(checkpoint.license or ""))
    writer.add_block_count(args.n_layers)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    if args.head_dim * args.n_heads != args.dim:
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    if args.rope_scaling:
        writer.add_rope_scaling_orig_ctx_len(args.rope_scaling.original_context)


def _add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    tokenizer, parts = checkpoint.tokenizer, tokenizer_parts(checkpoint)
    if parts.pattern is None:
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} splits text by the pattern '{sanitize(tokenizer.pattern)}', for which "
            "GGUF does not have a name. Use `to=hf`."
        )
    ids = range(tokenizer.n_vocab)
    writer.add_tokenizer_model("gpt2")
    # Only with "llama-bpe", a piece that equals a token becomes that token even if no merges produce it.
    pre = "smaug-bpe" if parts.pattern == "llama-bpe" and not tokenizer.whole_pieces else parts.pattern
    if tokenizer.merges and tokenizer.whole_pieces and pre != "llama-bpe":
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} has tokens that no merge produces, which GGUF cannot represent with the "
            f"pattern '{pre}'. Use `to=hf`."
        )
    writer.add_tokenizer_pre(pre)
    # Ids without a token get a placeholder name.
    texts = [parts.texts.get(id, f"[PAD{id}]") for id in ids]
    writer.add_token_list(texts)
    writer.add_token_types(_token_types(checkpoint, parts, texts))
    writer.add_token_merges(parts.merges)
    for role, id in _roles(parts, tokenizer).items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", id)
    writer.add_add_bos_token(parts.adds_bos)
    writer.add_chat_template(parts.template or "")


def _token_types(checkpoint: Checkpoint, parts: TokenizerParts, texts: Sequence[str]) -> list[int]:
    """Return GGUF's type of each token. Keep equivalent types of a GGUF source."""
    from gguf import TokenType

    by_kind: dict[str, int] = {
        "special": TokenType.CONTROL,
        "added": TokenType.USER_DEFINED,
        "ordinary": TokenType.NORMAL,
        "unused": TokenType.UNUSED,
    }
    ordinary = set(checkpoint.tokenizer.ranks.values())
    kinds = [
        "special"
        if id in parts.special
        else "added"
        if id in parts.added
        else "ordinary"
        if id in ordinary
        else "unused"
        for id in range(len(texts))
    ]
    types = [by_kind[kind] for kind in kinds]
    for id, given in enumerate(checkpoint.extras.token_types):
        if kind_of(texts[id], given) == kinds[id]:
            types[id] = given
    return types


def _roles(parts: TokenizerParts, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of tokens with a role, such as the stop tokens eos, eot and eom."""
    stops = {parts.texts[id]: id for id in sorted(tokenizer.stop_ids)}
    ends = {"eom": stops.get("<|eom_id|>"), "eot": stops.get("<|eot_id|>", stops.get("<|im_end|>"))}
    return {**{role: id for role, id in ends.items() if id is not None}, **parts.roles}


def _add_metadata(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Write sampling defaults, and the metadata of the source if it was a GGUF file."""
    generation, metadata = checkpoint.extras.generation, dict(checkpoint.extras.metadata)
    if generation.get("do_sample") is True:
        metadata |= {key: generation[field] for field, key in SAMPLING.items() if field in generation}
    written = writer.kv_data[0].keys() | _OURS
    for key, value in metadata.items():
        if key in written:
            continue
        if isinstance(value, str):
            writer.add_string(key, replace_surrogates(value))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            writer.add_array(key, [replace_surrogates(item) for item in value])
