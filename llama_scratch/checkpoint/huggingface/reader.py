"""Reader of Hugging Face directories: config.json, tokenizer.json, safetensors.

Source: `LlamaConfig` and `LlamaForCausalLM` in transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.chat_format import ChatFormat, TemplateFormat
from llama_scratch.checkpoint.base import Checkpoint, WeightStorage, check_shapes, name_of, reading, tie
from llama_scratch.checkpoint.extras import Extras
from llama_scratch.checkpoint.fields import Fields, read_object
from llama_scratch.checkpoint.huggingface.safetensors_file import Entry, find_weights
from llama_scratch.checkpoint.huggingface.tokenizer_json import ReadTokenizer, named_token, read_tokenizer_json
from llama_scratch.checkpoint.license import read_license
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs, RopeScaling
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, ModelNotFoundError, UnsupportedError, sanitize
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_bytes, without_mark
from llama_scratch.tokenizer import Tokenizer, replace_surrogates

if TYPE_CHECKING:
    from torch import Tensor

    from llama_scratch.precision.lazy_weight import Weight

CONFIG = "config.json"
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_MAX_TEMPLATE = 1 << 20
_ORIGINAL = "original_max_position_embeddings"
# Types of RoPE scaling that have no effect if their factor is 1.
_PLAIN_AT_1 = ("linear", "dynamic", "yarn", "llama3")
# Field of config.json with a token id → GGUF's name of the token's role.
_ID_ROLES = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def open_huggingface(directory: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a model in Hugging Face's format: read and check all but the weights.

    Args:
        directory: The model's directory.
        tokenizer: Path of a tokenizer.model that replaces the model's own.

    Raises:
        ModelNotFoundError: If a file is missing.
        CheckpointError: If a file is damaged or not supported.
    """
    with reading(directory):
        if not (directory / CONFIG).is_file():
            raise ModelNotFoundError(f"{CONFIG} not found in {directory}. Pass the directory that holds the model.")
        config = read_object(directory / CONFIG, required=True)
        args, says_tied = _model_args(config, directory / CONFIG)
        path, entries = find_weights(directory)
        check_shapes({name: entry.shape for name, entry in entries.items()}, args, path, weight_names(args))
        output = entries.get(_OUTPUT)
        tied = output is None or (says_tied and output.holds_the_same_as(entries[_EMBEDDING]))
        settings = _settings(directory)
        generation = read_object(directory / "generation_config.json")
        if tokenizer:
            read = ReadTokenizer(Tokenizer.from_meta(tokenizer), {}, frozenset(), ())
        else:
            read = _tokenizer(directory, config, generation, settings, args)
        files = tuple(dict.fromkeys(entry.file for entry in entries.values()))
        return Checkpoint(
            name=name_of(directory),
            format="huggingface",
            path=files[0],
            args=args,
            tokenizer=read.tokenizer,
            load=lambda progress: _load(entries, args, tied, progress),
            storage=lambda _: _stored(entries, tied),
            chat=_chat(directory, settings, read.tokenizer),
            files=files,
            license=read_license(directory),
            warnings=(
                *read.warnings,
                *_contradictory_ropes(config, args),
                *_contradictory_output(says_tied, tied, output, path),
            ),
            extras=Extras(
                roles=read.roles,
                flagged=read.flagged,
                generation=generation,
                settings=settings,
                ids={name: config[name] for name in _ID_ROLES if config.get(name) is not None},
            ),
        )


# --- Shape ------------------------------------------------------------------------------------


def _model_args(config: dict[str, Any], path: Path) -> tuple[ModelArgs, bool]:
    """Return dimensions and whether the output is tied, with transformers' defaults."""
    if (found := unsupported(config)) is not None:
        raise UnsupportedError(f"{path} says {found}. Use another model.")
    fields = Fields(config)
    try:
        n_heads = fields.integer("num_attention_heads")
        context = fields.integer("max_position_embeddings", default=2048)
        theta, scaling = _rope(config, context)
        args = ModelArgs(
            dim=fields.integer("hidden_size"),
            n_layers=fields.integer("num_hidden_layers", limit=1024),
            n_heads=n_heads,
            n_kv_heads=fields.integer("num_key_value_heads", default=n_heads),
            vocab_size=fields.integer("vocab_size"),
            ffn_dim=fields.integer("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_seq_len=context,
            head_dim=fields.integer("head_dim", default=0),
        )
        return args, fields.boolean("tie_word_embeddings", default=False)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removesuffix('.')}. {REDOWNLOAD_HINT}") from error


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Describe the first feature in a config that is not supported, or return None."""
    kind, architectures = config.get("model_type"), config.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or architectures != ["LlamaForCausalLM"]:
        return (
            f"that the architecture is {sanitize(architectures)} of the type '{sanitize(kind)}', "
            "expected LlamaForCausalLM of the type 'llama'"
        )
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        return f"that the weights are quantized (quantization_config, {sanitize(method)}), expected bf16, fp16 or fp32"
    if config.get("quantization") is not None:
        return "that MLX quantized the weights (quantization), expected bf16, fp16 or fp32"
    if config.get("hidden_act") not in (None, "silu", "swish"):  # two names of the same function
        return f"that hidden_act is '{sanitize(config['hidden_act'])}', expected silu"
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            return f"that {field} is {sanitize(config[field])}, expected linear layers without bias"
    return None


def _rope(config: Mapping[str, Any], context: int) -> tuple[float, RopeScaling | None]:
    """Read RoPE's base and scaling from `rope_scaling` or `rope_parameters`.

    transformers 5 writes the latter.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"the field rope_scaling is {sanitize(rope)}, expected an object.")
    fields = Fields(rope)
    theta = fields.number("rope_theta", default=Fields(config).number("rope_theta", default=10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise UnsupportedError(
            "only a part of each head is rotated (partial_rotary_factor), which is not supported. Use another model."
        )
    if kind == "default":
        return theta, None
    one = fields.number("factor", default=None) == 1 and rope.get("attention_factor") in (None, 1)
    if one and kind in _PLAIN_AT_1:
        return theta, None
    if kind != "llama3":
        raise UnsupportedError(
            f"the RoPE scaling is '{sanitize(kind)}', which is not supported. Use a model with the type 'llama3' or "
            "without scaling, or run this one in transformers."
        )
    factor, low, high = (fields.number(field) for field in ("factor", "low_freq_factor", "high_freq_factor"))
    if factor < 1 or low >= high:
        raise CheckpointError(
            f"the RoPE scaling has factor {factor:g}, low_freq_factor {low:g} and high_freq_factor {high:g}, "
            "expected a factor of at least 1, and low_freq_factor below high_freq_factor."
        )
    original = Fields(rope | _outer_original(config)).integer(_ORIGINAL, default=context)
    return theta, RopeScaling(factor, low, high, original)


def _outer_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the top-level original context, which transformers prefers, if any."""
    return {} if config.get(_ORIGINAL) is None else {_ORIGINAL: config[_ORIGINAL]}


def _contradictory_ropes(config: Mapping[str, Any], args: ModelArgs) -> Iterator[str]:
    """Warn about contradictory RoPE fields. The same field is used as in transformers."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if scaling and parameters:
        try:
            other = _rope({**config, "rope_scaling": None}, args.max_seq_len)
        except CheckpointError:
            other = None
        if other != (args.rope_theta, args.rope_scaling):
            yield f"rope_scaling and rope_parameters in {CONFIG} contradict each other. rope_scaling is used."
    rope = scaling or parameters or {}
    for field, used in (("rope_theta", rope), (_ORIGINAL, config)):
        values = [fields[field] for fields in (rope, config) if fields.get(field) is not None]
        if len(values) == 2 and values[0] != values[1]:
            one, other_one = map(sanitize, values)
            yield f"{CONFIG} has {field} {one} and {other_one}. {sanitize(used[field])} is used."


def _contradictory_output(says_tied: bool, tied: bool, output: Entry | None, path: Path) -> Iterator[str]:
    """Warn if `tie_word_embeddings` contradicts the weights, which take precedence."""
    if output is None and not says_tied:
        yield f"{path.name} has no {_OUTPUT}, though {CONFIG} does not tie it to the embedding. The embedding is used."
    if output is not None and says_tied and not tied:
        yield (
            f"{CONFIG} ties {_OUTPUT} to the embedding (tie_word_embeddings), but {path.name} holds different "
            "weights for it. The weights in the file are used."
        )


# --- Tokenizer and chat format ----------------------------------------------------------------


def _settings(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json. Missing fields come from special_tokens_map.json."""
    named = read_object(directory / "special_tokens_map.json")
    settings = read_object(directory / "tokenizer_config.json")
    return {**named, **{name: value for name, value in settings.items() if value is not None}}


def _tokenizer(
    directory: Path, config: dict[str, Any], generation: dict[str, Any], settings: dict[str, Any], args: ModelArgs
) -> ReadTokenizer:
    path, metas = directory / "tokenizer.json", directory / "tokenizer.model"
    if path.is_file():
        stops = {id for values in (generation, config) for id in _ids(values.get("eos_token_id"), directory)}
        read = read_tokenizer_json(path, settings, stops, args.vocab_size)
        given = {role: config.get(name) for name, role in _ID_ROLES.items()}
        # Unedited default configurations have bos 1 and eos 2, even if those ids belong to other tokens.
        named = set(read.tokenizer.names.values())
        by_id = {
            role: id
            for role, id in given.items()
            if type(id) is int and (id in named or (role == "padding" and 0 <= id < args.vocab_size))
        }
        return replace(read, roles={**by_id, **read.roles})
    if metas.is_file():
        return ReadTokenizer(Tokenizer.from_meta(str(metas)), {}, frozenset(), ())
    raise ModelNotFoundError(
        f"tokenizer.json not found in {directory}. Copy it there from where the model came from, "
        "or pass a tokenizer.model as `tokenizer`."
    )


def _ids(value: Any, directory: Path) -> list[int]:
    """Return a list of ids for a field with one id, a list of ids, or None."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise CheckpointError(
            f"{directory}: eos_token_id is {sanitize(value)}, expected one or several integers. {REDOWNLOAD_HINT}"
        )
    return ids


def _chat(directory: Path, settings: dict[str, Any], tokenizer: Tokenizer) -> ChatFormat | None:
    """Read the chat template from its file or tokenizer_config.json, if there is one."""
    file = directory / "chat_template.jinja"
    template: Any
    if file.is_file():
        data = without_mark(read_bytes(file, _MAX_TEMPLATE), sanitize(file, 200))
        template = data.decode("utf-8", errors="replace")
    else:
        template = settings.get("chat_template")
        if template is None:
            template = read_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or template == "":
        return None
    if not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template is {sanitize(template)}, expected text. {REDOWNLOAD_HINT}")
    template, bos, eos = (
        replace_surrogates(text or "")
        for text in (template, named_token(settings, "bos_token"), named_token(settings, "eos_token"))
    )
    return TemplateFormat(template, bos, eos, tuple(tokenizer.special_tokens))


# --- Weights ----------------------------------------------------------------------------------


def _load(entries: Mapping[str, Entry], args: ModelArgs, tied: bool, progress: Progress) -> dict[str, Weight]:
    """Map the tensors under Meta's names. Copy only wq and wk, to reorder their rows."""
    from safetensors import SafetensorError, safe_open

    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}
    names = weight_names(args)
    copied = sum(entry.nbytes for name, entry in entries.items() if _part(names[name]) in heads)
    require_memory(copied, "Copying wq and wk in Meta's order")
    weights: dict[str, Weight] = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        try:
            with reading(file), safe_open(file, framework="pt") as opened:
                for name in [name for name, entry in entries.items() if entry.file == file]:
                    tensor, entry = opened.get_tensor(name), entries[name]
                    if tensor.shape != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
                        raise SafetensorError(f"{name} has changed")
                    part = _part(names[name])
                    weights[names[name]] = in_pairs(tensor, heads[part]) if part in heads else tensor
                    progress("reading", len(weights), len(entries))
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} cannot be read as tensors ({sanitize(error, 100)}). {REDOWNLOAD_HINT}"
            ) from error
    if tied:
        weights.pop(OUTPUT, None)
    return tie(weights)


def in_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of wq or wk from Hugging Face's order to Meta's.

    RoPE rotates the components j and j + head_dim/2 of a head together in transformers, but 2j and 2j + 1 in Meta's
    code. Therefore transformers stores the first components of all pairs of a head, then the second components.
    Source: the inverse of `permute` in transformers' convert_llama_weights_to_hf.py.

    Args:
        weight: (n_heads·head_dim, dim), in Hugging Face's order.
        n_heads: Number of heads.

    Returns:
        A copy in Meta's order, with the same shape.
    """
    rows, dim = weight.shape
    return weight.view(n_heads, 2, rows // n_heads // 2, dim).transpose(1, 2).reshape(rows, dim)


def _stored(entries: Mapping[str, Entry], tied: bool) -> WeightStorage:
    import torch

    return WeightStorage(
        types=dict(Counter(entry.dtype for entry in entries.values())),
        tied=tied or _OUTPUT not in entries,
        dtype=getattr(torch, entries[_EMBEDDING].dtype),
    )


def weight_names(args: ModelArgs) -> dict[str, str]:
    """Map Hugging Face's names of weights to Meta's.

    model.layers.3.self_attn.q_proj.weight → layers.3.attention.wq.weight
    """
    names = {_EMBEDDING: EMBEDDING, "model.norm.weight": "norm.weight", _OUTPUT: OUTPUT}
    for layer in range(args.n_layers):
        for name, metas in _LAYER_NAMES.items():
            names[f"model.layers.{layer}.{name}.weight"] = f"layers.{layer}.{metas}.weight"
    return names


def _part(name: str) -> str:
    """layers.3.attention.wq.weight → wq"""
    return name.split(".")[-2]
