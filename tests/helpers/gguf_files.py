"""GGUF files of a small model.

They are written by the gguf package, assembled from parts that a test can corrupt, or split.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import bytes_to_unicode
from llama_scratch.config import ModelArgs
from llama_scratch.errors import CheckpointError, LlamaScratchError
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected, little_time_and_memory

ARGS = ModelArgs(
    dim=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    vocab_size=272,
    ffn_dim=96,
    norm_eps=2**-17,  # exact in the float32 of the file
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=512,
)
# GGUF's name → Meta's, written out by hand for the two layers.
NAMES = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight"}
for _layer in (0, 1):
    NAMES |= {
        f"blk.{_layer}.attn_norm.weight": f"layers.{_layer}.attention_norm.weight",
        f"blk.{_layer}.attn_q.weight": f"layers.{_layer}.attention.wq.weight",
        f"blk.{_layer}.attn_k.weight": f"layers.{_layer}.attention.wk.weight",
        f"blk.{_layer}.attn_v.weight": f"layers.{_layer}.attention.wv.weight",
        f"blk.{_layer}.attn_output.weight": f"layers.{_layer}.attention.wo.weight",
        f"blk.{_layer}.ffn_norm.weight": f"layers.{_layer}.ffn_norm.weight",
        f"blk.{_layer}.ffn_gate.weight": f"layers.{_layer}.feed_forward.w1.weight",
        f"blk.{_layer}.ffn_down.weight": f"layers.{_layer}.feed_forward.w2.weight",
        f"blk.{_layer}.ffn_up.weight": f"layers.{_layer}.feed_forward.w3.weight",
    }
MERGES = ["t h", "e r", "i n", "th e", "o n", "a t", "e n", "th in", "o u", "s t", "a r", "h e", "i s", "e d"]


def arrays(*, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Random weights of `ARGS` under GGUF's names."""
    rng = np.random.default_rng(seed)
    shapes = ARGS.weight_shapes()
    names = NAMES if tied else NAMES | {"output.weight": "output.weight"}
    return {name: (rng.normal(size=shapes[meta]) / 8).astype(np.float32) for name, meta in names.items()}


def vocabulary() -> tuple[list[str], list[int]]:
    """Token texts in GPT-2's byte alphabet, and token types.

    The tokens are 256 bytes, merged tokens, an end and an unknown token.
    """
    texts = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    return [*texts, "<|endoftext|>", "<|unknown|>"], [1] * len(texts) + [3, 3]


def write_with_gguf(path: Path, quant: Quant, *, tied: bool = True) -> Path:
    """Write a small model with the gguf package; norms are F32.

    Args:
        path: The file.
        quant: Type of the weights.
        tied: Whether the output weight is the embedding.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(ARGS.max_seq_len)
    writer.add_embedding_length(ARGS.dim)
    writer.add_block_count(ARGS.n_layers)
    writer.add_feed_forward_length(ARGS.ffn_dim)
    writer.add_head_count(ARGS.n_heads)
    writer.add_head_count_kv(ARGS.n_kv_heads)
    writer.add_layer_norm_rms_eps(ARGS.norm_eps)
    writer.add_rope_freq_base(ARGS.rope_theta)
    texts, types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(270)
    writer.add_unk_token_id(271)
    for name, array in arrays(tied=tied).items():
        kind = Quant.F32 if array.ndim == 1 else quant
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def uint(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + text(value)


def strings(values: list[str]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def ints(values: list[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


@dataclass
class File:
    """The parts of a GGUF file, each of which a test can corrupt.

    Args:
        magic: Magic bytes.
        version: Format version.
        n_tensors: Tensor count, by default the actual one.
        n_metadata: Metadata count, by default the actual one.
        metadata: (key, type and value as bytes).
        tensors: (name, dims with the fastest first, type, offset).
        data: The tensor data.
        alignment: Alignment of the data in bytes.
    """

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_metadata: int | None = None
    metadata: list[tuple[str, bytes]] = field(default_factory=list)
    tensors: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)
    data: bytes = b""
    alignment: int = 32

    def set(self, key: str, value: bytes | None) -> File:
        """Replace a metadata value; None removes it."""
        self.metadata = [(k, v) for k, v in self.metadata if k != key]
        if value is not None:
            self.metadata.append((key, value))
        return self

    def change(self, tensor: str, *, dims: tuple[int, ...] | None = None, kind: int | None = None, **more: Any) -> File:
        """Replace fields of a tensor's entry.

        Args:
            tensor: Name of the tensor.
            dims: New dimensions.
            kind: New type.
            more: New `name` or `offset`.
        """
        self.tensors = [
            (more.get("name", n), d if dims is None else dims, k if kind is None else kind, more.get("offset", o))
            if n == tensor
            else (n, d, k, o)
            for n, d, k, o in self.tensors
        ]
        return self

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_metadata = len(self.metadata) if self.n_metadata is None else self.n_metadata
        head = struct.pack("<4sIQQ", self.magic, self.version, n_tensors, n_metadata)
        head += b"".join(text(key) + value for key, value in self.metadata)
        for name, dims, kind, offset in self.tensors:
            head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        return head + bytes(-len(head) % self.alignment)

    def write(self, path: Path) -> Path:
        # Remove the old file first, because its tensors may still be mapped.
        path.unlink(missing_ok=True)
        path.write_bytes(self.header() + self.data)
        return path


def whole_file(*, without: str = "") -> File:
    """The small model in F32, except the tensor `without`."""
    texts, types = vocabulary()
    file = File()
    file.metadata = [
        ("general.architecture", string("llama")),
        ("llama.context_length", uint(ARGS.max_seq_len)),
        ("llama.embedding_length", uint(ARGS.dim)),
        ("llama.block_count", uint(ARGS.n_layers)),
        ("llama.feed_forward_length", uint(ARGS.ffn_dim)),
        ("llama.attention.head_count", uint(ARGS.n_heads)),
        ("llama.attention.head_count_kv", uint(ARGS.n_kv_heads)),
        ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, ARGS.norm_eps)),
        ("llama.rope.freq_base", struct.pack("<If", 6, ARGS.rope_theta)),
        ("tokenizer.ggml.model", string("gpt2")),
        ("tokenizer.ggml.pre", string("smollm")),
        ("tokenizer.ggml.tokens", strings(texts)),
        ("tokenizer.ggml.token_type", ints(types)),
        ("tokenizer.ggml.merges", strings(MERGES)),
        ("tokenizer.ggml.eos_token_id", uint(270)),
        ("tokenizer.ggml.unknown_token_id", uint(271)),
    ]
    for name, array in arrays().items():
        if name != without:
            file.tensors.append((name, tuple(reversed(array.shape)), 0, len(file.data)))
            file.data += array.tobytes()
    return file


def short(value: int) -> bytes:
    """A uint16 value, which gguf-split uses for the number and the count of files."""
    return struct.pack("<IH", 2, value)


def whole(value: int) -> bytes:
    """An int32 value, which gguf-split uses for the number of tensors."""
    return struct.pack("<Ii", 5, value)


def cut(*sizes: int) -> list[File]:
    """Split the small model into files with `sizes` tensors, as gguf-split does.

    The metadata is in the first file.
    """
    original = whole_file()
    files, ends = [], [*(offset for *_, offset in original.tensors), len(original.data)]
    first = 0
    for number, size in enumerate(sizes):
        file = File(metadata=list(original.metadata) if number == 0 else [])
        file.set("split.no", short(number)).set("split.count", short(len(sizes)))
        file.set("split.tensors.count", whole(sum(sizes)))
        start = ends[first]
        file.tensors = [(n, d, k, o - start) for n, d, k, o in original.tensors[first : first + size]]
        file.data = original.data[start : ends[first + size]]
        first += size
        files.append(file)
    return files


def place(directory: Path, number: int, count: int = 3) -> Path:
    return directory / f"small-{number:05}-of-{count:05}.gguf"


def write(directory: Path, files: Sequence[File]) -> list[Path]:
    """Write the files with the names that gguf-split uses."""
    return [file.write(place(directory, i, len(files))) for i, file in enumerate(files, start=1)]


def load_rejected(path: Path, *words: object, error: type[LlamaScratchError] = CheckpointError) -> str:
    """Load a file that must be rejected within limits of time and memory.

    Args:
        path: The file, which the message must name.
        words: More texts that the message must contain.
        error: The expected class.

    Returns:
        The message.
    """
    with little_time_and_memory():
        return assert_rejected(lambda: open_checkpoint(path).load(silent), error, path, *words)
