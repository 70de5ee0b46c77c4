"""Shell completion: the replies to each shell, and a session in bash."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llama_scratch.download.pypi import OPEN_MODELS
from llama_scratch.precision import ACTIVATIONS, PRECISIONS
from tests.helpers.processes import loaded_after
from tests.helpers.terminal import PROGRAM, Terminal

SHELLS = ["bash", "zsh", "fish"]


def asked(shell: str, line: str) -> dict[str, str]:
    """The environment of a shell's completion request for a line."""
    words = line.split(" ")
    return {
        "_LLAMA_SCRATCH_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


def completed(shell: str, line: str) -> list[str]:
    """The completions of the last word of a line."""
    result = subprocess.run(
        PROGRAM, env=os.environ | asked(shell, line), capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    if shell == "zsh":
        inside = result.stdout.strip().removeprefix("_arguments '*: :((").removesuffix("))'")
        return [word.split('":"')[0].strip('"') for word in inside.split("\n")]
    return [word.split("\t")[0] for word in result.stdout.splitlines() if word]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llama-scratch --pre", ["--precision"]),
        ("llama-scratch --precision ", ["auto", *PRECISIONS]),
        ("llama-scratch --precision fp", ["fp32", "fp16"]),
        ("llama-scratch --activations ", ["auto", *ACTIVATIONS]),
        ("llama-scratch --model ", list(OPEN_MODELS)),
        ("llama-scratch pull ", list(OPEN_MODELS)),
        ("llama-scratch --device c", ["cpu", "cuda"]),
        ("llama-scratch rep", ["replay"]),
        ("llama-scratch bench --precision b", ["bf16"]),
        ("llama-scratch --no-l", ["--no-live"]),
    ],
)
def test_what_a_line_may_become(shell: str, line: str, expected: list[str]) -> None:
    assert completed(shell, line) == expected


@pytest.mark.parametrize("line", ["llama-scratch --model-dir ", "llama-scratch --tokenizer ", "llama-scratch replay "])
def test_paths_are_completed_by_the_shell_itself(line: str) -> None:
    """bash and fish get no completions, so they complete files. zsh is told to do so."""
    assert completed("bash", line) == completed("fish", line) == []
    assert completed("zsh", line) == ["_files"]
    is_there = asked("fish", line) | {"_TYPER_COMPLETE_FISH_ACTION": "is-args"}
    assert subprocess.run(PROGRAM, env=os.environ | is_there, check=False, timeout=60).returncode == 1


def test_completing_imports_no_torch_and_reads_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs at each press of Tab, so a damaged configuration must not matter."""
    (tmp_path / "damaged.toml").write_text("damaged")
    monkeypatch.setenv("LLAMA_SCRATCH_CONFIG", str(tmp_path / "damaged.toml"))
    for name, value in asked("bash", "llama-scratch --model ").items():
        monkeypatch.setenv(name, value)
    loaded = loaded_after(
        "from llama_scratch.cli import run\ntry:\n    run([])\nexcept SystemExit as end:\n    assert end.code == 0"
    )
    assert "typer" in loaded
    assert not {"torch", "prompt_toolkit"} & loaded


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder for the PATH that contains the program by name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llama-scratch"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m llama_scratch "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_that_of_the_shell_that_asks(shell: str, bin_folder: Path) -> None:
    """typer detects the shell by the parent process's name, so /bin/sh is copied under each name."""
    shutil.copy("/bin/sh", bin_folder / shell)
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [bin_folder / shell, "-c", "llama-scratch --show-completion; true"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"_LLAMA_SCRATCH_COMPLETE=complete_{shell}" in result.stdout
    begins = {"bash": "_llama_scratch_completion() {", "zsh": "#compdef llama-scratch", "fish": "complete --command"}
    assert result.stdout.startswith(begins[shell])


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_installed_where_the_shell_looks(shell: str, bin_folder: Path, tmp_path: Path) -> None:
    shutil.copy("/bin/sh", bin_folder / shell)
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(
        [bin_folder / shell, "-c", "llama-scratch --install-completion; true"],
        env=environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    places = {
        "bash": ".bash_completions/llama-scratch.sh",
        "zsh": ".zfunc/_llama-scratch",
        "fish": ".config/fish/completions/llama-scratch.fish",
    }
    assert f"complete_{shell}" in (tmp_path / places[shell]).read_text()


def test_bash_completes(bin_folder: Path, tmp_path: Path) -> None:
    """A real shell completes an option, its value, and a path."""
    (tmp_path / "my-model").mkdir()
    environment = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "PS1": "$ ", "HOME": str(tmp_path)}
    with Terminal(program=("/bin/bash", "--norc", "--noprofile", "-i"), env=environment) as bash:
        bash.type(f'cd {tmp_path}; eval "$(llama-scratch --show-completion)"; clear; echo ready', "enter")
        bash.wait_for("ready\n")
        bash.type("llama-scratch --pre\t")
        bash.wait_for("--precision")
        bash.type("int8\t")
        bash.wait_for("--precision int8")
        bash.type("--model-dir my-\t")
        bash.wait_for("--model-dir my-model/")
