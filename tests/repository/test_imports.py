"""Layers of the package: imports go one way, and the package loads fast."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llama_scratch
from tests.helpers.checkpoints import write_meta
from tests.helpers.processes import loaded_after

PACKAGE = Path(llama_scratch.__file__).parent
# Packages and top-level modules from the highest to the lowest layer: each imports only from later ones.
ORDER = [
    "__main__",
    "cli",
    "repl",
    "render",
    "book",
    "learn",
    "llama",
    "microscope",
    "inference",
    "download",
    "checkpoint",
    "precision",
    "hooks",
    "chat_format",
    "model",
    "sampling",
    "tokenizer",
    "config",
    "system",
    "results",
    "errors",
    "__init__",  # the version; public names are imported lazily from their modules
]
# The same order within two packages.
INNER = {
    "inference": [
        "speed",
        "generation",
        "loaded_model",
        "loading",
        "prompt_warnings",
        "prompt_text",
        "engine",
        "cuda_graph",
        "fused_layers",
        "long_attention",
        "prompt_lookup",
    ],
    "precision": [
        "network",
        "packing",
        "memory_estimate",
        "calibration",
        "linear",
        "panels",
        "rows",
        "weight_cache",
        "quantize",
        "dtypes",
        "kernels",
        "lazy_weight",
    ],
}
# The only upward import, inside a function: a result displays itself.
UPWARD = {"llama_scratch.microscope.display": {"llama_scratch.render.display"}}
FLOOR = {room: floor for floor, room in enumerate(ORDER)}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    """Convert llama_scratch/checkpoint/base.py to llama_scratch.checkpoint.base."""
    parts = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def room(module: str) -> str:
    """The layer of a module: llama_scratch.checkpoint.base → checkpoint.

    The package itself is `__init__`.
    """
    return [*module.split("."), "__init__"][1]


def targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> Iterator[str]:
    """The modules of this package in one import statement.

    Args:
        node: The statement.
        module: The importing module.
        is_package: Whether it is an `__init__.py`.
    """
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        base = node.module or ""
        if node.level:
            above = module.split(".")
            above = above[: len(above) - node.level + is_package]
            base = ".".join([*above, *filter(None, [node.module])])
        names = []
        for alias in node.names:
            full = f"{base}.{alias.name}"
            if base == PACKAGE.name and full not in MODULES:
                # A public name belongs to the module that defines it; the version belongs to no layer.
                if alias.name == "__version__":
                    continue
                full = f"{PACKAGE.name}.{llama_scratch._HOMES[alias.name]}"
            names.append(full)
    for name in names:
        if name.split(".")[0] == PACKAGE.name:
            yield name


def statements(source: str, module: str, is_package: bool = False) -> set[str]:
    """All modules of this package that a module imports.

    Includes imports in functions and under TYPE_CHECKING.

    Args:
        source: The source code.
        module: The name of the module.
        is_package: Whether it is an `__init__.py`.
    """
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {target for node in nodes for target in targets(node, module, is_package)}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """The other layers that a module imports; see `statements` for the parameters."""
    return {room(target) for target in statements(source, module, is_package)} - {room(module)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    """Every module belongs to a known layer and imports only from lower layers."""
    file = MODULES[module]
    own = FLOOR[room(module)]
    if module == PACKAGE.name:  # it imports the public names for type checkers
        return
    upward = {other for other in imports(file.read_text(), module, file.name == "__init__.py") if FLOOR[other] <= own}
    assert upward == {room(other) for other in UPWARD.get(module, ())}, f"{module} imports {upward}"


@pytest.mark.parametrize("package", INNER)
def test_imports_within_a_package_go_downwards(package: str) -> None:
    """Modules of a package import only from later ones in `INNER`."""
    order = INNER[package]
    own = {name: file for name, file in MODULES.items() if room(name) == package and name.count(".") == 2}
    assert {name.rpartition(".")[2] for name in own} == set(order)
    for name, file in own.items():
        module = name.rpartition(".")[2]
        for other in statements(file.read_text(), name):
            if other.startswith(f"{PACKAGE.name}.{package}.") and (below := other.split(".")[2]) in order:
                assert order.index(below) > order.index(module), f"{module} imports {below}"


def test_no_circle_of_imports() -> None:
    """Includes imports in functions and for type checking, except `UPWARD`."""
    graph: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        others = statements(file.read_text(), name, file.name == "__init__.py")
        graph[name] = {other if other in MODULES else other.rpartition(".")[0] for other in others} - {name}
        graph[name] -= UPWARD.get(name, set())
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import llama_scratch.inference.engine", {"inference"}),
        ("import llama_scratch.checkpoint.meta.reader as m, llama_scratch.config", {"config"}),
        ("from llama_scratch.model import Transformer", {"model"}),
        ("from llama_scratch import model", {"model"}),
        ("from llama_scratch import Llama, Token", {"llama", "results"}),
        ("from llama_scratch import __version__", set()),
        ("from . import reader", set()),
        ("from .header import checked", set()),
        ("from .. import verify", set()),
        ("from ...hooks import Hook", {"hooks"}),
        ("def f():\n    from llama_scratch.inference.engine import Engine", {"inference"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import llama_scratch.llama", {"llama"}),
        ("import llama_scratch", {"__init__"}),
        ("import torch, os", set()),
        ("from llama_scratch_other import x", set()),
    ],
)
def test_the_test_above_sees_every_kind_of_import(source: str, expected: set[str]) -> None:
    """Each form of import, from a module in `checkpoint`."""
    assert imports(source, "llama_scratch.checkpoint.gguf.reader") == expected


def test_every_room_exists() -> None:
    """`ORDER` has no layers that were removed or renamed."""
    assert set(FLOOR) == {room(module) for module in MODULES}


@pytest.mark.parametrize("library", ["torch", "numpy", "rich", "prompt_toolkit", "typer", "gguf", "tiktoken"])
@pytest.mark.parametrize("below", ["model", "config", "results", "errors", "tokenizer"])
def test_the_low_rooms_know_no_terminal_and_no_format(below: str, library: str) -> None:
    """The network imports only torch, and the tokenizer only tiktoken.

    The other modules import only the standard library.
    """
    allowed = {"model": {"torch"}, "tokenizer": {"tiktoken"}}.get(below, set())
    nodes = list(ast.walk(ast.parse((PACKAGE / f"{below}.py").read_text())))
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert library not in {name.split(".")[0] for name in found} - allowed


OPEN = "from pathlib import Path; from llama_scratch.checkpoint import open_checkpoint; open_checkpoint(Path("
HEAVY = {"torch", "numpy", "rich", "prompt_toolkit", "typer", "tiktoken", "gguf", "blobfile", "psutil", "matplotlib"}
HEAVY |= {"requests", "urllib3", "huggingface_hub", "safetensors"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    """`import llama_scratch` and its errors take milliseconds."""
    loaded = loaded_after("import llama_scratch; llama_scratch.CheckpointError, llama_scratch.Prediction")
    assert "llama_scratch.errors" in loaded
    assert not HEAVY & loaded


def test_the_names_of_the_precisions_come_without_torch() -> None:
    """The command line checks and completes them before torch is imported."""
    loaded = loaded_after("from llama_scratch.precision import PRECISIONS, resolve_precision, validate_precision")
    assert not HEAVY & loaded


def test_the_public_interface_loads_torch_when_it_is_used() -> None:
    """`Llama` does import torch, so the test above would detect it."""
    assert "torch" in loaded_after("from llama_scratch import Llama")


def test_opening_a_model_imports_no_torch(tmp_path: Path) -> None:
    """Small files are checked before torch is imported, to report errors quickly."""
    directory = write_meta(tmp_path / "m")
    loaded = loaded_after(OPEN + repr(str(directory)) + "))")
    assert "llama_scratch.checkpoint.meta.reader" in loaded
    assert not {"torch", "numpy", "gguf", "rich", "typer"} & loaded


def test_opening_a_gguf_file_imports_no_torch(smollm2_path: Path) -> None:
    """The same for GGUF, which takes its table of block sizes from the gguf package."""
    loaded = loaded_after(OPEN + repr(str(smollm2_path)) + "))")
    assert "llama_scratch.checkpoint.gguf.reader" in loaded
    assert not {"torch", "rich", "typer"} & loaded


def test_an_answer_without_a_terminal_imports_nothing_for_one(tiny_dir: Path) -> None:
    """No line editing or progress bars; options are checked before importing torch."""
    command = "from llama_scratch.cli import run; run(['--model-dir', {!r}, '--prompt', 'x', '--top-p', '{}'])"
    loaded = loaded_after(command.format(str(tiny_dir), 1))
    assert "torch" in loaded
    assert not {"prompt_toolkit", "rich.progress", "llama_scratch.repl.loop"} & loaded
    assert "torch" not in loaded_after(command.format(str(tiny_dir), 2))


@pytest.mark.parametrize("name", llama_scratch.__all__)
def test_the_public_interface(name: str) -> None:
    """Each public name is a class; it and its public members have docstrings."""
    value = getattr(llama_scratch, name)
    assert inspect.isclass(value)
    assert value.__name__ == name
    # Python gives a dataclass without a docstring its signature as docstring.
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")
    for attribute, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not attribute.startswith("_") and inspect.isfunction(function):
            assert function.__doc__, f"{name}.{attribute}"


def test_a_name_that_is_not_public() -> None:
    """A misspelled name raises `AttributeError`."""
    with pytest.raises(AttributeError, match="Lama"):
        llama_scratch.Lama  # noqa: B018
    assert sorted(llama_scratch.__all__) == llama_scratch.__all__
    assert llama_scratch.__version__


@pytest.mark.parametrize("name", llama_scratch._MOVED)
def test_a_module_that_moved_is_found_by_its_old_name(name: str) -> None:
    """The old name works with a warning that contains the new one."""
    home = f"llama_scratch.{llama_scratch._MOVED[name]}"
    with pytest.warns(DeprecationWarning, match=re.escape(home)):
        module = getattr(llama_scratch, name)
    assert module is importlib.import_module(home)
