"""Writer of Hugging Face's format: configuration, tokenizer and weights.

The fields and their order are the same as in the published Llama models. transformers 4 and 5 can read them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.byte_level_bpe import TokenizerParts, is_hidden_control, tokenizer_parts
from llama_scratch.checkpoint.huggingface.reader import weight_names
from llama_scratch.checkpoint.huggingface.tokenizer_json import ROLES, named_token
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs, is_tied
from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer, replace_surrogates

if TYPE_CHECKING:
    from torch import Tensor

    from llama_scratch.precision.lazy_weight import Weight

# Maximum bytes of weights per file, as in the published models.
SHARD = 5_000_000_000
# Fields of tokenizer_config.json that are copied unchanged.
_KEPT_SETTINGS = {
    *("clean_up_tokenization_spaces", "model_input_names", "model_max_length", "padding_side", "truncation_side")
}


def write_huggingface(
    checkpoint: Checkpoint, weights: Mapping[str, Weight], directory: Path, progress: Progress
) -> None:
    """Write a model into a new directory in Hugging Face's format.

    Args:
        checkpoint: The model.
        weights: Its weights, under Meta's names.
        directory: The new directory.
        progress: Called with the number of bytes written.

    Raises:
        CheckpointError: If the format cannot hold the model.
    """
    parts = tokenizer_parts(checkpoint)
    ids = _ids(parts, checkpoint.tokenizer)
    files = {
        "config.json": {**_config(checkpoint, weights), **ids, **checkpoint.extras.ids},
        "generation_config.json": {**ids, **checkpoint.extras.generation},
        "tokenizer.json": _tokenizer(parts, checkpoint),
        "tokenizer_config.json": _tokenizer_config(parts, checkpoint),
    }
    directory.mkdir()
    for name, content in files.items():
        text = replace_surrogates(json.dumps(content, indent=2, ensure_ascii=False))
        (directory / name).write_text(text + "\n", encoding="utf-8")
    if checkpoint.license:
        (directory / "README.md").write_text(f"---\nlicense: {json.dumps(checkpoint.license)}\n---\n", encoding="utf-8")
    _write_weights(weights, checkpoint.args, directory, progress)


# --- Configuration ----------------------------------------------------------------------------


def _config(checkpoint: Checkpoint, weights: Mapping[str, Weight]) -> dict[str, Any]:
    args = checkpoint.args
    if args.rope_divisors:
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} scales its rotary embedding differently from Llama 3.1. "
            "Hugging Face's config.json cannot represent this. Use `to=gguf`."
        )
    scaling = args.rope_scaling and {
        "rope_type": "llama3",
        "factor": args.rope_scaling.factor,
        "low_freq_factor": args.rope_scaling.low_freq_factor,
        "high_freq_factor": args.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": args.rope_scaling.original_context,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "initializer_range": 0.02,
        "intermediate_size": args.ffn_dim,
        "max_position_embeddings": args.max_seq_len,
        "mlp_bias": False,
        "num_attention_heads": args.n_heads,
        "num_hidden_layers": args.n_layers,
        "num_key_value_heads": args.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": args.norm_eps,
        # transformers 5 has a new name for this field, but still reads this one.
        "rope_scaling": scaling,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": is_tied(weights),
        "torch_dtype": str(weights[EMBEDDING].dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": args.vocab_size,
    }


def _ids(parts: TokenizerParts, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields with the ids of bos, eos and padding."""
    stops = sorted(tokenizer.stop_ids)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id if parts.adds_bos else parts.roles.get("bos")}
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    return ids | ({"pad_token_id": parts.roles["padding"]} if "padding" in parts.roles else {})


# --- Tokenizer --------------------------------------------------------------------------------


def _tokenizer_config(parts: TokenizerParts, checkpoint: Checkpoint) -> dict[str, Any]:
    settings, names = checkpoint.extras.settings, checkpoint.tokenizer.names
    templates = settings.get("chat_template")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": templates if isinstance(templates, list) else parts.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.args.max_seq_len,
        **{name: value for name, value in settings.items() if name in _KEPT_SETTINGS},
        # An ordinary token in one of these fields would become an added token.
        **{field: text for field, role in ROLES.items() if (text := parts.text_of(role)) in names},
    }
    more = settings.get("additional_special_tokens")
    if isinstance(more, list):
        config["additional_special_tokens"] = [token for token in more if named_token({"": token}, "") in names]
    return {name: value for name, value in config.items() if value is not None}


def _tokenizer(parts: TokenizerParts, checkpoint: Checkpoint) -> dict[str, Any]:
    """Build the content of tokenizer.json for the tokenizers package."""
    tokenizer = checkpoint.tokenizer
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    # Unused tokens with names that would otherwise be read as ordinary tokens.
    unused = {
        id
        for name, id in tokenizer.names.items()
        if name not in tokenizer.special_tokens
        and name not in tokenizer.added_tokens
        and id in parts.texts
        and not is_hidden_control(name, ())
    }
    special = parts.special | checkpoint.extras.flagged | unused
    bos = parts.text_of("bos")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": parts.texts[id], **flags, "special": id in special}
            for id in sorted(special | parts.added)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _pre_tokenizers(parts.pattern, tokenizer.pattern)},
        "post_processor": _bos_in_front(bos, tokenizer.bos_id) if parts.adds_bos else _byte_level(regex=True),
        "decoder": _byte_level(regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.whole_pieces,  # a piece that equals a token becomes that token, as in tiktoken
            "vocab": {text: id for id, text in parts.texts.items()},
            "merges": parts.merges,
        },
    }


def _byte_level(*, regex: bool) -> dict[str, Any]:
    """Build a ByteLevel step. With `regex`, it splits text by GPT-2's pattern first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _pre_tokenizers(name: str | None, pattern: str) -> list[dict[str, Any]]:
    if name == "gpt-2":
        return [_byte_level(regex=True)]
    if name == "smollm":
        return [{"type": "Digits", "individual_digits": True}, _byte_level(regex=True)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(regex=False)]


def _bos_in_front(bos: str | None, id: int | None) -> dict[str, Any]:
    """Build the post-processor that puts bos before one text or both of a pair."""
    special = [{"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1)]
    texts = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [special[0], texts[0]],
        "pair": [special[0], texts[0], special[1], texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


# --- Weights ----------------------------------------------------------------------------------


def _write_weights(weights: Mapping[str, Weight], args: ModelArgs, directory: Path, progress: Progress) -> None:
    """Write model.safetensors, or shards with an index. Keep one shard in memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: weight for name, weight in weights.items() if name != OUTPUT or not is_tied(weights)}
    sizes = {name: weight.numel() * weight.dtype.itemsize for name, weight in stored.items()}
    theirs = {metas: name for name, metas in weight_names(args).items()}
    shards = list(_shards(sizes))
    done, total = 0, sum(sizes.values())
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in shard:
            tensors[theirs[name]] = _tensor(name, stored[name], args)
            done += sizes[name]
            progress("writing", done, total)
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # wraps operating system errors
            raise OSError(str(error)) from error
        shutil.copymode(directory / "config.json", directory / file)  # safetensors creates owner-only files
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Group names, in order, into shards of at most `SHARD` bytes."""
    names: list[str] = []
    for name in sizes:
        if names and sum(sizes[other] for other in names) + sizes[name] > SHARD:
            yield names
            names = []
        names.append(name)
    yield names


def _tensor(name: str, weight: Weight, args: ModelArgs) -> Tensor:
    """Return a weight as a tensor, with the rows of wq and wk in Hugging Face's order.

    In a head, Meta stores the two components of a rotated pair next to each other; Hugging Face stores all first
    components, then all second ones. Source: `permute` in transformers, convert_llama_weights_to_hf.py.
    """
    from llama_scratch.precision.lazy_weight import as_tensor

    tensor = as_tensor(weight)
    if ".wq." in name or ".wk." in name:
        pairs = tensor.view(-1, args.head_dim // 2, 2, args.dim)  # (heads, pairs, 2, dim)
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()
