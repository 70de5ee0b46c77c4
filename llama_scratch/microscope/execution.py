"""A debugger for the forward pass, which stops at each statement of `model.py`.

The network runs once under `sys.settrace`. For each executed statement, a `Statement` with summaries of its values is
recorded. `ExecutionTrace` moves between these stops. The values themselves are not kept: to show more of their numbers,
`look` runs the network again up to the stop.
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
# The name for the return value of a function.
RETURNED = "return"
_FILLING = ("KVCache.update", "KVCache.reserve", "KVCache._grown")


@dataclass(frozen=True)
class Statement(JsonResult):
    """One executed statement of `model.py`.

    Attributes:
        function: Its function, such as "Attention.forward".
        module: Its module, such as "layers.3.attention"; "" for the whole network.
        callers: The calling functions, outermost first.
        first_line: Its first line.
        last_line: Its last line.
        values: Summaries of the values that it assigned.
        in_scope: Names of the variables that `look` can show here.
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
        """Depth in the call stack, 0 in the outermost function."""
        return len(self.callers)

    @property
    def layer(self) -> int | None:
        """The layer, if the statement belongs to one."""
        layers, _, rest = self.module.partition(".")
        return int(rest.partition(".")[0]) if layers == "layers" else None

    @property
    def path(self) -> str:
        """The file, relative to the package's parent folder."""
        return _PATH

    @property
    def text(self) -> str:
        """The source of the statement."""
        return "\n".join(lines(_PATH)[self.first_line - 1 : self.last_line])

    @property
    def file(self) -> str:
        """The text of the whole file."""
        return "\n".join(lines(_PATH))

    def around(self, margin: int) -> tuple[int, str]:
        """Return the statement with up to `margin` lines of its function on both sides.

        Returns:
            The number of the first line, and the text.
        """
        function = functions(_PATH)[self.function]
        first = max(function.start, self.first_line - margin)
        last = min(function.stop - 1, self.last_line + margin)
        return first, "\n".join(lines(_PATH)[first - 1 : last])


@dataclass(frozen=True)
class ExecutionTrace:
    """All stops of one forward pass, in order of execution, numbered from 0.

    Attributes:
        ids: The token ids of the text.
        begin: Position of the first token in the traced chunk. Earlier tokens are in the cache.
        n_layers: Number of layers of the network.
        stops: The executed statements.
    """

    ids: tuple[int, ...]
    begin: int
    n_layers: int
    stops: tuple[Statement, ...]
    _llama: ref[LoadedModel]

    def fits(self, llama: LoadedModel, ids: Sequence[int]) -> bool:
        """Whether the trace was recorded with this model and this text.

        Args:
            llama: The model.
            ids: The token ids of the text.
        """
        return self._llama() is llama and tuple(ids) == self.ids

    def step_into(self, at: int, count: int = 1) -> int:
        """Return the stop `count` steps later, entering calls.

        Args:
            at: The current stop.
            count: Number of steps.

        Raises:
            UsageError: If that is beyond the last stop.
        """
        return self._checked(at + count)

    def next(self, at: int, count: int = 1) -> int:
        """Return the next stop in this function or in a caller, stepping over calls.

        Args:
            at: The current stop.
            count: Number of steps.

        Raises:
            UsageError: If that is beyond the last stop.
        """
        for _ in range(count):
            at = self._first(at, self.stops[at].depth)
        return at

    def step_out(self, at: int, count: int = 1) -> int:
        """Return the stop after the current function has returned.

        Args:
            at: The current stop.
            count: Number of functions to leave.

        Raises:
            UsageError: If that is beyond the last stop.
        """
        for _ in range(count):
            at = self._first(at, self.stops[at].depth - 1)
        return at

    def back(self, at: int, count: int = 1) -> int:
        """Return the stop `count` steps earlier.

        Args:
            at: The current stop.
            count: Number of steps.

        Raises:
            UsageError: If that is before the first stop.
        """
        if at - count < 0:
            raise UsageError(f"Going back {count} stops is not possible: there are {at} before this one.")
        return at - count

    def to(self, layer: int) -> int:
        """Return the first stop of a layer. Raises `UsageError` if it does not exist."""
        layer = numbered("layer", layer, self.n_layers)
        return next(at for at, stop in enumerate(self.stops) if stop.layer == layer)

    def _first(self, at: int, depth: int) -> int:
        rest = range(at + 1, len(self.stops))
        return self._checked(next((other for other in rest if self.stops[other].depth <= depth), len(self.stops)))

    def _checked(self, at: int) -> int:
        if at >= len(self.stops):
            raise UsageError("The forward pass ends before that stop. Go back, or take a smaller step.")
        return at


def walk(llama: LoadedModel, ids: Sequence[int], progress: Progress = silent) -> ExecutionTrace:
    """Trace a forward pass over a text, with the hooks of the model.

    Only the last chunk of a long text is traced, at most 512 tokens. The cache of the engine is neither used nor
    changed. Raises the same errors as `Engine.next_logits`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        progress: Called for each layer. It can raise an exception to cancel.
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
    """Return numbers of a variable at a stop, by running the network up to it again.

    Args:
        llama: The model.
        walk: The trace.
        at: The stop.
        expression: A name, optionally with an index of integers, slices and `...`, such as "q[0, -1, :, :8]".
        progress: As for `walk`.

    Raises:
        UsageError: If the variable or the index does not exist.
    """
    name, index = parsed(expression)
    stop = walk.stops[at]
    if name not in stop.in_scope:
        raise UsageError(f"'{sanitize(name)}' is not in scope here. In scope: {', '.join(stop.in_scope) or 'nothing'}.")
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
    raise UsageError("The forward pass ran differently from its trace. Trace it again.")


class _ReachedError(Exception):
    """The run has reached the stop."""


# --- Running ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """An executed statement. `following` is the next one in the same call, if any."""

    function: str
    module: str
    callers: tuple[str, ...]
    statement: SourceStatement
    following: SourceStatement | None
    variables: dict[str, Any]
    meanings: dict[str, ValueSummary]  # variable → its last summary with named dimensions

    def _with_meaning(self, value: ValueSummary) -> ValueSummary:
        """Reuse the names of the dimensions if the variable had the same shape before."""
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
        # In these functions, the cache can hold uninitialized memory. The tensors that `update` returns are filled.
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
    """A function call in progress."""

    function: str
    module: str
    statement: SourceStatement | None = None
    meanings: dict[str, ValueSummary] = field(default_factory=dict)


class _Tracer:
    """The trace function: reports each executed statement of `model.py`."""

    def __init__(self, model: Transformer, on_statement: Callable[[_Done], None]):
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._on_statement = on_statement
        self._calls: list[_Call] = []

    def called(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        # A generator expression has a frame of its own, but belongs to the statement that contains it.
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
    """Run a text and report each statement of its last chunk.

    Returns the position of the first token of that chunk.
    """
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
        before = sys.gettrace()  # for example a debugger or a coverage tool
        try:
            sys.settrace(tracer.called)
            model(tokens, cache)
        finally:
            sys.settrace(before)
    return begin
