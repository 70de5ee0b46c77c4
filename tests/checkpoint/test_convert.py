"""Conversion: a round trip through all formats is lossless, and other programs read the results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.chat_format import Message
from llama_scratch.checkpoint import Checkpoint, convert, open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import PATTERNS
from llama_scratch.checkpoint.convert import FORMATS
from llama_scratch.checkpoint.huggingface import writer
from llama_scratch.config import ModelArgs, RopeScaling, is_tied
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UsageError
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.system.progress import silent
from llama_scratch.tokenizer import Tokenizer
from tests.helpers.assertions import assert_rejected
from tests.helpers.checkpoints import tiny_params, tokenizer_file, write_meta

pytestmark = pytest.mark.reference

SMALL = tiny_params(dim=128, n_heads=2, n_kv_heads=1, n_layers=2)  # head_dim 64, as in Llama 3.2
TEXTS = [
    "",
    "the cat is on the line",
    "There's 1234 of them, I'll see\r\n\n  indented   text ",
    "def f(x):\n\treturn {x: 'y'}  # 12.5 % — naïve",
    "你好, wörld! Привет мир 🙂🙃 नमस्ते",
    "a  1  22   333    4444",
    "thethethethe ererer inin' it'S WE'LL",
    "\u00a0\u2003 x\u3000y \x00\x07",
    "<|begin_of_text|>the<|eot_id|>",
]


@dataclass(frozen=True)
class Kind:
    """The differences between the models that are converted."""

    dtype: torch.dtype
    tied: bool
    scaled: bool
    instruct: bool
    width: float | None = 1.5
    context: int | None = None


KINDS = {
    "fp32": Kind(torch.float32, tied=True, scaled=True, instruct=True),
    "bf16": Kind(torch.bfloat16, tied=True, scaled=True, instruct=False, context=1000),
    "fp16": Kind(torch.float16, tied=False, scaled=False, instruct=True, width=None),
    "wide": Kind(torch.bfloat16, tied=False, scaled=True, instruct=False, width=4.1),
}
ORDERS = [("hf", "gguf", "meta"), ("gguf", "hf", "meta")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Meta directory for each kind."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        params = SMALL | {"ffn_dim_multiplier": kind.width, "context_length": kind.context}
        params |= {"use_scaled_rope": kind.scaled, "rope_scaling_factor": 20.0 if name == "bf16" else None}
        params = {field: value for field, value in params.items() if value is not None}
        directory = folder / f"Tiny:{name}{'-Instruct' if kind.instruct else ''}"
        found[name] = write_meta(directory, params=params, dtype=kind.dtype, tied=kind.tied, seed=seed)
    return found


@pytest.fixture(scope="module")
def rounds(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], list[Path]]:
    """Each kind's path through the formats, in each order: the source, then each result."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for name, source in sources.items():
        for order in ORDERS:
            folder = tmp_path_factory.mktemp(name)
            steps = [source]
            for form in order:
                target = folder / (f"{source.name}.gguf" if form == "gguf" else f"{form}/{source.name}")
                target.parent.mkdir(exist_ok=True)
                steps.append(convert.convert(steps[-1], target, form).path)
            found[name, *order] = steps
    return found


WAYS = [(name, *order) for name in KINDS for order in ORDERS]


def written(rounds: dict[tuple[str, ...], list[Path]], name: str, form: str) -> Path:
    """The result of a single conversion from a Meta directory."""
    return next(steps[1] for way, steps in rounds.items() if way[:2] == (name, form))


def weights_of(path: Path) -> dict[str, Tensor]:
    """Read all weights as tensors under Meta's names."""
    return {name: as_tensor(weight) for name, weight in open_checkpoint(path).load(silent).items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare names, types and all bits, including the sign of zero."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].view(torch.uint8).equal(b[name].view(torch.uint8)) for name in a
    )


def chat_ids(path: Path) -> list[int] | None:
    """The ids of a conversation in the model's own chat format."""
    messages = [Message("system", "Be <|eot_id|> it."), Message("user", "the"), Message("assistant", " in\n")]
    llama = Llama.load(str(path), precision="fp32")
    return llama.encode_chat([*messages, Message("user", "on")]) if llama.chat else None


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_model_goes_round_and_comes_back(rounds: dict[tuple[str, ...], list[Path]], way: tuple[str, ...]) -> None:
    """All bits of all weights, the shape with RoPE and context, tokens, stop tokens, BOS and chat are kept."""
    steps = [open_checkpoint(path) for path in rounds[way]]
    first, last = steps[0], steps[-1]
    assert [step.format for step in steps] == [{"hf": "huggingface"}.get(form, form) for form in ("meta", *way[1:])]
    assert same_bits(weights_of(rounds[way][0]), weights_of(rounds[way][-1]))
    assert is_tied(last.load(silent)) == KINDS[way[0]].tied
    assert last.args == first.args
    assert vars_of(last.tokenizer) == vars_of(first.tokenizer)
    for step in steps:
        assert is_tied(step.load(silent)) == KINDS[way[0]].tied
        assert step.tokenizer.stop_ids == first.tokenizer.stop_ids
        assert step.tokenizer.bos_id == first.tokenizer.bos_id
        assert step.args.max_seq_len == first.args.max_seq_len
    ids = [chat_ids(path) for path in rounds[way]]
    assert (ids[0] is not None) == KINDS[way[0]].instruct
    assert ids == [ids[0]] * len(ids)


def vars_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that determines how a tokenizer works."""
    names = ("ranks", "special_tokens", "pattern", "bos_id", "stop_ids", "unknown", "n_vocab")
    return {name: getattr(tokenizer, name) for name in names}


def test_every_form_gives_the_same_logits(rounds: dict[tuple[str, ...], list[Path]]) -> None:
    """A random model in all formats."""
    prompt = TEXTS[2]
    for way in WAYS:
        first, *others = [Llama.load(str(path), precision="fp32").logits(prompt) for path in rounds[way]]
        for other in others:
            assert (other - first).norm() <= 1e-5 * first.norm()


# --- Hugging Face's format ---------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_transformers_computes_the_same(rounds: dict[tuple[str, ...], list[Path]], name: str) -> None:
    """Loaded by transformers' own classes in float32: logits, tokens, stop tokens, chat, context, dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    path = written(rounds, name, "hf")
    llama = Llama.load(str(path), precision="fp32")
    loader: Any = AutoModelForCausalLM
    model, loading = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    ids = torch.arange(0, SMALL["vocab_size"], 3)
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    assert (llama.logits(ids.tolist()) - theirs).norm() <= 1e-5 * theirs.norm()
    config = AutoConfig.from_pretrained(path)
    assert config.dtype == KINDS[name].dtype
    assert config.tie_word_embeddings == KINDS[name].tied
    assert config.max_position_embeddings == llama.args.max_seq_len
    assert set(GenerationConfig.from_pretrained(path).eos_token_id) == llama.tokenizer.stop_ids
    tokenizer = AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == llama.tokenizer.encode(text, bos=True, special=True)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.eos_token == ("<|eot_id|>" if KINDS[name].instruct else "<|end_of_text|>")
    if KINDS[name].instruct:
        messages = [{"role": "system", "content": "Be it."}, {"role": "user", "content": "the"}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked == llama.encode_chat([Message(**message) for message in messages])


def test_shards_with_an_index(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model larger than one file: the minimal number of files, each within the limit, and complete."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(writer, "SHARD", 300_000)
    path = convert.convert(sources["bf16"], tmp_path / "m", "hf").path
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(file.stat().st_size < 310_000 for file in files)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    weights = weights_of(sources["bf16"])
    assert index["metadata"]["total_size"] == sum(w.nbytes for name, w in weights.items() if name != "output.weight")
    assert same_bits(weights_of(path), weights)
    loader: Any = AutoModelForCausalLM
    _, loading = loader.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_are_readable_as_others_are(rounds: dict[tuple[str, ...], list[Path]]) -> None:
    """The directory and all files have the default permissions."""
    path = written(rounds, "bf16", "hf")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


# --- Meta's format -----------------------------------------------------------------------------


def test_what_meta_wrote_comes_back_as_meta_writes_it(
    rounds: dict[tuple[str, ...], list[Path]], sources: dict[str, Path]
) -> None:
    """tokenizer.model byte by byte, params.json except for defaults, MD5s, one storage for a tied output."""
    source, path = sources["fp32"], rounds["fp32", "hf", "gguf", "meta"][-1]
    assert (path / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    params = json.loads((path / "params.json").read_text())
    assert params.pop("rope_scaling_factor") == 32
    original = json.loads((source / "params.json").read_text())
    assert params == original | {"multiple_of": params["multiple_of"]}
    weights = torch.load(path / "consolidated.00.pth", weights_only=True, mmap=True)
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()
    assert (path / "consolidated.00.pth").stat().st_size < 1.1 * (source / "consolidated.00.pth").stat().st_size
    lines = (path / "checklist.chk").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.md5((path / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "expected"),
    [
        (2048, 8192, (256, 1.5)),
        (3072, 8192, (256, 1.0)),
        (4096, 14336, (1024, 1.3)),
        (8192, 28672, (4096, 1.3)),
        (4096, 11008, (256, None)),
        (576, 1536, (256, 1.0)),
        (64, 1, (1, None)),
        (64, 99, (99, None)),
        (64, 1001, (1001, None)),
    ],
)
def test_the_width_is_said_as_meta_says_it(dim: int, ffn_dim: int, expected: tuple[int, float | None]) -> None:
    """Meta's own numbers for Meta's models; numbers that give the exact width for others."""
    from llama_scratch.checkpoint.meta import params

    multiple_of, multiplier = params._ffn_fields(dim, ffn_dim)
    assert params.ffn_dim(dim, multiple_of=multiple_of, multiplier=multiplier) == ffn_dim
    if expected[1] is not None:
        assert (multiple_of, multiplier) == expected


# --- GGUF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_gguf_package_reads_the_file(rounds: dict[tuple[str, ...], list[Path]], name: str) -> None:
    """Everything that llama.cpp reads: names, types, F32 norms, RoPE divisors as in its own converter."""
    kind, path = KINDS[name], written(rounds, name, "gguf")
    reader = gguf.GGUFReader(path)
    args = open_checkpoint(path).args
    fields = {key: field.contents() for key, field in reader.fields.items()}
    number = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[kind.dtype]
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == path.stem
    assert fields["general.file_type"] == number
    assert fields["llama.vocab_size"] == args.vocab_size
    assert fields["llama.rope.dimension_count"] == 64
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    texts = fields["tokenizer.ggml.tokens"]
    assert texts[fields["tokenizer.ggml.bos_token_id"]] == "<|begin_of_text|>"
    assert texts[fields["tokenizer.ggml.eos_token_id"]] == ("<|eot_id|>" if kind.instruct else "<|end_of_text|>")
    assert texts[fields["tokenizer.ggml.eot_token_id"]] == "<|eot_id|>"
    assert texts[fields["tokenizer.ggml.eom_token_id"]] == "<|eom_id|>"
    assert ("tokenizer.chat_template" in fields) == kind.instruct
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    types = {
        len(tensor.shape): {t.tensor_type.name for t in reader.tensors if len(t.shape) == len(tensor.shape)}
        for tensor in reader.tensors
    }
    assert types == {1: {"F32"}, 2: {{0: "F32", 1: "F16", 32: "BF16"}[number]}}
    assert ("output.weight" in tensors) == (not kind.tied)
    assert ("rope_freqs.weight" in tensors) == kind.scaled
    if kind.scaled:
        expected = llama_cpp_divisors(args)
        assert torch.allclose(torch.tensor(tensors["rope_freqs.weight"].data), expected, rtol=1e-6)


def llama_cpp_divisors(args: ModelArgs) -> Tensor:
    """As in `LlamaModel.generate_extra_tensors` in convert_hf_to_gguf.py."""
    assert args.rope_scaling is not None
    factor, low, high, context = (
        args.rope_scaling.factor,
        args.rope_scaling.low_freq_factor,
        args.rope_scaling.high_freq_factor,
        args.rope_scaling.original_context,
    )
    divisors = []
    for i in range(0, args.head_dim, 2):
        wavelength = 2 * torch.pi * args.rope_theta ** (i / args.head_dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def test_norms_that_need_float32_keep_it(sources: dict[str, Path], tmp_path: Path) -> None:
    """On the way back from GGUF, norms get the matrices' type only if all values fit."""
    source = shutil.copytree(sources["bf16"], tmp_path / "m")
    weights = torch.load(source / "consolidated.00.pth", weights_only=True)
    weights["norm.weight"] = weights["norm.weight"].float() + 2**-20
    torch.save(weights, source / "consolidated.00.pth")
    back = convert.convert(convert.convert(source, tmp_path / "m.gguf", "gguf").path, tmp_path / "back", "meta").path
    assert weights_of(back)["norm.weight"].dtype == torch.float32
    assert same_bits(weights_of(back), weights_of(source))


# --- The open model: another tokenizer, and quantized weights ---------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[convert.Converted, ...]]:
    """SmolLM2 as a Hugging Face directory, and as a GGUF file; half a gigabyte each, so removed at the end."""
    folder = tmp_path_factory.mktemp("smollm2")
    there = convert.convert(smollm2_path, folder / "hf", "hf")
    yield there, convert.convert(there.path, folder / "smollm2.gguf", "gguf")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_open_model_in_all_forms(smollm2: tuple[convert.Converted, ...], smollm2_path: Path) -> None:
    """From quantized to float32 with a note, then lossless; ids match `tokenizers` and the source."""
    from tokenizers import Tokenizer as TheirTokenizer

    there, back = smollm2
    first, *others = [open_checkpoint(path) for path in (smollm2_path, there.path, back.path)]
    quantized, metadata = there.notes
    assert "float32" in quantized
    assert "general.languages" in metadata
    assert back.notes == ()
    theirs = TheirTokenizer.from_file(str(there.path / "tokenizer.json"))
    for other in others:
        assert vars_of(other.tokenizer) == vars_of(first.tokenizer)
        assert other.license == first.license
        assert other.args.rope_theta == first.args.rope_theta
        assert other.chat is not None
        assert other.chat.parts([Message("user", "Hi")]) == first.chat.parts([Message("user", "Hi")])  # type: ignore[union-attr]
        for text in TEXTS:
            assert other.tokenizer.encode(text) == first.tokenizer.encode(text) == theirs.encode(text).ids
    weights = [checkpoint.load(silent) for checkpoint in (first, *others)]
    for name in weights[0]:
        a, b, c = (as_tensor(w[name]) for w in weights)
        assert a.equal(b), name
        assert b.equal(c), name


def test_a_token_that_no_merges_make(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3 has hundreds: a piece that equals a token becomes it, in tiktoken, `tokenizers` and llama.cpp.

    Ids without a token are included: they get placeholder names.
    """
    from tokenizers import Tokenizer as TheirTokenizer

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"bcd": 258, b"abcd": 259}
    tokenizer = retokenized(sources["bf16"], ranks=ranks)
    changed(monkeypatch, sources["bf16"], tokenizer=tokenizer)
    there = convert.convert(sources["bf16"], tmp_path / "hf", "hf").path
    file = convert.convert(sources["bf16"], tmp_path / "m.gguf", "gguf").path
    theirs = TheirTokenizer.from_file(str(there / "tokenizer.json"))
    for text, ids in (("abcd", [259]), ("abcde", [256, 99, 100, 101])):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) == ids
        for path in (there, file):
            assert open_checkpoint(path).tokenizer.encode(text) == ids
    assert open_checkpoint(file).tokenizer.token_text(270) == "[PAD270]"


# --- Models that a format cannot hold ----------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, source: Path, **changes: Any) -> None:
    """Replace fields of the source's `Checkpoint`."""

    def open_changed(path: Path, tokenizer: str | None = None) -> Checkpoint:
        checkpoint = open_checkpoint(path, tokenizer)
        return replace(checkpoint, **changes) if path == source else checkpoint

    monkeypatch.setattr(convert, "open_checkpoint", open_changed)


def retokenized(source: Path, **changes: Any) -> Tokenizer:
    """The source's tokenizer with some arguments of `Tokenizer` replaced."""
    tokenizer = open_checkpoint(source).tokenizer
    arguments: dict[str, Any] = {
        "ranks": tokenizer.ranks,
        "special_tokens": tokenizer.special_tokens,
        "pattern": tokenizer.pattern,
        "bos": "<|begin_of_text|>",
        "stops": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    }
    return Tokenizer(**(arguments | changes))


def renamed(source: Path, old: str, new: str) -> dict[str, int]:
    """The source's special tokens with one of them renamed."""
    return {new if name == old else name: id for name, id in open_checkpoint(source).tokenizer.special_tokens.items()}


OWN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "own pattern": lambda source: {"tokenizer": retokenized(source, pattern=PATTERNS["gpt-2"])},
    "no BOS": lambda source: {"tokenizer": retokenized(source, bos=None)},
    "own names": lambda source: {
        "tokenizer": retokenized(source, special_tokens=renamed(source, "<|image|>", "<|picture|>"))
    },
    "unnamed pattern": lambda source: {"tokenizer": retokenized(source, pattern=r"\w+|\W+")},
    "token twice": lambda source: {"tokenizer": retokenized(source, special_tokens=renamed(source, "<|image|>", "th"))},
    "own divisors": lambda source: {
        "args": replace(open_checkpoint(source).args, rope_scaling=None, rope_divisors=(1.0,) * 31 + (5.0,))
    },
    "own rule": lambda source: {"args": replace(open_checkpoint(source).args, rope_scaling=RopeScaling(8, 1, 3))},
}


@pytest.mark.parametrize(
    ("what", "form", "words"),
    [
        ("own pattern", "meta", ["Llama 3's tokenizer", "to=hf"]),
        ("no BOS", "meta", ["Llama 3's tokenizer", "to=hf"]),
        ("own names", "meta", ["Llama 3's tokenizer", "to=hf"]),
        ("unnamed pattern", "gguf", ["pattern", "to=hf"]),
        ("token twice", "hf", ["'th' twice"]),
        ("token twice", "gguf", ["'th' twice"]),
        ("own divisors", "hf", ["rotary embedding", "to=gguf"]),
        ("own divisors", "meta", ["rotary embedding", "to=gguf"]),
        ("own rule", "meta", ["rotary embedding", "to=gguf"]),
    ],
)
def test_a_model_that_a_form_does_not_hold(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, form: str, words: list[str]
) -> None:
    """The error names a format that can hold it, and no files remain."""
    changed(monkeypatch, sources["bf16"], **OWN[what](sources["bf16"]))
    assert_rejected(lambda: convert.convert(sources["bf16"], tmp_path / "m.gguf", form), CheckpointError, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "form"),
    [
        ("own pattern", "gguf"),
        ("own pattern", "hf"),
        ("no BOS", "hf"),
        ("no BOS", "gguf"),
        ("own divisors", "gguf"),
        ("own rule", "hf"),
        ("own rule", "gguf"),
    ],
)
def test_a_form_that_does_hold_it(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, form: str
) -> None:
    """If another format rejects a model: the same tokens and logits."""
    source = sources["bf16"]
    changes = OWN[what](source)
    changed(monkeypatch, source, **changes)
    found = convert.convert(source, tmp_path / "m.gguf", form)
    expected = replace(open_checkpoint(source), **changes)
    assert found.notes == ()
    after = open_checkpoint(found.path)
    assert vars_of(after.tokenizer) == vars_of(expected.tokenizer)
    assert convert._same_network(after.args, expected.args)
    assert not convert._same_network(after.args, replace(expected.args, rope_theta=1e4))


def test_reserved_names_of_other_releases(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face has other names for unused tokens: accepted, with a note."""
    special = renamed(sources["bf16"], "<|image|>", "<|reserved_special_token_900|>")
    changed(monkeypatch, sources["bf16"], tokenizer=retokenized(sources["bf16"], special_tokens=special))
    (note,) = convert.convert(sources["bf16"], tmp_path / "m", "meta").notes
    assert "names" in note


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [("fp32", "plain", ["chat format", "Instruct"]), ("bf16", "Now-Instruct", ["chat model"])],
)
def test_a_name_that_says_something_else(
    rounds: dict[tuple[str, ...], list[Path]], tmp_path: Path, name: str, target: str, words: list[str]
) -> None:
    """Meta's format marks a chat model only by its name: if that changes, there is a note."""
    (note,) = convert.convert(written(rounds, name, "hf"), tmp_path / target, "meta").notes
    assert all(word in note for word in words)


def test_a_template_that_is_not_metas(rounds: dict[tuple[str, ...], list[Path]], tmp_path: Path) -> None:
    """Two formats keep it; Meta's drops it with a note."""
    source = shutil.copytree(written(rounds, "fp32", "hf"), tmp_path / "m-Instruct")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    there = convert.convert(source, tmp_path / "m.gguf", "gguf")
    assert there.notes == ()
    assert chat_ids(there.path) == chat_ids(source) != chat_ids(written(rounds, "fp32", "hf"))
    (note,) = convert.convert(there.path, tmp_path / "x-Instruct", "meta").notes
    assert "template" in note


def test_the_license_goes_along(sources: dict[str, Path], tmp_path: Path) -> None:
    """Its file between directories, its name to GGUF's metadata and back; Meta's format cannot state it."""
    source = shutil.copytree(sources["bf16"], tmp_path / "m")
    (source / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n…\n")
    (source / "USE_POLICY.md").write_text("be good")
    there = convert.convert(source, tmp_path / "hf", "hf").path
    assert (there / "LICENSE.txt").read_bytes() == (source / "LICENSE.txt").read_bytes()
    assert (there / "USE_POLICY.md").read_text() == "be good"
    file = convert.convert(there, tmp_path / "m.gguf", "gguf").path
    assert open_checkpoint(file).license == "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"
    back = convert.convert(file, tmp_path / "again", "hf").path
    assert open_checkpoint(back).license == "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"
    (note,) = convert.convert(file, tmp_path / "meta", "meta").notes
    assert "LLAMA 3.2" in note


# --- Destinations and failures -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "pytorch", "META", "huggingface", "gguf\n"])
def test_a_form_that_is_none(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    """The error lists the three formats."""
    assert_rejected(lambda: convert.convert(sources["bf16"], tmp_path / "m", form), UsageError, "meta, hf, gguf")


@pytest.mark.parametrize("form", FORMATS)
def test_places_that_are_taken(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    """A file, a non-empty directory, the model itself, a directory around it, a missing parent directory."""
    source = shutil.copytree(sources["bf16"], tmp_path / "in.gguf" / "m.gguf")
    (tmp_path / "file.gguf").write_text("mine")
    (tmp_path / "link.gguf").symlink_to(source)
    assert_rejected(lambda: convert.convert(source, tmp_path / "file.gguf", form), UsageError, "already exists")
    assert_rejected(lambda: convert.convert(source, source, form), UsageError, "itself")
    assert_rejected(lambda: convert.convert(source, tmp_path / "link.gguf", form), UsageError, "itself")
    assert_rejected(lambda: convert.convert(source, source.parent, form), UsageError, "holds the model")
    assert_rejected(lambda: convert.convert(source, tmp_path / "no" / "m.gguf", form), ModelNotFoundError, "not exist")
    assert_rejected(lambda: convert.convert(source, tmp_path / ("n" * 300 + ".gguf"), form), UsageError, "Choose")
    assert (tmp_path / "file.gguf").read_text() == "mine"
    (tmp_path / "full.gguf").mkdir()
    (tmp_path / "full.gguf" / "x").touch()
    assert_rejected(lambda: convert.convert(source, tmp_path / "full.gguf", form), UsageError, "already exists")


def test_an_empty_directory(sources: dict[str, Path], tmp_path: Path) -> None:
    """It may exist for the formats that are directories; GGUF needs a file name with its extension."""
    (tmp_path / "m.gguf").mkdir()
    assert_rejected(lambda: convert.convert(sources["bf16"], tmp_path / "m.gguf", "gguf"), UsageError, "already exists")
    assert_rejected(lambda: convert.convert(sources["bf16"], tmp_path / "m", "gguf"), UsageError, ".gguf")
    assert convert.convert(sources["bf16"], tmp_path / "m.gguf", "hf").path == tmp_path / "m.gguf"
    assert (tmp_path / "m.gguf" / "config.json").is_file()


def test_a_disk_that_is_too_small(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported before anything is written, with both numbers."""
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10_300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_rejected(
        lambda: convert.convert(sources["bf16"], tmp_path / "m", "hf"),
        LlamaScratchError,
        "0.1 GB",
        "0.0 GB",
        "Free up disk space",
    )


FULL = """
import resource, signal, sys
from llama_scratch.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")
@pytest.mark.parametrize("form", FORMATS)
def test_a_disk_that_becomes_full(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    """An error while writing names the path, with exit code 1, and no files remain."""
    target = tmp_path / "m.gguf"
    command = [sys.executable, "-c", FULL, "convert", str(sources["bf16"]), str(target), "--to", form]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result.stderr
    assert str(target) in result.stderr
    assert "Free up disk space" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupt(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    """Ctrl-C while weights are written: no files remain, and an empty directory stays empty."""
    if form != "gguf":
        (tmp_path / "m.gguf").mkdir()

    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(sources["bf16"], tmp_path / "m.gguf", form, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ([] if form == "gguf" else ["m.gguf"])
    assert form == "gguf" or list((tmp_path / "m.gguf").iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_progress(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    """Progress grows until everything is written."""
    seen = []
    convert.convert(sources["bf16"], tmp_path / "m.gguf", form, lambda *report: seen.append(report))
    writing = [report for report in seen if report[0] == "writing"]
    assert [done for _, done, _ in writing] == sorted(done for _, done, _ in writing)
    assert len({total for _, _, total in writing}) == 1
    assert writing[-1][1] == writing[-1][2]


def test_a_broken_source(sources: dict[str, Path], tmp_path: Path) -> None:
    """Errors of reading are raised before anything is written."""
    source = shutil.copytree(sources["bf16"], tmp_path / "m")
    (source / "tokenizer.model").write_bytes(tokenizer_file()[:-20])
    assert_rejected(lambda: convert.convert(source, tmp_path / "x", "hf"), CheckpointError, "tokenizer.model")
    assert_rejected(lambda: convert.convert(tmp_path / "none", tmp_path / "x", "hf"), ModelNotFoundError, "none")
    assert not (tmp_path / "x").exists()


# --- The command ------------------------------------------------------------------------------


def test_the_command(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line on stderr is a command that runs the result; --json is one object; bad calls are reported."""
    from llama_scratch.cli import run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models").mkdir()
    assert run(["--plain", "convert", str(sources["fp32"]), "my models/a:b.gguf", "--to", "gguf", "--json"]) == 0
    captured = capsys.readouterr()
    path = tmp_path / "my models" / "a:b.gguf"
    assert json.loads(captured.out) == {"path": str(path), "form": "gguf", "bytes": path.stat().st_size, "notes": []}
    assert captured.err.splitlines()[-1].endswith(f"llama-scratch --model-dir '{path}'")
    assert run(["convert", str(path), "m", "--to", "meta"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Instruct" in captured.err.splitlines()[-2]
    assert run(["convert", str(path), "m2"]) == 2
    assert "--to" in capsys.readouterr().err
    assert run(["convert", str(path), "m2", "--to", "onnx"]) == 2
    assert "meta, hf, gguf" in capsys.readouterr().err
    assert run(["convert", "no-such-model", "m2", "--to", "hf"]) == 3
