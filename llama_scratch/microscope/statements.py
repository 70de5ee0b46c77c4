"""The statements of `model.py`: lines, assigned names, and shapes in comments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from llama_scratch.microscope.source import lines


@dataclass(frozen=True)
class SourceStatement:
    """A statement, excluding the statements nested in it.

    Attributes:
        first_line: Its first line.
        last_line: Its last line.
        names: The names that it binds, or whose elements it assigns.
        returns: Whether it is a return statement.
        body: The lines of its body if it is a loop.
        meanings: The shapes in its comment.
    """

    first_line: int
    last_line: int
    names: tuple[str, ...]
    returns: bool
    body: range | None
    meanings: tuple[str, ...]


@cache
def functions(path: str) -> dict[str, range]:
    """Return the lines of each function of a file; methods are named "KVCache.update"."""
    ranges = {}
    for node in ast.parse("\n".join(lines(path))).body:
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        for method in methods:
            if isinstance(method, ast.FunctionDef):
                name = method.name if method is node else f"{node.name}.{method.name}"  # type: ignore[attr-defined]
                ranges[name] = range(method.lineno, (method.end_lineno or method.lineno) + 1)
    return ranges


@cache
def statements(path: str) -> dict[int, SourceStatement]:
    """Return the statement that each line of a file belongs to."""
    by_line: dict[int, SourceStatement] = {}
    for node in ast.walk(ast.parse("\n".join(lines(path)))):  # outer statements first
        if not isinstance(node, ast.stmt):
            continue
        nested = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
        end = min((part.lineno - 1 for part in nested), default=node.end_lineno or node.lineno)
        expressions = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt)]
        statement = SourceStatement(
            first_line=node.lineno,
            last_line=max(node.lineno, end),
            names=tuple(dict.fromkeys(name for part in expressions for name in _bound(part))),
            returns=isinstance(node, ast.Return),
            body=range(node.body[0].lineno, (node.end_lineno or 0) + 1) if isinstance(node, ast.For) else None,
            meanings=_shapes(lines(path)[node.lineno - 1 : max(node.lineno, end)]),
        )
        for line in range(statement.first_line, (node.end_lineno or node.lineno) + 1):
            by_line[line] = statement
    return by_line


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that an expression binds, or whose elements it assigns.

    Names bound in comprehensions are local to them, and are left out.
    """
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
        return
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        if isinstance(node.value, ast.Name):
            yield node.value.id
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    else:
        for part in ast.iter_child_nodes(node):
            yield from _bound(part)


def _shapes(code: Sequence[str]) -> tuple[str, ...]:
    """The shapes in comments at line ends: "# (B, T, dim)"."""
    comments = (line.partition("  # ")[2] for line in code)
    return tuple(shape for comment in comments for shape in re.findall(r"\([^()]*,[^()]*\)", comment))
