"""README.md and docs/*.md: their commands run or exist, their links lead somewhere, and their tables are complete.

Commands that need no network run with SmolLM2. For the others (sessions, downloads, `make`), the subcommands, options,
targets and modules are checked.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import llama_scratch as package
from llama_scratch.cli.app import app
from llama_scratch.errors import LlamaScratchError
from llama_scratch.learn import solution
from tests.helpers import ROOT
from tests.helpers.command_line import Runner

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their cells, and the blocks for a session, run in tests/book.
CHAPTERS = sorted((ROOT / "llama_scratch" / "book").glob("*.md"))
MAX_README_WORDS = 1800
SUBCOMMANDS = ("pull", "info", "verify", "convert", "bench", "replay", "learn")
# Options that typer adds.
COMPLETION = {"--install-completion", "--show-completion", "--help"}
# Options in inline code that are not this program's: mypy's, and the benchmarks'.
OTHER_OPTIONS = {"--strict", "--record"}


class Block(NamedTuple):
    """A fenced block of a page. line: of its first line of content, counted from 1."""

    page: Path
    language: str
    line: int
    lines: tuple[str, ...]


class Command(NamedTuple):
    """A line after "$ ", and the output that the page shows for it."""

    page: Path
    line: int
    text: str
    output: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The words of the command, without comments; a pipe is a word."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@cache
def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    language: str | None = None
    content: list[str] = []
    start = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            content.append(line)
        elif language is None:
            language, content, start = line.removeprefix("```").strip(), [], number + 1
        else:
            found.append(Block(page, language, start, tuple(content)))
            language = None
    assert language is None, f"{page.name}: a block without an end"
    return found


def commands(page: Path) -> Iterator[Command]:
    for block in blocks(page):
        starts = [i for i, line in enumerate(block.lines) if line.startswith("$ ")]
        for start, end in pairwise([*starts, len(block.lines)]):
            output = tuple(line for line in block.lines[start + 1 : end] if not line.startswith("> "))
            yield Command(page, block.line + start, block.lines[start].removeprefix("$ "), output)


def session_lines(page: Path) -> list[str]:
    """The lines that a page types into a session."""
    return [line.removeprefix("> ") for block in blocks(page) for line in block.lines if line.startswith("> ")]


def code_spans(page: Path) -> Iterator[str]:
    """Inline code. In a table, a bar in it is escaped."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        yield span.replace("\\|", "|")


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


def is_ours(command: Command) -> bool:
    return "llama-scratch" in command.words


def arguments(command: Command) -> list[str]:
    """The arguments of `llama-scratch` in a command, up to a pipe."""
    words = command.words[command.words.index("llama-scratch") + 1 :]
    return words[: words.index("|")] if "|" in words else words


def subcommand(command: Command) -> str | None:
    return next((word for word in arguments(command) if word in SUBCOMMANDS), None)


def is_session(command: Command) -> bool:
    """A command that waits for a user at a terminal."""
    words = arguments(command)
    return subcommand(command) is None and "|" not in command.words and not {"--prompt", "--json", "--help"} & {*words}


def needs_network(command: Command) -> bool:
    return subcommand(command) == "pull" and "smollm2" not in arguments(command)


def is_slow(command: Command) -> bool:
    words = arguments(command)
    return "--help" not in words and bool({"bench", "convert", "replay", "SmolLM2.gguf"} & {*words})


@cache
def options(name: str | None) -> frozenset[str]:
    """The options of a subcommand, or of the main command for None."""
    program: Any = typer.main.get_command(app)
    command = program if name is None else program.commands[name]
    names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return frozenset({name for name in names if name.startswith("-")} | COMPLETION)


@cache
def slash_commands() -> frozenset[str]:
    from llama_scratch.repl.commands import COMMANDS

    return frozenset(COMMANDS)


# --- Size and links ---------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MAX_README_WORDS


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = [heading.lower().replace("`", "") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *CHAPTERS], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES[1:] if f"](docs/{page.name})" not in text} == set()


def test_every_picture_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, *CHAPTERS])
    assert {file.name for file in (ROOT / "OutputImages").iterdir() if file.name not in text} == set()


# --- Names that exist -------------------------------------------------------------------------


@pytest.mark.parametrize("command", [each for each in ALL_COMMANDS if is_ours(each)], ids=str)
def test_options_and_subcommands_exist(command: Command) -> None:
    """An option of a subcommand is its own, or one of the main command before it."""
    words, name = arguments(command), subcommand(command)
    own = words.index(name) if name else len(words)
    for position, word in enumerate(words):
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in options(name if position > own else None), word


@pytest.mark.parametrize("command", [each for each in ALL_COMMANDS if not is_ours(each)], ids=str)
def test_other_programs_are_called_as_they_exist(command: Command) -> None:
    """Makefile targets, and modules with their options. pip and the Hugging Face program are not checked."""
    words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    match words:
        case ["make", target]:
            assert target in make_targets()
        case ["python", "-m", module, *rest]:
            spec = importlib.util.find_spec(module)
            assert spec is not None
            source = Path(spec.origin or "").read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest)
        case ["pip", "install", *_] | ["hf", "auth", "login"]:
            pass
        case _:
            pytest.fail(f"Unknown command: {command.text}")


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_inline_code_exist(page: Path) -> None:
    """Options, slash commands, targets of the Makefile, paths of tests, and variables of the environment."""
    known = {*OTHER_OPTIONS, *(option for name in (None, *SUBCOMMANDS) for option in options(name))}
    unknown = []
    for span in code_spans(page):
        if span.startswith("/") and re.match(r"/[a-z]", span):
            unknown += [span] if re.split(r"[\s`]", span[1:])[0] not in slash_commands() else []
        if span.startswith(("--", "llama-scratch ")):
            unknown += [word for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span) if word not in known]
        if span.startswith("llama-scratch ") and (word := span.split()[1])[0].isalpha() and word not in SUBCOMMANDS:
            unknown.append(span)
        if target := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z-]+)", span):
            unknown += [span] if target[1] not in make_targets() else []
        if re.fullmatch(r"tests/[\w/]+\.py", span) and not (ROOT / span).exists():
            unknown.append(span)
        for variable in re.findall(r"LLAMA_SCRATCH_[A-Z_]+", span):
            option = "--" + variable.removeprefix("LLAMA_SCRATCH_").lower().replace("_", "-")
            unknown += [variable] if option not in known and variable not in sources() else []
    assert unknown == []


@cache
def sources() -> str:
    """The text of all files in which a variable of the environment may be read."""
    files = [ROOT / "setup.py", *(ROOT / "llama_scratch").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def test_every_line_that_is_typed_into_a_session_is_a_prompt_or_a_command() -> None:
    lines = [line for page in [*PAGES, *CHAPTERS] for line in session_lines(page)]
    assert len(lines) > 10
    assert {line for line in lines if line.startswith("/") and line.split()[0][1:] not in slash_commands()} == set()


# --- Tables that are complete -----------------------------------------------------------------


def test_the_page_of_the_session_lists_every_command() -> None:
    named = {span.split()[0].removeprefix("/") for span in code_spans(ROOT / "docs" / "session.md") if span[0] == "/"}
    assert slash_commands() - named == set()


def test_the_page_of_the_command_line_lists_every_option_and_subcommand() -> None:
    spans = set(code_spans(ROOT / "docs" / "command-line.md"))
    named = {word for span in spans for word in span.split()}
    assert {*options(None), *SUBCOMMANDS} - named - {"-h"} == set()


def test_the_page_of_the_library_has_the_exit_code_of_every_error() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    documented = {name: int(code) for name, code in re.findall(r"^\| `(\w+Error)`.*\| (\d+) \|$", text, re.MULTILINE)}
    errors = {name: getattr(package, name).exit_code for name in package.__all__ if name.endswith("Error")}
    del errors[LlamaScratchError.__name__]  # the base class
    assert documented == errors


def test_the_page_of_the_command_line_lists_every_key_of_json(llama_scratch: Runner, tiny_dir: Path) -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = text.partition("\n## JSON")[2].partition("\n## ")[0]
    result = llama_scratch("--model-dir", str(tiny_dir), "--json", "--generate", "2", "--prompt", "Hello")
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(json.loads(result.out))


def test_the_example_of_a_configuration_is_valid(llama_scratch: Runner, tmp_path: Path, smollm2_path: Path) -> None:
    (block,) = (block for page in PAGES for block in blocks(page) if block.language == "toml")
    (tmp_path / "config.toml").write_text("\n".join(block.lines))
    result = llama_scratch("--config", str(tmp_path / "config.toml"), "info", "--json")
    assert result.code == 0
    assert json.loads(result.out)["path"] == str(smollm2_path)


# --- Commands that run ------------------------------------------------------------------------


def run(folder: Path, command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in a folder, with `llama-scratch` on the path."""
    program = folder / "bin" / "llama-scratch"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llama_scratch "$@"\n')
    program.chmod(0o755)
    shutil.copy(solution.__file__, folder / "my_llama.py")  # a reader's file, for `learn check`
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


RUN = [command for command in ALL_COMMANDS if is_ours(command) and not is_session(command)]
RUN = [command for command in RUN if not needs_network(command)]


@pytest.mark.parametrize("command", [each for each in RUN if not is_slow(each)], ids=str)
def test_a_command_gives_the_output_of_its_page(tmp_path: Path, smollm2_path: Path, command: Command) -> None:
    """Tokens, ids and text are equal; probabilities may differ by rounding."""
    result = run(tmp_path, command.text)
    assert result.returncode == 0, result.stderr
    if command.output:
        answers = [fields(line) for line in result.stdout.splitlines()]
        documented = [fields(line) for line in command.output]
        assert [token for token, _ in answers] == [token for token, _ in documented]
        assert [share for _, share in answers] == pytest.approx([share for _, share in documented], abs=2e-3)


def fields(line: str) -> tuple[str, float]:
    """A line of an answer without its probability, and the probability; 0 if it is generated text."""
    parts = line.split("\t")
    return (f"{parts[0]} {parts[2]}", float(parts[1])) if len(parts) == 3 else (line, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in [*PAGES, *CHAPTERS] if session_lines(page)], ids=lambda page: page.name
)
def test_the_sessions_of_a_page_run(tmp_path: Path, smollm2_path: Path, page: Path) -> None:
    """Everything that a page types, in one session, and then the replay of a session that it saved."""
    lines = "\n".join(session_lines(page))
    result = run(tmp_path, "llama-scratch --model smollm2 --precision fp32 --commands", stdin=lines)
    assert result.returncode == 0, result.stderr
    for command in commands(page):
        if is_ours(command) and subcommand(command) == "replay":
            assert run(tmp_path, command.text).returncode == 0


@pytest.mark.slow
def test_slow_commands_run(tmp_path: Path, smollm2_path: Path) -> None:
    """In the order of the pages: some use files that earlier ones wrote."""
    for command in RUN:
        # A replay runs with its session, and tests/inference/test_speed.py runs bench at a small size.
        if is_slow(command) and subcommand(command) not in ("replay", "bench"):
            result = run(tmp_path, command.text)
            assert result.returncode == 0, (command.text, result.stderr)


# --- Python -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_examples_in_python_run(name: str, smollm2_path: Path) -> None:
    """All of a page's blocks, in order; a comment that is a value is the value of its line."""
    code = [block for block in blocks(ROOT / name) if block.language == "python"]
    names: dict[str, Any] = {}
    compared = 0
    for block in code:
        for node in ast.parse("\n".join(block.lines)).body:
            text = ast.unparse(node)
            if not isinstance(node, ast.Expr):
                exec(text, names)
                continue
            value = eval(text, names)
            comment = block.lines[(node.end_lineno or 0) - 1].partition("  # ")[2]
            if (documented := literal(comment)) is not None:
                assert (str(value) if comment.startswith("torch.Size") else value) == documented, text
                compared += 1
    assert compared >= 2


def literal(comment: str) -> Any:
    """The value of a comment, None if it is not one."""
    if comment.startswith("torch.Size"):
        return comment
    try:
        return ast.literal_eval(comment)
    except (ValueError, SyntaxError):
        return None


def test_other_pages_have_no_examples_in_python() -> None:
    """The test above would not run them."""
    pages = {block.page.name for page in PAGES for block in blocks(page) if block.language == "python"}
    assert pages == {"README.md", "python.md"}
