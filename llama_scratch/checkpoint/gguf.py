"""GGUF files of the `llama` architecture: one file with shape, tokenizer and quantised weights.

The header is walked here, every count and size checked against the file before it is believed: the
gguf package's reader trusts them, and a 43-byte file can keep it busy for ever. What the blocks of
each quantisation mean is the package's knowledge: its sizes, and its dequantisation to float32.
Source: the GGUF specification in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.chat import ChatFormat, TemplateFormat
from llama_scratch.checkpoint.base import Checkpoint, Stored, check_shapes, name_of, reading, tie
from llama_scratch.config import Fields, ModelArgs
from llama_scratch.errors import FETCH_AGAIN, CheckpointError, printable
from llama_scratch.memory import require_memory
from llama_scratch.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# GPT-2's byte-level pattern behind a step that makes each digit a piece of its own, in one expression.
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
_PATTERNS = {"smollm": SMOLLM_PATTERN}
# Control tokens that end a text in the models that have them, beside the one that the file names.
_STOPS = {"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"}

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


def open_gguf(path: Path, tokenizer: str | None = None) -> Checkpoint:
    """Read and check the header; `tokenizer` is a tokenizer.model that replaces the file's own."""
    header = read_header(path)
    replacement = Tokenizer.from_meta(tokenizer) if tokenizer else None
    try:
        args = _model_args(header)
        own_tokenizer = replacement or _tokenizer(header.metadata)
        chat = _chat(header.metadata, own_tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_shapes({_meta_name(tensor.name): tensor.shape for tensor in header.tensors}, args, path)
    return Checkpoint(
        # "SmolLM2-135M-Instruct.Q4_1" → "SmolLM2-135M-Instruct"
        name=name_of(path),
        format="gguf",
        path=path,
        args=args,
        tokenizer=own_tokenizer,
        load=lambda progress: tie(_dequantised(path, header.tensors, progress)),
        inspect=lambda _: _stored(header),
        chat=chat,
    )


# --- The header -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` as torch counts it, `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """A GGUF file's metadata and table of tensors, every place of which lies within the file."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]


# GGUF's type number of a metadata value → struct's letter; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Several times the largest vocabulary or list of merges.
_MAX_ARRAY = 1 << 19


class _Cursor:
    """Reads values one after the other and never beyond the end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they start."""
        start = self.position
        if size > len(self.data) - start:
            raise CheckpointError(f"{len(self.data):,} bytes, expected {size:,} more at byte {start:,}; {FETCH_AGAIN}")
        self.position = start + size
        return start

    def scalars(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{letter}"
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))

    def scalar(self, letter: str) -> Any:
        return self.scalars(letter)[0]

    def string(self) -> str:
        start = self.take(size := self.scalar("Q"))
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            return self.array()
        return self.scalar(self._letter(kind))

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ARRAY:
            raise CheckpointError(f"an array of {count:,} elements, expected at most {_MAX_ARRAY:,}; {FETCH_AGAIN}")
        if kind == 8:
            return [self.string() for _ in range(count)]
        return list(self.scalars(self._letter(kind), count))

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(
                f"a metadata value of the unknown type {kind} at byte {self.position:,}; {FETCH_AGAIN}"
            )
        return _SCALARS[kind]


def read_header(path: Path) -> Header:
    """Metadata and tensor table of a GGUF file, version 2 or 3. Raises `CheckpointError` for any other file."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise CheckpointError(f"{path} has under 24 bytes, expected a GGUF file; {FETCH_AGAIN}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(_Cursor(data))
            except CheckpointError as error:
                raise CheckpointError(f"{path} is not a whole GGUF file: {error}") from error


def _read_header(cursor: _Cursor) -> Header:
    magic, version, n_tensors, n_metadata = struct.unpack_from("<4sIQQ", cursor.data, cursor.take(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise CheckpointError(
            f"it begins with {magic!r} and version {version}, expected GGUF version 2 or 3; {FETCH_AGAIN}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(n_metadata):  # each takes bytes of the file, so a lie about their number soon ends
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"the metadata key '{printable(key)}' stands there twice; {FETCH_AGAIN}")
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if n_dims > 4:
            raise CheckpointError(
                f"the tensor '{printable(name)}' has {n_dims} dimensions, expected at most 4; {FETCH_AGAIN}"
            )
        dims, type_, offset = cursor.scalars("Q", n_dims), cursor.scalar("I"), cursor.scalar("Q")
        table.append((name, tuple(reversed(dims)), type_, offset))
    alignment = Fields(metadata).integer("general.alignment", default=32)
    if alignment & (alignment - 1):
        raise CheckpointError(f"general.alignment is {alignment}, expected a power of two; {FETCH_AGAIN}")
    data_start = _aligned(cursor.position, alignment)
    tensors = [_place(entry, data_start, len(cursor.data)) for entry in table]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError(f"a tensor stands there twice; {FETCH_AGAIN}")
    # One lies behind the other and the last one ends the file, so that no damage sends a reader elsewhere.
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start != _aligned(end, alignment):
            raise CheckpointError(
                f"the tensor '{printable(tensor.name)}' begins at byte {tensor.start:,}, "
                f"expected it at {_aligned(end, alignment):,}; {FETCH_AGAIN}"
            )
        end = tensor.start + tensor.size
    if len(cursor.data) not in (end, _aligned(end, alignment)):
        raise CheckpointError(f"{len(cursor.data):,} bytes, expected {end:,} by its table of tensors; {FETCH_AGAIN}")
    return Header(metadata, tensors)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _place(entry: tuple[str, tuple[int, ...], int, int], data_start: int, file_size: int) -> TensorInfo:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, shape, type_, offset = entry
    try:
        block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError):
        raise CheckpointError(f"the tensor '{printable(name)}' has the unknown type {type_}; {FETCH_AGAIN}") from None
    count = math.prod(shape)
    size = count // block * block_size
    start = data_start + offset
    if not shape or count == 0 or shape[-1] % block or start + size > file_size:
        raise CheckpointError(
            f"{file_size:,} bytes, expected the tensor '{printable(name)}' of shape {shape} at byte {start:,}; "
            + FETCH_AGAIN
        )
    return TensorInfo(name, shape, type_, start, size)


# --- What the header says ---------------------------------------------------------------------


def _model_args(header: Header) -> ModelArgs:
    fields = Fields(header.metadata)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"the architecture is '{printable(architecture)}', expected 'llama'; use another model.")
    scaling = header.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "llama.expert_count" in header.metadata:
        raise CheckpointError("it has scaled RoPE or experts, expected a plain Llama; use another file.")
    dims = {tensor.name: tensor.shape for tensor in header.tensors}
    n_heads = fields.integer("llama.attention.head_count")
    if "token_embd.weight" not in dims:
        raise CheckpointError(f"the tensor 'token_embd.weight' is missing; {FETCH_AGAIN}")
    args = ModelArgs(
        dim=fields.integer("llama.embedding_length"),
        n_layers=fields.integer("llama.block_count", most=1024),
        n_heads=n_heads,
        n_kv_heads=fields.integer("llama.attention.head_count_kv", default=n_heads),
        vocab_size=dims["token_embd.weight"][0],
        ffn_dim=fields.integer("llama.feed_forward_length"),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("llama.rope.freq_base", default=10_000.0),
        rope_scaling=None,
        max_seq_len=fields.integer("llama.context_length"),
    )
    for field in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        if fields.integer(field, default=args.head_dim) != args.head_dim:
            raise CheckpointError(f"{field} is not dim / n_heads = {args.head_dim}; use another file.")
    return args


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PATTERNS:
        raise CheckpointError(
            f"the tokenizer is '{printable(kind)}' with the pattern '{printable(pre)}', expected 'gpt2' with "
            f"{' or '.join(map(repr, _PATTERNS))}; name a tokenizer.model with --tokenizer, or use another file."
        )
    texts, types = _list(metadata, "tokenizer.ggml.tokens", str), _list(metadata, "tokenizer.ggml.token_type", int)
    if len(texts) != len(types):
        raise CheckpointError(f"{len(texts)} tokens with {len(types)} types, expected one each; {FETCH_AGAIN}")
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks: dict[bytes, int] = {}
    special: dict[str, int] = {}
    for id, (text, type_) in enumerate(zip(texts, types, strict=True)):
        if type_ == 1:  # an ordinary token
            try:
                ranks[bytes(map(byte_of.__getitem__, text))] = id
            except KeyError:
                raise CheckpointError(
                    f"the token {id}, '{printable(text)}', is not in GPT-2's byte alphabet; {FETCH_AGAIN}"
                ) from None
        else:
            special[text] = id
    if len(ranks) + len(special) != len(texts) or b"" in ranks or "" in special:
        raise CheckpointError(f"a token of the vocabulary is empty or stands there twice; {FETCH_AGAIN}")
    _check_merges(_list(metadata, "tokenizer.ggml.merges", str), byte_of, ranks)

    eos, bos, unknown = (_named(metadata, special, field) for field in ("eos", "bos", "unknown"))
    if metadata.get("tokenizer.ggml.add_bos_token") is not True:
        bos = None
    stops = {text for text in special if text in _STOPS or text == eos}
    return Tokenizer(ranks, special, _PATTERNS[pre], bos=bos, stops=stops, unknown=unknown)


def _named(metadata: dict[str, Any], special: dict[str, int], field: str) -> str | None:
    """The special token that the file has in a part, such as "eos"."""
    id = metadata.get(f"tokenizer.ggml.{field}_token_id")
    return next((text for text, special_id in special.items() if special_id == id), None)


def _chat(metadata: dict[str, Any], tokenizer: Tokenizer) -> ChatFormat | None:
    """The chat template that the file carries; a base model's file has none."""
    template = metadata.get("tokenizer.chat_template")
    if not template:
        return None
    if not isinstance(template, str):
        raise CheckpointError(
            f"the metadata field tokenizer.chat_template is a {type(template).__name__}, expected text; {FETCH_AGAIN}"
        )
    special = tokenizer.special_tokens
    bos, eos = (_named(metadata, special, field) or "" for field in ("bos", "eos"))
    return TemplateFormat(template, bos, eos, tuple(special))


def _check_merges(merges: list[str], byte_of: dict[str, int], ranks: dict[bytes, int]) -> None:
    """tiktoken merges by the rank of the result: right only where ids grow in the order of the merges."""
    previous = -1
    for merge in merges:
        left, space, right = merge.partition(" ")
        token = bytes(byte_of.get(char, 0) for char in left + right)
        rank = ranks.get(token, -1)
        if not space or rank <= previous:
            raise CheckpointError(
                f"the merge '{printable(merge)}' is out of the order of the token ids; use another file."
            )
        previous = rank
    merged = sum(len(token) > 1 for token in ranks)
    if len(merges) != merged:
        raise CheckpointError(f"{len(merges)} merges make {merged} tokens, expected one each; {FETCH_AGAIN}")


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(element) is kind for element in value):
        raise CheckpointError(f"the metadata field {key} is missing or of the wrong type; {FETCH_AGAIN}")
    return value


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's way to write any byte as one visible character: byte → character.

    Printable Latin-1 stands for itself; the others take the characters from U+0100 on, in order.
    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


# --- The weights ------------------------------------------------------------------------------


def _stored(header: Header) -> Stored:
    import torch
    from gguf import GGMLQuantizationType

    return Stored(
        types=dict(Counter(GGMLQuantizationType(tensor.type).name for tensor in header.tensors)),
        tied=all(tensor.name != "output.weight" for tensor in header.tensors),
        dtype=torch.float32,  # all are dequantised
    )


def _dequantised(path: Path, tensors: list[TensorInfo], progress: Progress) -> dict[str, Tensor]:
    """All weights as float32 under Meta's names. q and k need no permutation: llama's GGUF holds Meta's layout."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    require_memory(sum(4 * math.prod(tensor.shape) for tensor in tensors), f"{path.name} as float32")
    with reading(path):
        data = np.memmap(path, dtype=np.uint8, mode="r")

    def load(tensor: TensorInfo) -> Tensor:
        raw = data[tensor.start : tensor.start + tensor.size]
        if raw.size != tensor.size:
            raise CheckpointError(f"{path} became shorter while it was read, at {tensor.name}; {FETCH_AGAIN}")
        try:
            with np.errstate(all="ignore"):
                values = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.type))
        except NotImplementedError as error:
            kind = GGMLQuantizationType(tensor.type).name
            raise CheckpointError(
                f"{path}: {tensor.name} is in {kind}, which the gguf package cannot read; use another file."
            ) from error
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {tensor.name} holds values that are not numbers; {FETCH_AGAIN}")
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(tensor.shape))

    weights: dict[str, Tensor] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            for tensor, weight in zip(tensors, pool.map(load, tensors), strict=True):
                weights[_meta_name(tensor.name)] = weight
                progress("dequantising", len(weights), len(tensors))
        finally:
            pool.shutdown(cancel_futures=True)
    return weights


def _meta_name(name: str) -> str:
    """blk.3.attn_q.weight → layers.3.attention.wq.weight; a name that is not known stays what it is."""
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in _LAYER_NAMES:
        return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return _NAMES.get(name, name)
