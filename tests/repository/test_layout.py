"""Limits of the code base: sizes, names, and the place of files."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers import ROOT

PACKAGE = ROOT / "llama_scratch"
TESTS = ROOT / "tests"

MAX_TOP_MODULES = 12
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_MEMBERS = 20
MAX_CPP_COLUMNS = 100

# Exceptions, each with its reason. Unneeded exceptions fail the test and must be removed.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
LARGE_CLASSES: dict[str, str] = {}
SHARED_NAMES: dict[str, str] = {}
BRITISH_NAMES: dict[str, str] = {}
WIDE_CPP_FILES: dict[str, str] = {}

# British spellings; identifiers are American, as in torch, gguf and Hugging Face.
BRITISH = re.compile(
    r"colour|licence|behaviour|neighbour|favour|honour|flavour|grey|centre(?!d)|catalogue|labell|modell|defence"
    r"|(?:quant|normal|initial|serial|organ|optim|recogn|summar|token|material|sanit|general|special|visual|synchron"
    r"|local|final|minim|maxim|real|factor|random|custom|author|penal|util|categor|emphas|regular)is(?:e|ing|ation|able)"
    r"|analys(?:e(?!s)|ing)",
    re.IGNORECASE,
)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The package's modules by path, for example `repl/session.py`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), parsed(file)


def assigned(node: ast.stmt) -> list[str]:
    """The names bound by an assignment."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def public_members(cls: ast.ClassDef) -> set[str]:
    """Methods, properties, and attributes of the class and of `self`."""
    names = {node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    names |= {name for node in cls.body for name in assigned(node)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id == "self" else set()
    return {name for name in names if not name.startswith("_")}


def identifiers(module: ast.Module) -> set[str]:
    """All names in a module, including keyword arguments and imports."""
    fields = ("id", "attr", "arg", "name", "asname")
    values = (getattr(node, field, None) for node in ast.walk(module) for field in fields)
    return {value for value in values if isinstance(value, str)}


def imported(file: Path) -> set[str]:
    """All modules and names that a file imports, except relative imports."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_few_modules_are_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_MODULES


def test_every_package_says_what_it_is_for() -> None:
    packages = {file.parent for file in PACKAGE.rglob("*.py")}
    silent = {str(p) for p in packages if not ((f := p / "__init__.py").exists() and ast.get_docstring(parsed(f)))}
    assert silent == set()


def test_modules_are_short() -> None:
    lines = {path: len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path, _ in modules()}
    assert {path for path, count in lines.items() if count > MAX_MODULE_LINES} == set(LONG_MODULES)


def test_functions_are_short() -> None:
    long = {
        f"{path}:{node.name}"
        for path, module in modules()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS)


def test_classes_have_few_public_members() -> None:
    large = {
        f"{path}:{node.name}"
        for path, module in modules()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and len(public_members(node)) > MAX_PUBLIC_MEMBERS
    }
    assert large == set(LARGE_CLASSES)


def test_public_classes_and_constants_have_names_of_their_own() -> None:
    """Searching for a name finds one definition."""
    homes = defaultdict(set)
    for path, module in modules():
        for node in module.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else [n for n in assigned(node) if n[:1].isupper()]
            for name in names:
                if not name.startswith("_"):
                    homes[name].add(path)
    assert {name for name, paths in homes.items() if len(paths) > 1} == set(SHARED_NAMES)


def test_identifiers_have_american_spelling() -> None:
    """Identifiers and file names, as in torch, gguf and Hugging Face."""
    british = {f"{path}:{name}" for path, module in modules() for name in identifiers(module) if BRITISH.search(name)}
    british |= {path for path, _ in modules() if BRITISH.search(path)}
    assert british == set(BRITISH_NAMES)


def test_the_page_of_the_architecture_shows_every_file() -> None:
    """docs/architecture.md lists every file.

    "*.py" means all modules with the same name as one in microscope/.
    """
    microscope = {file.name for file in (PACKAGE / "microscope").glob("[!_]*.py")}
    listed: set[str] = set()
    folders: list[str] = []
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("```\nllama_scratch/\n")[2]
    for line in tree.partition("```")[0].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2 - 1, line.split()[0]
        if depth > 4:  # the second line of a comment
            continue
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name == "*.py":
            here = PACKAGE.joinpath(*folders)
            listed |= {"".join(folders) + file.name for file in here.glob("*.py") if file.name in microscope}
        else:
            listed.add("".join(folders) + name)
    suffixes = {".py", ".cpp", ".h", ".html", ".css", ".js"}
    files = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*") if file.suffix in suffixes}
    assert listed == {file for file in files if not file.endswith("__init__.py")}


def test_lines_of_cpp_are_short() -> None:
    files = [PACKAGE / "precision" / "kernels.cpp", *sorted((PACKAGE / "precision" / "cpp").glob("*.h"))]
    assert len(files) > 1
    wide = {
        file.relative_to(PACKAGE).as_posix()
        for file in files
        if any(len(line) > MAX_CPP_COLUMNS for line in file.read_text(encoding="utf-8").splitlines())
    }
    assert wide == set(WIDE_CPP_FILES)


def test_no_file_imports_from_a_test_module() -> None:
    """Shared test code is in tests/helpers, and fixtures are in conftest.py."""
    files = [*TESTS.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")]
    taken = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported(file)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[1:])
    }
    assert taken == set()


def test_tests_mirror_the_packages() -> None:
    """Each folder of tests matches a package and has an `__init__.py`.

    Tests of the whole repository are an exception.
    """
    folders = {file.parent for file in TESTS.rglob("test_*.py")} - {TESTS / "repository", TESTS / "trust"}
    assert {str(folder) for folder in folders if not (PACKAGE / folder.relative_to(TESTS)).is_dir()} == set()
    assert {str(file.parent) for file in TESTS.rglob("*.py") if not (file.parent / "__init__.py").exists()} == set()
