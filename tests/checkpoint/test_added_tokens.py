"""Added, special and unused tokens in each format: the same ids as the formats' own programs.

Conversion keeps them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_scratch import Llama
from llama_scratch.chat_format import Message
from llama_scratch.checkpoint import convert, open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import BEGIN_WITH_BOS, PATTERNS, PRE_TOKENIZERS, bytes_to_unicode
from llama_scratch.checkpoint.gguf.reader import open_gguf
from llama_scratch.checkpoint.huggingface.reader import open_huggingface
from llama_scratch.errors import CheckpointError
from llama_scratch.tokenizer import LLAMA3_PATTERN, Tokenizer
from tests.helpers.command_line import Runner
from tests.helpers.gguf_files import MERGES, File, ints, string, strings, uint, vocabulary, whole_file
from tests.helpers.huggingface_files import (
    BYTE_LEVEL,
    N_VOCAB,
    PRE,
    edited,
    random_model,
    save,
    sequence,
    split,
    template,
    tokenizer_json,
    witness,
    write,
)
from tests.helpers.texts import CORPUS

pytestmark = pytest.mark.reference

THINK = N_VOCAB
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

Edit = Callable[[dict[str, Any]], object]


def add(values: dict[str, Any], *texts: str, special: bool = False) -> None:
    """Add tokens, after the others or with the id that they have in the vocabulary."""
    for text in texts:
        added, vocab = values["added_tokens"], values["model"]["vocab"]
        id = vocab.get(text, 1 + max([*vocab.values(), *(token["id"] for token in added)]))
        added.append({"id": id, "content": text, **FLAGS, "special": special})


@pytest.fixture
def gguf_file() -> File:
    return whole_file()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with room for eight more tokens."""
    return save(random_model(vocab_size=N_VOCAB + 8), tmp_path_factory.mktemp("added") / "Added")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with <think>, which is not special, a padding token, sampling defaults and a chat template."""
    directory = save(random_model(vocab_size=N_VOCAB + 8), tmp_path_factory.mktemp("thinking") / "Thinking")

    def edit(values: dict[str, Any]) -> None:
        add(values, "<think>", "</think>")
        add(values, "<|pad|>", special=True)
        values["post_processor"] = template("<|begin|>")

    edited(directory, edit)
    write(directory, "generation_config.json", {**SAMPLING, "eos_token_id": [N_VOCAB - 3, N_VOCAB - 1]})
    settings = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "model_max_length": 99}
    write(directory, "tokenizer_config.json", {"chat_template": CHAT, "padding_side": "left", **settings})
    return directory


# --- Text → ids -------------------------------------------------------------------------------


def test_an_added_token_is_found_in_plain_text(thinking: Path) -> None:
    """As in the `tokenizers` package; special tokens stay plain text unless they are allowed."""
    tokenizer, theirs = open_checkpoint(thinking).tokenizer, witness(thinking / "tokenizer.json")
    for text in ("a<think>b</think>", "<think><think>", "the <think>", "<thin<think>k>", "a<|im_end|><think>"):
        assert tokenizer.encode(text, bos=True, special=True) == theirs(text)
    assert tokenizer.encode("a<think>b") == [64, THINK, 65]
    assert tokenizer.encode("<|im_end|><think>")[-1] == THINK
    assert max(tokenizer.encode("<|im_end|>")) < 256
    assert "<think>" not in "".join(tokenizer.warnings("<think>"))
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        (["<a", "<a>", "<a>>"], "<a<a><a>><a>>>"),
        (["\n\n", "\n\n\n", "  "], "x\n\n\n\n\n the   cat"),
        (["the", "on"], "them on the one  the"),
        (["é", "日本"], "caf\u00e9 日本語"),
    ],
    ids=["of those that begin alike the longest", "white space", "ordinary tokens too", "other scripts"],
)
def test_added_tokens_of_all_kinds(base: Path, texts: list[str], text: str) -> None:
    values = tokenizer_json()
    if texts[0] == "é":  # has another visible form in the vocabulary
        values["model"]["vocab"].pop("é", None)
        texts = ["日本"]
    edited(base, lambda values: add(values, *texts))
    assert opened_as_it_is(base).encode(text) == witness(base / "tokenizer.json")(text)


def opened_as_it_is(directory: Path) -> Tokenizer:
    return open_huggingface(directory).tokenizer


def test_a_special_token_that_is_ordinary_too(base: Path) -> None:
    """Plain text produces it anyway, so nothing blocks it: the ids match the `tokenizers` package."""
    edited(base, lambda values: add(values, "!", special=True))
    tokenizer = opened_as_it_is(base)
    for text in ("hi!! the !", "!"):
        assert tokenizer.encode(text) == witness(base / "tokenizer.json")(text)
    assert not tokenizer.warnings("hi!")
    assert open_huggingface(base).extras.flagged == {tokenizer.names["!"]}


def test_a_name_beyond_a_cut_is_found(llama3_like: Tokenizer) -> None:
    """Very long runs are split, but not within an added token."""
    text = "a" * 24_997 + "<think>" + "a" * 30_000
    assert llama3_like.encode(text).count(999) == 1


@pytest.fixture
def llama3_like() -> Tokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return Tokenizer(ranks, {"<|x|>": 998}, LLAMA3_PATTERN, added_tokens={"<think>": 999}, unused_tokens={"[U]": 997})


def test_unused_names_are_never_found(llama3_like: Tokenizer) -> None:
    assert max(llama3_like.encode("[U]", special=True)) < 256
    assert llama3_like.decode([997]) == "[U]"
    assert llama3_like.untypeable == {997, 998}


@pytest.mark.parametrize("name", ["", "\ud800", "x" * 300_000], ids=["empty", "surrogate", "long"])
@pytest.mark.parametrize("kind", ["special_tokens", "added_tokens", "unused_tokens"])
def test_names_that_are_no_names(name: str, kind: str) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    arguments: dict[str, Any] = {"special_tokens": {}, "pattern": LLAMA3_PATTERN, kind: {name: 256}}
    with pytest.raises(CheckpointError):
        Tokenizer(ranks, **arguments)


def test_a_second_turn_is_what_the_model_generated(thinking: Path) -> None:
    """The ids match transformers' apply_chat_template, but special names in user messages stay text."""
    from transformers import AutoTokenizer

    llama = Llama.load(thinking, precision="fp32", threads=1)
    turns = [("user", "the <think> token"), ("assistant", "<think>\nthe</think>on"), ("user", "the")]
    theirs = AutoTokenizer.from_pretrained(thinking)
    expected: Any = theirs.apply_chat_template([{"role": role, "content": text} for role, text in turns])
    ids = llama.encode_chat([Message(*turn) for turn in turns])
    assert ids == list(expected["input_ids"] if hasattr(expected, "keys") else expected)
    assert ids.count(THINK) == 2
    assert llama.encode_chat([Message("user", "<|im_end|>")]).count(N_VOCAB - 1) == 1


# --- Hugging Face -----------------------------------------------------------------------------


def settings(**fields: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(THINK): {"content": "<new>", **FLAGS, **fields}}}


@pytest.mark.parametrize(
    ("config", "special", "added"),
    [
        (settings(special=False), set(), {"<new>"}),
        (settings(special=True), {"<new>"}, set()),
        (settings(special=False) | {"eos_token": "<new>"}, {"<new>"}, set()),
        (settings(special=False) | {"additional_special_tokens": ["<new>"]}, {"<new>"}, set()),
        (settings(special=False) | {"extra_special_tokens": {"x": "<new>"}}, {"<new>"}, set()),
        ({"added_tokens_decoder": [1]}, set(), set()),
        ({"added_tokens_decoder": {"x": {}, "1": 2}, "additional_special_tokens": [["x"], 5, None]}, set(), set()),
    ],
)
def test_tokenizer_config_adds_tokens_and_calls_them_special(
    base: Path, config: dict[str, Any], special: set[str], added: set[str]
) -> None:
    """In addition to tokenizer.json, as in transformers."""
    edited(base, lambda values: None)
    write(base, "tokenizer_config.json", config)
    tokenizer = opened_as_it_is(base)
    assert special == {name for name in tokenizer.special_tokens if name == "<new>"}
    assert added == set(tokenizer.added_tokens)
    assert tokenizer.encode("a<new>", special=True)[-1] == (THINK if special | added else 29)


def test_older_directories_name_special_tokens_elsewhere(base: Path) -> None:
    """In special_tokens_map.json; tokenizer_config.json takes precedence."""
    edited(base, lambda values: add(values, "<end>"))
    write(base, "special_tokens_map.json", {"eos_token": {"content": "<end>"}, "bos_token": "<|im_end|>"})
    write(base, "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": None})
    found = open_huggingface(base)
    assert found.tokenizer.names["<end>"] in found.tokenizer.stop_ids
    assert found.extras.roles["bos"] == N_VOCAB - 2
    (base / "special_tokens_map.json").unlink()


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    """They are dropped with a warning, and their names in a text are plain text. BOS must be in range."""
    directory = save(random_model(), tmp_path / "Short")
    write(directory, "tokenizer_config.json", {"pad_token": "[PAD]"})
    edited(directory, lambda values: add(values, "[PAD]", "<more>"))
    checkpoint = open_checkpoint(directory)
    (warning,) = checkpoint.warnings
    assert "'[PAD]', '<more>'" in warning
    for text in ("a[PAD]b", "<more>"):
        assert max(checkpoint.tokenizer.encode(text, special=True)) < N_VOCAB
    llama = Llama.load(directory, precision="fp32", threads=1)
    assert warning in llama.predict("[PAD]").warnings
    assert warning in convert.convert(directory, tmp_path / "again", "hf").notes

    def begin(values: dict[str, Any]) -> None:
        add(values, "<start>")
        values["post_processor"] = template("<|begin|>")
        values["post_processor"]["special_tokens"]["<|begin|>"]["ids"] = [N_VOCAB]

    edited(directory, begin)
    with pytest.raises(CheckpointError, match="'<start>' has the id 267, beyond"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "pre",
    [
        *(
            sequence(split(LLAMA3_PATTERN, behavior=behavior, invert=invert), BYTE_LEVEL | {"use_regex": False})
            for behavior in ("Isolated", "MergedWithPrevious", "MergedWithNext")
            for invert in (False, True)
        ),
        sequence(split(LLAMA3_PATTERN, behavior="Removed", invert=True), BYTE_LEVEL | {"use_regex": False}),
        *(
            sequence(split(pattern), BYTE_LEVEL | {"use_regex": False})
            for pattern in (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
                r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
            )
        ),
    ],
)
def test_steps_of_the_same_meaning(base: Path, pre: dict[str, Any]) -> None:
    """If a description of the steps is accepted, the ids match the `tokenizers` package."""
    edited(base, lambda values: values.update(pre_tokenizer=pre, normalizer={"type": "Sequence", "normalizers": []}))
    write(base, "tokenizer_config.json", {})
    tokenizer, theirs = opened_as_it_is(base), witness(base / "tokenizer.json")
    for text in (
        *CORPUS.splitlines(keepends=True)[::7],
        CORPUS[:5000],
        "IT'S  \r\n\n 12345 x\t\t",
        " a\u0301\u200b \n ",
    ):
        assert tokenizer.encode(text) == theirs(text)


def test_a_control_token_of_the_vocabulary_alone(base: Path) -> None:
    """No merge produces it and no list adds it, so text never does, as in the `tokenizers` package."""
    edited(base, lambda values: values["model"]["vocab"].update({"<|hidden|>": THINK}))
    tokenizer = opened_as_it_is(base)
    assert tokenizer.token_text(THINK) == "<|hidden|>"
    assert tokenizer.encode("a<|hidden|>") == witness(base / "tokenizer.json")("a<|hidden|>")


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["model"].update(merges=[["t", "h"]] * 200_000),
        lambda values: values["model"].update(merges=["t h"] * 200_000),
        lambda values: values["model"]["merges"].insert(1, ["t", "h"]),
        lambda values: values["model"]["merges"].insert(0, ["t", "z"]),
        lambda values: values["model"]["vocab"].update({f"x{i}": 300 + i for i in range(100_000)}),
        lambda values: add(values, "\ud800"),
        lambda values: values["added_tokens"][0].update(content="\udc80x"),
        lambda values: values["model"]["vocab"].update({"\ud800": 300}),
        lambda values: values["model"]["merges"].append(["\ud800", "a"]),
    ],
    ids=["equal merges", "as text", "a merge twice", "a merge of nothing", "many tokens", *["surrogate"] * 4],
)
def test_a_damaged_tokenizer_is_rejected_soon(base: Path, edit: Edit) -> None:
    edited(base, edit)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_huggingface(base)


@pytest.mark.parametrize("field", ["chat_template", "bos_token", "eos_token", "pad_token"])
def test_settings_that_are_not_unicode(base: Path, tmp_path: Path, field: str) -> None:
    """A lone surrogate in tokenizer_config.json becomes U+FFFD, also when written again."""
    edited(base, lambda values: None)
    write(base, "tokenizer_config.json", {"chat_template": "{{ bos_token }}x", field: "\ud800"})
    for to, name in (("hf", "hf"), ("gguf", "a.gguf")):
        convert.convert(base, tmp_path / name, to)
        chat = open_checkpoint(tmp_path / name).chat
        assert chat is not None
        assert "\ud800" not in "".join(part.text for part in chat.parts([Message("user", "a")]))


def test_a_tokenizer_model_of_a_million_lines(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\n" * 1_000_000)
    with pytest.raises(CheckpointError, match="1,000,000 lines, expected at most"):
        Tokenizer.from_meta(str(tmp_path / "tokenizer.model"))


# --- GGUF -------------------------------------------------------------------------------------

TEXTS, TYPES = vocabulary()
# Source: `llama_vocab::impl::load` in ggml-org/llama.cpp.
LLAMA_CPP = {
    ("llama-bpe", True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ("llama-bpe", False): "smaug-bpe dbrx glm4 chatglm-bpe",
    ("smollm", False): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ("gpt-2", False): "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 "
    "mpt olmo jais trillion granite-docling",
}


def test_llama_cpps_table_of_pre_tokenizers(tmp_path: Path, gguf_file: File) -> None:
    """All names of the known patterns, with llama.cpp's default of BOS for each."""
    expected = {name: key for key, names in LLAMA_CPP.items() for name in names.split()}
    assert {name: (known, name in BEGIN_WITH_BOS) for name, known in PRE_TOKENIZERS.items()} == expected
    gguf_file.set("tokenizer.ggml.bos_token_id", uint(270))
    for name in ("llama3", "smaug-bpe", "mpt", "starcoder"):
        path = gguf_file.set("tokenizer.ggml.pre", string(name)).write(tmp_path / "a.gguf")
        tokenizer = open_gguf(path).tokenizer
        assert tokenizer.pattern == PATTERNS[expected[name][0]]
        assert tokenizer.bos_id == (270 if expected[name][1] else None)


@pytest.mark.parametrize("pre", [None, string("default")])
@pytest.mark.parametrize(
    ("more", "special", "expected"),
    [
        ([], "<|begin_of_text|>", "llama-bpe"),
        ([], "<|x|>", "smollm"),
        (["1 2", "12 3"], "<|x|>", "gpt-2"),
        (["1 2", "12 3", "( t"], "<|x|>", "llama-bpe"),
        (["1 2", "12 3", "123 1"], "<|x|>", "gpt-2"),
        (["1 2", "12 3", "123 1", "( t"], "<|x|>", None),
    ],
)
def test_a_missing_pre_tokenizer(
    tmp_path: Path, gguf_file: File, pre: bytes | None, more: list[str], special: str, expected: str | None
) -> None:
    """Llama 3 is recognized by special tokens, others by the narrowest pattern that splits no token; with a warning."""
    merges = [*MERGES, *more]
    texts = [*TEXTS[:270], *(merge.replace(" ", "") for merge in more), special, "<|unknown|>"]
    types = [1] * (len(texts) - 2) + [3, 3]
    for key, value in (("tokens", strings(texts)), ("token_type", ints(types)), ("merges", strings(merges))):
        gguf_file.set(f"tokenizer.ggml.{key}", value)
    gguf_file.set("tokenizer.ggml.pre", pre).set("tokenizer.ggml.bos_token_id", uint(len(texts) - 2))
    path = gguf_file.write(tmp_path / "a.gguf")
    if expected is None:
        with pytest.raises(CheckpointError, match="`tokenizer`"):
            open_tokenizer(path)
        return
    tokenizer, warnings = open_tokenizer(path)
    assert tokenizer.pattern == PATTERNS[expected]
    assert tokenizer.bos_id == (len(texts) - 2 if expected == "llama-bpe" else None)
    assert f"'{expected}'" in warnings[0]


def open_tokenizer(path: Path) -> tuple[Tokenizer, tuple[str, ...]]:
    """Return a file's tokenizer and its warnings, ignoring the size of its embedding."""
    from llama_scratch.checkpoint.gguf.header import read_header
    from llama_scratch.checkpoint.gguf.tokenizer import read_tokenizer

    tokenizer, _, warnings = read_tokenizer(read_header(path).metadata)
    return tokenizer, warnings


def test_the_vocabularies_of_models_tell_their_patterns(smollm2_path: Path, meta_tokenizer_path: Path) -> None:
    """For Llama 3 and SmolLM2, also without the names of their special tokens."""
    from llama_scratch.checkpoint.byte_level_bpe import guess_pre_tokenizer

    for tokenizer, expected in (
        (Tokenizer.from_meta(str(meta_tokenizer_path)), "llama-bpe"),
        (open_checkpoint(smollm2_path).tokenizer, "smollm"),
    ):
        names = {"<unk>": tokenizer.n_vocab}

        def make(pattern: str, tokenizer: Tokenizer = tokenizer, names: dict[str, int] = names) -> Tokenizer:
            return Tokenizer(tokenizer.ranks, names, pattern, unknown="<unk>")

        assert guess_pre_tokenizer((), make) == expected


@pytest.mark.parametrize("types", [None, [1] * 272])
def test_control_tokens_without_their_type(tmp_path: Path, gguf_file: File, types: list[int] | None) -> None:
    """If token types are missing or ordinary, a token's form makes it special, with a warning."""
    gguf_file.set("tokenizer.ggml.token_type", None if types is None else ints(types))
    found = open_gguf(gguf_file.write(tmp_path / "a.gguf"))
    assert set(found.tokenizer.special_tokens) == {"<|endoftext|>", "<|unknown|>"}
    assert found.tokenizer.stop_ids == {270}
    assert "'<|endoftext|>'" in found.warnings[0]


def test_a_control_token_that_only_its_role_tells(tmp_path: Path, gguf_file: File) -> None:
    """Without brackets; a token that merges produce stays ordinary, whatever its role."""
    gguf_file.set("tokenizer.ggml.tokens", strings([*TEXTS[:270], "EOT", "<|unknown|>"]))
    gguf_file.set("tokenizer.ggml.token_type", ints([1] * 272)).set("tokenizer.ggml.padding_token_id", uint(0))
    found = open_gguf(gguf_file.write(tmp_path / "a.gguf"))
    assert found.tokenizer.special_tokens["EOT"] == 270
    assert found.tokenizer.stop_ids == {270}
    assert found.extras.roles["padding"] == 0
    assert found.tokenizer.encode("!") == [0]


def test_types_of_tokens(tmp_path: Path, gguf_file: File) -> None:
    """User-defined tokens always match, control tokens only if allowed, unused and byte tokens never."""
    special = {"<think>": 4, "<|x|>": 3, "<u>": 5, "<0x0A>": 6, "<|im_end|>": 4}
    texts = [*TEXTS[:267], *special]
    merges = MERGES[:11]
    types = [3, 5, *TYPES[2:267], *special.values()]  # "!" is a control token, '"' is unused
    for key, value in (("tokens", strings(texts)), ("token_type", ints(types)), ("merges", strings(merges))):
        gguf_file.set(f"tokenizer.ggml.{key}", value)
    tokenizer = open_gguf(gguf_file.write(tmp_path / "a.gguf")).tokenizer
    text = "<think><|x|><u><0x0A><|im_end|>"
    assert [id for id in tokenizer.encode(text) if id >= 267] == [267]
    assert [id for id in tokenizer.encode(text, special=True) if id >= 267] == [267, 268, 271]
    assert tokenizer.encode('!"') == [0, 1]
    assert 271 in tokenizer.stop_ids


# --- Conversion --------------------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_a_hugging_face_directory_again(thinking: Path, tmp_path: Path) -> None:
    """Flags, roles, sampling defaults and settings are kept; transformers decodes the same text."""
    from transformers import AutoTokenizer

    found = convert.convert(thinking, tmp_path / "hf", "hf")
    assert found.notes == ()
    before, after = (json.loads((path / "generation_config.json").read_text()) for path in (thinking, found.path))
    assert {name: after[name] for name in before} == before
    assert after["pad_token_id"] == json.loads((found.path / "config.json").read_text())["pad_token_id"] == THINK + 2
    for path in (thinking, found.path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer("a<think>b<|im_end|>")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
        assert (tokenizer.pad_token, tokenizer.model_max_length, tokenizer.padding_side) == ("<|pad|>", 99, "left")
    assert same_tokenizer(thinking, found.path)


def same_tokenizer(one: Path, other: Path) -> bool:
    fields = ["ranks", "special_tokens", "added_tokens", "_unused_tokens", "pattern", "bos_id", "stop_ids", "unknown"]
    tokenizers = [open_checkpoint(path).tokenizer for path in (one, other)]
    return all(getattr(tokenizers[0], field) == getattr(tokenizers[1], field) for field in fields)


def test_through_gguf_and_back(thinking: Path, tmp_path: Path) -> None:
    """Token types, padding and sampling defaults, as written by llama.cpp's converter."""
    file = convert.convert(thinking, tmp_path / "a.gguf", "gguf")
    assert file.notes == ()
    fields = metadata_of(file.path)
    types = fields["tokenizer.ggml.token_type"]
    assert [types[id] for id in (0, N_VOCAB - 1, THINK, THINK + 2, THINK + 3)] == [1, 3, 4, 3, 5]
    assert fields["tokenizer.ggml.tokens"][THINK + 3] == f"[PAD{THINK + 3}]"
    assert fields["tokenizer.ggml.padding_token_id"] == THINK + 2
    assert fields["general.sampling.temp"] == pytest.approx(0.6)
    back = convert.convert(file.path, tmp_path / "hf", "hf")
    assert back.notes == ()
    assert same_tokenizer(thinking, back.path)
    generation = json.loads((back.path / "generation_config.json").read_text())
    assert {name: generation[name] for name in SAMPLING} == SAMPLING


def test_a_gguf_file_again(tmp_path: Path, gguf_file: File) -> None:
    """All token types, roles and metadata are kept; converting to Hugging Face reports the lost ones."""
    texts, types = [*TEXTS[:268], "<0x0A>", "<u>", "<think>", "<|unknown|>"], [*TYPES[:268], 6, 5, 4, 2]
    kept = {
        "tokenizer.ggml.fim_pre_token_id": uint(270),
        "tokenizer.ggml.padding_token_id": uint(0),
        "general.name": string("A Name"),
        "general.author": string("An Author"),
        "general.tags": strings(["a", "b"]),
        "general.sampling.top_k": uint(40),
        "tokenizer.chat_template": string("{{ bos_token }}"),
        "tokenizer.chat_template.tool": string("x"),
    }
    more = {"tokens": strings(texts), "token_type": ints(types), "merges": strings(MERGES[:12])}
    for key, value in {**kept, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}.items():
        gguf_file.set(key, value)
    source = gguf_file.set("tokenizer.ggml.eos_token_id", None).write(tmp_path / "a.gguf")
    found = convert.convert(source, tmp_path / "b.gguf", "gguf")
    assert found.notes == ()
    before, after = metadata_of(source), metadata_of(found.path)
    for key in (*kept, "tokenizer.ggml.token_type", "tokenizer.ggml.tokens", "tokenizer.ggml.unknown_token_id"):
        assert after[key] == before[key], key
    notes = " ".join(convert.convert(source, tmp_path / "hf", "hf").notes)
    assert all(word in notes for word in ("fim_pre", "general.author", "general.tags", "chat_template.tool"))
    assert same_tokenizer(source, tmp_path / "hf")
    assert open_checkpoint(tmp_path / "hf").extras.roles["padding"] == 0


def test_a_form_that_cannot_hold_it_says_so(
    thinking: Path, tiny_dir: Path, tmp_path: Path, llama_scratch: Runner
) -> None:
    """On stderr: sampling defaults without a key in GGUF. Meta's format rejects added tokens."""
    before = json.loads((thinking / "generation_config.json").read_text())
    write(thinking, "generation_config.json", before | {"typical_p": 0.5})
    try:
        found = llama_scratch("convert", str(thinking), str(tmp_path / "a.gguf"), "--to", "gguf")
        rejected = llama_scratch("convert", str(thinking), str(tmp_path / "meta"), "--to", "meta")
    finally:
        write(thinking, "generation_config.json", before)
    assert found.code == 0
    assert "typical_p" in found.err
    assert rejected.code == CheckpointError.exit_code
    hf = convert.convert(tiny_dir, tmp_path / "hf", "hf").path
    write(hf, "generation_config.json", SAMPLING)
    notes = " ".join(convert.convert(hf, tmp_path / "again", "meta").notes)
    assert "temperature" in notes


# --- Merges -----------------------------------------------------------------------------------


def random_merges(chance: random.Random) -> tuple[list[str], list[list[str]]]:
    """An untrained vocabulary, with many tokens that no merges produce from their bytes."""
    texts, known = list(bytes_to_unicode().values()), list("abcĠ")
    pairs: list[list[str]] = []
    for _ in range(chance.randint(3, 40)):
        left, right = chance.choice(known), chance.choice(known)
        if left + right in texts or len(left + right) > 9:
            continue
        texts.append(left + right)
        known.append(left + right)
        splits = [[(left + right)[:i], (left + right)[i:]] for i in range(1, len(left + right))]
        others = [pair for pair in splits if pair != [left, right] and set(pair) <= set(texts)]
        pairs += [[left, right], *(others if chance.random() < 0.3 else [])]
    return texts, pairs


@pytest.mark.parametrize("whole", [True, False])
def test_merges_that_nothing_trained(tmp_path: Path, whole: bool) -> None:
    """The ids match the `tokenizers` package, before and after conversion, for both values of `ignore_merges`."""
    base = save(random_model(vocab_size=300), tmp_path / "Untrained")
    chance, hidden = random.Random(f"merges {whole}"), 0
    for number in range(25):
        texts, pairs = random_merges(chance)

        def edit(values: dict[str, Any], texts: list[str] = texts, pairs: list[list[str]] = pairs) -> None:
            model = values["model"]
            model.update(vocab={text: id for id, text in enumerate(texts)}, merges=pairs, ignore_merges=whole)
            values.update(added_tokens=[], pre_tokenizer=PRE["llama-bpe"])

        edited(base, edit)
        write(base, "tokenizer_config.json", {})
        tokenizer, theirs = opened_as_it_is(base), witness(base / "tokenizer.json")
        hidden += tokenizer.merges is not None
        drawn = ["".join(chance.choices("abc ", k=chance.randint(1, 14))) for _ in range(40)]
        for text in drawn:
            assert tokenizer.encode(text) == theirs(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        if number == 0:
            for to, name in (("hf", "hf"), ("gguf", "a.gguf")):
                other = open_checkpoint(convert.convert(base, tmp_path / name, to).path).tokenizer
                assert [other.encode(text) for text in drawn] == [tokenizer.encode(text) for text in drawn]
    assert hidden > 10
