"""Where the chat template of a model file runs: a stranger's code, in Jinja's sandbox, bounded in time and size.

The sandbox keeps it from Python's insides and from changing what it is given. Jinja has no endless loops, but a
few nested ones, a macro that calls itself twice or a text that is doubled forty times come to the same. So time is
looked at in each turn of a loop, each call and each filter, and the size of what an operator, a filter, a call or a
block makes is bounded, as are all whole numbers. What is not covered: one operation that makes something huge of
parts within these bounds, as `replace` of every letter by a million others can; that ends as memory does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Several times what the longest context holds, in characters.
MAX_SIZE = 4_000_000
MAX_SECONDS = 2.0


class RefusalError(Exception):
    """What a template says, with `raise_exception`, of messages that it does not take."""


class TooMuchError(Exception):
    """The template goes beyond a bound."""


class Template:
    """A chat template, compiled. Raises what Jinja raises where it is none."""

    def __init__(self, source: str):
        self._sandbox = _Sandbox()
        tree = _Watch().visit(self._sandbox.parse(source))
        self._template = self._sandbox.from_string(tree)

    def render(self, **variables: Any) -> str:
        """Its text. Raises `RefusalError`, `TooMuchError`, or whatever the template's code runs into."""
        self._sandbox.begin()
        pieces, length = [], 0
        for piece in self._template.generate(**variables):
            length += len(piece)
            self._sandbox.bounded(length)
            pieces.append(piece)
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what transformers gives to chat templates, and with bounds.

    Source: `_cached_compile_jinja_template` in transformers, utils/chat_template_utils.py.
    """

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.filters["tojson"] = _tojson
        self.filters["_bounded"] = pass_context(lambda _, value: self.bounded(value))
        self.filters["_watched"] = pass_context(lambda _, values: self.watched(values))
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self._end = 0.0

    def begin(self) -> None:
        """The time runs from now on."""
        self._end = time.thread_time() + MAX_SECONDS  # not the clock's: a busy machine is not the template's fault

    def bounded(self, value: Any) -> Any:
        """A value, unless it is too large or time is up."""
        if time.thread_time() > self._end:
            raise TooMuchError(f"it does not end within {MAX_SECONDS:g} seconds")
        return _sized(value)

    def watched(self, values: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes over."""
        for value in values:
            self.bounded(None)
            yield value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call within the template: of a macro, a method or `loop`."""
        return self.bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make more than it was given; repetitions are refused before they are made."""
        if operator == "**" or (operator == "*" and _size(left) * _size(right) > MAX_SIZE):
            raise TooMuchError(f"it takes '{operator}' too far")
        return self.bounded(super().call_binop(context, operator, left, right))


class _Watch(NodeTransformer):
    """Leads loops, filters, `~` and blocks that are kept through the sandbox's bounds."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_watched", node.iter)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return _through("_bounded", self.generic_visit(node))

    visit_Concat = visit_Filter

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        if node.filter is None:
            node.filter = _through("_bounded", None)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        _sized(node.value)
        return node


def _through(filter: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, filter, [], [], None, None, lineno=getattr(node, "lineno", 1))


class _Generation(Extension):
    """`{% generation %}` says to trainers what the assistant wrote; here its content is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace without the names that Python gives a meaning to."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it keeps something under the name {name}")


def _size(value: Any) -> int:
    """Elements of a text or a list, the amount of a whole number, 1 for all else."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _sized(value: Any) -> Any:
    if _size(value) > MAX_SIZE:
        raise TooMuchError(f"it makes something larger than {MAX_SIZE:,}")
    return value


def _raise_exception(message: object) -> None:
    raise RefusalError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
