"""Fuzz every reader of untrusted input.

    python -m tests.trust.fuzz [--target NAME] [--count N] [--seed N] [--jobs N]

A reader must accept a mutated file or reject it with an error message. The inputs are small valid files with
structure-aware mutations: JSON values of other types, numbers at the limits of their range, pickle opcodes, counts and
lengths in headers, and random bits and byte ranges. An input depends only on its target, the seed and its number. A
reader runs in a separate process with a memory limit and a deadline, so crashes and hangs are findings too. Inputs that
caused a finding are stored in `cases/`.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import mmap
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import typer
from safetensors.torch import save
from torch import Tensor

from llama_scratch.chat_format import ChatFormat, Message, TemplateFormat
from llama_scratch.checkpoint.checksums import parse_checklist
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.fields import read_object
from llama_scratch.checkpoint.gguf import reader as gguf
from llama_scratch.checkpoint.huggingface import reader as huggingface
from llama_scratch.checkpoint.huggingface import safetensors_file
from llama_scratch.checkpoint.huggingface.tokenizer_json import read_tokenizer
from llama_scratch.checkpoint.meta.params import parse_params
from llama_scratch.checkpoint.meta.pickle_file import load_pth
from llama_scratch.cli.app import app
from llama_scratch.cli.config_file import read_config
from llama_scratch.errors import CheckpointError, LlamaScratchError
from llama_scratch.precision.weight_cache import PackedWeightCache
from llama_scratch.repl import session_file
from llama_scratch.repl.history import FileHistory
from llama_scratch.system.progress import silent
from llama_scratch.system.template_process import TemplateProcess
from llama_scratch.tokenizer import StreamDecoder, Tokenizer, parse_tokenizer_model
from tests.helpers.checkpoints import tiny_params, tokenizer_file, write_meta
from tests.trust import record

CASES = Path(__file__).parent / "cases"
COUNT = 1_000_000
SECONDS = 1.0  # maximum CPU time per input
ROOM = 128 << 20  # maximum additional memory of the process in bytes, for any file size
PEAK_FLOOR, PEAK_PER_BYTE = 4 << 20, 64  # maximum size of the Python objects in bytes: floor, and per input byte
SAMPLE = 101  # one input of this many is traced with tracemalloc
RENEWED = 50_000  # inputs per process: tracemalloc leaks some kilobytes each time
STALLED = 30.0  # seconds without a new input until native code counts as hung

PARAMS = tiny_params(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim_multiplier=1.0)
MESSAGES = [Message("system", "Be <|eot_id|> brief."), Message("user", "Hello"), Message("assistant", "Hi")]


_TEMPLATES = TemplateProcess()


class HangError(BaseException):
    """The reader takes too long. A `BaseException`, so that no reader catches it."""


# --- Mutations --------------------------------------------------------------------------------

_NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
)
_NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def change_bytes(data: bytes, chance: Random) -> bytes:
    """Apply one to four mutations: bits, bytes, ranges, numbers, truncation."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        size = len(changed)
        at = chance.randrange(size + 1) if chance.random() < 0.5 else chance.randrange(min(size, 64) + 1)
        length = chance.choice((1, 1, 2, 4, 8, 64, 500))
        kind = chance.randrange(7)
        if kind == 0 and at < size:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 30))
        elif kind == 4:
            number = chance.choice(_NUMBERS)
            width = chance.choice((2, 4, 8))
            changed[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind == 5:
            changed[at : at + length] = chance.randbytes(length)
        elif chance.random() < 0.3:
            del changed[at:]
    return bytes(changed)


class _Raw(float):
    """A number that JSON serializes as a given text."""

    def __new__(cls, text: str) -> _Raw:
        found = super().__new__(cls, 0.5)
        found.text = text
        return found

    text: str

    def __repr__(self) -> str:
        return self.text


def _odd(chance: Random) -> Any:
    """Choose an unexpected value."""
    return chance.choice(
        (
            *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
            *("", "a", "-1", "\ud800", "\0", "\u202e", "[PAD1]", "x" * 5_000, "𝒳" * 50, "<|eot_id|>", "{{ 1 }}"),
            *([], {}, [None], [[]], {"a": 1}, [0] * 2_000, ["a"] * 2_000, {"": ""}, {"content": "<s>"}, [[1, 2]] * 9),
        )
    )


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _nodes(inner, (*path, key))


@cache
def _tree(data: bytes) -> tuple[Any, list[tuple[Any, ...]]]:
    value = json.loads(data)
    return value, list(_nodes(value))


def change_json(data: bytes, chance: Random) -> bytes:
    """Change values and keys of JSON, or nest deeply; sometimes change bytes."""
    if chance.random() < 0.2:
        return change_bytes(data, chance)
    value, paths = _tree(data)
    raw = {}
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice(paths)
        if not path:
            continue
        value, place = _copied(value, path)
        if place is None:
            continue
        key, kind = path[-1], chance.randrange(8)
        if kind < 4:
            place[key] = _odd(chance)
        elif kind == 4:
            del place[key]
        elif kind == 5:
            mark = f"@{chance.randrange(1 << 30)}@"
            depth = chance.choice((50, 900, 20_000))
            text = chance.choice(
                ("NaN", "-Infinity", "1e999", "1" * 5_000, "[" * depth, '{"a":' * depth, "0.1e", "tru")
            )
            raw[json.dumps(mark)] = text + chance.choice(("", "]" * depth)) * text.startswith("[")
            place[key] = mark
        elif kind == 6 and isinstance(place, dict):
            place[chance.choice((f"{key} ", "a", "", str(key).upper(), "__class__"))] = place.pop(key)
        else:
            other = chance.choice(paths)
            place[key] = deepcopy(_at(value, other)) if other else 0
    text = json.dumps(value)
    for mark, instead in raw.items():
        text = text.replace(mark, instead, 1)
    if chance.random() < 0.05:
        text = text.replace("{", '{"model":1,"model":2,', 1)
    changed = text.encode("utf-8", "surrogatepass")
    return change_bytes(changed, chance) if chance.random() < 0.1 else changed


def _copied(value: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    """Copy all containers along a path.

    Returns the new root, and the innermost container or None if the path is gone.
    """
    copies = []
    holder = value
    for key in path:
        if not isinstance(holder, dict | list) or not (
            key in holder if isinstance(holder, dict) else _has(holder, key)
        ):
            return value, None
        copies.append(holder.copy())
        holder = holder[key]
    for outer, inner, key in zip(copies, copies[1:], path, strict=False):
        outer[key] = inner
    return copies[0], copies[-1]


def _has(values: list[Any], key: Any) -> bool:
    return isinstance(key, int) and key < len(values)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def change_lines(data: bytes, chance: Random) -> bytes:
    """Remove, duplicate, reorder or replace lines; sometimes change bytes."""
    if chance.random() < 0.4:
        return change_bytes(data, chance)
    lines = data.split(b"\n")
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(lines))
        kind = chance.randrange(6)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(at, chance.choice(lines))
        elif kind == 2:
            other = chance.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            words = lines[at].split(b" ")
            words[chance.randrange(len(words))] = str(
                chance.choice((*_NUMBERS, -1, "", "a", "../a", "/", "=", "é"))
            ).encode()
            lines[at] = b" ".join(words)
        elif kind == 4:
            lines[at] = chance.choice((b"", b" ", b"\0", b"\r", b"=" * 70, b"[" * 3_000, b"+", b"#", b"\xff\xfe"))
        else:
            lines[at] = change_bytes(lines[at], chance)
    return b"\n".join(lines)


def change_session(data: bytes, chance: Random) -> bytes:
    """Mutate one line of a JSON Lines file as JSON."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines) - 1)
    if chance.random() < 0.3:
        return change_lines(data, chance)
    lines[at] = change_json(lines[at], chance)
    return b"\n".join(lines)


# Pickle fragments: calls, nesting, wrong sizes, memo indices, persistent ids.
_OPCODES = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.nn.parameter\nParameter\n", b"ctorch\nfloat32\n"),
    *(
        b"R",
        b"b",
        b"o",
        b"i\x93",
        b"\x93",
        b"\x81",
        b"\x92",
        b"Q",
        b".",
        b"0",
        b"1",
        b"2",
        b"(",
        b")",
        b"]",
        b"}",
        b"t",
    ),
    *(
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x85" * 3_000,
        b"(" * 3_000,
        b"s",
        b"u",
        b"e",
        b"a",
        b"N",
        b"\x88",
        b"\x8f",
        b"\x90",
    ),
    *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"q\x00", b"h\x00", b"h\xff", b"\x94", b"K\xff", b"M\xff\xff"),
    *(b"J\xff\xff\xff\xff", b"G\x7f\xf0\0\0\0\0\0\0", b"\x8b\xff\xff\xff\x7f", b"\x8a\x02\xff\xff", b"L1\n", b"I01\n"),
    *(
        b"X\xff\xff\xff\x7f",
        b"X\x01\0\0\0a",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"B\xff\xff\xff\x7f",
        b"\x80\x05",
    ),
    *(b"\x95\xff\xff\xff\xff\0\0\0\0", b"\x82\x01", b"Pa\n", b"\x97", b"\x98"),
)


def change_pth(data: bytes, chance: Random) -> bytes:
    """Mutate the pickle or the ZIP archive around it, with correct ZIP checksums."""
    if chance.random() < 0.25:
        return change_bytes(data, chance)
    names, contents = _records(data)
    out = io.BytesIO()
    kind = chance.randrange(8)
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in zip(names, contents, strict=True):
            if name.endswith("data.pkl") and kind < 6:
                content = _change_pickle(content, chance)
            elif kind == 6 and chance.random() < 0.4:
                name = chance.choice(
                    ("archive/data/9", "../a", "/a", "archive/data.pkl", "b/data/0", "a" * 300, "archive/é")
                )
            elif kind == 7 and chance.random() < 0.4:
                content = change_bytes(content, chance)
            packing = zipfile.ZIP_DEFLATED if kind == 6 and chance.random() < 0.1 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, packing)
    changed = out.getvalue()
    return change_bytes(changed, chance) if chance.random() < 0.05 else changed


@cache
def _records(data: bytes) -> tuple[list[str], list[bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.namelist(), [archive.read(name) for name in archive.namelist()]


def _change_pickle(data: bytes, chance: Random) -> bytes:
    if chance.random() < 0.4:
        return change_bytes(data, chance)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(data))
        data = data[:at] + chance.choice(_OPCODES) + data[at + chance.choice((0, 0, 1, 2, 5)) :]
    return data


def change_safetensors(data: bytes, chance: Random) -> bytes:
    """Mutate the JSON header, with a correct or wrong length field."""
    if chance.random() < 0.2:
        return change_bytes(data, chance)
    (size,) = struct.unpack_from("<Q", data)
    header = change_json(data[8 : 8 + size].rstrip(), chance)
    told = len(header) if chance.random() < 0.9 else chance.choice(_NUMBERS)
    return struct.pack("<Q", told) + header + data[8 + size :]


_GGUF_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@cache
def _gguf_places(data: bytes) -> list[tuple[int, int]]:
    """Offset and size of each number in the header.

    The numbers are versions, counts, lengths, types, values and offsets.
    """
    at, found = 24, [(4, 4), (8, 8), (16, 8)]

    def number(width: int) -> int:
        nonlocal at
        found.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def skip(size: int) -> None:
        nonlocal at
        at += size

    def value(kind: int) -> None:
        if kind == 8:
            skip(number(8))
        elif kind == 9:
            inner, count = number(4), number(8)
            kept = len(found)
            for _ in range(count):
                value(inner)
            del found[kept + 6 :]  # the first ones represent all elements
        else:
            number(struct.calcsize("<" + _GGUF_KINDS[kind]))

    tensors, metadata = struct.unpack_from("<QQ", data, 8)
    for _ in range(metadata):
        skip(number(8))
        value(number(4))
    for _ in range(tensors):
        skip(number(8))
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def change_gguf(data: bytes, chance: Random) -> bytes:
    """Set header numbers to extreme or slightly wrong values, or change bytes."""
    places = _gguf_places(data)
    header = places[-1][0] + 8
    changed = data
    if chance.random() < 0.7:
        for _ in range(chance.choice((1, 1, 2, 3))):
            at, width = chance.choice(places)
            number = int.from_bytes(data[at : at + width], "little") + chance.choice((-1, 1, 2, 32))
            number = chance.choice((number, number, *_NUMBERS, chance.randrange(40), chance.getrandbits(64)))
            changed = changed[:at] + (number & (1 << 8 * width) - 1).to_bytes(width, "little") + changed[at + width :]
    else:
        changed = change_bytes(data[:header], chance) + data[header:]
    return changed[: chance.randrange(len(changed))] if chance.random() < 0.05 else changed


_JINJA = (
    *(
        "{% for a in range(9999) %}",
        "{% endfor %}",
        "{% if true %}",
        "{% endif %}",
        "{{ messages }}",
        "{{ ",
        " }}",
        "{% ",
    ),
    *(
        " %}",
        "{% set a = 'x' * 9999999 %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{# ",
        "{% raw %}",
    ),
    *(
        "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(1) }}",
        "{{ 9**9**9 }}",
        "{{ [1]*9999999 }}",
        "|join",
        "|e",
    ),
    *(
        "{% include 'x' %}",
        "{% import 'os' as o %}",
        "{{ raise_exception('x') }}",
        "{{ namespace(a=1) }}",
        "{{ '%999999999d' % 1 }}",
    ),
    *(
        "{{ strftime_now('%Y' * 9999) }}",
        "{{ messages|tojson }}",
        "{{ (" + "(" * 300,
        "{% break %}",
        "{% generation %}",
        "{{ a|a }}",
    ),
    *(
        "{% set ns.a = 1 %}",
        "{{ messages[0]['content'].format(a) }}",
        "|replace('', 'xxxxxxxx')",
        "{{ 1/0 }}",
        "{{ '' ~ " * 40,
    ),
)


def change_template(data: bytes, chance: Random) -> bytes:
    """Insert Jinja fragments at random places."""
    if chance.random() < 0.3:
        return change_bytes(data, chance)
    text = data.decode()
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(_JINJA) + text[at + chance.choice((0, 0, 1, 5, 30)) :]
    return text.encode()


_TEXTS = (
    "a",
    " ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "é",
    "🙂",
    "𝒳",
    "\u202e",
    "\0",
    "'s",
    "<|eot_id|>",
    "<|",
    "한",
    "\u0301",
    "x" * 300,
)


def change_text(data: bytes, chance: Random) -> bytes:
    """Combine text fragments, some of them repeated."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.choice((1, 3, 40, 2_000)))
    return "".join(
        chance.choice(_TEXTS) * chance.choice((1, 1, 1, 3, 60)) for _ in range(chance.randrange(12))
    ).encode()


# --- Readers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Args:
        seeds: Returns valid files of its kind.
        change: Mutates a file.
        read: Reads a file.
        file: File name of the input.
    """

    seeds: Callable[[Path], list[bytes]]
    change: Callable[[bytes, Random], bytes]
    read: Callable[[Path], None]
    file: str


@cache
def _model(folder: Path, form: str = "meta") -> Path:
    """Write a complete small model with a chat template."""
    meta = folder / "meta" / "Tiny-Instruct"
    if form == "meta":
        return meta if meta.exists() else write_meta(meta, params=PARAMS)
    path = folder / form / ("Tiny.gguf" if form == "gguf" else "Tiny")
    if not path.exists():
        path.parent.mkdir()
        convert(_model(folder), path, form)
    return path


def _seed_file(name: str, form: str = "hf") -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_model(folder, form) / name).read_bytes()]


def _tokenizer_json_seeds(folder: Path) -> list[bytes]:
    """A tokenizer with few special tokens, so that mutations reach other parts."""
    whole = json.loads((_model(folder, "hf") / "tokenizer.json").read_bytes())
    gone = {token["content"] for token in whole["added_tokens"][12:]}
    whole["added_tokens"] = whole["added_tokens"][:12]
    whole["model"]["vocab"] = {text: id for text, id in whole["model"]["vocab"].items() if text not in gone}
    return [json.dumps(whole).encode()]


def _pth_seeds(_: Path) -> list[bytes]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        out = io.BytesIO()
        shared = torch.ones(4, 8, dtype=dtype)
        torch.save({"tok_embeddings.weight": shared, "output.weight": shared, "norm.weight": torch.ones(8)}, out)
        found.append(out.getvalue())
    return found


def _safetensors_seeds(_: Path) -> list[bytes]:
    tensors = {"model.embed_tokens.weight": torch.ones(4, 8), "model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    return [save(tensors), save(tensors, metadata={"format": "pt"})]


def _index_seeds(_: Path) -> list[bytes]:
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return [json.dumps({"metadata": {"total_size": 64}, "weight_map": places}).encode()]


def _read_index(path: Path) -> None:
    for i, name in enumerate("ab", start=1):
        shard = path.parent / f"model-0000{i}-of-00002.safetensors"
        if not shard.exists():
            shard.write_bytes(save({name: torch.ones(8)}))
    safetensors_file.find_weights(path.parent)


@cache
def _tokenizer() -> Tokenizer:
    return parse_tokenizer_model(tokenizer_file())


def _read_gguf(path: Path) -> None:
    checkpoint = gguf.open_gguf(path)
    checkpoint.load(silent)
    if checkpoint.chat is not None:
        _render(checkpoint.chat)
    checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("the 12 é🙂", special=True))


def _read_config_json(path: Path) -> None:
    config = read_object(path)
    args, _ = huggingface._model_args(config, path)
    huggingface._ids(config.get("eos_token_id"), path)
    args.weight_shapes().popitem()


def _read_generation_config(path: Path) -> None:
    huggingface._ids(read_object(path).get("eos_token_id"), path)


def _read_tokenizer_config(path: Path) -> None:
    settings = read_object(path)
    chat: Any = huggingface._chat(path.parent, settings, _tokenizer())
    assert chat is None or chat.source  # the template does not run until it is used


def _read_tokenizer_json(path: Path) -> None:
    tokenizer = read_tokenizer(path, {}, [1], 600)
    tokenizer.decode(tokenizer.encode("the 12 é🙂 <|eot_id|>", special=True))


def _read_template(path: Path) -> None:
    source = path.read_bytes().decode("utf-8", errors="replace")
    _render(TemplateFormat(source, "<s>", "</s>", ("<|eot_id|>",)))


def _render(chat: ChatFormat) -> None:
    vars(chat)["_process"] = _TEMPLATES  # one process for all formats
    chat.parts(MESSAGES)


def _read_tokenizer_model(path: Path) -> None:
    tokenizer = Tokenizer.from_meta(str(path))
    tokenizer.decode(tokenizer.encode("the 12 é🙂"))


def _read_text(path: Path) -> None:
    """Encode and decode a prompt; the text must survive the round trip."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    tokenizer = _tokenizer()
    for special in (False, True):
        if tokenizer.decode(tokenizer.encode(text, special=special)) != text:
            raise ValueError("decoding does not restore the text")
    tokenizer.warnings(text, special=True)
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    if "".join(stream.push(id, final=i == len(ids) - 1) for i, id in enumerate(ids)) != text:
        raise ValueError("the stream decoder does not restore the text")


def _session_seeds(folder: Path) -> list[bytes]:
    from tests.trust.faults import Sessions

    path = folder / "seed.jsonl"
    session_file.save(Sessions.version(0), path)
    return [path.read_bytes()]


def _history_seeds(folder: Path) -> list[bytes]:
    path = folder / "seed-history"
    path.write_bytes(b"")
    for text in ("the cat", "two\nlines", "é🙂"):
        FileHistory(path).store_string(text)
    return [path.read_bytes(), b"\n# 2024-01-01 00:00:00\n+an entry of prompt_toolkit\n"]


@cache
def _context() -> typer.Context:
    return typer.Context(typer.main.get_command(app))


def _read_hub(path: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from llama_scratch.download.hub import Repository, _info, _license, _wanted

    repository = Repository.named("owner/name")
    assert repository is not None
    answer = HfApi.model_info
    try:
        HfApi.model_info = lambda *_, **__: ModelInfo(**json.loads(path.read_bytes()))  # type: ignore[method-assign,no-untyped-call]
        info = _info(repository)
    finally:
        HfApi.model_info = answer  # type: ignore[method-assign]
    _wanted(repository, [file.rfilename for file in info.siblings or []])
    _license(info)


def _hub_seeds(_: Path) -> list[bytes]:
    files = [{"rfilename": name, "size": 9} for name in ("config.json", "model.safetensors", "tokenizer.json")]
    card = {"license": "other", "license_name": "llama3.2"}
    return [json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": files, "cardData": card}).encode()]


def _kept_pieces(folder: Path) -> PackedWeightCache:
    """A weight cache with pieces of an int8 and an int4 model, below a folder."""
    types = torch.int8, torch.uint8
    layouts = [((((2, 8, 16, 4), kind), ((2, 1, 16), torch.float16))) for kind in types for _ in range(2)]
    with patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
        return PackedWeightCache([], layouts)


@cache
def _piece(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    values = torch.randint(0, 127, (2, 8, 16, 4), generator=generator)
    return values.to(torch.int8 if i < 2 else torch.uint8), torch.rand(2, 1, 16, generator=generator).half()


def _kept_seeds(folder: Path) -> list[bytes]:
    pieces = _kept_pieces(folder)
    for i in range(4):
        pieces.put(i, *_piece(i))
    (file,) = folder.rglob("weights/*")
    return [file.read_bytes()]


def _read_kept(path: Path) -> None:
    """Read each piece from the cache: it must be equal to the stored one or missing."""
    place = _kept_pieces(path.parent)._path
    assert place is not None
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.replace(place)
    pieces = _kept_pieces(path.parent)
    found = [pieces.get(i) for i in range(4)]
    for i, piece in enumerate(found):
        if piece is not None and not all(map(torch.equal, piece, _piece(i))):
            raise ValueError(f"piece {i} differs from the stored one")
    if None in found:
        raise CheckpointError("It is packed again.")


_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' and not loop.first %}"
    "{{ '<|start|>' + message.content | trim + '<|eot_id|>' }}{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{% set ns = namespace(a=1) %}{{ 'assistant' }}{% endif %}"
)
_TOML = b'model = "smollm2"\ntop = 10\nlive = false\ntemperature = 0.5\n\n[bench]\nruns = 5\n'

TARGETS = {
    "pth": Target(_pth_seeds, change_pth, lambda path: (load_pth(path, silent), None)[1], "consolidated.00.pth"),
    "params.json": Target(
        lambda _: [json.dumps(PARAMS).encode()],
        change_json,
        lambda path: (parse_params(path.read_text("utf-8", "replace"), str(path)), None)[1],
        "params.json",
    ),
    "tokenizer.model": Target(lambda _: [tokenizer_file()], change_lines, _read_tokenizer_model, "tokenizer.model"),
    "checklist.chk": Target(
        lambda _: [b"0" * 32 + b"  params.json\n" + b"A" * 32 + b" *./consolidated.00.pth\n"],
        change_lines,
        lambda path: (parse_checklist(path.read_bytes()), None)[1],
        "checklist.chk",
    ),
    "safetensors": Target(
        _safetensors_seeds,
        change_safetensors,
        lambda path: (safetensors_file.find_weights(path.parent), None)[1],
        "model.safetensors",
    ),
    "safetensors index": Target(_index_seeds, change_json, _read_index, "model.safetensors.index.json"),
    "config.json": Target(_seed_file("config.json"), change_json, _read_config_json, "config.json"),
    "generation_config.json": Target(
        _seed_file("generation_config.json"), change_json, _read_generation_config, "generation_config.json"
    ),
    "tokenizer_config.json": Target(
        _seed_file("tokenizer_config.json"), change_json, _read_tokenizer_config, "tokenizer_config.json"
    ),
    "tokenizer.json": Target(_tokenizer_json_seeds, change_json, _read_tokenizer_json, "tokenizer.json"),
    "gguf": Target(lambda folder: [_model(folder, "gguf").read_bytes()], change_gguf, _read_gguf, "Tiny.gguf"),
    "chat template": Target(lambda _: [_TEMPLATE.encode()], change_template, _read_template, "chat_template.jinja"),
    "session": Target(_session_seeds, change_session, lambda path: (session_file.load(path), None)[1], "a.jsonl"),
    "history": Target(
        _history_seeds, change_lines, lambda path: (list(FileHistory(path).load_history_strings()), None)[1], "history"
    ),
    "configuration": Target(
        lambda _: [_TOML], change_lines, lambda path: (read_config(str(path), _context()), None)[1], "config.toml"
    ),
    "kept": Target(_kept_seeds, change_bytes, _read_kept, "kept"),
    "hub": Target(_hub_seeds, change_json, _read_hub, "answer.json"),
    "text": Target(lambda _: [b""], change_text, _read_text, "text"),
}


# --- Running ----------------------------------------------------------------------------------


@dataclass
class Figures:
    """Results of a target.

    `peak_bytes` is the largest size of Python objects among the sampled inputs.
    """

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Add the results of another run."""
        self.inputs += other.inputs
        self.taken += other.taken
        self.refused += other.refused
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.seconds += other.seconds
        self.findings += other.findings


def problem(target: Target, data: bytes, path: Path, figures: Figures, *, sampled: bool = False) -> str | None:
    """Read one input and check the reader's behavior.

    Args:
        target: The reader.
        data: The input.
        path: File to write it to.
        figures: Results to update.
        sampled: Whether to trace the reader's objects.

    Returns:
        A description of the problem, or None.
    """
    path.write_bytes(data)
    if sampled:
        tracemalloc.start()
    start = time.process_time()
    found = None
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target.read(path)
            figures.taken += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except LlamaScratchError as error:
        figures.refused += 1
        sentence = str(error)
        if not sentence.isprintable() or not sentence.endswith((".", "?")) or len(sentence) > 1_500:
            found = f"rejected without a proper message: {sentence[:200]!r}"
    except HangError:
        found = f"it takes longer than {SECONDS:g} s"
    except MemoryError:
        found = f"it takes more than {ROOM >> 20} MB"
    except BaseException as error:  # noqa: BLE001 - any other exception is a finding
        found = f"{type(error).__name__}: {str(error)[:200]}"
    figures.slowest_s = max(figures.slowest_s, time.process_time() - start)
    if sampled:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        figures.peak_bytes = max(figures.peak_bytes, peak)
        if found is None and peak > PEAK_FLOOR + PEAK_PER_BYTE * len(data):
            found = f"its objects take {peak:,} bytes"
    return found


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise HangError


def bound() -> None:
    """Set the deadline handler and the memory limit of this process permanently."""
    signal.signal(signal.SIGPROF, _hang)
    text = Path("/proc/self/status").read_text() if sys.platform.startswith("linux") else ""
    if match := re.search(r"VmData:\s+(\d+) kB", text):
        room = 1024 * int(match[1]) + ROOM
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))


def inputs(name: str, seeds: list[bytes], seed: int, first: int, stop: int, step: int) -> Iterator[tuple[int, bytes]]:
    """Generate inputs of a target.

    Args:
        name: The target.
        seeds: Its valid files.
        seed: Random seed.
        first: Number of the first input.
        stop: Number after the last input.
        step: Distance between the numbers.

    Yields:
        The number and the bytes of each input.
    """
    change = TARGETS[name].change
    for number in range(first, stop, step):
        chance = Random(f"{name} {seed} {number}")
        yield number, change(seeds[number % len(seeds)], chance)


def _work(name: str, seeds: list[bytes], seed: int, first: int, stop: int, step: int, at: mmap.mmap, tell: Any) -> None:
    """Read the inputs and send the results; `at` holds the current number."""
    target, figures, start = TARGETS[name], Figures(), time.monotonic()
    root = "/dev/shm" if os.path.isdir("/dev/shm") else None
    faulthandler.enable()  # prints the stack to stderr if the process crashes
    warnings.simplefilter("ignore")  # zipfile and torch warn about the broken files
    with tempfile.TemporaryDirectory(dir=root) as folder:
        path = Path(folder) / target.file
        for data in seeds:  # valid files, which also trigger the reader's imports
            path.write_bytes(data)
            target.read(path)
        bound()
        for number, data in inputs(name, seeds, seed, first, stop, step):
            at[:8] = struct.pack("<q", number)
            figures.inputs += 1
            found = problem(target, data, path, figures, sampled=number % SAMPLE == 0)
            if found is not None:
                figures.findings.append(_keep(name, number, data, found))
                if len(figures.findings) >= 20:
                    break
    figures.seconds = time.monotonic() - start
    tell.send(figures)


def _keep(name: str, number: int, data: bytes, found: str) -> str:
    CASES.mkdir(exist_ok=True)
    kept = CASES / f"{name.replace(' ', '_')}-{hashlib.sha256(data).hexdigest()[:12]}"
    kept.write_bytes(data)
    return f"{name} {number} ({kept.name}): {found.replace(tempfile.gettempdir(), '')}"


def run(name: str, count: int, seed: int = 0, job: int = 0, jobs: int = 1) -> Figures:
    """Read every `jobs`-th input of a target in a worker process.

    The process is restarted if it dies.

    Args:
        name: The target.
        count: Number of inputs of all jobs together.
        seed: Random seed.
        job: Number of this job, from 0.
        jobs: Number of jobs.

    Returns:
        The results, with crashes and hangs as findings.
    """
    with tempfile.TemporaryDirectory() as folder:
        seeds = TARGETS[name].seeds(Path(folder))
    whole, first = Figures(), job
    fork = get_context("fork")
    while first < count:
        at = mmap.mmap(-1, 8)
        hear, tell = fork.Pipe(duplex=False)
        stop = min(count, first + RENEWED * jobs)
        worker = fork.Process(target=_work, args=(name, seeds, seed, first, stop, jobs, at, tell))
        worker.start()
        tell.close()
        last, since = first, time.monotonic()
        found = None
        try:
            while not hear.poll(0.2):
                here = struct.unpack("<q", at[:8])[0]
                if here != last:
                    last, since = here, time.monotonic()
                elif time.monotonic() - since > STALLED:
                    found = f"it hangs for more than {STALLED:g} s outside of Python"
                    worker.kill()
                    break
            figures = hear.recv() if found is None else None
        except EOFError:
            figures = None
        worker.join()
        if figures is not None:
            whole.add(figures)
            if len(whole.findings) >= 20:
                break
            first += RENEWED * jobs
            continue
        last = struct.unpack("<q", at[:8])[0]
        found = found or f"it ends the process with {worker.exitcode}"
        (_, data), *_ = inputs(name, seeds, seed, last, last + 1, 1)
        whole.findings.append(_keep(name, last, data, found))
        whole.inputs += (last - first) // jobs + 1
        first = last + jobs
        if len(whole.findings) >= 20:
            break
    return whole


def _run_all(names: list[str], count: int, seed: int, job: int, jobs: int, tell: Any) -> None:
    for name in names:
        tell.send((name, run(name, count, seed, job, jobs)))
    tell.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="fuzz only this reader (default: all)")
    parser.add_argument("--count", type=int, default=COUNT, help=f"inputs per reader (default: {COUNT:,}; recorded)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parallel processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.target] if options.target else list(TARGETS)
    fork = get_context("fork")
    found = {name: Figures() for name in names}
    hear = []
    for job in range(options.jobs):
        ear, tell = fork.Pipe(duplex=False)
        fork.Process(target=_run_all, args=(names, options.count, options.seed, job, options.jobs, tell)).start()
        hear.append(ear)
        tell.close()
    for ear in hear:
        while (said := ear.recv()) is not None:
            found[said[0]].add(said[1])
    print(json.dumps({name: asdict(figures) for name, figures in found.items()}, indent=2))
    if options.count >= COUNT:
        _record(found, options.seed)
    sys.exit(any(figures.findings for figures in found.values()))


def _record(found: dict[str, Figures], seed: int) -> None:
    """Record the figures, and keep those of other targets from earlier runs."""
    try:
        targets = record.read("fuzz")["targets"]
    except FileNotFoundError:
        targets = {}
    targets |= {
        name: {
            **asdict(figures),
            "seed": seed,
            "slowest_s": round(figures.slowest_s, 3),
            "seconds": round(figures.seconds),
        }
        for name, figures in found.items()
    }
    record.write("fuzz", {"targets": {name: targets[name] for name in TARGETS if name in targets}})


if __name__ == "__main__":
    main()
