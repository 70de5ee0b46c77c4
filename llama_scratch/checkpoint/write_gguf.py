"""Writes a GGUF file of the `llama` architecture, with the metadata that llama.cpp's own conversion writes.

Matrices keep their type and norms become float32, which llama.cpp wants.
Source: convert_hf_to_gguf.py in ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import EMBEDDING, OUTPUT, Checkpoint, is_tied
from llama_scratch.checkpoint.gguf import weight_names
from llama_scratch.checkpoint.tokenizer_parts import TokenizerParts, tokenizer_parts
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError, printable
from llama_scratch.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

    from llama_scratch.lazy import Weight

_ROPE_FREQS = "rope_freqs.weight"


def write_gguf(checkpoint: Checkpoint, weights: Mapping[str, Weight], path: Path, progress: Progress) -> None:
    """Write a model into a new file. Raises `CheckpointError` for one that this form has no place for."""
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    from llama_scratch.lazy import as_tensor

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
    """An array that writes itself plainly: numpy's `tofile` makes a TypeError of an interrupt that falls into it."""
    import numpy as np

    class Plain(np.ndarray[Any, Any]):
        def tofile(self, file: Any, *_: Any) -> None:
            file.write(self.data)

    return data.view(Plain)


def _stored_type(weight: Weight) -> Any:
    """The torch type that a weight is written in."""
    import torch

    return torch.float32 if len(weight.shape) == 1 else weight.dtype


def _rope_divisors(args: ModelArgs) -> Tensor | None:
    """What each pair's frequency is divided by, (head_dim/2,) float32; None without scaling."""
    from llama_scratch.model import rope_frequencies

    if args.rope_scaling is None and args.rope_divisors is None:
        return None
    return rope_frequencies(replace(args, rope_scaling=None, rope_divisors=None)) / rope_frequencies(args)


def _add_shape(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    from gguf import GGUFType

    args = checkpoint.args
    writer.add_type(GGUFType.MODEL)
    writer.add_name(checkpoint.name)
    writer.add_license(checkpoint.licence or "")
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
    from gguf import TokenType

    tokenizer, parts = checkpoint.tokenizer, tokenizer_parts(checkpoint)
    if parts.pattern is None:
        raise CheckpointError(
            f"{printable(checkpoint.name)} cuts text by the pattern '{printable(tokenizer.pattern)}', expected one "
            "that GGUF has a name for; --to hf holds it."
        )
    ids = range(tokenizer.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(parts.pattern)
    # Ids without a token get a name that no text has.
    writer.add_token_list([parts.texts.get(id, f"[PAD{id}]") for id in ids])
    writer.add_token_types(
        [
            TokenType.CONTROL if id in parts.special else TokenType.NORMAL if id in parts.texts else TokenType.UNUSED
            for id in ids
        ]
    )
    writer.add_token_merges(parts.merges)
    for add, name in _named_tokens(writer, parts, tokenizer):
        if name in tokenizer.special_tokens:
            add(tokenizer.special_tokens[name])
    writer.add_add_bos_token(parts.adds_bos)
    writer.add_chat_template(parts.template or "")


def _named_tokens(writer: GGUFWriter, parts: TokenizerParts, tokenizer: Tokenizer) -> list[tuple[Any, str]]:
    """What tells the file of a special token, and its name."""
    stops = [parts.texts[id] for id in sorted(tokenizer.stop_ids)]
    return [
        (writer.add_bos_token_id, parts.bos or ""),
        (writer.add_eos_token_id, parts.eos or ""),
        (writer.add_unk_token_id, tokenizer.unknown or ""),
        # The ends of a turn and of a message: a file names up to three stops.
        (writer.add_eot_token_id, next((name for name in ("<|eot_id|>", "<|im_end|>") if name in stops), "")),
        (writer.add_eom_token_id, "<|eom_id|>" if "<|eom_id|>" in stops else ""),
    ]
