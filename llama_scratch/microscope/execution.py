"""A debugger over the forward pass: what each statement of `model.py` made, for the text's last tokens.

The network runs once under `sys.settrace`, and of each statement of `model.py` that was done a summary is kept: a
`Statement`. Walking goes from stop to stop; a number that no summary holds is taken by running to its stop again.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from types import EllipsisType, FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.hooks import hooked
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.parts import numbered
from llama_scratch.microscope.source import lines
from llama_scratch.model import KVCache, Transformer
from llama_scratch.precision.memory_estimate import CHUNK
from llama_scratch.system.memory import memory_errors
from llama_scratch.system.progress import Progress, silent

_PATH = "llama_scratch/model.py"
_FILE = Transformer.forward.__code__.co_filename
# What a function returns stands among its values under this name.
RETURNED = "return"
_FILLING = ("KVCache.update", "KVCache.reserve", "KVCache._grown")
# Numbers of a value that are kept, and numbers of a row and rows that `look` shows.
_FIRST = 4
_COLUMNS, _ROWS = 4, 16

Number = float | tuple[float, float] | None
"""A complex number is its magnitude and its angle in radians; None is one that is not finite."""
Index = tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True)
class ValueSummary:
    """What a statement made.

    text: where it is no tensor, and then the rest is empty. meaning: the names of the shape's sizes, from the comment
    at the statement's end. mean, std, min, max: over its finite numbers (std: of the population; complex: of their
    magnitudes); None for memory that is taken and not written yet. infinite: how many are not finite. first: the
    first numbers of the last row, which are the last token's, and of these the last head's.
    """

    name: str
    text: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    meaning: str = ""
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    infinite: int = 0
    first: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Statement:
    """A statement that was done, at its `first_line` to `last_line` of `model.py`.

    function: such as "Attention.forward". module: where it belongs to, such as "layers.3.attention"; "" for the whole.
    callers: the functions above it, outermost first. alive: the names of what `look` can show here.
    """

    function: str
    module: str
    callers: tuple[str, ...]
    first_line: int
    last_line: int
    values: tuple[ValueSummary, ...]
    alive: tuple[str, ...]

    @property
    def depth(self) -> int:
        """0 in the outermost function."""
        return len(self.callers)

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to, None outside of them."""
        layers, _, rest = self.module.partition(".")
        return int(rest.partition(".")[0]) if layers == "layers" else None

    @property
    def path(self) -> str:
        """The file, from the package's folder on."""
        return _PATH

    @property
    def text(self) -> str:
        """The statement as it is written."""
        return "\n".join(lines(_PATH)[self.first_line - 1 : self.last_line])

    def around(self, margin: int) -> tuple[int, str]:
        """The statement with lines before and behind it, but not beyond its function: their first line, and they."""
        function = _functions(_PATH)[self.function]
        first = max(function.start, self.first_line - margin)
        last = min(function.stop - 1, self.last_line + margin)
        return first, "\n".join(lines(_PATH)[first - 1 : last])

    def as_json(self) -> dict[str, Any]:
        """As /step prints it."""
        return asdict(self) | {"depth": self.depth, "layer": self.layer, "path": _PATH, "text": self.text}


@dataclass(frozen=True)
class ExecutionTrace:
    """All stops of one run, in the order in which they were done.

    begin: position of the first token that was walked through; those before it were read in pieces, as always.
    n_layers: of the network. A stop is named by its number, from 0 on.
    """

    ids: tuple[int, ...]
    begin: int
    n_layers: int
    stops: tuple[Statement, ...]
    _llama: ref[LoadedModel]

    def fits(self, llama: LoadedModel, ids: Sequence[int]) -> bool:
        """Whether this model would walk the same way through this text still."""
        return self._llama() is llama and tuple(ids) == self.ids

    def into(self, at: int, count: int = 1) -> int:
        """The stop that came next, `count` times. Raises `UsageError` behind the last one, as the others do."""
        return self._checked(at + count)

    def next(self, at: int, count: int = 1) -> int:
        """The next stop in the same function, or where it returned to, `count` times."""
        for _ in range(count):
            at = self._first(at, self.stops[at].depth)
        return at

    def out(self, at: int, count: int = 1) -> int:
        """The statement that called this function, once it is done."""
        for _ in range(count):
            at = self._first(at, self.stops[at].depth - 1)
        return at

    def back(self, at: int, count: int = 1) -> int:
        """The stop that came before. Raises `UsageError` before the first one."""
        if at - count < 0:
            raise UsageError(f"There are {at} stops before this one, expected at most that many steps back.")
        return at - count

    def to(self, layer: int) -> int:
        """The first stop of a layer. Raises `UsageError` where there is no such layer."""
        layer = numbered("layer", layer, self.n_layers)
        return next(at for at, stop in enumerate(self.stops) if stop.layer == layer)

    def _first(self, at: int, depth: int) -> int:
        rest = range(at + 1, len(self.stops))
        return self._checked(next((other for other in rest if self.stops[other].depth <= depth), len(self.stops)))

    def _checked(self, at: int) -> int:
        if at >= len(self.stops):
            raise UsageError("The forward pass ends before that, expected a step within it; /step back goes back.")
        return at


def walk(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> ExecutionTrace:
    """Run a text through the network, with the hooks that are on, and keep what each statement made.

    Of a long text the last piece, of up to 512 tokens, is walked through. What the engine has cached is neither used
    nor changed. progress: called for each layer; what it raises ends the work. Raises as `Engine.next_logits` does.
    """
    stops: list[Statement] = []
    n_layers = llama.args.n_layers

    def seen(done: _Done) -> None:
        stop = done.stop()
        if stop.layer is not None and stop.layer != stops[-1].layer:
            progress("stepping", stop.layer, n_layers)
        stops.append(stop)

    begin = _run(llama, ids, seen, progress)
    return ExecutionTrace(tuple(ids), begin, n_layers, tuple(stops), ref(llama))


# --- Looking at a value -----------------------------------------------------------------------


@dataclass(frozen=True)
class ValueView:
    """Numbers of a value at a stop.

    index: what is shown of it, as text: of more than two dimensions, the last one's two, behind what was asked for.
    whole: its shape. shape: that of the part that was asked for. text: where that is no tensor, and the rest is empty.
    rows: at most 16 of at most 4 numbers (2 complex ones); of one dimension the numbers go on from row to row.
    labels: where each row begins. left_out: whether there are more numbers than these.
    """

    name: str
    index: str
    whole: tuple[int, ...] | None
    shape: tuple[int, ...] | None
    dtype: str
    text: str
    labels: tuple[str, ...]
    rows: tuple[tuple[Number, ...], ...]
    left_out: bool

    def as_json(self) -> dict[str, Any]:
        """As /step print prints it."""
        return asdict(self)


def look(llama: LoadedModel, walk: ExecutionTrace, at: int, expression: str, progress: Progress = silent) -> ValueView:
    """Numbers of a value that is alive at a stop, taken by running to it again.

    expression: a name, and behind it an index of whole numbers, slices and `...`, such as "q[0, -1, :, :8]". Raises
    `UsageError` for what is not there, or where there is no such index.
    """
    name, index = parsed(expression)
    stop = walk.stops[at]
    if name not in stop.alive:
        raise UsageError(
            f"There is no '{sanitize(name)}' here, expected one of {', '.join(stop.alive) or 'nothing'}; "
            "/step walks to where there is."
        )
    taken: list[Any] = []
    count = 0

    def seen(done: _Done) -> None:
        nonlocal count
        if count == at:
            taken.append(done.named(name))
            raise _ReachedError
        count += 1

    try:
        _run(llama, walk.ids, seen, progress)
    except _ReachedError:
        return _looked(name, taken[0], index)
    raise UsageError("The walk has changed, expected the same one; /step end and /step begin it anew.")


class _ReachedError(Exception):
    """The run has come to the stop that was looked for."""


def parsed(expression: str) -> tuple[str, Index]:
    """A name and its index, read as data and never evaluated. Raises `UsageError` for anything else."""
    matched = re.fullmatch(r"\s*([^\W\d]\w*)\s*(\[.{0,200}\])?\s*", expression.replace("…", "..."))
    try:
        if matched is None:
            raise ValueError
        if matched[2] is None:
            return matched[1], ()
        node = ast.parse(f"_{matched[2]}", mode="eval").body
        if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
            raise ValueError
        return matched[1], tuple(map(_item, node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UsageError(
            f"'{sanitize(expression)}' cannot be printed, expected a name and perhaps an index of whole numbers, "
            "slices and '...', such as q[0, -1, :, :8]."
        ) from None


def _item(node: ast.expr) -> int | slice | EllipsisType:
    match node:
        case ast.Constant(value=value) if value is ...:
            return ...
        case ast.Slice(lower, upper, step):
            return slice(*(None if part is None else _whole_number(part) for part in (lower, upper, step)))
    return _whole_number(node)


def _whole_number(node: ast.expr) -> int:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_whole_number(operand)
        case ast.Constant(value=int(value)) if type(value) is int:
            return value
    raise ValueError


def _looked(name: str, value: Any, index: Index) -> ValueView:
    asked, rest = _written(index), index
    try:
        while isinstance(value, tuple) and rest:
            value, rest = value[rest[0]], rest[1:]  # type: ignore[index]  # '...' raises TypeError
        part = value[rest] if rest else value
        if rest and isinstance(part, Tensor) and not part.numel():
            raise IndexError
    except (IndexError, TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{name} is {_plain(value)} here, expected an index within it, found {asked}.") from None
    if not isinstance(part, Tensor):
        return ValueView(name, asked, None, None, "", _plain(part), (), (), left_out=False)
    shape = tuple(part.shape)
    if part.ndim > 2:
        last = (-1,) * (part.ndim - 2)
        asked, part = asked + _written(last), part[last]
    columns = _COLUMNS // 2 if part.is_complex() else _COLUMNS
    if part.ndim == 2:
        rows = list(part[:_ROWS, :columns])
        labels = list(map(str, range(len(rows))))
    else:
        flat = part.reshape(-1)[: _ROWS * columns]
        labels = list(map(str, range(0, len(flat), columns)))
        rows = [flat[int(begin) : int(begin) + columns] for begin in labels]
    return ValueView(
        name=name,
        index=asked,
        whole=tuple(value.shape),
        shape=shape,
        dtype=_dtype(part),
        text="",
        labels=tuple(labels),
        rows=tuple(map(_numbers, rows)),
        left_out=sum(row.numel() for row in rows) < part.numel(),
    )


def _written(index: Index) -> str:
    def part(item: int | slice | EllipsisType) -> str:
        if item is ...:
            return "..."
        if isinstance(item, slice):
            ends = ["" if end is None else str(end) for end in (item.start, item.stop)]
            return ":".join([*ends, str(item.step)] if item.step is not None else ends)
        return str(item)

    return f"[{', '.join(map(part, index))}]" if index else ""


# --- Running ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SourceStatement:
    """A statement without those within it; names: of what it binds or writes into; body: the lines of a loop's."""

    first_line: int
    last_line: int
    names: tuple[str, ...]
    returns: bool
    body: range | None
    meanings: tuple[str, ...]  # of shapes, from its comment


@cache
def _functions(path: str) -> dict[str, range]:
    """The lines of each function of a file, from "def" on; methods as "KVCache.update"."""
    found = {}
    for node in ast.parse("\n".join(lines(path))).body:
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        for method in methods:
            if isinstance(method, ast.FunctionDef):
                name = method.name if method is node else f"{node.name}.{method.name}"  # type: ignore[attr-defined]
                found[name] = range(method.lineno, (method.end_lineno or method.lineno) + 1)
    return found


@cache
def _statements(path: str) -> dict[int, _SourceStatement]:
    """The statement that each line of a file belongs to."""
    found: dict[int, _SourceStatement] = {}
    for node in ast.walk(ast.parse("\n".join(lines(path)))):  # outer ones first
        if not isinstance(node, ast.stmt):
            continue
        inner = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
        end = min((part.lineno - 1 for part in inner), default=node.end_lineno or node.lineno)
        own = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt)]
        statement = _SourceStatement(
            first_line=node.lineno,
            last_line=max(node.lineno, end),
            names=tuple(dict.fromkeys(name for part in own for name in _bound(part))),
            returns=isinstance(node, ast.Return),
            body=range(node.body[0].lineno, (node.end_lineno or 0) + 1) if isinstance(node, ast.For) else None,
            meanings=_meanings(lines(path)[node.lineno - 1 : max(node.lineno, end)]),
        )
        for line in range(statement.first_line, (node.end_lineno or node.lineno) + 1):
            found[line] = statement
    return found


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that an expression binds, or whose elements it writes; not those within a generator, which are its own."""
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


def _meanings(code: Sequence[str]) -> tuple[str, ...]:
    """The shapes in the comments at the lines' ends: "# (B, T, dim)"."""
    comments = (line.partition("  # ")[2] for line in code)
    return tuple(shape for comment in comments for shape in re.findall(r"\([^()]*,[^()]*\)", comment))


@dataclass(frozen=True)
class _Done:
    """A statement that was just done. following: the one that comes next in its function."""

    function: str
    module: str
    callers: tuple[str, ...]
    statement: _SourceStatement
    following: _SourceStatement | None
    variables: dict[str, Any]
    meanings: dict[str, ValueSummary]  # values of this call whose shapes were named, by their own names

    def _meant(self, value: ValueSummary) -> ValueSummary:
        """The value with what its shape means, if it had the same shape under the same name before."""
        before = self.meanings.get(value.name)
        if not value.meaning and before and before.shape == value.shape:
            value = replace(value, meaning=before.meaning)
        if value.meaning:
            self.meanings[value.name] = value
        return value

    def named(self, name: str) -> Any:
        return self.variables[name]

    def stop(self) -> Statement:
        statement = self.statement
        ended = statement.body is not None and (
            self.following is None or self.following.first_line not in statement.body
        )
        names = () if ended else (RETURNED,) if statement.returns else statement.names
        made = [(name, self.variables[name]) for name in names if name in self.variables and name != "_"]
        # What the cache takes is memory without numbers yet; what it gives back is filled.
        filled = self.function not in _FILLING or (self.function == "KVCache.update" and statement.returns)
        values = [value for name, it in made for value in _values(name, it, statement.meanings, filled)]
        return Statement(
            function=self.function,
            module=self.module,
            callers=self.callers,
            first_line=statement.first_line,
            last_line=statement.last_line,
            values=tuple(map(self._meant, values)),
            alive=tuple(name for name, it in self.variables.items() if _can_be_looked_at(it)) if filled else (),
        )


@dataclass
class _Call:
    """A function that is being run."""

    function: str
    module: str
    statement: _SourceStatement | None = None
    meanings: dict[str, ValueSummary] = field(default_factory=dict)


class _Tracer:
    """Called by Python for each line: tells `seen` of each statement of `model.py` when it was done."""

    def __init__(self, model: Transformer, seen: Callable[[_Done], None]):
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._seen = seen
        self._calls: list[_Call] = []

    def called(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        # A generator is a part of its statement.
        if code.co_filename != _FILE or code.co_qualname not in _functions(_PATH):
            return None
        above = self._calls[-1].module if self._calls else ""
        module = self._modules.get(id(frame.f_locals.get("self")), above)
        self._calls.append(_Call(code.co_qualname, module))
        return self._within

    def _within(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        call = self._calls[-1]
        if event == "line":
            statement = _statements(_PATH)[frame.f_lineno]
            if statement is not call.statement:
                self._tell(frame, call, statement)
                call.statement = statement
        elif event == "return":
            self._tell(frame, call, None, argument)
            self._calls.pop()
        return self._within

    def _tell(self, frame: FrameType, call: _Call, following: _SourceStatement | None, returned: Any = None) -> None:
        if call.statement is None:
            return
        variables = dict(frame.f_locals)
        if call.statement.returns:
            variables[RETURNED] = returned
        callers = tuple(call.function for call in self._calls[:-1])
        self._seen(_Done(call.function, call.module, callers, call.statement, following, variables, call.meanings))


def _run(llama: LoadedModel, ids: Sequence[int], seen: Callable[[_Done], None], progress: Progress) -> int:
    """Run a text and tell `seen` of each statement of its last piece; returns where that begins."""
    engine = llama.engine
    engine.check(ids)
    model, device = engine.model, engine.model.tok_embeddings.weight.device
    cache = KVCache(model.args, len(ids))
    begin = (len(ids) - 1) // CHUNK * CHUNK
    tracer = _Tracer(model, seen)
    with (
        torch.inference_mode(),
        memory_errors(f"A text of {len(ids):,} tokens"),
        engine.weights(progress),
        hooked(model, engine.hooks),
    ):
        for start in range(0, begin, CHUNK):
            progress("reading", start, len(ids))
            model(torch.tensor([ids[start : start + CHUNK]], device=device), cache)
        tokens = torch.tensor([ids[begin:]], device=device)
        before = sys.gettrace()  # a debugger's, or what measures a test's coverage
        try:
            sys.settrace(tracer.called)
            model(tokens, cache)
        finally:
            sys.settrace(before)
    return begin


# --- Values -----------------------------------------------------------------------------------


def _values(name: str, value: Any, meanings: Sequence[str], filled: bool) -> Iterator[ValueSummary]:
    """A value's summary; of a tuple, that of each of its parts."""
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        for i, part in enumerate(value):
            yield from _values(f"{name}[{i}]", part, meanings, filled)
    elif not isinstance(value, Tensor):
        yield ValueSummary(name, text=_plain(value))
    else:
        fitting = [meaning for meaning in meanings if meaning.count(",") + 1 == value.ndim]
        shape, meaning = tuple(value.shape), fitting[-1] if fitting else ""
        statistics = _statistics(value) if filled and value.numel() else {}
        yield ValueSummary(name, "", shape, _dtype(value), meaning, **statistics)


def _statistics(value: Tensor) -> dict[str, Any]:
    numbers = (value.abs() if value.is_complex() else value).float()
    finite = numbers[numbers.isfinite()] if not math.isfinite(numbers.sum()) else numbers
    first = _numbers(value[(-1,) * (value.ndim - 1)][:_FIRST] if value.ndim else value.reshape(1))
    found: dict[str, Any] = {"infinite": numbers.numel() - finite.numel(), "first": first}
    if finite.numel():
        std, mean = torch.std_mean(finite, correction=0)
        low, high = finite.aminmax()
        found |= {"mean": float(mean), "std": float(std), "min": float(low), "max": float(high)}
    return found


def _numbers(row: Tensor) -> tuple[Number, ...]:
    if row.is_complex():
        pairs = zip(row.abs().tolist(), row.angle().tolist(), strict=True)
        return tuple(pair if math.isfinite(pair[0]) else None for pair in pairs)
    return tuple(number if math.isfinite(number) else None for number in row.float().tolist())


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _can_be_looked_at(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or isinstance(part, Tensor | int | float) for part in parts)


def _plain(value: Any) -> str:
    """What is no tensor, in a word or two."""
    if isinstance(value, Tensor):
        return f"of the shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float | str | torch.Size):
        return sanitize(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    return type(value).__name__
