"""Hugging Face directories of a small model, written by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_scratch.checkpoint.byte_level_bpe import bytes_to_unicode
from llama_scratch.tokenizer import LLAMA3_PATTERN

MERGES = [("t", "h"), ("e", "r"), ("i", "n"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("1", "2"), ("12", "3")]
SPECIAL = ["<|endoftext|>", "<|begin|>", "<|im_end|>"]
N_VOCAB = 256 + len(MERGES) + len(SPECIAL)
# Small, but with grouped key heads and a feed-forward width that is not a multiple of the hidden size.
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": N_VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes


PRE = {
    "gpt-2": BYTE_LEVEL,
    "smollm": sequence(DIGITS, BYTE_LEVEL),
    "llama-bpe": sequence(split(LLAMA3_PATTERN), BYTE_LEVEL | {"use_regex": False}),
}


def template(*front: str) -> dict[str, Any]:
    """A post-processor that prepends tokens to a text."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in front] + [
        {"Sequence": {"id": "A", "type_id": 0}}
    ]
    known = {name: {"id": name, "ids": [N_VOCAB - 3 + SPECIAL.index(name)], "tokens": [name]} for name in front}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


def tokenizer_json() -> dict[str, Any]:
    """A small tokenizer.json: the bytes, a few merges and three special tokens."""
    tokens = [*bytes_to_unicode().values(), *(left + right for left, right in MERGES)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": PRE["smollm"],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [list(merge) for merge in MERGES],
        },
    }


def write(directory: Path, file: str, value: Any) -> Path:
    """Write a JSON file and return the directory.

    Args:
        directory: The directory.
        file: The file name.
        value: The contents.
    """
    (directory / file).write_text(json.dumps(value), encoding="utf-8")
    return directory


def random_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Create transformers' own model with random weights.

    The weights are large enough that every part affects the logits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    make_config: Any = LlamaConfig  # its type annotations lack some settings
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(make_config(**CONFIG | {"tie_word_embeddings": False} | changes))
    for name, weight in model.named_parameters():
        scale = 3 if "q_proj" in name or "k_proj" in name else 1
        weight.data = torch.randn_like(weight) * scale * weight.shape[-1] ** -0.5 if weight.ndim > 1 else weight.data
        weight.data = weight.data + (0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0)
    return model.to(dtype).eval().requires_grad_(False)


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model with transformers, and the small tokenizer."""
    model.save_pretrained(directory, **options)
    return write(directory, "tokenizer.json", tokenizer_json())


def edited(directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Write an edited tokenizer.json to a directory."""
    values = tokenizer_json()
    edit(values)
    return write(directory, "tokenizer.json", values)


def witness(path: Path) -> Callable[[str], list[int]]:
    """The encode function of the `tokenizers` package for the same file."""
    from tokenizers import Tokenizer as HuggingFaces

    theirs = HuggingFaces.from_file(str(path))

    def encode(text: str) -> list[int]:
        ids: list[int] = theirs.encode(text).ids
        return ids

    return encode
