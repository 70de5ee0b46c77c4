"""Find the source code of any part of the package by name, without importing it."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.results import JsonResult

_PACKAGE = Path(__file__).parent.parent

# Concept → names in this package. A file name selects the whole file.
CONCEPTS: dict[str, tuple[str, ...]] = {
    "embedding": ("model.Transformer",),
    "norm": ("model.RMSNorm",),
    "rmsnorm": ("model.RMSNorm",),
    "rope": ("model.rope_frequencies", "model.rotations", "model.apply_rotary_emb"),
    "scaling": ("config.RopeScaling", "model.rope_frequencies"),
    "cache": ("model.KVCache",),
    "mask": ("model.causal_mask",),
    "attend": ("model.attend",),
    "attention": ("model.Attention", "model.attend"),
    "softmax": ("model.attention_probs",),
    "feed_forward": ("model.FeedForward",),
    "swiglu": ("model.FeedForward",),
    "block": ("model.TransformerBlock",),
    "transformer": ("model.Transformer",),
    "hooks": ("hooks.py",),
    "sampling": ("sampling.sample",),
    "tokenizer": ("tokenizer.Tokenizer",),
    "prefill": ("inference.engine.Engine.next_logits",),
    "fp16": ("precision.rows.Rows", "precision/cpp/rows.h.products"),
    "int8": ("precision.panels.Panels", "precision.quantize.quantize_blocks", "precision/cpp/panels.h.products"),
    "int4": ("precision.panels.Panels", "precision.quantize.quantize_blocks", "precision/cpp/panels.h.products"),
    "kernels": ("precision/kernels.cpp",),
    "surprisal": ("microscope.surprisal.Scorer",),
    "step": ("microscope.execution.walk",),
    "lens": ("microscope.lens.lens", "microscope.lens.guesses"),
    "attribution": ("microscope.attribution.why",),
    "interventions": ("microscope/interventions.py",),
    "ablation": ("microscope.interventions.ablate", "microscope.interventions.mean_ablate"),
    "patching": ("microscope.interventions.patch",),
    "steering": ("microscope.interventions.steer",),
}


@dataclass(frozen=True)
class Passage:
    """Lines of a file.

    Attributes:
        name: Its name, such as "model.KVCache.update", or the name of a file.
        path: The path, relative to the package's parent folder.
        first_line: The first line.
        last_line: The last line.
    """

    json_fields = ("name", "path", "first_line", "last_line", "text")

    name: str
    path: str
    first_line: int
    last_line: int

    @property
    def text(self) -> str:
        """The source text."""
        return "\n".join(lines(self.path)[self.first_line - 1 : self.last_line])

    @property
    def file(self) -> str:
        """The text of the whole file."""
        return "\n".join(lines(self.path))


@dataclass(frozen=True)
class Source(JsonResult):
    """The source code for a name.

    Attributes:
        name: The name.
        passages: One passage, or several that belong together.
    """

    name: str
    passages: tuple[Passage, ...]


def source(name: str) -> Source:
    """Return the source code of a part of the package.

    `name` is a concept, function, class, method, module or command ("/lens" or "lens"). A line ("model.py:305") selects
    the innermost definition there. C++ code is named by file and section: "cpp/panels.h.products".

    Raises:
        UsageError: If the name is unknown or ambiguous.
    """
    wanted = re.sub(rf"^{_PACKAGE.name}[./]", "", name).removesuffix("()")
    if place := re.fullmatch(r"(.+\.(?:py|cpp|h)):([0-9]{1,6})", wanted):
        return Source(name, (_at(_index().passages.get(place[1]) or _only(place[1], name), int(place[2])),))
    concept = CONCEPTS.get(re.sub(r"[- ]", "_", wanted.lower()))
    command = _index().commands.get(wanted.removeprefix("/"))
    if concept:
        return Source(name, tuple(_index().passages.get(part) or _only(part, part) for part in concept))
    for whole in (wanted, f"{wanted}.py"):
        if whole in _index().passages:
            return Source(name, (_index().passages[whole],))
    if command and (wanted.startswith("/") or len(_matches(wanted)) != 1):
        return Source(name, command)
    return Source(name, (_only(wanted, name),))


def concepts() -> dict[str, tuple[Passage, ...]]:
    """Return all concepts with their passages."""
    return {concept: source(concept).passages for concept in CONCEPTS}


def names() -> list[str]:
    """Return the names that `source` accepts, for completion.

    These are concepts, commands, modules and public names. Short names are included if they are unique.
    """
    index = _index()
    public = [name for name in index.passages if "._" not in f".{name}"]
    short = [name.rpartition(".")[2] for name in public]
    unique = [name for name in short if len(_matches(name)) == 1]
    every = [*CONCEPTS, *sorted({*unique, *public}), *(f"/{command}" for command in index.commands)]
    return list(dict.fromkeys(every))


@cache
def lines(path: str) -> tuple[str, ...]:
    """Return the lines of a file of the package."""
    return tuple((_PACKAGE.parent / path).read_text(encoding="utf-8").splitlines())


# --- Index ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """All passages by full name, whole files included, and the passages per command."""

    passages: dict[str, Passage]
    commands: dict[str, tuple[Passage, ...]]


@cache
def _index() -> _Index:
    passages: dict[str, Passage] = {}
    functions: dict[str, tuple[str, ast.FunctionDef]] = {}  # command → name of its function, and the function
    for file in sorted(_PACKAGE.rglob("*.py")):
        path = file.relative_to(_PACKAGE.parent).as_posix()
        text = lines(path)
        module = ".".join(file.relative_to(_PACKAGE).with_suffix("").parts)
        passages[f"{module.replace('.', '/')}.py"] = Passage(f"{module.replace('.', '/')}.py", path, 1, len(text))
        for name, node in _definitions(ast.parse("\n".join(text)), f"{module.removesuffix('.__init__')}."):
            passages[name] = Passage(name, path, _first_line(node, text), node.end_lineno or node.lineno)
            if isinstance(node, ast.FunctionDef) and (command := _command(node)):
                functions[command] = (name, node)
    for file in sorted([*_PACKAGE.rglob("*.cpp"), *_PACKAGE.rglob("*.h")]):
        passages |= {passage.name: passage for passage in _sections(file)}
    return _Index(passages, {command: _computing(*found, passages) for command, found in functions.items()})


def _sections(file: Path) -> Iterator[Passage]:
    """Yield a C++ file as a whole, and each of its sections.

    A section ends at the next heading. Its name has the form "cpp/layer.h.the_layer".
    """
    path, name = (file.relative_to(folder).as_posix() for folder in (_PACKAGE.parent, _PACKAGE))
    text = lines(path)
    yield Passage(name, path, 1, len(text))
    headings = [(n, line.split()[2:-1]) for n, line in enumerate(text, 1) if line.startswith("// --- ")]
    for (first, words), (end, _) in pairwise([*headings, (len(text) + 1, [])]):
        last = max(n for n in range(first, end) if text[n - 1].strip())
        yield Passage(f"{name}.{'_'.join(words).lower()}", path, first, last)


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def _definitions(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Yield functions, classes, methods, and module-level assignments."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(tree, ast.Module) and isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield f"{prefix}{target.id}", node


def _first_line(node: _Definition, text: tuple[str, ...]) -> int:
    """The first line of a definition, including decorators and the comment above it."""
    begin = node.lineno
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        begin = min([begin, *(decorator.lineno for decorator in node.decorator_list)])
    above = begin
    while above > 1 and not text[above - 2].strip():
        above -= 1  # skip blank lines between a comment and the definition
    comment = above
    while comment > 1 and re.match(r"\s*#", text[comment - 2]):
        comment -= 1
    heading = above - comment == 1 and text[comment - 1].startswith("# ---")
    return begin if comment == above or heading else comment


def _command(node: ast.FunctionDef) -> str | None:
    """The name of the command that a function implements, if any."""
    for decorator in node.decorator_list:
        match decorator:
            case ast.Call(func=ast.Name(id="command"), args=[ast.Constant(value=str(name)), *_]):
                return name
    return None


def _computing(name: str, node: ast.FunctionDef, passages: dict[str, Passage]) -> tuple[Passage, ...]:
    """The microscope functions that a command imports, or the command itself.

    If one of the functions has the name of the command, only that one is returned.
    """
    imports = [part for part in ast.walk(node) if isinstance(part, ast.ImportFrom)]
    asked = [
        f"{part.module.removeprefix(f'{_PACKAGE.name}.')}.{alias.name}"
        for part in imports
        if part.module and part.module.startswith(f"{_PACKAGE.name}.microscope")
        for alias in part.names
    ]
    same = [other for other in asked if other.endswith(f".{_command(node)}")]
    parts = [passages[other] for other in same or asked if other in passages]
    return tuple(parts) or (passages[name],)


# --- Names ------------------------------------------------------------------------------------


@cache
def _matches(name: str) -> list[Passage]:
    """The passages named `name`, or whose name ends with a dot and `name`.

    Full matches win over partial ones, the program's own names over those of the exercises, public names over private
    ones, and outer names over inner ones. If there is no match, case is ignored. If there is still no match, file names
    are searched, with or without suffix.
    """
    passages = _index().passages
    parts = [other for other in passages if not other.endswith((".py", ".cpp", ".h"))]
    file = name.removesuffix(".py").replace(".", "/")
    ends = (
        [other for other in parts if f".{other}".endswith(f".{name}")]
        or [other for other in parts if f".{other}".lower().endswith(f".{name.lower()}")]
        or [other for other in passages if f"/{other}".endswith((f"/{file}.py", f"/{name}"))]
    )
    for better in (lambda other: other == name, _is_program, lambda other: "._" not in f".{other}", _is_outermost):
        ends = [other for other in ends if better(other)] or ends
    return [passages[other] for other in ends]


def _is_program(name: str) -> bool:
    """Whether a name belongs to the program, not to the solutions of the exercises."""
    return not name.startswith("learn.")


def _is_outermost(name: str) -> bool:
    """Whether a name is neither a method nor a field."""
    return not any(part.strip("_")[:1].isupper() for part in name.split(".")[:-1])


def _only(wanted: str, name: str) -> Passage:
    matches = _matches(wanted)
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise _unknown(name)
    first = sorted((passage.name for passage in matches), key=lambda other: not other.startswith("model."))
    listed = ", ".join(first[:6]) + (", …" if len(matches) > 6 else "")
    raise UsageError(f"'{sanitize(name)}' is ambiguous: it names {len(matches)} places. Choose one: {listed}.")


def _at(file: Passage, line: int) -> Passage:
    """The smallest passage of a file that contains a line, or the file itself."""
    if not 1 <= line <= file.last_line:
        raise UsageError(f"{file.name} has no line {line}. Its lines are 1 to {file.last_line}.")
    around = [p for p in _index().passages.values() if p.path == file.path and p.first_line <= line <= p.last_line]
    return min(around, key=lambda passage: passage.last_line - passage.first_line)


def _unknown(name: str) -> UsageError:
    known = names()
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    advice = f" Did you mean {' or '.join(lower[other] for other in near)}?" if near else ""
    return UsageError(f"No part of this program is named '{sanitize(name)}'.{advice}")
