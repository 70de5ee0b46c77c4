"""Hugging Face directories: logits of transformers, ids of `tokenizers`, and errors for broken files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.chat_format import Message, TemplateFormat
from llama_scratch.checkpoint import Checkpoint, open_checkpoint
from llama_scratch.checkpoint.byte_level_bpe import PATTERNS, bytes_to_unicode, merges_of
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.huggingface.reader import in_pairs, open_huggingface
from llama_scratch.checkpoint.license import read_license
from llama_scratch.checkpoint.verify import verify
from llama_scratch.config import ModelArgs, RopeScaling, is_tied
from llama_scratch.errors import CheckpointError, LlamaScratchError, ModelNotFoundError, UnsupportedError
from llama_scratch.model import Transformer
from llama_scratch.precision.lazy_weight import as_tensor
from llama_scratch.system.progress import silent
from llama_scratch.tokenizer import LLAMA3_PATTERN, Tokenizer
from tests.helpers.assertions import assert_rejected, is_sentence
from tests.helpers.huggingface_files import (
    BYTE_LEVEL,
    CONFIG,
    MERGES,
    N_VOCAB,
    PRE,
    SPECIAL,
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
from tests.helpers.texts import CORPUS, UNWRITTEN, drawn

pytestmark = pytest.mark.reference

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BOS = N_VOCAB - 2
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # to make it matter within the first hundred tokens
}
IDS = [(7 * i * i + 3 * i) % 256 for i in range(160)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an untied output. Read only."""
    return save(random_model(), tmp_path_factory.mktemp("hf") / "Small")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several files. Read only."""
    return save(random_model(), tmp_path_factory.mktemp("hf") / "Sharded", max_shard_size="100KB")


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "Small")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """A copy in several files, to damage."""
    return shutil.copytree(sharded, tmp_path / "Sharded")


def change(directory: Path, file: str, **changes: Any) -> Path:
    """Replace fields of a JSON file; None removes one."""
    path = directory / file
    values = json.loads(path.read_text()) | changes if path.exists() else changes
    return write(directory, file, {name: value for name, value in values.items() if value is not None})


def load_rejected(directory: Path, *words: object, error: type[LlamaScratchError] = CheckpointError) -> None:
    """Load a directory that must be rejected with an error that names it."""
    assert_rejected(lambda: open_huggingface(directory).load(silent), error, directory, *words)


def logits(checkpoint: Checkpoint, ids: list[int] = IDS) -> Tensor:
    """Compute the checkpoint's logits in float32, (T, vocab_size)."""
    model = Transformer(checkpoint.args)
    model.load_state_dict({name: as_tensor(w).float() for name, w in checkpoint.load(silent).items()})
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([ids]), all_positions=True)[0]
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm())


def theirs(directory: Path) -> Tensor:
    """Compute the same logits with transformers, from the same files."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([IDS])).logits[0]
    return found


# --- Network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_logits_are_transformers(tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str) -> None:
    """In each type, in one or several files, tied and untied."""
    directory = save(random_model(dtype, tie_word_embeddings=tied), tmp_path / "Small", max_shard_size=shard)
    checkpoint = open_huggingface(directory)
    assert (len(checkpoint.files) > 1) == (shard == "100KB")
    assert all(file.is_file() for file in checkpoint.files)
    assert checkpoint.path == checkpoint.files[0]
    weights, stored = checkpoint.load(silent), checkpoint.storage(silent)
    assert {weight.dtype for weight in weights.values()} == {dtype} == {stored.dtype}
    assert is_tied(weights) is tied is stored.tied
    assert stored.types == {str(dtype).removeprefix("torch."): 2 * 9 + 2 + (not tied)}
    assert distance(logits(checkpoint), theirs(directory)) < 1e-5


ROPES: dict[str, dict[str, Any]] = {
    "old": {"rope_theta": 50000.0, "rope_scaling": LLAMA3_SCALING | {"type": "llama3"}},
    "newer": {"rope_theta": 50000.0, "rope_scaling": LLAMA3_SCALING | {"rope_type": "llama3"}},
    "of transformers 5": {"rope_parameters": LLAMA3_SCALING | {"rope_type": "llama3", "rope_theta": 50000.0}},
}


@pytest.mark.parametrize("spelling", ROPES)
def test_scaled_rope_in_each_spelling(directory: Path, spelling: str) -> None:
    """The same shape and transformers' logits for each way to write the scaling; unscaled logits differ."""
    change(directory, "config.json", **{"rope_parameters": None} | ROPES[spelling])
    checkpoint = open_huggingface(directory)
    assert checkpoint.args.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert checkpoint.args.rope_theta == 50000.0
    expected = theirs(directory)
    assert distance(logits(checkpoint), expected) < 1e-5
    assert distance(logits(replace(checkpoint, args=checkpoint.args.with_rope_factor(1))), expected) > 0.01
    assert distance(logits(replace(checkpoint, args=checkpoint.args.with_rope_factor(32))), expected) > 0.001


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1234.0},
        {"rope_theta": 1234.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 1234.0, "rope_scaling": {"rope_type": None}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
        {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 1234.0}},
    ],
)
def test_plain_rope_in_each_spelling(directory: Path, fields: dict[str, Any]) -> None:
    """No scaling, or one without effect; fields in `rope_parameters` take precedence over those beside it."""
    args = open_huggingface(change(directory, "config.json", **{"rope_parameters": None} | fields)).args
    assert (args.rope_theta, args.rope_scaling) == (1234.0, None)


def test_a_config_with_all_its_fields(whole: Path) -> None:
    """Each field ends up in the right place."""
    checkpoint = open_huggingface(whole)
    assert checkpoint.args == ModelArgs(64, 2, 4, 2, N_VOCAB, 96, 1e-5, 10000.0, None, 512)
    assert (checkpoint.name, checkpoint.format, checkpoint.chat) == ("Small", "huggingface", None)


def test_a_config_with_only_what_is_needed(tmp_path: Path) -> None:
    """Missing fields have transformers' defaults: as many KV heads as heads, ε 1e-6, θ 10,000, untied."""
    directory = save(random_model(num_key_value_heads=4), tmp_path / "Small")
    left = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    write(directory, "config.json", {"model_type": "llama"} | {name: CONFIG[name] for name in left})
    checkpoint = open_huggingface(directory)
    assert checkpoint.args == ModelArgs(64, 2, 4, 4, N_VOCAB, 96, 1e-6, 10000.0, None, 2048)
    assert not is_tied(checkpoint.load(silent))


def rewritten(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edit the tensors of a directory's only file."""
    path = directory / WEIGHTS
    weights = {name: weight.clone() for name, weight in safetensors.torch.load_file(path).items()}
    edit(weights)
    path.unlink()
    safetensors.torch.save_file(weights, path)
    return directory


def another_output(weights: dict[str, Tensor]) -> None:
    """Keep the output, which differs from the embedding."""


def another_last_value(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][-1, -1] += 1


def another_type(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].to(torch.bfloat16)


@pytest.mark.parametrize("edit", [another_output, another_last_value, another_type])
def test_weights_are_believed_over_a_flag_that_ties_them(directory: Path, edit: Callable[..., object]) -> None:
    """The output in the file is used, as in transformers, with a warning."""
    checkpoint = open_huggingface(rewritten(change(directory, "config.json", tie_word_embeddings=True), edit))
    assert not is_tied(checkpoint.load(silent))
    assert not checkpoint.storage(silent).tied
    assert ["tie_word_embeddings" in sentence for sentence in checkpoint.warnings] == [True]
    if edit is not another_type:
        assert distance(logits(checkpoint), theirs(directory)) < 1e-5


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_an_equal_output_is_tied(directory: Path, value: float) -> None:
    """Compared bitwise, so NaN equals itself. Without the flag the output stays untied."""

    def equal(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][3, 5] = value
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    for flag in (True, False):
        checkpoint = open_huggingface(rewritten(change(directory, "config.json", tie_word_embeddings=flag), equal))
        assert is_tied(checkpoint.load(silent)) is flag is checkpoint.storage(silent).tied
        assert checkpoint.warnings == ()


def test_nan_in_an_output_that_a_flag_ties(directory: Path, tmp_path: Path) -> None:
    """`verify` reports it, and `convert` keeps the output."""
    change(directory, "config.json", tie_word_embeddings=True)
    rewritten(directory, lambda weights: weights["lm_head.weight"][3, 5].fill_(float("nan")))
    found = verify(directory)
    assert [finding.part for finding in found.findings if finding.result == "wrong"] == ["output.weight"]
    convert(directory, tmp_path / "a.gguf", "gguf")
    output = as_tensor(open_checkpoint(tmp_path / "a.gguf").load(silent)["output.weight"])
    assert output[3, 5].isnan()
    assert int(output.isnan().sum()) == 1


@pytest.mark.parametrize("flag", [True, False, None])
def test_an_output_that_was_left_out_is_the_embedding(directory: Path, flag: bool | None) -> None:
    """Never random values; with a warning if the config does not tie it."""
    change(directory, "config.json", tie_word_embeddings=flag)
    checkpoint = open_huggingface(rewritten(directory, lambda weights: weights.pop("lm_head.weight")))
    assert is_tied(checkpoint.load(silent))
    assert checkpoint.storage(silent).tied
    assert len(checkpoint.warnings) == (flag is not True)


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "head_dim"), [(64, 4, 2, 32), (64, 4, 2, 8), (96, 2, 1, 64)])
def test_heads_of_a_width_of_their_own(tmp_path: Path, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """`head_dim` may differ from hidden_size / heads."""
    shape: dict[str, Any] = {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    directory = save(random_model(**shape), tmp_path / "Small")
    checkpoint = open_huggingface(directory)
    assert checkpoint.args.head_dim == head_dim
    assert distance(logits(checkpoint), theirs(directory)) < 1e-5


def test_numbers_that_are_whole_floats(directory: Path, whole: Path) -> None:
    """Some programs write 64 as 64.0."""
    fields = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    fields += ["vocab_size", "intermediate_size", "max_position_embeddings"]
    config = json.loads((directory / "config.json").read_text())
    change(directory, "config.json", **{field: float(config[field]) for field in fields})
    assert open_huggingface(directory).args == open_huggingface(whole).args


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 1},
        {"rope_type": "dynamic", "factor": 1.0},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512, "attention_factor": 1.0},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512},
        LLAMA3_SCALING | {"rope_type": "llama3", "factor": 1.0},
    ],
)
def test_a_scaling_by_a_factor_of_1(directory: Path, scaling: dict[str, Any]) -> None:
    """It has no effect, as in transformers."""
    change(directory, "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    checkpoint = open_huggingface(directory)
    assert checkpoint.args.rope_scaling is None
    assert distance(logits(checkpoint), theirs(directory)) < 1e-5
    assert checkpoint.warnings == ()


PARAMETERS = {"rope_type": "llama3", "rope_theta": 10000.0} | LLAMA3_SCALING


@pytest.mark.parametrize(
    ("fields", "says", "theta", "original"),
    [
        ({"rope_parameters": PARAMETERS, "rope_theta": 500000.0}, "rope_theta", 10000.0, 64),
        ({"rope_parameters": PARAMETERS, "rope_theta": 10000}, "", 10000.0, 64),
        ({"rope_parameters": PARAMETERS, "rope_scaling": PARAMETERS}, "", 10000.0, 64),
        ({"rope_parameters": PARAMETERS, "rope_scaling": PARAMETERS | {"factor": 4}}, "rope_scaling", 10000.0, 64),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": PARAMETERS}, "rope_scaling", 10000.0, 64),
        ({"rope_parameters": PARAMETERS, "original_max_position_embeddings": 128}, "original_max", 10000.0, 128),
    ],
)
def test_a_rope_that_contradicts_itself(
    directory: Path, fields: dict[str, Any], says: str, theta: float, original: int
) -> None:
    """transformers' choice is used, with a warning, unless the two fields agree."""
    change(directory, "config.json", **fields)
    checkpoint = open_huggingface(directory)
    assert checkpoint.args.rope_theta == theta
    assert checkpoint.args.rope_scaling is not None
    assert checkpoint.args.rope_scaling.original_context == original
    assert [says in sentence for sentence in checkpoint.warnings] == [True] * bool(says)
    assert distance(logits(checkpoint), theirs(directory)) < 1e-5


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.bias"])
def test_biases_that_the_config_does_not_speak_of(directory: Path, name: str) -> None:
    """They are not dropped: the model is rejected as not supported, not as damaged."""
    rewritten(directory, lambda weights: weights.update({name: torch.ones(64)}))
    load_rejected(directory, name, "bias", error=UnsupportedError)


def test_a_header_of_very_many_tensors(directory: Path) -> None:
    """Rejected quickly, in a file and in an index."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{n}": entry for n in range(60_000)}, separators=(",", ":")).encode()
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.process_time()
    load_rejected(directory, "60,000 tensors")
    assert time.process_time() - start < 2
    (directory / WEIGHTS).rename(directory / "a.safetensors")
    write(directory, INDEX, {"weight_map": {f"{n}": "a.safetensors" for n in range(60_000)}})
    start = time.process_time()
    load_rejected(directory, "60,000 tensors")
    assert time.process_time() - start < 2


def test_the_rotation_table_of_older_files_is_ignored(directory: Path) -> None:
    """RoPE's frequencies are computed here."""
    before = open_huggingface(directory).load(silent)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    after = open_huggingface(rewritten(directory, lambda weights: weights.update(tables))).load(silent)
    assert after.keys() == before.keys()


def test_only_q_and_k_are_sorted_anew(whole: Path) -> None:
    """Rows 2j and 2j + 1 of a head are transformers' rows j and j + head_dim/2; all else is unchanged."""
    stored = safetensors.torch.load_file(whole / WEIGHTS)
    weights = open_huggingface(whole).load(silent)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        meta = as_tensor(weights[f"layers.1.attention.w{name[0]}.weight"])
        file = stored[f"model.layers.1.self_attn.{name}.weight"]
        for row in range(16 * heads):
            head, place = divmod(row, 16)
            assert torch.equal(meta[row], file[16 * head + place // 2 + 8 * (place % 2)])
    assert torch.equal(
        as_tensor(weights["layers.1.attention.wv.weight"]), stored["model.layers.1.self_attn.v_proj.weight"]
    )
    assert in_pairs(torch.arange(8).reshape(8, 1), 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """Loading 150 MB takes no memory; reading the weights afterwards does, so the measurement works."""
    directory = save(random_model(intermediate_size=200_000, num_hidden_layers=1), tmp_path / "Wide")
    assert (directory / WEIGHTS).stat().st_size > 150e6
    checkpoint = open_huggingface(directory)
    open_huggingface(directory).load(silent)  # imports and small allocations
    process = psutil.Process()
    before = process.memory_info().rss
    weights = checkpoint.load(silent)
    assert process.memory_info().rss - before < 10e6
    total = sum(float(as_tensor(weight).sum()) for weight in weights.values())
    assert total != 0
    assert process.memory_info().rss - before > 140e6


def test_opening_imports_no_torch(whole: Path) -> None:
    """Shape, tokenizer and tensor offsets are read without torch."""
    code = (
        "import sys; from pathlib import Path; from llama_scratch.checkpoint import open_checkpoint; "
        f"open_checkpoint(Path({str(whole)!r})); print({{'torch', 'safetensors', 'numpy'}} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_a_directory_answers(whole: Path) -> None:
    """`Llama.load` computes transformers' logits."""
    llama = Llama.load(whole, device="cpu", precision="fp32")
    assert distance(llama.logits(IDS), theirs(whole)) < 1e-5
    assert llama.info.format == "huggingface"
    assert llama.tokenizer.decode(llama.encode("the thin 123 é")) == "the thin 123 é"


# --- Broken weights ----------------------------------------------------------------------------


def with_header(directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Edit the header of a directory's only file and keep its data."""
    path = directory / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    return directory


Q = "model.layers.0.self_attn.q_proj.weight"


def entry(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[Q].update(changes)


def longer(header: dict[str, Any]) -> None:
    """A tensor that extends past the end of the file."""
    header["more"] = {"dtype": "F32", "shape": [2**37], "data_offsets": [sizes(header), sizes(header) + 2**39]}


def sizes(header: dict[str, Any]) -> int:
    return max(int(value["data_offsets"][1]) for name, value in header.items() if name != "__metadata__")


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown type": (entry(dtype="F8_E4M3"), f"'{Q}' is stored as F8_E4M3, expected F32, F16, BF16"),
    "a type of integers": (entry(dtype="I32"), f"'{Q}' is stored as I32"),
    "a type that is a list": (entry(dtype=["F32"]), f"entry for '{Q}' is {{'dtype': ['F32']"),
    "a negative size": (entry(shape=[-64, 64]), f"entry for '{Q}' is "),
    "a fraction": (entry(shape=[64.0, 64]), f"entry for '{Q}' is "),
    "an absurd size": (entry(shape=[2**62, 64]), f"entry for '{Q}' is "),
    "an absurd number of dimensions": (entry(shape=[1] * 1000), f"entry for '{Q}' is "),
    "true as a size": (entry(shape=[True, 64]), f"entry for '{Q}' is "),
    "no shape": (lambda header: header[Q].pop("shape"), f"entry for '{Q}' is "),
    "no offsets": (lambda header: header[Q].pop("data_offsets"), f"entry for '{Q}' is "),
    "one offset": (entry(data_offsets=[0]), f"entry for '{Q}' is "),
    "a shape of another size": (
        entry(shape=[64, 65]),
        f"'{Q}' has 16,384 bytes, expected 16,640 for the shape (64",
    ),
    "a type of another size": (entry(dtype="F16"), f"'{Q}' has 16,384 bytes, expected 8,192 for the shape"),
    "an entry that is none": (lambda header: header.update({Q: 7}), f"entry for '{Q}' is "),
    "tensors over each other": (
        lambda header: header[Q].update(data_offsets=[0, 16384]),
        "starts at byte 0 of the data, expected",
    ),
    "a hole": (lambda header: header.pop(Q), "of the data, expected"),
    "a tensor behind the end": (longer, "bytes of data, expected 549,"),
    "offsets back to front": (entry(data_offsets=[16384, 0]), f"'{Q}' has -16,384 bytes"),
    "another name": (
        lambda header: header.update({"lm_head.bias": header.pop("lm_head.weight")}),
        "holds 'lm_head.bias', but linear layers with a bias",
    ),
    "Meta's name": (
        lambda header: header.update({"output.weight": header.pop("lm_head.weight")}),
        "holds 'output.weight', but a Llama with these dimensions",
    ),
    "a name for a terminal": (
        lambda header: header.update({"\x1b[2J": header.pop("lm_head.weight")}),
        r"holds '\x1b[2J'",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_broken_header_is_refused(directory: Path, case: str) -> None:
    """The error names the file and the tensor."""
    edit, says = HEADERS[case]
    load_rejected(with_header(directory, edit), WEIGHTS, says)


def test_a_header_with_what_it_may_have(directory: Path) -> None:
    """The headers above are invalid only because of the change."""
    before = open_huggingface(directory).args
    with_header(directory, lambda header: header.update({"__metadata__": {"format": "pt"}}))
    checkpoint = open_huggingface(directory)
    assert checkpoint.args == before
    assert distance(logits(checkpoint), theirs(directory)) < 1e-5


RAW: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an empty file": (lambda data: b"", "has 0 bytes"),
    "five bytes": (lambda data: data[:5], "has 5 bytes"),
    "a header that is cut": (lambda data: data[:100], "has 100 bytes, expected a safetensors header"),
    "data that are cut": (lambda data: data[:-1], "bytes of data, expected"),
    "data too many": (lambda data: data + b"\0", "bytes of data, expected"),
    "an absurd length": (lambda data: b"\xff" * 8 + data[8:], r"starts with b'\xff\xff"),
    "a long length": (lambda data: struct.pack("<Q", 5_000_000) + b" " * 6_000_000, "expected a safetensors header"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>" + data, "is a web page"),
    "a git-lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    "a pickle": (lambda data: b"PK\x03\x04" + data, "expected a safetensors header"),
    "no JSON": (lambda data: data[:8] + b"!" + data[9:], "is not JSON (Expecting"),
    "no text": (lambda data: data[:9] + b"\xff" + data[10:], "is not JSON ('utf-8' codec"),
    "a list": (lambda data: struct.pack("<Q", 2) + b"[]", "holds a JSON list, expected an object"),
    "no tensors": (lambda data: struct.pack("<Q", 2) + b"{}", "lacks 'model.embed_tokens.weight' and 19 more"),
    "deep JSON": (lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000, "is not JSON"),
    "a number of 5000 digits": (lambda data: struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}", "is not JSON"),
    "a name twice": (lambda data: struct.pack("<Q", 20) + b'{"a": {}, "a": {}  }', "is repeated"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_broken_file_is_refused(directory: Path, case: str) -> None:
    """Any other content in place of the weights."""
    edit, says = RAW[case]
    path = directory / WEIGHTS
    data = edit(path.read_bytes())
    path.unlink()
    path.write_bytes(data)
    load_rejected(directory, WEIGHTS, says)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(place=st.integers(0, 1500), value=st.integers(0, 255))
def test_any_byte_of_a_header_can_be_wrong(whole: Path, place: int, value: int) -> None:
    """The file is rejected, or the result does not change."""
    from llama_scratch.checkpoint.huggingface.safetensors_file import read_header

    data = bytearray((whole / WEIGHTS).read_bytes())
    data[place] = value
    path = whole.parent / "flipped.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        read_header(path)
    except LlamaScratchError as error:
        is_sentence(error, CheckpointError, path)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fewer heads": (
        {"num_key_value_heads": 1},
        "model.layers.0.self_attn.k_proj.weight has the shape (32, 64), expected (16, 64)",
    ),
    "another width": ({"intermediate_size": 128}, "has the shape"),
    "another vocabulary": ({"vocab_size": 300}, "has the shape (267, 64), expected (300, 64)"),
    "wider heads": ({"head_dim": 32}, "has the shape (32, 64), expected (64, 64)"),
    "more layers": ({"num_hidden_layers": 3}, "lacks 'model.layers.2.input_layernorm.weight' and 8 more weights"),
    "fewer layers": ({"num_hidden_layers": 1}, "holds 'model.layers.1."),
    "wider": ({"hidden_size": 128}, "has the shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_of_another_shape_are_refused(directory: Path, case: str) -> None:
    """The config of one model with the weights of another."""
    fields, says = WRONG[case]
    load_rejected(change(directory, "config.json", **{"head_dim": None} | fields), WEIGHTS, says)


def edited_index(shards: Path, edit: Callable[[dict[str, str]], object]) -> Path:
    index = json.loads((shards / INDEX).read_text())
    edit(index["weight_map"])
    return write(shards, INDEX, index)


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "x.bin",
        "",
        7,
        None,
        ["a"],
        "a\\b.safetensors",
        "\x1b.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(shards: Path, file: Any) -> None:
    """Only plain file names are allowed."""
    load_rejected(
        edited_index(shards, lambda places: places.update({Q: file})), INDEX, "names the file '", "the same directory"
    )


def test_an_index_that_names_a_missing_file(shards: Path) -> None:
    """As after an interrupted download."""
    name = json.loads((shards / INDEX).read_text())["weight_map"][Q]
    (shards / name).unlink()
    load_rejected(shards, f"{name} not found in", INDEX, error=ModelNotFoundError)


def test_shards_that_are_not_what_the_index_says(shards: Path) -> None:
    """A tensor missing in its shard, in two shards, or missing in the index; a shard of another model."""
    places = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(file for file in places.values() if file != places[Q])
    load_rejected(
        edited_index(shards, lambda places: places.update({Q: other})), other, f"lacks '{Q}', which {INDEX} names"
    )
    edited_index(shards, lambda places: places.update({Q: other}) or places.update({Q: places_of(shards, Q)}))
    load_rejected(edited_index(shards, lambda places: places.pop(Q)), f"holds '{Q}', which {INDEX} lacks")
    write(shards, INDEX, {"weight_map": places})
    assert open_huggingface(shards).args
    weights = safetensors.torch.load_file(shards / other)
    (shards / other).unlink()
    safetensors.torch.save_file(weights | {Q: torch.zeros(64, 64)}, shards / other)
    load_rejected(shards, f"'{Q}' is in both ")
    weights = {name: torch.zeros(3, 3) for name in weights}
    (shards / other).unlink()
    safetensors.torch.save_file(weights, shards / other)
    load_rejected(shards, "has the shape (3, 3), expected")


def places_of(shards: Path, name: str) -> str:
    """Return the shard that a tensor is in."""
    for path in sorted(shards.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return path.name
    raise AssertionError(name)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_places_is_refused(shards: Path, index: Any) -> None:
    """An object without the required map."""
    load_rejected(write(shards, INDEX, index), INDEX, "has no weight_map")


def test_a_shard_that_is_cut_is_refused(shards: Path) -> None:
    """The error names the shard."""
    path = shards / places_of(shards, Q)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-10])
    load_rejected(shards, path, "bytes of data, expected")


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The Hugging Face cache consists of symbolic links."""
    (tmp_path / "Linked").mkdir()
    for file in sharded.iterdir():
        (tmp_path / "Linked" / file.name).symlink_to(file)
    assert distance(logits(open_huggingface(tmp_path / "Linked")), theirs(sharded)) < 1e-5


def test_weights_that_are_not_there(directory: Path) -> None:
    """No weights at all, or only a pickle."""
    (directory / WEIGHTS).unlink()
    load_rejected(directory, "model.safetensors and its index not found in", error=ModelNotFoundError)
    (directory / "pytorch_model.bin").write_bytes(b"")
    load_rejected(directory, "holds its weights only as pytorch_model.bin, expected model.safetensors")


def test_a_file_that_changes_after_it_was_opened(directory: Path) -> None:
    """The file differs from the one that was checked."""
    checkpoint = open_huggingface(directory)
    path = directory / WEIGHTS
    weights = safetensors.torch.load_file(path)
    path.unlink()
    safetensors.torch.save_file({name: weight.half() for name, weight in weights.items()}, path)
    with pytest.raises(LlamaScratchError) as caught:
        checkpoint.load(silent)
    is_sentence(caught.value, CheckpointError, path, "has changed")


# --- Unsupported configs -----------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "Mistral": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        "['MistralForCausalLM'] of the type 'mistral'",
    ),
    "Qwen": ({"model_type": "qwen2"}, "of the type 'qwen2', expected LlamaForCausalLM of the type 'llama'"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "['LlamaForSequenceClassification']"),
    "architectures that are text": ({"architectures": "LlamaForCausalLM"}, "the architecture is LlamaForCausalLM"),
    "no type": ({"model_type": None}, "the type 'None'"),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8"}},
        "(quantization_config, fp8), expected bf16, fp16 or fp32",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(quantization_config, gptq)"),
    "quantized somehow": ({"quantization_config": 7}, "(quantization_config, 7)"),
    "a bias in attention": ({"attention_bias": True}, "attention_bias is True, expected linear layers without bias"),
    "a bias in the MLP": ({"mlp_bias": True}, "mlp_bias is True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "the RoPE scaling is 'linear', which is not supported",
    ),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "the RoPE scaling is 'dynamic'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "the RoPE scaling is 'yarn'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "the RoPE scaling is 'longrope'"),
    "a scaling that is text": ({"rope_scaling": "llama3"}, "the field rope_scaling is llama3, expected an object"),
    "no factor": ({"rope_scaling": LLAMA3_SCALING | {"type": "llama3", "factor": None}}, "the field factor is missing"),
    "a small factor": ({"rope_scaling": LLAMA3_SCALING | {"type": "llama3", "factor": 0.5}}, "has factor 0.5"),
    "equal limits": (
        {"rope_scaling": LLAMA3_SCALING | {"type": "llama3", "high_freq_factor": 1}},
        "low_freq_factor below",
    ),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "(partial_rotary_factor), which is not supported"),
    "heads of an odd width": ({"head_dim": 33}, "head_dim is 33, expected an even number"),
    "heads that do not fit": (
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
        "does not divide into 5 heads",
    ),
    "no width": ({"hidden_size": None}, "the field hidden_size is missing"),
    "layers as text": ({"num_hidden_layers": "2"}, "the field num_hidden_layers is 2, expected an integer"),
    "absurd layers": ({"num_hidden_layers": 10**9}, "the field num_hidden_layers is 1000000000"),
    "an epsilon of nothing": ({"rms_norm_eps": 0}, "the field rms_norm_eps is 0, expected a positive"),
    "an infinite theta": ({"rope_parameters": {"rope_theta": float("inf")}}, "the field rope_theta is inf"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "the field tie_word_embeddings is yes, expected true or false"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_for_this_network_is_refused(directory: Path, case: str) -> None:
    """The error names the unsupported feature."""
    fields, says = CONFIGS[case]
    load_rejected(change(directory, "config.json", **{"rope_parameters": None} | fields), "config.json", says)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX]
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff{", "is not JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"a": 1, "a": 2}', "is not JSON (the key 'a' is repeated)"),
        (b'{"a": ' + b"[" * 100_000, "is not JSON"),
    ],
    ids=["empty", "not UTF-8", "a list", "a key twice", "deep"],
)
def test_a_file_that_is_no_json_object_is_refused(shards: Path, file: str, content: bytes, says: str) -> None:
    """Each of the small files."""
    (shards / file).write_bytes(content)
    load_rejected(shards, file, says)


@pytest.mark.parametrize(
    ("file", "most"),
    [
        ("config.json", 1 << 20),
        ("tokenizer_config.json", 1 << 20),
        ("tokenizer.json", 1 << 25),
        (INDEX, 1 << 22),
        ("chat_template.jinja", 1 << 20),
    ],
)
def test_a_file_of_an_absurd_size_is_not_read(shards: Path, file: str, most: int) -> None:
    """Reading does not even start, so a sparse file of any size takes no memory."""
    with (shards / file).open("wb") as opened:
        opened.truncate(1 << 36)
    load_rejected(shards, file, f"has 68,719,476,736 bytes, expected at most {most:,}")


JUNK: list[Any] = [None, True, -1, 2**70, 1.5, "", "x" * 99, [], [[]], [None], {}, {"type": []}, {"a": {"b": []}}]


def replacements(value: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
    """Paths of the values in a JSON document; only the first ones in long lists and objects."""
    if path:
        yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items[:12]:
        yield from replacements(inner, (*path, key))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_any_field_can_be_of_any_type(directory: Path, file: str) -> None:
    """The file is rejected, or the result does not change; no other error is raised."""
    whole = json.loads((directory / file).read_text())
    whole["post_processor"] = {"type": "Sequence", "processors": [BYTE_LEVEL, template("<|begin|>")]}
    places = list(replacements(whole))
    assert len(places) > 12
    for n, place in enumerate(places):
        for junk in JUNK[n % 3 :: 3]:
            broken = deepcopy(whole)
            inner = broken
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = junk
            try:
                open_huggingface(write(directory, file, broken))
            except LlamaScratchError as error:
                is_sentence(error, CheckpointError, directory)


# --- Tokenizer ---------------------------------------------------------------------------------


def opened(directory: Path, **changes: Any) -> Tokenizer:
    """The small tokenizer with parts replaced."""
    return open_huggingface(edited(directory, lambda values: values.update(changes))).tokenizer


def gguf_tokenizer(path: Path) -> Any:
    """SmolLM2's tokenizer, built from the metadata that the gguf package reads."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer as HuggingFaces
    from tokenizers import models, pre_tokenizers

    fields = GGUFReader(path).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    model = models.BPE(
        vocab={token: id for id, token in enumerate(tokens)},
        merges=[(left, right) for left, right in map(str.split, merges)],
        unk_token="<|endoftext|>",
    )
    built = HuggingFaces(model)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.add_special_tokens([token for token, type_ in zip(tokens, types, strict=True) if type_ != 1])
    return built


def llama3_tokenizer(path: Path) -> Any:
    """Llama 3's tokenizer, as transformers converts it from Meta's file, with BOS."""
    from tokenizers import Regex, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as HuggingFaces

    metas = Tokenizer.from_meta(str(path))
    char_of = bytes_to_unicode()
    vocab = {"".join(map(char_of.__getitem__, token)): id for token, id in metas.ranks.items()}
    built = HuggingFaces(models.BPE(vocab=vocab, merges=merges_of(metas.ranks), ignore_merges=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.add_special_tokens(list(metas.special_tokens))
    start = "<|begin_of_text|>"
    first = processors.TemplateProcessing(f"{start} $A", special_tokens=[(start, metas.special_tokens[start])])
    built.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return built


Pair = tuple[Tokenizer, Callable[[str], list[int]]]


@pytest.fixture(scope="module")
def pairs(smollm2_path: Path, meta_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """For each of the two vocabularies: our tokenizer and the reference, from the same tokenizer.json."""
    from llama_scratch.checkpoint.huggingface.tokenizer_json import read_tokenizer

    folder = tmp_path_factory.mktemp("vocabularies")
    made = {}
    for name, built, size in (
        ("smollm2", gguf_tokenizer(smollm2_path), 49_152),
        ("llama3", llama3_tokenizer(meta_tokenizer_path), 128_256),
    ):
        path = folder / f"{name}.json"
        built.save(str(path), pretty=False)
        encode = witness(path)
        made[name] = (read_tokenizer(path, {}, (), size), encode)
    return made


def same_ids(pairs: dict[str, Pair], text: str) -> None:
    for name, (ours, encode) in pairs.items():
        assert ours.encode(text, bos=True) == encode(text), name


@pytest.mark.slow
def test_ten_thousand_texts_have_their_ids(pairs: dict[str, Pair]) -> None:
    """Random Unicode and fragments on which tokenizers disagree, without special tokens; each text once."""
    seen: set[str] = set()

    @settings(max_examples=650, deadline=None, derandomize=True)
    @given(texts=drawn)
    def compare(texts: list[str]) -> None:
        for text in texts:
            same_ids(pairs, text.replace("<|", "<"))
        seen.update(texts)

    compare()
    assert len(seen) >= 10_000


@pytest.mark.slow
def test_a_corpus_of_code_and_many_scripts_has_its_ids(pairs: dict[str, Pair]) -> None:
    """By line, as a whole, with CRLF line ends, and with characters that SmolLM2 cannot encode."""
    assert len(CORPUS) > 2000
    for text in [*CORPUS.splitlines(keepends=True), CORPUS, CORPUS.replace("\n", "\r\n"), *UNWRITTEN]:
        same_ids(pairs, text)
        for ours, _ in pairs.values():
            assert ours.unknown or ours.decode(ours.encode(text)) == text


def test_special_tokens_have_their_ids(pairs: dict[str, Pair], meta_tokenizer_path: Path) -> None:
    """All special tokens, if allowed; Llama 3's tokenizer equals Meta's in every part."""
    for ours, encode in pairs.values():
        text = "a".join(ours.special_tokens)
        assert ours.encode(text, bos=True, special=True) == encode(text)
    ours, metas = pairs["llama3"][0], Tokenizer.from_meta(str(meta_tokenizer_path))
    for part in ("ranks", "special_tokens", "pattern", "bos_id", "stop_ids", "unknown", "n_vocab"):
        assert getattr(ours, part) == getattr(metas, part), part
    assert pairs["smollm2"][0].unknown == "<|endoftext|>"


def test_smollm2s_is_that_of_its_gguf_file(pairs: dict[str, Pair], smollm2_path: Path) -> None:
    """The same vocabulary in two formats."""
    ours, other = pairs["smollm2"][0], open_checkpoint(smollm2_path).tokenizer
    for part in ("ranks", "special_tokens", "pattern", "bos_id", "unknown", "n_vocab"):
        assert getattr(ours, part) == getattr(other, part), part


HARD = "they're the 1234 thing  12 x\n\n 7 thé 'S   ١٢٣ the123"


@pytest.mark.parametrize("name", PRE)
def test_each_pattern_is_recognized(directory: Path, name: str) -> None:
    """And splits text as the `tokenizers` package does with the same file."""
    tokenizer = opened(directory, pre_tokenizer=PRE[name])
    assert tokenizer.pattern == PATTERNS[name]
    assert tokenizer.encode(HARD) == witness(directory / "tokenizer.json")(HARD)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_is_written_out_is_recognized(directory: Path, name: str) -> None:
    """The pattern as an explicit Split step."""
    tokenizer = opened(directory, pre_tokenizer=sequence(split(PATTERNS[name]), BYTE_LEVEL | {"use_regex": False}))
    assert tokenizer.pattern == PATTERNS[name]
    assert tokenizer.encode(HARD) == witness(directory / "tokenizer.json")(HARD)


def test_byte_level_of_older_files(directory: Path) -> None:
    """Older files omit `use_regex` and other fields with defaults."""
    older = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    assert opened(directory, pre_tokenizer=older).pattern == PATTERNS["gpt-2"]


def test_merges_in_both_spellings(directory: Path) -> None:
    """As "a b" and as ["a", "b"]."""
    listed = opened(directory)
    spelled = open_huggingface(
        edited(directory, lambda values: values["model"].update(merges=[" ".join(merge) for merge in MERGES]))
    ).tokenizer
    assert listed.ranks == spelled.ranks
    assert listed.encode("the 123") == spelled.encode("the 123") == witness(directory / "tokenizer.json")("the 123")


def test_the_ids_of_a_whole_piece_do_not_need_ignore_merges(directory: Path) -> None:
    """Llama 3's flag has no effect if the merges can produce every token."""

    def ignore(values: dict[str, Any]) -> None:
        values["model"]["ignore_merges"] = True

    expected = opened(directory).encode(HARD)
    assert open_huggingface(edited(directory, ignore)).tokenizer.encode(HARD) == expected


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (None, {}, None),
        (BYTE_LEVEL, {}, None),
        (template(), {}, None),
        (template("<|begin|>"), {}, BOS),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template("<|begin|>")]}, {}, BOS),
        (template("<|begin|>"), {"add_bos_token": False, "bos_token": "<|begin|>"}, BOS),  # as in transformers 5
        (None, {"add_bos_token": True, "bos_token": "<|begin|>"}, BOS),
        (None, {"add_bos_token": True, "bos_token": {"content": "<|begin|>"}}, BOS),
        (None, {"add_bos_token": False, "bos_token": "<|begin|>"}, None),
        (None, {"bos_token": "<|begin|>"}, None),
        (None, {"add_bos_token": True, "bos_token": "<s>"}, None),
    ],
)
def test_what_comes_first(directory: Path, processor: Any, settings: dict[str, Any], expected: int | None) -> None:
    """The post-processor decides about BOS; if it does not, tokenizer_config.json does."""
    write(directory, "tokenizer_config.json", settings)
    assert opened(directory, post_processor=processor).bos_id == expected
    if processor:
        assert (witness(directory / "tokenizer.json")("a")[0] == BOS) == (expected == BOS)


def test_what_comes_behind_a_text_is_no_part_of_a_prompt(directory: Path) -> None:
    """If a template adds a token after a text, it is not added to a prompt."""
    both = template("<|begin|>")
    both["single"].append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    assert opened(directory, post_processor=both).encode("a", bos=True) == [BOS, *opened(directory).encode("a")]


@pytest.mark.parametrize(
    ("generation", "config", "settings", "more"),
    [
        ({}, None, {}, set()),
        ({"eos_token_id": BOS}, None, {}, {BOS}),
        ({"eos_token_id": [BOS, 5]}, None, {}, {BOS}),
        ({}, BOS, {}, {BOS}),
        ({}, [BOS], {}, {BOS}),
        ({}, None, {"eos_token": "<|begin|>"}, {BOS}),
        ({}, None, {"eos_token": {"content": "<|begin|>"}}, {BOS}),
    ],
)
def test_what_ends_a_text(directory: Path, generation: Any, config: Any, settings: Any, more: set[int]) -> None:
    """Stop tokens are those that any file names, and those with known names."""
    write(directory, "generation_config.json", generation)
    write(directory, "tokenizer_config.json", settings)
    change(directory, "config.json", eos_token_id=config)
    assert opened(directory).stop_ids == {N_VOCAB - 3, N_VOCAB - 1} | more


@pytest.mark.parametrize("value", ["2", [1, "2"], {"a": 1}, 1.5, True])
def test_an_end_that_is_no_number_is_refused(directory: Path, value: Any) -> None:
    """`eos_token_id` must be one or several integers."""
    load_rejected(
        write(directory, "generation_config.json", {"eos_token_id": value}),
        "eos_token_id is",
        "expected one or several integers",
    )


def without_a_byte(values: dict[str, Any]) -> None:
    """Replace the token of byte 4 by one of two letters that only its merge produces."""
    vocab, merges = values["model"]["vocab"], values["model"]["merges"]
    vocab["ee"] = vocab.pop(bytes_to_unicode()[4])
    values["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges.insert(0, ["e", "e"])


def test_bytes_that_a_vocabulary_lacks(directory: Path) -> None:
    """They become the unknown token of the model or tokenizer_config.json, as in the `tokenizers` package."""
    edited(directory, without_a_byte)
    load_rejected(directory, "no token for the byte 0x04 and no unknown token")
    write(directory, "tokenizer_config.json", {"unk_token": "<|begin|>"})
    assert open_huggingface(directory).tokenizer.encode("\x04a") == [BOS, *opened(directory).encode("a")]

    def unknown(values: dict[str, Any]) -> None:
        without_a_byte(values)
        values["model"]["unk_token"] = "<|im_end|>"
        values["model"]["vocab"] |= {text: N_VOCAB - 3 + i for i, text in enumerate(SPECIAL)}

    tokenizer = open_huggingface(edited(directory, unknown)).tokenizer
    assert tokenizer.unknown == "<|im_end|>"
    for text in ("\x04a", "\x04\x04 the\x04"):
        assert tokenizer.encode(text) == witness(directory / "tokenizer.json")(text)

    def fused(values: dict[str, Any]) -> None:
        unknown(values)
        values["model"]["fuse_unk"] = True

    load_rejected(edited(directory, fused), "fuses unknown bytes (fuse_unk)")


def test_rows_of_the_embedding_that_no_token_has(tmp_path: Path) -> None:
    """They get placeholder names, so that every generated id has a text; after the tokens or among them."""
    directory = save(random_model(vocab_size=N_VOCAB + 5), tmp_path / "Padded")
    edited(directory, lambda values: values["added_tokens"][2].update(id=N_VOCAB + 1))
    tokenizer = open_huggingface(directory).tokenizer
    assert tokenizer.n_vocab == N_VOCAB + 5
    assert (
        tokenizer.decode([N_VOCAB + 4, N_VOCAB - 1, N_VOCAB + 1]) == f"[PAD{N_VOCAB + 4}][PAD{N_VOCAB - 1}]<|im_end|>"
    )
    text = f"[PAD{N_VOCAB + 4}]"
    assert max(tokenizer.encode(text)) < 256  # in a prompt, it is plain text


def test_an_embedding_of_another_size_is_refused(tmp_path: Path) -> None:
    """Far more rows than tokens, or fewer, cannot be padding."""
    directory = save(random_model(vocab_size=N_VOCAB + 5000), tmp_path / "Padded")
    load_rejected(directory, "it has 267 tokens, but the model's embedding has 5,267 rows")
    directory = save(random_model(vocab_size=N_VOCAB - 4), tmp_path / "Short")
    load_rejected(directory, "the tokenizer has 264 tokens, but the model's embedding has 263 rows")


def model(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["model"].update(changes)


def part(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


def added(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["added_tokens"][0].update(changes)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
SENTENCEPIECE = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace"}]}
OTHER = r"\p{N}{1,2}|\w+|\s+"
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "SentencePiece": (model(byte_fallback=True), "is SentencePiece BPE (byte_fallback), expected byte-level BPE"),
    "its normalizers": (
        part(normalizer=SENTENCEPIECE),
        "it normalizes text (Prepend + Replace), expected",
    ),
    "NFC": (part(normalizer={"type": "NFC"}), "it normalizes text (NFC), expected no normalizer"),
    "Metaspace": (
        part(pre_tokenizer=METASPACE),
        "it splits text by Metaspace, expected exactly the steps of Llama 3, SmolLM2 or GPT-2",
    ),
    "a pattern": (
        part(pre_tokenizer=sequence(split(OTHER), BYTE_LEVEL | {"use_regex": False})),
        f"it splits text by the pattern '{OTHER}' (Split + ByteLevel), expected that of Llama 3",
    ),
    "a pattern for a terminal": (part(pre_tokenizer=split("\x1b[2J" + "x" * 500)), r"by the pattern '\x1b[2Jxxx"),
    "pieces that are joined": (
        part(pre_tokenizer=sequence(split(LLAMA3_PATTERN, behavior="Contiguous"), BYTE_LEVEL | {"use_regex": False})),
        "it splits text by the pattern '(?i:",
    ),
    "pieces that are dropped": (
        part(pre_tokenizer=sequence(split(LLAMA3_PATTERN, behavior="Removed"), BYTE_LEVEL | {"use_regex": False})),
        "it splits text by the pattern '(?i:",
    ),
    "two patterns": (part(pre_tokenizer=sequence(split(LLAMA3_PATTERN), BYTE_LEVEL)), "it splits text by the pattern"),
    "a pattern without bytes": (part(pre_tokenizer=split(LLAMA3_PATTERN)), "it splits text by the pattern"),
    "digits in groups": (
        part(pre_tokenizer=sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)),
        "it splits text by Digits + ByteLevel, expected exactly the steps",
    ),
    "a space in front": (
        part(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
        "it splits text by ByteLevel, expected",
    ),
    "bytes without a pattern": (part(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}), "it splits text by ByteLevel"),
    "no pre-tokenizer": (part(pre_tokenizer=None), "it splits text by None"),
    "WordPiece": (model(type="WordPiece"), "the model is of the type WordPiece, expected BPE"),
    "dropout": (model(dropout=0.1), "it has a dropout (0.1), which is not supported"),
    "a prefix of parts": (model(continuing_subword_prefix="##"), "it has a continuing_subword_prefix (##)"),
    "an end of words": (model(end_of_word_suffix="</w>"), "it has a end_of_word_suffix (</w>)"),
    "no model": (part(model=None), "the field model is None, expected a JSON dict"),
    "no vocabulary": (model(vocab=None), "the field vocab is None, expected a JSON dict"),
    "no merges": (model(merges=None), "the field merges is None, expected a JSON list"),
    "a merge of three": (model(merges=["a b c"]), "the merge 'a b c' does not have two tokens"),
    "a merge that is a number": (model(merges=[1]), "the merge '1' does not have two tokens"),
    "a merge of what is none": (model(merges=[["a", 1]]), "does not have two tokens"),
    "merges out of order": (model(merges=MERGES[::-1]), "is not in the order of the token ids"),
    "a merge that is missing": (model(merges=MERGES[:-1]), "the merges produce only 7 of 8 tokens"),
    "an id twice": (lambda values: values["model"]["vocab"].update(the=5), "or is repeated"),
    "an id as text": (lambda values: values["model"]["vocab"].update(a="5"), "a token id is not an integer"),
    "an absurd id": (lambda values: values["model"]["vocab"].update(the=2**40), "a token id is not an integer"),
    "a negative id": (added(id=-1), "a token id is not an integer"),
    "a token of no bytes": (
        lambda values: values["model"]["vocab"].update({"日": 300}),
        "is not in GPT-2's byte alphabet",
    ),
    "an added token with another id": (added(content="the"), "has the id 264. Its text must be unique"),
    "an added token twice": (added(content="<|im_end|>"), "the added token <|im_end|> has the id"),
    "an added token without a text": (added(content=None), "the added token None has the id 264"),
    "an added token of nothing": (
        added(content=""),
        "the added token '' strips whitespace or matches",
    ),
    "an added token that takes spaces": (added(lstrip=True), "the added token '<|endoftext|>' strips whitespace"),
    "added tokens that are none": (part(added_tokens=7), "the field added_tokens is 7, expected a JSON list"),
    "two tokens in front": (
        part(post_processor=template("<|begin|>", "<|im_end|>")),
        "before a text, expected at most one",
    ),
    "an unknown token in front": (
        part(post_processor=template("<|begin|>") | {"special_tokens": {}}),
        "the post_processor cannot be read (KeyError('<|begin|>'))",
    ),
    "BERT's": (
        part(post_processor={"type": "BertProcessing"}),
        "adds special tokens by BertProcessing, expected TemplateProcessing",
    ),
    "a post-processor that is text": (part(post_processor="x"), "the post_processor cannot be read"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_another_or_broken_is_refused(directory: Path, case: str) -> None:
    """The error names the unsupported or broken part."""
    edit, says = TOKENIZERS[case]
    load_rejected(edited(directory, edit), "tokenizer.json", says)


def test_a_name_that_a_row_without_a_token_would_get(tmp_path: Path) -> None:
    """Two ids cannot have the same name."""
    directory = save(random_model(vocab_size=N_VOCAB + 1), tmp_path / "Padded")
    load_rejected(
        edited(directory, lambda v: v["added_tokens"][0].update(content=f"[PAD{N_VOCAB}]")),
        f"'[PAD{N_VOCAB}]' has the placeholder name",
    )


def test_metas_tokenizer_is_taken_where_there_is_no_other(directory: Path, meta_tokenizer_path: Path) -> None:
    """Beside the weights, or given as an argument; without any, the error names the missing file."""
    (directory / "tokenizer.json").unlink()
    load_rejected(directory, "tokenizer.json not found in", "`tokenizer`", error=ModelNotFoundError)
    shutil.copy(meta_tokenizer_path, directory / "tokenizer.model")
    load_rejected(directory, "the tokenizer has 128256 tokens, but the model's embedding has 267 rows")
    with pytest.raises(CheckpointError, match="the tokenizer has 128256 tokens"):
        open_huggingface(write(directory, "tokenizer.json", tokenizer_json()), str(meta_tokenizer_path))


# --- Chat template and license -----------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "place",
    [
        lambda d: write(d, "tokenizer_config.json", SETTINGS | {"chat_template": TEMPLATE}),
        lambda d: write(
            d,
            "tokenizer_config.json",
            SETTINGS
            | {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
        ),
        lambda d: write(write(d, "tokenizer_config.json", SETTINGS), "chat_template.json", {"chat_template": TEMPLATE}),
        lambda d: (
            write(d, "tokenizer_config.json", SETTINGS | {"chat_template": "x"}) / "chat_template.jinja"
        ).write_text(TEMPLATE),
    ],
    ids=["a setting", "several under names", "a JSON file", "a file, which comes first"],
)
def test_a_chat_template_is_found(directory: Path, place: Callable[[Path], object]) -> None:
    """In any of its places, with the texts of BOS and EOS, which become special."""
    place(directory)
    chat = open_huggingface(directory).chat
    assert isinstance(chat, TemplateFormat)
    parts = chat.parts([Message("user", "Hi <|im_end|>")])
    assert [(part.text, part.special) for part in parts] == [
        ("<|begin|>", True),
        ("Hi <|im_end|>", False),
        ("<|im_end|>", True),
    ]


SETTINGS: dict[str, Any] = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}


@pytest.mark.parametrize("chat_template", [None, "", [], [{"name": "tool_use", "template": "x"}]])
def test_a_base_model_has_no_chat(directory: Path, chat_template: Any) -> None:
    """No template, an empty one, or only templates for other purposes."""
    write(directory, "tokenizer_config.json", {"chat_template": chat_template})
    assert open_huggingface(directory).chat is None


@pytest.mark.parametrize("chat_template", [7, {"a": 1}, [{"name": "default", "template": 7}]])
def test_a_template_that_is_no_text_is_refused(directory: Path, chat_template: Any) -> None:
    """A template must be text."""
    load_rejected(
        write(directory, "tokenizer_config.json", {"chat_template": chat_template}), "chat_template is", "expected text"
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"README.md": "# Model\nlicense: mit\n"}, None),
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: mit\n"}, "apache-2.0"),
        ({"README.md": "---\r\nlicense: 'llama3.2'\r\nbase: x\r\n---\r\n"}, "llama3.2"),
        ({"README.md": "---\nlicense:\n- mit\n- apache-2.0\n---\n"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: my-license\nlicense_link: x\n---\n"}, "my-license"),
        ({"README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"README.md": "---\nlicense: mit\n"}, None),
        ({"LICENSE": "\n   LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\nText\n"}, "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT"),
        ({"README.md": "# x\n", "LICENSE.txt": "MIT License\n"}, "MIT License"),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": "Other\n"}, "mit"),
        ({"LICENSE": "\x1b[2J" + "x" * 500}, "\\x1b[2J" + "x" * 52 + "…"),
        ({"README.md": b"---\nlicense: \xff\n---\n"}, "\ufffd"),
    ],
)
def test_the_license_is_what_the_files_state(
    tmp_path: Path, files: dict[str, str | bytes], expected: str | None
) -> None:
    """The README's front matter, or else the first line of the license file; short and printable."""
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_license(tmp_path) == expected


def test_a_license_that_cannot_be_read_is_no_error(directory: Path) -> None:
    """A directory in its place, or a named pipe without a writer."""
    (directory / "LICENSE").mkdir()
    os.mkfifo(directory / "LICENSE.txt")
    assert open_huggingface(directory).license is None
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    assert open_huggingface(directory).license == "mit"


@pytest.mark.parametrize("text", ["---" + "\n" * 60_000, "---\nlicense: a" + " " * 60_000 + "b\n---\n"])
def test_a_readme_that_keeps_a_reader_busy(tmp_path: Path, text: str) -> None:
    """Time grows linearly with its length, not quadratically."""
    (tmp_path / "README.md").write_text(text)
    start = time.thread_time()
    read_license(tmp_path)
    assert time.thread_time() - start < 0.5
