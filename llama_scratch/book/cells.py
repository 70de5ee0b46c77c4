"""Run the cells of a chapter, and compare or rewrite what they print.

    python -m llama_scratch.book.cells [CHAPTER …]      rewrite outputs and source blocks

The cells of a chapter share their variables. Numbers may differ in their last digit, because CPUs round differently.
"""

from __future__ import annotations

import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from llama_scratch.microscope.source import source

FOLDER = Path(__file__).parent
_SOURCE = "python source="
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"\A\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[+\-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def chapters() -> list[Path]:
    """The files of the chapters, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]-*.md"))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the content of each code block."""
    for block in _BLOCK.finditer(text):
        yield block[1], block[2]


def run(text: str) -> str:
    """Return a chapter with new outputs and new source blocks.

    A cell that prints nothing has no output block.
    """
    variables: dict[str, Any] = {"__name__": "__chapter__"}
    parts: list[str] = []
    rest = text
    while block := _BLOCK.search(rest):
        kind, content = block[1], block[2]
        parts.append(rest[: block.start()])
        rest = rest[block.end() :]
        if kind == "python":
            parts.append(block[0])
            if old := _OUTPUT.match(rest):
                rest = rest[old.end() :]
            if out := printed(content, variables):
                parts.append(f"\n\n```text\n{out}```")
        elif kind.startswith(_SOURCE):
            parts.append(f"```{kind}\n{code_of(kind.removeprefix(_SOURCE))}\n```")
        else:
            parts.append(block[0])
    return "".join([*parts, rest])


def printed(code: str, variables: dict[str, Any]) -> str:
    """Run a cell. Returns what it prints, and leaves its variables in `variables`."""
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "<cell>", "exec"), variables)
    return out.getvalue()


def code_of(name: str) -> str:
    """The source code for a name, without a method's indentation."""
    return "\n\n".join(textwrap.dedent(passage.text) for passage in source(name).passages)


def differences(text: str, again: str) -> Iterator[tuple[str, str]]:
    """Yield the blocks in which two runs of a chapter differ by more than the rounding of a number."""
    for (_, old), (_, new) in zip(blocks(text), blocks(again), strict=True):
        if not same(old, new):
            yield old, new


def same(old: str, new: str) -> bool:
    """Whether two outputs are equal, up to one unit in the last digit of each number."""
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(a == b or abs(_value(a) - _value(b)) <= 1.01 * _unit(a) for a, b in pairs)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def _unit(number: str) -> float:
    """One unit in the last digit: 0.01 for 0.25, 1 for 25."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def main(arguments: list[str], report: Callable[[str], None] = print) -> None:
    """Rewrite the outputs of chapters, all or those whose file names contain an argument."""
    for path in chapters():
        if not arguments or any(argument in path.name for argument in arguments):
            old = path.read_text(encoding="utf-8")
            new = run(old)
            if new != old:
                path.write_text(new, encoding="utf-8")
            report(f"{path.name}: {'rewritten' if new != old else 'unchanged'}")


if __name__ == "__main__":
    main(sys.argv[1:])
