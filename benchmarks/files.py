"""The peers' files of a model: GGUF in several precisions, a Hugging Face directory, CTranslate2's own format.

All hold the same weights, so that all engines compute the same answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from benchmarks.engines import quiet_llama_cpp
from llama_scratch.checkpoint import Checkpoint, is_tied, open_checkpoint
from llama_scratch.checkpoint.gguf_header import read_header
from llama_scratch.checkpoint.vocabulary import bytes_to_unicode
from llama_scratch.config import ModelArgs
from llama_scratch.lazy import as_tensor
from llama_scratch.model import rope_frequencies
from llama_scratch.progress import silent

_LAYER_NAMES = {
    "attention_norm": ("attn_norm", "input_layernorm"),
    "attention.wq": ("attn_q", "self_attn.q_proj"),
    "attention.wk": ("attn_k", "self_attn.k_proj"),
    "attention.wv": ("attn_v", "self_attn.v_proj"),
    "attention.wo": ("attn_output", "self_attn.o_proj"),
    "ffn_norm": ("ffn_norm", "post_attention_layernorm"),
    "feed_forward.w1": ("ffn_gate", "mlp.gate_proj"),
    "feed_forward.w2": ("ffn_down", "mlp.down_proj"),
    "feed_forward.w3": ("ffn_up", "mlp.up_proj"),
}
_NAMES = {
    "tok_embeddings.weight": ("token_embd.weight", "model.embed_tokens.weight"),
    "norm.weight": ("output_norm.weight", "model.norm.weight"),
    "output.weight": ("output.weight", "lm_head.weight"),
}


_ALPHABET = bytes_to_unicode()


def names(name: str) -> tuple[str, str]:
    """A weight's names in GGUF and in Hugging Face's files, from its name in Meta's."""
    if not name.startswith("layers."):
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    in_gguf, in_huggingface = _LAYER_NAMES[rest.removesuffix(".weight")]
    return f"blk.{layer}.{in_gguf}.weight", f"model.layers.{layer}.{in_huggingface}.weight"


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, which `make` writes where it does not exist; an interruption leaves nothing half done behind."""
    if not path.exists():
        unfinished = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"Writing {path.name}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def distinct_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights under Meta's names; a tied output is left out."""
    weights = checkpoint.load(silent)
    tied = is_tied(weights)
    return {name: as_tensor(weight) for name, weight in weights.items() if not (tied and name == "output.weight")}


# --- GGUF -------------------------------------------------------------------------------------


def write_gguf(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a model as a GGUF file of bfloat16 or float32 matrices; norms are float32, as llama.cpp wants them.

    Meta's layout of q and k is the one that llama.cpp's `llama` architecture expects.
    """
    checkpoint = open_checkpoint(source)
    args = checkpoint.args
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(checkpoint.name)
    writer.add_block_count(args.n_layers)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32)
    for key, value in _tokenizer_metadata(checkpoint).items():
        _add(writer, key, value)
    if args.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors(args).numpy())
    for name, weight in distinct_weights(checkpoint).items():
        if weight.dim() == 2 and dtype == torch.bfloat16:
            raw = weight.to(dtype).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(names(name)[0], raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(names(name)[0], weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_divisors(args: ModelArgs) -> Tensor:
    """What llama.cpp divides each pair's frequency by: 1 for the fast ones, the factor for the slow ones."""
    return rope_frequencies(replace(args, rope_scaling=None)) / rope_frequencies(args)


def _tokenizer_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.format == "gguf":
        metadata = read_header(checkpoint.path).metadata
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    tokenizer = checkpoint.tokenizer
    special = {id: text for text, id in tokenizer.special_tokens.items()}
    ordinary = {id: tokenizer.token_bytes(id) for id in range(tokenizer.n_vocab) if id not in special}
    ranks = {token: id for id, token in ordinary.items()}
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [special.get(id) or visible(ordinary[id]) for id in range(tokenizer.n_vocab)],
        "tokenizer.ggml.token_type": [control if id in special else normal for id in range(tokenizer.n_vocab)],
        "tokenizer.ggml.merges": [
            " ".join(map(visible, last_merge(token, ranks))) for token in ranks if len(token) > 1
        ],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": min(tokenizer.stop_ids),
    }


def visible(token: bytes) -> str:
    """A token's bytes in GPT-2's alphabet, one character each."""
    return "".join(map(_ALPHABET.__getitem__, token))


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes this one; tiktoken's files hold only the results of merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def quantize_gguf(source: Path, target: Path, kind: str) -> None:
    """llama.cpp's own quantizer; `kind` is one of its names, such as Q8_0 or Q4_K_M."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quiet_llama_cpp()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not write {kind} from {source}; its message above says why.")


# --- Hugging Face and CTranslate2 -------------------------------------------------------------


def write_huggingface(source: Path, target: Path) -> None:
    """Write a directory that transformers' `LlamaForCausalLM` reads: config.json and model.safetensors, bfloat16."""
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    args = checkpoint.args
    weights = distinct_weights(checkpoint)
    for name, weight in weights.items():
        heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
        if heads:  # pairs side by side → the two halves of a head
            weight = weight.view(heads, args.head_dim // 2, 2, args.dim).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight.to(torch.bfloat16).contiguous()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in weights,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if (scaling := args.rope_scaling) is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config, indent=2))
    save_file({names(name)[1]: w for name, w in weights.items()}, target / "model.safetensors", {"format": "pt"})


class _IdsAsTokens:
    """All that CTranslate2's converter asks of a tokenizer: a name for each id. Ours are the ids themselves."""

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab
        self.bos_token, self.eos_token, self.unk_token = "0", "1", "2"

    def get_vocab(self) -> dict[str, int]:
        return {str(id): id for id in range(self.n_vocab)}


def write_ctranslate2(huggingface: Path, target: Path, quantization: str = "int8") -> None:
    """CTranslate2's own converter, from a Hugging Face directory; its tokens are the ids as text."""
    from ctranslate2.converters import TransformersConverter

    n_vocab = json.loads((huggingface / "config.json").read_text())["vocab_size"]

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_: Any, **__: Any) -> _IdsAsTokens:
            return _IdsAsTokens(n_vocab)

    Converter(str(huggingface)).convert(str(target), quantization=quantization)
