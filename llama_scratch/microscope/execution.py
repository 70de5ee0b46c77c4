"""A debugger over the forward pass: what each statement of `model.py` made, for the text's last tokens.

The network runs once under `sys.settrace`, and of each statement of `model.py` that was done a summary is kept: a
`Statement`. Walking goes from stop to stop; a number that no summary holds is taken by running to its stop again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any
from weakref import ref

import torch

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.hooks import hooked
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.parts import numbered
from llama_scratch.microscope.source import lines
from llama_scratch.microscope.statements import SourceStatement, functions, statements
from llama_scratch.microscope.value_view import ValueSummary, ValueView, has_numbers, parsed, summaries, view_value
from llama_scratch.model import KVCache, Transformer
from llama_scratch.precision.memory_estimate import CHUNK
from llama_scratch.results import JsonResult
from llama_scratch.system.memory import memory_errors
from llama_scratch.system.progress import Progress, silent

_PATH = "llama_scratch/model.py"
_FILE = Transformer.forward.__code__.co_filename
# What a function returns stands among its values under this name.
RETURNED = "return"
_FILLING = ("KVCache.update", "KVCache.reserve", "KVCache._grown")


@dataclass(frozen=True)
class Statement(JsonResult):
    """A statement that was done, at its `first_line` to `last_line` of `model.py`.

    function: such as "Attention.forward". module: where it belongs to, such as "layers.3.attention"; "" for the whole.
    callers: the functions above it, outermost first. in_scope: the names of what `look` can show here.
    """

    json_fields = (
        "function",
        "module",
        "callers",
        "first_line",
        "last_line",
        "values",
        "in_scope as alive",
        "depth",
        "layer",
        "path",
        "text",
    )

    function: str
    module: str
    callers: tuple[str, ...]
    first_line: int
    last_line: int
    values: tuple[ValueSummary, ...]
    in_scope: tuple[str, ...]

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
        function = functions(_PATH)[self.function]
        first = max(function.start, self.first_line - margin)
        last = min(function.stop - 1, self.last_line + margin)
        return first, "\n".join(lines(_PATH)[first - 1 : last])


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

    def step_into(self, at: int, count: int = 1) -> int:
        """The stop that came next, `count` times. Raises `UsageError` behind the last one, as the others do."""
        return self._checked(at + count)

    def next(self, at: int, count: int = 1) -> int:
        """The next stop in the same function, or where it returned to, `count` times."""
        for _ in range(count):
            at = self._first(at, self.stops[at].depth)
        return at

    def step_out(self, at: int, count: int = 1) -> int:
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

    def on_statement(done: _Done) -> None:
        stop = done.stop()
        if stop.layer is not None and stop.layer != stops[-1].layer:
            progress("stepping", stop.layer, n_layers)
        stops.append(stop)

    begin = _run(llama, ids, on_statement, progress)
    return ExecutionTrace(tuple(ids), begin, n_layers, tuple(stops), ref(llama))


def look(llama: LoadedModel, walk: ExecutionTrace, at: int, expression: str, progress: Progress = silent) -> ValueView:
    """Numbers of a value that is in scope at a stop, taken by running to it again.

    expression: a name, and behind it an index of whole numbers, slices and `...`, such as "q[0, -1, :, :8]". Raises
    `UsageError` for what is not there, or where there is no such index.
    """
    name, index = parsed(expression)
    stop = walk.stops[at]
    if name not in stop.in_scope:
        raise UsageError(
            f"There is no '{sanitize(name)}' here, expected one of {', '.join(stop.in_scope) or 'nothing'}; "
            "/step walks to where there is."
        )
    taken: list[Any] = []
    count = 0

    def on_statement(done: _Done) -> None:
        nonlocal count
        if count == at:
            taken.append(done.variables[name])
            raise _ReachedError
        count += 1

    try:
        _run(llama, walk.ids, on_statement, progress)
    except _ReachedError:
        return view_value(name, taken[0], index)
    raise UsageError("The walk has changed, expected the same one; /step end and /step begin it anew.")


class _ReachedError(Exception):
    """The run has come to the stop that was looked for."""


# --- Running ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """A statement that was just done. following: the one that comes next in its function."""

    function: str
    module: str
    callers: tuple[str, ...]
    statement: SourceStatement
    following: SourceStatement | None
    variables: dict[str, Any]
    meanings: dict[str, ValueSummary]  # values of this call whose shapes were named, by their own names

    def _with_meaning(self, value: ValueSummary) -> ValueSummary:
        """The value with what its shape means, if it had the same shape under the same name before."""
        before = self.meanings.get(value.name)
        if not value.meaning and before and before.shape == value.shape:
            value = replace(value, meaning=before.meaning)
        if value.meaning:
            self.meanings[value.name] = value
        return value

    def stop(self) -> Statement:
        statement = self.statement
        ended = statement.body is not None and (
            self.following is None or self.following.first_line not in statement.body
        )
        names = () if ended else (RETURNED,) if statement.returns else statement.names
        bound = [(name, self.variables[name]) for name in names if name in self.variables and name != "_"]
        # What the cache takes is memory without numbers yet; what it gives back is filled.
        filled = self.function not in _FILLING or (self.function == "KVCache.update" and statement.returns)
        values = [value for name, it in bound for value in summaries(name, it, statement.meanings, filled)]
        return Statement(
            function=self.function,
            module=self.module,
            callers=self.callers,
            first_line=statement.first_line,
            last_line=statement.last_line,
            values=tuple(map(self._with_meaning, values)),
            in_scope=tuple(name for name, it in self.variables.items() if has_numbers(it)) if filled else (),
        )


@dataclass
class _Call:
    """A function that is being run."""

    function: str
    module: str
    statement: SourceStatement | None = None
    meanings: dict[str, ValueSummary] = field(default_factory=dict)


class _Tracer:
    """Called by Python for each line: tells `on_statement` of each statement of `model.py` when it was done."""

    def __init__(self, model: Transformer, on_statement: Callable[[_Done], None]):
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._on_statement = on_statement
        self._calls: list[_Call] = []

    def called(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        # A generator is a part of its statement.
        if code.co_filename != _FILE or code.co_qualname not in functions(_PATH):
            return None
        above = self._calls[-1].module if self._calls else ""
        module = self._modules.get(id(frame.f_locals.get("self")), above)
        self._calls.append(_Call(code.co_qualname, module))
        return self._within

    def _within(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        call = self._calls[-1]
        if event == "line":
            statement = statements(_PATH)[frame.f_lineno]
            if statement is not call.statement:
                self._tell(frame, call, statement)
                call.statement = statement
        elif event == "return":
            self._tell(frame, call, None, argument)
            self._calls.pop()
        return self._within

    def _tell(self, frame: FrameType, call: _Call, following: SourceStatement | None, returned: Any = None) -> None:
        if call.statement is None:
            return
        variables = dict(frame.f_locals)
        if call.statement.returns:
            variables[RETURNED] = returned
        callers = tuple(call.function for call in self._calls[:-1])
        self._on_statement(
            _Done(call.function, call.module, callers, call.statement, following, variables, call.meanings)
        )


def _run(llama: LoadedModel, ids: Sequence[int], on_statement: Callable[[_Done], None], progress: Progress) -> int:
    """Run a text and tell `on_statement` of each statement of its last piece; returns where that begins."""
    engine = llama.engine
    engine.check(ids)
    model, device = engine.model, engine.model.tok_embeddings.weight.device
    cache = KVCache(model.args, len(ids))
    begin = (len(ids) - 1) // CHUNK * CHUNK
    tracer = _Tracer(model, on_statement)
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
