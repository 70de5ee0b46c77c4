"""The command line, run in this process: streams, formats, exit codes, and one message per error."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llama_scratch.errors import escape_controls
from llama_scratch.render.messages import user_message
from tests.helpers.checkpoints import write_meta
from tests.helpers.command_line import Runner, one_sentence
from tests.helpers.terminal import PROGRAM


@pytest.fixture
def tiny(tiny_dir: Path) -> tuple[str, str]:
    """The option for the small random model."""
    return ("--model-dir", str(tiny_dir))


# --- Formats ----------------------------------------------------------------------------------


def test_a_prompt_gives_one_line_of_token_probability_id(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    result = llama_scratch(*tiny, "--prompt", "the nation")
    text, probability, id = result.out.removesuffix("\n").split("\t")
    assert result.code == 0
    assert result.err == ""
    assert isinstance(json.loads(text), str)
    assert len(probability.split(".")[1]) == 4
    assert 0 <= int(id) < 556


def test_each_line_of_a_pipe_is_a_prompt_and_empty_ones_are_skipped(
    llama_scratch: Runner, tiny: tuple[str, str]
) -> None:
    result = llama_scratch(*tiny, "--json", stdin=b"the nation\n\nin the end\r\nlast")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["the nation", "in the end", "last"]
    assert result.code == 0


@pytest.mark.parametrize("stdin", [b"\xef\xbb\xbfthe\nin\n", b"the\r\nin\r\n", b"\xef\xbb\xbf\nthe\nin"])
def test_a_byte_order_mark_and_line_ends_are_not_text(
    llama_scratch: Runner, tiny: tuple[str, str], stdin: bytes
) -> None:
    result = llama_scratch(*tiny, "--json", stdin=stdin)
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["the", "in"]


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [
        (b"\xef\xbb\xbfthe\n", "the"),
        (b"the\r\n", "the"),
        (b"the\r\n\r\n", "the\r\n"),
        (b"the\n\n", "the\n"),
        (b"the\r", "the\r"),
        (b"the\xef\xbb\xbf", "the\ufeff"),
    ],
)
def test_all_of_stdin_without_one_line_end(
    llama_scratch: Runner, tiny: tuple[str, str], stdin: bytes, prompt: str
) -> None:
    assert json.loads(llama_scratch(*tiny, "--json", "--prompt", "-", stdin=stdin).out)["prompt"] == prompt


def test_a_command_after_a_byte_order_mark(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    result = llama_scratch(*tiny, "--json", "--commands", stdin=b"\xef\xbb\xbf/top 2\nthe\n")
    assert json.loads(result.out.splitlines()[0])["command"] == "top"


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-")])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(
    llama_scratch: Runner, tiny: tuple[str, str], arguments: tuple[str, ...], encoding: str
) -> None:
    result = llama_scratch(*tiny, *arguments, stdin="the nation\n".encode(encoding))
    assert result.code == 2
    assert "UTF-16" in one_sentence(result)


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-")])
def test_an_endless_prompt_is_rejected(
    llama_scratch: Runner, tiny: tuple[str, str], arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as /dev/zero."""
    monkeypatch.setattr("llama_scratch.repl.batch._MAX_PROMPT", 1000)
    result = llama_scratch(*tiny, *arguments, stdin=bytes(1001))
    assert result.code == 2
    assert "1,000 bytes" in one_sentence(result)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("convert", "--model-dir", "x"), "llama-scratch convert"),
        (("convert", "a", "b", "--to", "hf", "--precision", "int8"), "llama-scratch convert"),
        (("pull", "--tokenizer", "x", "smollm2"), "llama-scratch pull"),
        (("info", "--top", "3"), "llama-scratch info"),
        (("--bogus",), "llama-scratch"),
    ],
)
def test_an_unknown_option_names_the_help_that_lists_the_known_ones(
    llama_scratch: Runner, arguments: tuple[str, ...], command: str
) -> None:
    """It is the help of the subcommand, because the main command has options that the subcommand lacks."""
    result = llama_scratch(*arguments)
    assert result.code == 2
    assert f"'{command} --help'" in one_sentence(result)


def test_no_message_names_an_option_that_its_command_lacks(llama_scratch: Runner, tmp_path: Path) -> None:
    """`convert` has no --model-dir, but once recommended it for a directory with Meta's files in original/."""
    write_meta(tmp_path / "model" / "original")
    (tmp_path / "model" / "original" / "consolidated.00.pth").unlink()
    result = llama_scratch("convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "hf")
    assert result.code == 3
    assert "--model-dir" not in one_sentence(result)


def test_top_lists_that_many_lines_only_where_it_was_asked_for(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    assert len(llama_scratch(*tiny, "--prompt", "the").out.splitlines()) == 1
    assert len(llama_scratch(*tiny, "--prompt", "the", "--top", "5").out.splitlines()) == 5
    assert len(json.loads(llama_scratch(*tiny, "--prompt", "the", "--json").out)["top"]) == 5
    assert len(json.loads(llama_scratch(*tiny, "--prompt", "the", "--json", "--top", "2").out)["top"]) == 2


def test_generate_prints_the_continuation(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    answer = json.loads(llama_scratch(*tiny, "--prompt", "the nation", "--generate", "8", "--json").out)
    generated = answer["generated"]
    assert generated["finish_reason"] == "length"
    assert len(generated["ids"]) == len(generated["logprobs"]) == 8
    assert generated["ids"][0] == answer["next"]["id"]
    assert generated["logprobs"][0] == pytest.approx(answer["next"]["logprob"], abs=1e-4)
    plain = llama_scratch(*tiny, "--prompt", "the nation", "--generate", "8").out
    assert plain == generated["text"] + "\n"


def test_next_is_the_argmax_whatever_the_sampling(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    greedy = json.loads(llama_scratch(*tiny, "--prompt", "the", "--json").out)
    # In fp32 the weights have the same format from the first token to the last.
    hot = ["--precision", "fp32", "--temperature", "5", "--generate", "5", "--json"]
    runs = [json.loads(llama_scratch(*tiny, "--prompt", "the", *hot, "--seed", seed).out) for seed in ("1", "1", "2")]
    assert {answer["next"]["id"] for answer in runs} == {greedy["next"]["id"]}
    assert runs[0]["generated"] == runs[1]["generated"]
    assert runs[0]["generated"]["ids"] != runs[2]["generated"]["ids"]


def test_all_of_standard_input_is_the_prompt_for_a_dash(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    result = llama_scratch(*tiny, "--prompt", "-", "--json", stdin=b"two\nlines\n\n")
    assert json.loads(result.out)["prompt"] == "two\nlines\n"


def test_tokens_are_what_the_model_saw(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    tokens = json.loads(llama_scratch(*tiny, "--prompt", "the", "--json").out)["tokens"]
    assert tokens[0] == {"id": 300, "text": "<|begin_of_text|>"}
    assert "".join(token["text"] for token in tokens[1:]) == "the"


def test_bytes_that_are_not_text_are_read_as_replacement_characters(
    llama_scratch: Runner, tiny: tuple[str, str]
) -> None:
    answer = json.loads(llama_scratch(*tiny, "--json", stdin=b"caf\xe9\n").out)
    assert answer["prompt"] == "caf\ufffd"
    assert "U+FFFD" in answer["warnings"][0]


def test_warnings_go_to_stderr_beside_lines_and_into_json(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    result = llama_scratch(*tiny, "--prompt", "the ")
    assert "ends in a space" in result.err
    assert result.out.count("\n") == 1
    result = llama_scratch(*tiny, "--prompt", "the ", "--json")
    assert "ends in a space" in json.loads(result.out)["warnings"][0]
    assert result.err == ""
    assert llama_scratch(*tiny, "--prompt", "the ", "--quiet").err == ""


def test_lines_that_begin_with_a_slash_are_prompts_unless_commands_are_asked_for(
    llama_scratch: Runner, tiny: tuple[str, str]
) -> None:
    prompts = b"/help\n//usr\n"
    plain = llama_scratch(*tiny, "--json", stdin=prompts).out.splitlines()
    assert [json.loads(line)["prompt"] for line in plain] == ["/help", "//usr"]
    result = llama_scratch(*tiny, "--json", "--commands", stdin=b"//usr\n/quit\nnever answered\n")
    prompt, command = map(json.loads, result.out.splitlines())
    assert prompt["prompt"] == "/usr"
    assert command == {"command": "quit"}
    result = llama_scratch(*tiny, "--json", "--commands", stdin=b"/help\nthe\n")
    command, prompt = map(json.loads, result.out.splitlines())
    assert "/quit" in command["commands"]
    assert prompt["prompt"] == "the"
    result = llama_scratch(*tiny, "--commands", stdin=b"/help\nthe\n")
    assert len(result.out.splitlines()) == 1  # help is not data
    assert "/quit" in result.err
    result = llama_scratch(*tiny, "--commands", stdin=b"/hlep\n")
    assert result.code == 2
    assert "Did you mean /help?" in one_sentence(result)


def test_the_pipe_goes_on_after_a_prompt_that_fails(llama_scratch: Runner, tiny: tuple[str, str]) -> None:
    for quiet in ([], ["--quiet"]):  # errors are printed with --quiet too
        result = llama_scratch(*tiny, "--context", "8", *quiet, stdin=b"the\n" + b"x" * 50 + b"\nthe\n")
        assert result.code == 2
        assert len(result.out.splitlines()) == 2
        assert "51 tokens" in result.err


# --- Subcommands ------------------------------------------------------------------------------


def test_info_names_shape_parameters_and_rope_factor(llama_scratch: Runner, tiny_dir: Path) -> None:
    facts = json.loads(llama_scratch("info", str(tiny_dir), "--json").out)
    assert facts["parameters"] == 3_093_248
    assert facts["shape"]["head_dim"] == 64
    assert facts["rope"]["scaling"]["factor"] == 32
    assert facts["stored"] == {"bfloat16": 30}
    assert facts["precision"] == "bf16"  # the resolved value of auto
    text = llama_scratch("info", str(tiny_dir)).out
    assert "scaled by a factor of 32" in text
    assert f"runs in {facts['precision']}" in text


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_the_first_answer_comes_from_the_precision_that_was_asked_for(
    llama_scratch: Runner, tiny: tuple[str, str], precision: str
) -> None:
    """With int8 it waits until the weights are packed."""
    result = llama_scratch(*tiny, "--precision", precision, "--json", stdin=b"the\n")
    assert json.loads(result.out)["model"]["precision"] == precision
    assert result.err == ""


def test_activations_are_an_option(
    llama_scratch: Runner, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags override the environment. An unknown name is a usage error in both."""

    def entropy(*arguments: str) -> float:
        result = llama_scratch(*tiny, *arguments, "--json", "--prompt", "the nation")
        assert result.code == 0, result.err
        found: float = json.loads(result.out)["entropy_bits"]
        return found

    exact, rounded = entropy(), entropy("--activations", "bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.1)
    assert entropy("--activations", "fp32") == entropy("--activations", "auto") == exact
    monkeypatch.setenv("LLAMA_SCRATCH_ACTIVATIONS", "bf16")
    assert entropy() == rounded
    assert entropy("--activations", "fp32") == exact
    monkeypatch.setenv("LLAMA_SCRATCH_ACTIVATIONS", "fp8")
    for arguments in ((*tiny, "--prompt", "x"), ("info", *tiny), ("info", *tiny, "--activations", "int8")):
        result = llama_scratch(*arguments)
        assert result.code == 2
        assert "auto, fp32, bf16 (--activations)" in one_sentence(result)


@pytest.mark.parametrize("before", [True, False])
def test_model_options_stand_before_or_after_a_subcommand(llama_scratch: Runner, tiny_dir: Path, before: bool) -> None:
    options = ["--model-dir", str(tiny_dir), "--rope-factor", "8"]
    arguments = [*options, "info", "--json"] if before else ["info", *options, "--json"]
    assert json.loads(llama_scratch(*arguments).out)["rope"]["scaling"]["factor"] == 8


def test_the_open_model_is_announced_and_fetched_where_there_is_none(
    llama_scratch: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The download is announced and attempted, and its failure is one message. The rest is tested elsewhere."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = llama_scratch("--prompt", "x")
    assert result.code == 1
    assert "Downloading SmolLM2-135M-Instruct" in result.err
    assert "has no pip" in result.err


def test_pulling_an_unknown_name_is_a_usage_error(llama_scratch: Runner) -> None:
    result = llama_scratch("pull", "llama-9000")
    assert result.code == 2
    assert "smollm2" in one_sentence(result)


def test_version_and_help(llama_scratch: Runner) -> None:
    assert llama_scratch("--version").out.startswith("llama-scratch 0.")
    result = llama_scratch("--help")
    assert result.code == 0
    for option in ("--model-dir", "--prompt", "--rope-factor", "--json", "pull", "info", "Examples:"):
        assert option in result.out


@pytest.mark.parametrize("command", [(), ("pull",), ("bench",)])
def test_help_fits_a_narrow_terminal(
    llama_scratch: Runner, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Names of options are not truncated, and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    names = set(re.findall(r"--[a-z-]+", llama_scratch(*command, "--help").out))
    monkeypatch.setenv("COLUMNS", "40")
    result = llama_scratch(*command, "--help")
    assert result.code == 0
    assert names == set(re.findall(r"--[a-z-]+", result.out))
    assert max(map(len, result.out.splitlines())) <= 40


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--top", "0"], "0 candidates"),
        (["--top", "many"], "--top"),
        (["--generate", "-1"], "-1 tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", "-1"], "-1"),
        (["--top-p", "1.5"], "1.5"),
        (["--min-p", "-0.1"], "-0.1"),
        (["--seed", "-1"], "seed"),
        (["--precision", "int3"], "'int3'"),
        (["--activations", "fp16"], "auto, fp32, bf16 (--activations)"),
        (["--device", "abacus"], "'abacus'"),
        (["--threads", "0"], "threads"),
        (["--context", "0"], "(--context)"),
        (["--context", "3"], "8 tokens"),
        (["--rope-factor", "0.5"], "0.5"),
        (["--rope-factor", "nan"], "nan"),
        (["--model", "smollm2"], "Both --model and --model-dir"),
        (["--bogus"], "--bogus"),
        (["--prompt", ""], "empty"),
    ],
)
def test_wrong_options_are_one_sentence_and_exit_code_2(
    llama_scratch: Runner, tiny: tuple[str, str], arguments: list[str], expected: str
) -> None:
    result = llama_scratch(*tiny, "--prompt", "the nation", *arguments)
    assert result.code == 2
    assert expected in one_sentence(result)


def test_a_missing_model_is_exit_code_3(llama_scratch: Runner, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        result = llama_scratch("--model-dir", str(path), "--prompt", "x")
        assert result.code == 3
        assert str(path) in one_sentence(result)


def test_a_damaged_model_is_exit_code_4(llama_scratch: Runner, tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "Damaged")
    (directory / "consolidated.00.pth").write_bytes(b"<!DOCTYPE html><title>Sign in</title>")
    result = llama_scratch("--model-dir", str(directory), "--prompt", "x")
    assert result.code == 4
    assert "web page" in one_sentence(result)


def test_too_little_memory_is_exit_code_5(
    llama_scratch: Runner, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    result = llama_scratch(*tiny, "--precision", "fp32", "--prompt", "x")
    assert result.code == 5
    assert "needs" in one_sentence(result)


def test_what_is_unexpected_is_a_sentence_and_a_traceback_only_with_debug(
    llama_scratch: Runner, tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("the world ended")

    monkeypatch.setattr("llama_scratch.inference.engine.Engine.next_logits", broken)
    result = llama_scratch(*tiny, "--prompt", "x")
    assert result.code == 1
    assert "the world ended" in one_sentence(result)
    assert "Traceback" in llama_scratch(*tiny, "--prompt", "x", "--debug").err


def test_a_reader_that_goes_away_ends_the_program_quietly(tiny_dir: Path) -> None:
    program = subprocess.Popen(
        [*PROGRAM, "--model-dir", str(tiny_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdin.write(b"the nation\n")
    program.stdin.flush()
    assert program.stdout.readline()
    program.stdout.close()
    program.stdin.write(b"the nation\n" * 50)
    program.stdin.close()
    assert program.wait(60) == 0
    assert program.stderr.read() == b""


def test_output_is_utf8_whatever_the_locale(tiny_dir: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [*PROGRAM, "--model-dir", str(tiny_dir), "--prompt", "日本", "--json"],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert json.loads(result.stdout.decode("utf-8"))["prompt"] == "日本"


def test_colors_that_are_forced_do_not_change_the_data(tiny_dir: Path) -> None:
    """The format depends on whether standard output is a terminal, not on forced colors."""
    command = [*PROGRAM, "--model-dir", str(tiny_dir), "--prompt", "the nation"]
    outputs = {
        subprocess.run(command, capture_output=True, env=os.environ | forced, check=True).stdout
        for forced in ({}, {"FORCE_COLOR": "1"})
    }
    assert len(outputs) == 1
    assert b"\x1b" not in outputs.pop()


@pytest.mark.parametrize("closed", ["<&-", "2>&-"])
def test_a_stream_that_is_closed_is_an_empty_one(tiny: tuple[str, str], closed: str) -> None:
    """Without stdin a prompt is still answered. Without stderr only data is on stdout."""
    command = shlex.join([sys.executable, "-m", "llama_scratch", *tiny])
    answered = subprocess.run(["sh", "-c", f"{command} --prompt the {closed}"], capture_output=True, check=False)
    assert answered.returncode == 0
    assert len(answered.stdout.splitlines()) == 1
    wrong = subprocess.run(["sh", "-c", f"{command} --nosuch {closed}"], capture_output=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stdout == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("asked", ["--prompt the", "--version", "--help"])
def test_a_full_disk_at_standard_output_is_a_sentence(tiny: tuple[str, str], asked: str, unbuffered: str) -> None:
    command = shlex.join([sys.executable, "-m", "llama_scratch", *tiny, *asked.split()])
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    full = subprocess.run(["sh", "-c", f"{command} > /dev/full"], capture_output=True, check=False, env=environment)
    assert full.returncode == 1
    assert full.stderr.count(b"No space left") == 1
    assert b"unexpected" not in full.stderr
    assert b"Traceback" not in full.stderr


@pytest.mark.parametrize("option", ["--model-dir", "--config", "--tokenizer"])
def test_a_terminal_obeys_no_path_in_a_message(
    llama_scratch: Runner, tiny_dir: Path, tmp_path: Path, option: str
) -> None:
    """Escape codes in a file name are shown escaped."""
    path = tmp_path / "a\x1b[31mb\r"
    path.write_text("no model, no options and no tokens")
    arguments = [] if option == "--model-dir" else ["--model-dir", str(tiny_dir)]
    result = llama_scratch(*arguments, option, str(path), "--prompt", "x")
    assert result.code
    assert "\x1b" not in result.err
    assert "\\x1b[31mb" in result.err


def test_a_message_keeps_its_letters() -> None:
    assert escape_controls("née 東京 ␣\n\t") == "née 東京 ␣\n\\t"


def test_errors_name_options_where_the_library_names_arguments(llama_scratch: Runner, tiny_dir: Path) -> None:
    """Other words in backticks are unchanged."""
    assert user_message("1 (`rope_factor`), `to=hf`, `f`.") == "1 (--rope-factor), --to hf, `f`."
    result = llama_scratch("--model-dir", str(tiny_dir), "--context", "0", "--prompt", "x")
    assert "(--context)" in one_sentence(result)
