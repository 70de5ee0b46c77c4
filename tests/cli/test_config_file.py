"""The configuration file and the environment: valid contents, precedence, and errors."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from llama_scratch.cli.config_file import default_path
from llama_scratch.repl.session import Session
from tests.helpers.command_line import Runner, one_sentence


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An empty file at the default path."""
    file = default_path()
    file.parent.mkdir(parents=True)
    file.write_text("")
    return file


@pytest.fixture
def model(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small random model, set in the environment only."""
    monkeypatch.setenv("LLAMA_SCRATCH_MODEL_DIR", str(tiny_dir))
    return str(tiny_dir)


def candidates(llama_scratch: Runner, *arguments: str) -> int:
    """The number of candidates in an answer."""
    result = llama_scratch(*arguments, "--json", stdin=b"the\n")
    assert result.err == ""
    return len(json.loads(result.out)["top"])


def test_flags_over_the_environment_over_the_file_over_the_default(
    llama_scratch: Runner,
    config: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert candidates(llama_scratch) == 5
    config.write_text("top = 4")
    assert candidates(llama_scratch) == 4
    monkeypatch.setenv("LLAMA_SCRATCH_TOP", "3")
    assert candidates(llama_scratch) == 3
    assert candidates(llama_scratch, "--top", "2") == 2


def test_another_file(
    llama_scratch: Runner,
    config: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.write_text("top = 4")
    (tmp_path / "other.toml").write_text("top = 3")
    (tmp_path / "third.toml").write_text("top = 2")
    monkeypatch.setenv("LLAMA_SCRATCH_CONFIG", str(tmp_path / "other.toml"))
    assert candidates(llama_scratch) == 3
    assert candidates(llama_scratch, "--config", str(tmp_path / "third.toml")) == 2


def test_every_kind_of_option(llama_scratch: Runner, config: Path, tiny_dir: Path) -> None:
    """A string, an integer, a float, a flag, and a flag that is on by default."""
    options = ["generate = 2", "temperature = 1.5", "seed = 1", "json = true", "live = false", "no-color = true"]
    config.write_text("\n".join([f'model-dir = "{tiny_dir}"', *options]))
    answer = json.loads(llama_scratch(stdin=b"the\n").out)
    assert answer["model"]["name"] == tiny_dir.name
    assert len(answer["generated"]["ids"]) == 2


@pytest.mark.parametrize(("given", "live"), [([], False), (["--live"], True), (["--no-live"], False)])
def test_live_and_special_reach_the_session(
    llama_scratch: Runner,
    config: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    live: bool,
) -> None:
    """The file can turn off a flag that is on by default, and the command line can turn it on again."""
    config.write_text("live = false\nspecial = true")
    seen = []

    def answer_all(session: Session, *_: object, **__: object) -> int:
        seen.append(session.settings)
        return 0

    monkeypatch.setattr("llama_scratch.repl.batch.answer_all", answer_all)
    assert llama_scratch(*given).code == 0
    assert (seen[0].live, seen[0].special) == (live, True)


def test_the_file_names_the_activations(
    llama_scratch: Runner,
    config: Path,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The environment and the command line take precedence."""
    needed = {}
    for written, environment, given in (("bf16", None, ()), ("bf16", "fp32", ()), ("bf16", "fp32", ("bf16",))):
        config.write_text(f'model-dir = "{tiny_dir}"\nactivations = "{written}"')
        if environment:
            monkeypatch.setenv("LLAMA_SCRATCH_ACTIVATIONS", environment)
        options = [option for name in given for option in ("--activations", name)]
        facts = json.loads(llama_scratch("info", "--json", *options).out)
        needed[given or environment] = facts["memory"]["needed"]["fp32"]["KV cache"]
    assert needed["fp32"] == 2 * needed[None] == 2 * needed["bf16",]
    monkeypatch.delenv("LLAMA_SCRATCH_ACTIVATIONS")
    config.write_text(f'model-dir = "{tiny_dir}"\nactivations = "fp8"')
    assert llama_scratch(stdin=b"the\n").code == 2


def test_a_subcommand_has_a_table(llama_scratch: Runner, config: Path, tiny_dir: Path) -> None:
    config.write_text(f'[info]\njson = true\nmodel-dir = "{tiny_dir}"')
    assert json.loads(llama_scratch("info").out)["name"] == tiny_dir.name


# --- Which model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "environment", "arguments"),
    [
        ('model = "smollm2"', {}, ["--model-dir", "TINY"]),
        ('model = "smollm2"', {"LLAMA_SCRATCH_MODEL_DIR": "TINY"}, []),
        ('model = "smollm2"\n[info]\nmodel-dir = "TINY"', {}, []),
        ('[info]\nmodel = "smollm2"', {"LLAMA_SCRATCH_INFO_MODEL_DIR": "TINY"}, []),
        ('[info]\nmodel = "smollm2"', {}, ["--model-dir", "TINY"]),
        ("", {"LLAMA_SCRATCH_MODEL": "smollm2"}, ["--model-dir", "TINY"]),
        ("", {"LLAMA_SCRATCH_INFO_MODEL": "smollm2"}, ["--model-dir", "TINY"]),
        ("", {}, ["--model", "smollm2", "info", "--model-dir", "TINY"]),
        ('model-dir = "/nowhere"', {"LLAMA_SCRATCH_MODEL": "smollm2"}, ["info", "TINY"]),
    ],
)
def test_what_is_said_last_names_the_model(
    llama_scratch: Runner,
    config: Path,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    environment: dict[str, str],
    arguments: list[str],
) -> None:
    """--model and --model-dir count as one option: the source with the higher precedence wins, without an error."""
    config.write_text(file.replace("TINY", str(tiny_dir)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("TINY", str(tiny_dir)))
    arguments = [argument.replace("TINY", str(tiny_dir)) for argument in arguments]
    result = llama_scratch(*arguments, *([] if "info" in arguments else ["info"]))
    assert f"name: {tiny_dir.name}\n" in result.out, result.err


def test_both_in_one_place_are_still_refused(llama_scratch: Runner, config: Path, model: str) -> None:
    config.write_text(f'model = "smollm2"\nmodel-dir = "{model}"')
    assert llama_scratch(stdin=b"x\n").code == 0  # the environment overrides both
    config.write_text("")
    assert "Both --model and --model-dir" in one_sentence(llama_scratch("--model", "smollm2", "--model-dir", model))


def test_the_two_in_the_file_are_refused(llama_scratch: Runner, config: Path) -> None:
    config.write_text('model = "smollm2"\nmodel-dir = "here"')
    assert "Both --model and --model-dir" in one_sentence(llama_scratch(stdin=b"x\n"))


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tpo = 3", r"unknown option 'tpo'.* top\?"),
        ("model_dir = 'x'", r"unknown option 'model_dir'.* model-dir\?"),
        ("zzz = 3", "unknown option 'zzz'.* without the dashes"),
        ("version = true", "unknown option 'version'"),
        ("config = 'x'", "unknown option 'config'"),
        ("help = true", "unknown option 'help'"),
        ("install-completion = true", "unknown option 'install-completion'"),
        ('"t\\u001b[31m" = 1', r"unknown option 't\\x1b\[31m'"),
        ("[bnech]\nruns = 1", r"unknown option 'bnech'.* bench\?"),
        ("[bench]\nrnus = 1", r"unknown option 'rnus' in \[bench\].* runs\?"),
        ("[bench]\nprompt = 'x'", r"unknown option 'prompt' in \[bench\]"),
        ("bench = 1", r"bench is 1\..* under \[bench\]"),
        ("top = 'many'", r"top is 'many'\..* --top"),
        ("top = 1.5", r"top is 1\.5\..* --top"),
        ("top = true", r"top is true\..* --top"),
        ("top = [1]", r"top is \[1\]\..* --top"),
        ("json = 1", r"json is 1\..* true or false"),
        ("json = 'yes'", r"json is 'yes'\..* true or false"),
        ("model = 3", r"model is 3\..* quotes"),
        ("top = ", "TOML"),
        ("top = 1\ntop = 2", "TOML"),
        ("a = " + "[" * 10_000, "TOML"),
        ("\ud800", "UTF-8"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(
    llama_scratch: Runner,
    config: Path,
    text: str,
    expected: str,
) -> None:
    config.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    result = llama_scratch(stdin=b"x\n")
    assert result.code == 2
    assert re.search(expected, one_sentence(result))
    assert str(config) in result.err


def test_a_file_that_cannot_be_read(llama_scratch: Runner, config: Path, tmp_path: Path) -> None:
    """A file named by the user must exist. The default file may be missing."""
    config.unlink()
    assert "none" in llama_scratch("pull", "none").err
    for path, expected in ((tmp_path / "none.toml", "not found"), (tmp_path, "cannot be read")):
        result = llama_scratch("--config", str(path), stdin=b"x\n")
        assert result.code == 2
        assert expected in one_sentence(result)
        assert str(path) in result.err


def test_a_byte_order_mark_and_dos_line_ends(llama_scratch: Runner, config: Path, model: str) -> None:
    config.write_bytes(b"\xef\xbb\xbftop = 3\r\nquiet = true\r\n")
    assert candidates(llama_scratch) == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16(llama_scratch: Runner, config: Path, encoding: str) -> None:
    config.write_bytes("top = 3\n".encode(encoding))
    result = llama_scratch(stdin=b"x\n")
    assert result.code == 2
    assert "UTF-16" in one_sentence(result)


SLOW = {
    "a dotted key": "a." * 30_000 + "a = 1",
    "a dotted key in quotes": '"a" . ' * 10_000 + "a = 1",
    "a table": "[" + "a." * 30_000 + "a]",
    "an inline table": "x = {" + "a." * 30_000 + "a = 1}",
    "many keys of many parts": "\n".join(f"a{i}." + "b." * 253 + "c = 1" for i in range(125)),
    "many tables": "\n".join(f"[a{i}.b.c.d]" for i in range(4000)),
    "deep arrays": "top = " + "[" * 60_000,
    "deep tables": "top = " + "{a=" * 20_000,
    "quotes": '"\\' * 30_000,
    "large": "# " + "x" * 70_000,
    "a long number": "top = " + "9" * 60_000,
    "a long number in base 16": "top = 0x" + "F" * 60_000,
    "a long number for a fraction": "temperature = 0x" + "F" * 60_000,
    "a long number in an array": "top = [0x" + "F" * 60_000 + "]",
    "more than 64 bits": f"context = {1 << 63}",
}


@pytest.mark.parametrize("text", SLOW.values(), ids=SLOW)
def test_a_hostile_file_is_rejected_at_once(llama_scratch: Runner, config: Path, text: str) -> None:
    """A dotted key of 30,000 parts used to take 40 s."""
    config.write_text(text)
    start = time.process_time()
    result = llama_scratch(stdin=b"x\n")
    assert time.process_time() - start < 2
    assert result.code == 2
    assert str(config) in one_sentence(result)


def test_a_text_of_many_dots(llama_scratch: Runner, config: Path, model: str) -> None:
    """Ordinary prompts stay below the limit per line."""
    config.write_text('prompt = """' + "A line. It goes on. " * 100 + '\n..."""')
    config.write_text(config.read_text().replace(" It", "\nIt"))
    assert json.loads(llama_scratch("--json").out)["prompt"].startswith("A line.")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_file_that_is_not_one(llama_scratch: Runner, tmp_path: Path) -> None:
    """The program does not wait for a named pipe or read a device."""
    os.mkfifo(tmp_path / "pipe")
    for file in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        result = llama_scratch("--config", file, stdin=b"x\n")
        assert result.code == 2
        assert file in one_sentence(result)


def test_the_null_device_is_an_empty_file(llama_scratch: Runner, config: Path, model: str) -> None:
    config.write_text("top = 3")
    assert candidates(llama_scratch, "--config", "/dev/null") == 5


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_nobody_named_and_that_cannot_be_read_is_absent(
    llama_scratch: Runner,
    config: Path,
    model: str,
    error: OSError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example with another user's HOME. A file named by the user is still an error."""
    config.write_text("top = 3")
    original = os.open

    def opened(path: str | Path, *args: Any, **kwargs: Any) -> int:
        if Path(path) == config:
            raise error
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    assert candidates(llama_scratch) == 5
    result = llama_scratch("--config", str(config), stdin=b"x\n")
    assert result.code == 2
    assert str(error.strerror) in one_sentence(result)


def test_a_wrong_environment_is_one_sentence(
    llama_scratch: Runner,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLAMA_SCRATCH_TOP", "many")
    result = llama_scratch(stdin=b"x\n")
    assert result.code == 2
    assert "--top" in one_sentence(result)


def test_help_and_version_need_no_whole_file(llama_scratch: Runner, config: Path) -> None:
    """A user with a broken file can still read how to write it."""
    config.write_text("broken")
    assert llama_scratch("--version").code == 0
    result = llama_scratch("--help")
    assert result.code == 0
    assert "LLAMA_SCRATCH_TOP" in result.out


@pytest.mark.parametrize("place", ["flag", "environment", "file"])
def test_debug_from_each_place(
    llama_scratch: Runner,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Errors have tracebacks only with --debug."""
    missing = ("--model-dir", "/nowhere", "info")
    assert "Traceback" not in llama_scratch(*missing).err
    if place == "environment":
        monkeypatch.setenv("LLAMA_SCRATCH_DEBUG", "1")
    if place == "file":
        config.write_text("debug = true")
    result = llama_scratch(*(["--debug"] if place == "flag" else []), *missing)
    assert result.code == 3
    assert result.err.count("Traceback") == 1
    assert result.err.splitlines()[-1].startswith("llama-scratch: ")
