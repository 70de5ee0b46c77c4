"""`verify`: intact models pass; each kind of damage is found and named, with exit code 4."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_scratch.checkpoint import Checkpoint, checksums, open_checkpoint
from llama_scratch.checkpoint import verify as module
from llama_scratch.checkpoint.checksums import CHECKLIST
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.findings import CheckResult, Verification
from llama_scratch.checkpoint.verify import verify
from llama_scratch.download import pypi
from llama_scratch.errors import LlamaScratchError, ModelNotFoundError, OutOfMemoryError, UsageError
from llama_scratch.precision.lazy_weight import GGUFBlockWeight, Weight
from llama_scratch.render.reports import verify_table
from llama_scratch.render.text import as_text
from llama_scratch.system.progress import Progress
from tests.helpers.checkpoints import write_meta
from tests.helpers.command_line import Runner, one_sentence
from tests.helpers.gguf_files import whole_file

WEIGHTS = "consolidated.00.pth"
FILES = ("params.json", "tokenizer.model", WEIGHTS)


def write_checklist(directory: Path, *, prefix: str = "", **changes: str) -> None:
    """Write the correct `checklist.chk` of a directory, except for the given MD5s (dots in names as underscores)."""
    sums = {name: hashlib.md5((directory / name).read_bytes()).hexdigest() for name in FILES}
    sums |= {name: changes[name.replace(".", "_")] for name in FILES if name.replace(".", "_") in changes}
    text = "".join(f"{digest}  {prefix}{name}\n" for name, digest in sums.items())
    (directory / CHECKLIST).write_text(text)


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    """A complete Meta directory with its checklist, to damage."""
    directory = tmp_path / "Tiny-Llama"
    shutil.copytree(tiny_dir, directory)
    write_checklist(directory)
    return directory


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], None], *, listed: bool = True) -> None:
    """Change tensors and write the file again; with `listed`, update its MD5 in the checklist."""
    weights = torch.load(directory / WEIGHTS)
    change(weights)
    torch.save(weights, directory / WEIGHTS)
    if listed:
        write_checklist(directory)


def flip(file: Path, place: int) -> None:
    """Flip one bit."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def wrong(found: Verification) -> list[CheckResult]:
    """Return the failed findings, after checking the form of all messages and of the verdict."""
    failed = [finding for finding in found.findings if finding.result == "wrong"]
    assert found.wrong == len(failed)
    assert found.verdict.startswith("Damaged" if failed else "Intact")
    for finding in found.findings:
        assert finding.sentence.endswith(".")
        assert finding.sentence.isprintable()
    return failed


def one_wrong(found: Verification, part: str, check: str) -> str:
    """Return the message of the only failed finding."""
    (finding,) = wrong(found)
    assert (finding.part, finding.check) == (part, check)
    return finding.sentence


# --- An intact model ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_whole_model_passes_every_check(model: Path, prefix: str) -> None:
    """Names with ./ are the same files; Meta's own verifier compares these MD5s with SHA-256."""
    write_checklist(model, prefix=prefix)
    found = verify(model)
    assert wrong(found) == []
    assert found.fetch_again == []
    assert [(f.part, f.check) for f in found.findings if f.check == "MD5"] == [(name, "MD5") for name in FILES]
    assert {f.result for f in found.findings} == {"ok"}
    checks = {(f.part, f.check): f.sentence for f in found.findings}
    assert checks["weights", "structure"].startswith("All 29 tensors")
    assert "None of the 3,093,248 values is NaN" in checks["weights", "values"]
    assert "is tied" in checks["output", "tied"]
    assert "scaled by a factor of 32" in checks["RoPE", "factor"]
    assert "556 tokens" in checks["tokenizer", "structure"]


def test_names_that_begin_with_dots_keep_them(model: Path) -> None:
    """`lstrip("./")` would remove them."""
    (model / ".hidden").write_bytes(b"x")
    with (model / CHECKLIST).open("a") as file:
        file.write(f"{hashlib.md5(b'x').hexdigest().upper()} *./.hidden\r\n\n")
    found = verify(model)
    assert wrong(found) == []
    assert ".hidden" in [finding.part for finding in found.findings]


def test_an_untied_output_and_another_factor_are_said(tmp_path: Path) -> None:
    found = verify(write_meta(tmp_path / "m", tied=False), rope_factor=8)
    checks = {finding.part: finding for finding in found.findings}
    assert "(untied)" in checks["output"].sentence
    assert checks["RoPE"].result == "note"
    assert "a factor of 8 by `rope_factor`; in the files it is scaled by a factor of 32" in checks["RoPE"].sentence
    assert checks[WEIGHTS].result == "note"  # no known checksum
    assert "no known checksum" in checks[WEIGHTS].sentence
    assert found.verdict == "Intact: none of 6 checks failed, 2 with a note."


def test_the_directory_may_hold_the_files_in_original(model: Path, tmp_path: Path) -> None:
    outer = tmp_path / "Llama-3.2-Tiny"
    outer.mkdir()
    model.rename(outer / "original")
    assert wrong(verify(outer)) == []
    flip(outer / "original" / "params.json", 0)  # can no longer be opened
    assert {finding.part for finding in wrong(verify(outer))} == {"params.json"}


# --- Damage -----------------------------------------------------------------------------------


def test_another_md5(model: Path) -> None:
    write_checklist(model, consolidated_00_pth="0123456789abcdef" * 2)
    found = verify(model)
    sentence = one_wrong(found, WEIGHTS, "MD5")
    assert "expected 0123456789ab…" in sentence
    assert "Fetch the file again" in sentence
    assert found.fetch_again == [WEIGHTS]
    assert found.verdict == "Damaged: 1 of 8 checks failed. Fetch consolidated.00.pth again."


def test_a_file_that_the_checklist_names_is_missing(model: Path) -> None:
    """A file that the model needs, and one that it does not need."""
    with (model / CHECKLIST).open("a") as file:
        file.write(f"{'0' * 32}  consolidated.01.pth\n")
    found = verify(model)
    assert "checklist.chk lists it" in one_wrong(found, "consolidated.01.pth", "presence")
    assert any(finding.part == "RoPE" for finding in found.findings)
    (model / WEIGHTS).unlink()
    found = verify(model)
    assert found.fetch_again == [WEIGHTS, "consolidated.01.pth"]
    assert [finding.check for finding in wrong(found)] == ["presence", "presence", "structure"]
    assert [f.part for f in found.findings if f.result == "ok"] == ["params.json", "tokenizer.model"]


def test_a_checklist_alone_is_a_model_that_lost_its_files(model: Path) -> None:
    """It is damaged, unlike a folder without a model."""
    for name in FILES:
        (model / name).unlink()
    found = verify(model)
    assert found.fetch_again == [*FILES]
    assert [finding.check for finding in wrong(found)] == ["presence"] * 3 + ["structure"]


def test_a_file_that_the_checklist_does_not_name_is_a_note(model: Path) -> None:
    lines = (model / CHECKLIST).read_text().splitlines()
    (model / CHECKLIST).write_text("\n".join(line for line in lines if "tokenizer" not in line))
    found = verify(model)
    assert wrong(found) == []
    (note,) = (finding for finding in found.findings if finding.result == "note")
    assert (note.part, note.sentence) == ("tokenizer.model", "checklist.chk does not list it.")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("value", "counted"), [(torch.nan, "2 NaN"), (torch.inf, "2 infinite"), (-torch.inf, "2 inf")])
def test_a_value_that_is_no_number(
    model: Path, monkeypatch: pytest.MonkeyPatch, value: float, counted: str, listed: bool
) -> None:
    """Two of 262,144 values, in middle blocks; a file with the listed checksum is not fetched again."""
    monkeypatch.setattr(module, "_BLOCK", 4096)
    name = "layers.1.feed_forward.w2.weight"

    def change(weights: dict[str, Tensor]) -> None:
        weights[name][100, 77] = weights[name][200, 3] = value

    change_weights(model, change, listed=listed)
    found = verify(model)
    sentence = next(finding.sentence for finding in wrong(found) if finding.part == name)
    assert sentence.startswith(counted)
    assert "262,144 values, first in row 100" in sentence
    assert found.wrong == 2 - listed
    assert found.fetch_again == [WEIGHTS] * (not listed)


def test_values_that_are_no_numbers_everywhere(model: Path) -> None:
    """NaN and infinity are counted separately, a tied embedding once, and only some tensors are named."""

    def change(weights: dict[str, Tensor]) -> None:
        for weight in weights.values():
            weight[..., 0] = torch.nan
        weights["norm.weight"][3:5] = torch.inf

    change_weights(model, change)
    found = verify(model)
    sentences = {finding.part: finding.sentence for finding in wrong(found)}
    assert "556 NaN among its 142,336 values, first in row 0" in sentences["tok_embeddings.weight"]
    assert "output.weight" not in sentences
    assert sentences["weights"].startswith("21 more tensors")
    assert len(sentences) == 9
    assert not any("None of" in finding.sentence for finding in found.findings)

    def repair(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight[..., 0] = 1 if name != "norm.weight" else torch.nan

    change_weights(model, repair)
    assert "1 NaN and 2 infinite among its 256" in one_wrong(verify(model), "norm.weight", "values")


def test_weights_that_are_no_tensors_yet_are_looked_through_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF's quantized blocks: each block of rows is dequantized once."""
    asked: list[tuple[int, int]] = []

    def dequantize(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        rows = torch.ones(stop - start, 256)
        rows[torch.arange(start, stop) == 299] = torch.nan
        return rows

    def checked(checkpoint: Checkpoint) -> Checkpoint:
        def load(progress: Progress) -> dict[str, Weight]:
            name = "layers.0.feed_forward.w1.weight"
            blocks = torch.empty(1024, 1, dtype=torch.uint8)
            return {**checkpoint.load(progress), name: GGUFBlockWeight((1024, 256), blocks, "a test", dequantize)}

        return replace(checkpoint, load=load)

    monkeypatch.setattr(module, "open_checkpoint", lambda *arguments: checked(open_checkpoint(*arguments)))
    monkeypatch.setattr(module, "_BLOCK", 256 * 100)
    sentence = one_wrong(verify(model), "layers.0.feed_forward.w1.weight", "values")
    assert sentence.startswith("256 NaN among its 262,144 values, first in row 299.")
    assert asked == [(start, min(start + 100, 1024)) for start in range(0, 1024, 100)]


def test_weights_that_were_cut_short(model: Path) -> None:
    """Checksum and structure both fail; checks that need no weights still run."""
    os.truncate(model / WEIGHTS, 1_000_000)
    found = verify(model)
    assert [(f.part, f.check) for f in wrong(found)] == [(WEIGHTS, "MD5"), (WEIGHTS, "structure")]
    assert "truncated" in wrong(found)[1].sentence
    assert found.fetch_again == [WEIGHTS]
    assert {f.part for f in found.findings if f.result == "ok"} == {
        "params.json",
        "tokenizer.model",
        "tokenizer",
        "RoPE",
    }


def test_wrong_shapes(model: Path) -> None:
    """The checksum is correct, so fetching the file again would not help."""

    def change(weights: dict[str, Tensor]) -> None:
        weights["layers.2.attention.wk.weight"] = torch.ones(64, 256, dtype=torch.bfloat16)

    change_weights(model, change)
    found = verify(model)
    assert "has the shape (64, 256)" in one_wrong(found, WEIGHTS, "structure")
    assert found.fetch_again == []
    assert found.verdict.startswith("Damaged: 1 of 6 checks failed. Its files match the published ones")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not list any files"),
        (b"\n\n", "does not list any files"),
        (b"<html>expired</html>", "web page"),
        (b"\xff\xfe\x00\x1b[2J", "UTF-16"),
        (b"\xff\x1b[2J", "Line 1"),
        (b"0" * 31 + b"  params.json", "Line 1"),
        (b"0" * 64 + b"  params.json", "Line 1"),
        (
            b"0" * 32 + b"  params.json\n" + b"0" * 32 + b"  ../../secret",
            "Line 2 of checklist.chk names '../../secret'",
        ),
        (b"0" * 32 + b"  /etc/passwd", "names '/etc/passwd'"),
        (b"0" * 32 + b"  ./", "names ''"),
        (b"0" * 32 + b"  a\x00b", "names 'a\\x00b'"),
        (b"0" * 32 + b"  a\x1b[2Jb", "names 'a\\x1b[2Jb'"),
        (b"0" * 32 + b"  params.json\n" + b"1" * 32 + b"  ./params.json", "two different MD5s of 'params.json'"),
        ((b"0" * 32 + b"  params.json\n") * 10**6, "65,536 bytes"),
    ],
)
def test_a_checklist_that_is_none(model: Path, content: bytes, said: str) -> None:
    """The checklist fails; files outside the directory are not read, and the weights are still checked."""
    (model / CHECKLIST).write_bytes(content)
    found = verify(model)
    assert said in one_wrong(found, CHECKLIST, "structure")
    assert found.fetch_again == [CHECKLIST]
    assert "values" in {finding.check for finding in found.findings if finding.result == "ok"}


def test_names_that_no_file_can_have(model: Path) -> None:
    """A name that is too long for the system counts as missing."""
    with (model / CHECKLIST).open("a") as file:
        file.write(f"{'0' * 32}  {'n' * 5000}\n")
    assert "It is missing" in wrong(verify(model))[0].sentence


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_is_no_file_is_not_waited_for(model: Path) -> None:
    """A named pipe without a writer, as a listed file and as the checklist."""
    os.mkfifo(model / "pipe")
    with (model / CHECKLIST).open("a") as file:
        file.write(f"{'0' * 32}  pipe\n")
    assert "It is missing" in one_wrong(verify(model), "pipe", "presence")
    (model / CHECKLIST).unlink()
    os.mkfifo(model / CHECKLIST)
    assert "is a pipe" in one_wrong(verify(model), CHECKLIST, "structure")


def test_a_file_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails while reading: that file fails, and the others are still checked."""
    digests = checksums._digests

    def failing(file: Path, kinds: set[str], advance: Callable[[int], None]) -> dict[str, str]:
        if file.name == "tokenizer.model":
            raise OSError(5, "Input/output error")
        return digests(file, kinds, advance)

    monkeypatch.setattr(checksums, "_digests", failing)
    found = verify(model)
    assert "cannot be read: Input/output error" in one_wrong(found, "tokenizer.model", "MD5")
    assert found.fetch_again == ["tokenizer.model"]


@pytest.mark.parametrize(("form", "name"), [("hf", "Tiny"), ("gguf", "Tiny.gguf")])
def test_the_other_forms(model: Path, tmp_path: Path, form: str, name: str) -> None:
    """The same findings in each format, and a truncated file."""
    assert wrong(verify(convert(model, tmp_path / name, form).path)) == []

    def change(weights: dict[str, Tensor]) -> None:
        weights["layers.1.attention.wk.weight"][7, 9] = torch.nan

    change_weights(model, change)
    path = convert(model, tmp_path / f"Bad{name}", form).path
    found = verify(path)
    assert one_wrong(found, "layers.1.attention.wk.weight", "values").startswith("1 NaN among its 32,768 values")
    assert found.fetch_again == []
    assert found.verdict.endswith(". Its files match the published ones, so use another model.")
    file = path if path.is_file() else path / "model.safetensors"
    (path.with_name("BadTiny.gguf.md5") if path.is_file() else path / "checklist.chk").unlink()
    assert verify(path).fetch_again == [file.name]
    os.truncate(file, 3_000_000)
    found = verify(path)
    one_wrong(found, file.name, "structure")
    assert found.fetch_again == [file.name]


def test_an_index_that_names_a_missing_file(model: Path, tmp_path: Path, llama_scratch: Runner) -> None:
    """Part of a model exists, so it is damaged, not missing."""
    directory = convert(model, tmp_path / "Tiny", "hf").path
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    places = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    result = llama_scratch("verify", str(directory))
    assert result.code == 4
    assert "Fetch model.safetensors, model-00002-of-00002.safetensors again" in result.out


def test_the_verdict_names_so_many_files_and_counts_the_others() -> None:
    findings = [CheckResult(f"{i}.pth", "presence", "wrong", "It is missing.", (f"{i}.pth",)) for i in range(11)]
    found = Verification("m", None, Path("m"), tuple(findings))
    names = ", ".join(f"{i}.pth" for i in range(8))
    assert found.verdict == f"Damaged: 11 of 11 checks failed. Fetch {names} and 3 more again."
    assert len(found.fetch_again) == 11


# --- Known files ------------------------------------------------------------------------------


def test_the_open_model_and_one_bit_of_it(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_scratch: Runner
) -> None:
    """A bit in the weights, which only the checksum can detect."""
    found = verify(smollm2_path, published=pypi.published_files())
    assert wrong(found) == []
    assert found.findings[0].sentence == "Its SHA-256 matches the published smollm2 (98,362,432 bytes)."
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    copy = pypi.OPEN_MODELS["smollm2"].path
    copy.parent.mkdir(parents=True)
    shutil.copyfile(smollm2_path, copy)
    flip(copy, 90_000_000)
    result = llama_scratch("verify", "--model", "smollm2")
    assert result.code == 4
    assert "Its SHA-256 is " in result.out
    assert "Run 'llama-scratch pull smollm2' to fetch it again" in result.out
    assert result.out.endswith("Fetch SmolLM2-135M-Instruct.Q4_1.gguf again.\n")
    os.truncate(copy, 98_362_431)
    found = verify(copy, published=pypi.published_files())
    assert "98,362,431 bytes, expected 98,362,432 as in the published smollm2" in found.findings[0].sentence
    assert [(f.check, f.result) for f in found.findings] == [("SHA-256", "wrong"), ("structure", "wrong")]
    # In another place it may be a different file of the same name.
    elsewhere = tmp_path / copy.name
    copy.rename(elsewhere)
    assert [(f.check, f.result) for f in verify(elsewhere, published=pypi.published_files()).findings] == [
        ("SHA-256", "note"),
        ("structure", "wrong"),
    ]
    copy.touch()  # even if its own path exists
    assert verify(elsewhere, published=pypi.published_files()).findings[0].result == "note"


@pytest.mark.parametrize("listed", [True, False])
def test_a_known_model_that_has_other_weights_is_worth_a_note(
    model: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """As for a fine-tuned model; `checklist.chk` decides. The file is read once for both checksums."""
    if not listed:
        (model / CHECKLIST).unlink()
    monkeypatch.setattr(checksums, "_LLAMA_3_2_1B", 3_093_248)
    findings = {(f.part, f.check): f for f in verify(model).findings}
    assert findings[WEIGHTS, "SHA-256"].result == "note"
    assert "does not match Meta's Llama 3.2 1B or Meta's" in findings[WEIGHTS, "SHA-256"].sentence
    assert ((WEIGHTS, "MD5") in findings) == listed
    own = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    monkeypatch.setattr(checksums, "_LLAMA_3_2_1B_SHA256", {own: "a test"})
    findings = {(f.part, f.check): f for f in verify(model).findings}
    assert findings[WEIGHTS, "SHA-256"].sentence.startswith("Its SHA-256 matches a test")


def test_llamas_own_tokenizer_is_known(tiny_dir: Path, meta_tokenizer_path: Path, tmp_path: Path) -> None:
    """Its published MD5 is known; if one letter of a token changes, there is a note."""
    directory = tmp_path / "m"
    shutil.copytree(tiny_dir, directory)
    shutil.copyfile(meta_tokenizer_path, directory / "tokenizer.model")
    findings = {(f.part, f.check): f for f in verify(directory).findings}
    assert findings["tokenizer.model", "MD5"].sentence.startswith("Its MD5 matches Llama 3's tokenizer")
    text = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(text.replace(b"IQ== 0\n", b"fw== 0\n", 1))
    findings = {(f.part, f.check): f for f in verify(directory).findings}
    assert findings["tokenizer.model", "MD5"].result == "note"


def test_a_cache_whose_files_are_named_by_their_checksums(model: Path, tmp_path: Path) -> None:
    """As in the Hugging Face cache: large blobs are named by SHA-256, small ones by Git's SHA-1."""
    (model / CHECKLIST).unlink()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main" / "original"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    params = (model / "params.json").read_bytes()
    names = {
        WEIGHTS: hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest(),
        "params.json": hashlib.sha1(b"blob %d\0" % len(params) + params).hexdigest(),
        "tokenizer.model": "not-a-checksum",
    }
    for file, blob in names.items():
        (model / file).rename(blobs / blob)
        (snapshot / file).symlink_to(Path("../../../blobs") / blob)
    found = verify(snapshot.parent)
    assert wrong(found) == []
    checked = {f.part: f.check for f in found.findings if f.check in ("SHA-256", "Git's SHA-1")}
    assert checked == {WEIGHTS: "SHA-256", "params.json": "Git's SHA-1"}
    flip(blobs / names["params.json"], len(params) - 2)
    flip(blobs / names[WEIGHTS], 1_000_000)
    found = verify(snapshot.parent)
    assert found.fetch_again == [WEIGHTS, "params.json"]
    (blobs / names["params.json"]).unlink()
    sentences = {finding.check: finding.sentence for finding in wrong(verify(snapshot.parent))}
    assert "link points to a file that does not exist" in sentences["presence"]


# --- The command ------------------------------------------------------------------------------


def test_the_command_prints_lines_and_an_exit_code(model: Path, llama_scratch: Runner) -> None:
    result = llama_scratch("verify", str(model))
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("ok: params.json: Its MD5 matches checklist.chk (")
    assert lines[-1] == "Intact: none of 8 checks failed."
    flip(model / "tokenizer.model", 0)
    result = llama_scratch("--model-dir", str(model), "verify")
    assert (result.code, result.err) == (4, "")
    assert any(line.startswith("wrong: tokenizer.model: ") for line in result.out.splitlines())
    assert result.out.splitlines()[-1].endswith("Fetch tokenizer.model again.")


def test_json_is_one_object(model: Path, llama_scratch: Runner) -> None:
    write_checklist(model, params_json="0" * 32)
    result = llama_scratch("verify", str(model), "--json")
    assert result.code == 4
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert found["ok"] is False
    assert (found["name"], found["format"]) == ("Tiny-Llama", "meta")
    assert found["fetch_again"] == ["params.json"]
    assert found["findings"][0].keys() == {"part", "check", "result", "sentence"}
    assert [f["part"] for f in found["findings"] if f["result"] == "wrong"] == ["params.json"]
    result = llama_scratch("--json", "verify", str(model), "--rope-factor", "8")
    assert "a factor of 8" in json.loads(result.out)["findings"][-1]["sentence"]


def test_no_model_is_another_exit_code(tmp_path: Path, model: Path, llama_scratch: Runner) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        result = llama_scratch("verify", str(path), "--json")
        assert result.code == 3
        one_sentence(result)
        with pytest.raises(ModelNotFoundError):
            verify(path)
    (tmp_path / "params.json").touch()  # now part of a model exists
    assert wrong(verify(tmp_path))
    with pytest.raises(UsageError, match="`rope_factor`"):
        verify(model, rope_factor=0.5)
    assert llama_scratch("verify", str(model), "--rope-factor", "0.5").code == 2


def test_a_tokenizer_elsewhere(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").rename(tmp_path / "t.model")
    write = (model / CHECKLIST).read_text().splitlines()
    (model / CHECKLIST).write_text("\n".join(line for line in write if "tokenizer" not in line))
    assert wrong(verify(model, str(tmp_path / "t.model"))) == []
    assert wrong(verify(model))


@pytest.mark.parametrize("width", [80, 40])
def test_the_table_fits_and_says_all_without_color(model: Path, width: int) -> None:
    write_checklist(model, consolidated_00_pth="0" * 32)
    found = verify(model)
    text = as_text(verify_table(found), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for finding in found.findings:
        assert f"{finding.result} {finding.part} {finding.sentence}" in words
    assert words.endswith(found.verdict)


def test_progress_ends_at_its_total_and_never_goes_back(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(model, progress=lambda _, done, total: seen.append((done, total)))
    size = sum((model / name).stat().st_size for name in FILES)
    assert {total for _, total in seen} == {size + 2 * (model / WEIGHTS).stat().st_size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] > 0.99 * seen[-1][1]


def test_a_share_of_the_progress_never_goes_back() -> None:
    """For any progress of loading: stages that restart, and a stage without a total."""
    seen: list[int] = []
    meter = module._Meter(lambda _, done, total: seen.append(done), 300)
    report = meter.share(200)
    for done, total in ((0, 0), (50, 100), (10, 100), (100, 100), (1, 10)):
        report("x", done, total)
    meter.advance(100)
    assert seen == [0, 100, 100, 200, 200, 300]


def test_an_interrupt_is_heard_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashing threads stop too."""
    mine = threading.current_thread()

    def interrupted(_: str, done: int, total: int) -> None:
        if threading.current_thread() is mine:
            raise KeyboardInterrupt

    meters: list[module._Meter] = []

    class Kept(module._Meter):
        def __init__(self, progress: Progress, total: int):
            super().__init__(progress, total)
            meters.append(self)

    monkeypatch.setattr(module, "_Meter", Kept)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verify(model, progress=interrupted)
    assert threading.active_count() == before
    with pytest.raises(CancelledError):  # raised at the next block
        checksums._digests(model / WEIGHTS, {"md5"}, meters[0].advance)


@pytest.mark.parametrize(
    ("error", "code"),
    [(OutOfMemoryError("It is too large."), 5), (LlamaScratchError("x.pth cannot be read: Input/output error."), 4)],
)
def test_memory_that_is_not_enough_is_no_damage(
    model: Path, monkeypatch: pytest.MonkeyPatch, llama_scratch: Runner, error: LlamaScratchError, code: int
) -> None:
    """But a disk that fails while loading is."""

    def load(_: Progress) -> dict[str, Weight]:
        raise error

    changed = replace(open_checkpoint(model), load=load)
    monkeypatch.setattr(module, "open_checkpoint", lambda *_: changed)
    assert llama_scratch("verify", str(model)).code == code


def test_a_whole_file_that_is_not_supported_is_not_called_damaged(tmp_path: Path) -> None:
    """No file is listed to fetch again."""
    path = whole_file().change("blk.0.attn_q.weight", kind=31).write(tmp_path / "a.gguf")
    found = verify(path)
    assert found.wrong == 1
    assert found.fetch_again == []
    assert found.verdict.startswith("Not supported")
    assert "Q4_0_4_4" in found.as_json()["findings"][-1]["sentence"]
