"""The trace of the forward pass: statements, values against hooks, and cleanup."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pyte
import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from torch import Tensor

from llama_scratch import model as network
from llama_scratch.errors import UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope import execution
from llama_scratch.microscope.execution import (
    RETURNED,
    ExecutionTrace,
    Statement,
    look,
    walk,
)
from llama_scratch.microscope.source import lines
from llama_scratch.microscope.value_view import ValueSummary, ValueView, parsed, summaries
from llama_scratch.render.page import Code, Finding
from llama_scratch.render.pages import execution as execution_pages
from llama_scratch.repl.commands import completions, run_command
from llama_scratch.repl.keyboard import Keyboard
from llama_scratch.repl.session import Session
from tests.helpers.sessions import run, shown, started

TEXT = "the reader and the other"


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    """The small random model in fp32."""
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def ids(llama: Llama) -> list[int]:
    return llama.encode(TEXT)


@pytest.fixture(scope="module")
def walked(llama: Llama, ids: list[int]) -> ExecutionTrace:
    return walk(llama, ids)


@pytest.fixture
def session(llama: Llama) -> Session:
    """A session whose text is `TEXT`."""
    session = started(llama)
    session.predict(TEXT)
    return session


def tapped(llama: Llama, ids: list[int], place: str) -> Tensor:
    """The value at a place, recorded by a hook."""
    found: list[Tensor] = []

    def keep(value: Tensor, _start: int) -> None:
        found.append(value.clone())

    llama.engine.forward_with_hooks([ids], {place: keep})
    return found[0]


def number_of(walked: ExecutionTrace, code: str, layer: int | None = None) -> int:
    """The first stop whose statement starts with this code."""
    return next(
        at
        for at, stop in enumerate(walked.stops)
        if stop.text.strip().startswith(code) and (layer is None or stop.layer == layer)
    )


def value_of(stop: Statement, name: str) -> ValueSummary:
    return next(value for value in stop.values if value.name == name)


# --- The statements ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        network.RMSNorm.forward,
        network.Attention.forward,
        network.FeedForward.forward,
        network.TransformerBlock.forward,
        network.apply_rotary_emb,
        network.rotations,
    ],
)
def test_every_statement_of_a_function_is_a_stop(walked: ExecutionTrace, function: Any) -> None:
    """Once per call, in source order: these functions have no branches."""
    lines, first = inspect.getsourcelines(function)
    body = ast.parse(inspect.cleandoc("\n" + "".join(lines))).body[0]
    assert isinstance(body, ast.FunctionDef)
    expected = [
        first + node.lineno - 1 for node in body.body if not isinstance(getattr(node, "value", None), ast.Constant)
    ]
    found = [stop.first_line for stop in walked.stops if stop.function == function.__qualname__]
    assert len(found) >= len(expected) > 0
    assert found == expected * (len(found) // len(expected))


def test_the_whole_network_is_walked_through(walked: ExecutionTrace, llama: Llama) -> None:
    """The branches taken; the loop once per layer, and once more when it ends."""
    starts = [stop.text.split()[0] for stop in walked.stops if stop.depth == 0]
    loop = ["for", "x"] * llama.args.n_layers + ["for"]
    assert starts == ["T", "if", "freqs_cis", "mask", "x", *loop, "cache.advance(T)", "if", "x", "return"]
    loops = [stop for stop in walked.stops if stop.depth == 0 and stop.text.strip().startswith("for")]
    assert [[value.text for value in stop.values] for stop in loops] == [
        *([str(layer), "TransformerBlock"] for layer in range(llama.args.n_layers)),
        [],  # it ended and bound nothing
    ]
    calls = [stop.function for stop in walked.stops if stop.layer == 1]
    assert calls.index("RMSNorm.forward") < calls.index("Attention.forward") < calls.index("FeedForward.forward")
    assert {stop.layer for stop in walked.stops} == {None, 0, 1, 2}


def test_a_stop_says_where_it_is(walked: ExecutionTrace) -> None:
    stop = walked.stops[number_of(walked, "turned =", layer=1)]
    assert stop.function == "apply_rotary_emb"
    assert stop.callers == ("Transformer.forward", "TransformerBlock.forward", "Attention.forward")
    assert (stop.depth, stop.layer, stop.module, stop.path) == (3, 1, "layers.1.attention", "llama_scratch/model.py")
    source = Path(network.__file__).read_text().splitlines()
    assert source[stop.first_line - 1 : stop.last_line] == stop.text.splitlines()
    norms = [stop.module for stop in walked.stops if stop.function == "RMSNorm.forward"]
    assert list(dict.fromkeys(norms))[-3:] == ["layers.2.attention_norm", "layers.2.ffn_norm", "norm"]


SNIPPET = """
def compute(a):
    \"\"\"What it does.\"\"\"
    b = max(
        a,
        abs(a),
    )  # (first, second)
    for i in range(2):
        b += i
    c, _ = [i for i in range(7, 9)]
    if b > c:
        b = 0
    else:
        d = [b]
        d[0] = (
            c
        )
    return (
        b
        + c
    )
"""


def test_a_statement_of_several_lines_is_one_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if Python jumps between its lines.

    The head of a loop is a stop each time; an else is not a stop.
    """
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    monkeypatch.setattr(execution, "_PATH", str(file))
    monkeypatch.setattr(execution, "_FILE", str(file))
    namespace: dict[str, Any] = {}
    exec(compile(SNIPPET, str(file), "exec"), namespace)
    stops: list[Statement] = []
    tracer = execution._Tracer(torch.nn.Module(), lambda done: stops.append(done.stop()))  # type: ignore[arg-type]
    before = sys.gettrace()
    try:
        sys.settrace(tracer.called)
        namespace["compute"](-3)
    finally:
        sys.settrace(before)
    assert [(stop.first_line, stop.last_line) for stop in stops] == [
        (4, 7), (8, 8), (9, 9), (8, 8), (9, 9), (8, 8), (10, 10), (11, 11), (14, 14), (15, 17), (18, 21),
    ]  # fmt: skip
    assert [[(value.name, value.text) for value in stop.values] for stop in stops] == [
        [("b", "3")], [("i", "0")], [("b", "3")], [("i", "1")], [("b", "4")], [], [("c", "7")], [],
        [("d", "list")], [("d", "list")], [("return", "11")],
    ]  # fmt: skip


# --- The numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "place"),
    [
        ("x = self.tok_embeddings", "x", "embedding"),
        ("q, k, v = q.transpose", "q", "layers.1.attention.q"),
        ("k, v = cache.update", "k", "layers.1.attention.k"),
        ("k, v = cache.update", "v", "layers.1.attention.v"),
        ("return self.wo", RETURNED, "layers.1.attention.out"),
        ("x = x + self.attention", "x", "layers.1.resid_mid"),
        ("return self.w2", RETURNED, "layers.1.feed_forward.out"),
        ("return x + self.feed_forward", RETURNED, "layers.1.resid_post"),
        ("return self.output", RETURNED, "logits"),
    ],
)
def test_values_are_those_that_taps_give(
    llama: Llama, ids: list[int], walked: ExecutionTrace, code: str, name: str, place: str
) -> None:
    """Shape, statistics and first numbers, and the numbers that print shows."""
    expected = tapped(llama, ids, place)
    at = number_of(walked, code, 1 if place.startswith("layers") else None)
    value = value_of(walked.stops[at], name)
    assert value.shape == expected.shape
    assert value.dtype == "float32"
    assert value.mean == pytest.approx(float(expected.mean()), abs=1e-6)
    assert value.std == pytest.approx(float(expected.std(correction=0)), rel=1e-5)
    assert (value.min, value.max) == (float(expected.min()), float(expected.max()))
    last = expected[0, -1] if expected.ndim == 3 else expected[0, -1, -1]  # the last token of the last head
    assert value.first == tuple(last[:4].tolist())
    seen = look(llama, walked, at, f"{name}[0, ..., 1:3]")
    assert seen.index.startswith("[0, ..., 1:3]")
    part = expected[0, ..., 1:3]
    assert seen.shape == part.shape
    flat = part.reshape(-1, part.shape[-2], 2)[-1]
    assert seen.rows == tuple(tuple(row) for row in flat[:16].tolist())


def test_the_last_row_is_the_last_token_in_every_shape(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    """Also the logits, which are of the last token alone."""
    value = value_of(walked.stops[-1], RETURNED)
    assert value.first == tuple(llama.engine.forward_with_hooks([ids], {})[0, -1, :4].tolist())
    mask = value_of(walked.stops[number_of(walked, "mask =")], "mask")
    assert (mask.dtype, mask.min, mask.max, mask.first) == ("bool", 0, 1, (1, 1, 1, 1))


def test_complex_numbers_are_magnitude_and_angle(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    at = number_of(walked, "freqs_cis =")
    value = value_of(walked.stops[at], "freqs_cis")
    angles = (len(ids) - 1) * llama.engine.model.freqs[:4]
    turned = torch.remainder(angles + torch.pi, 2 * torch.pi) - torch.pi
    assert value.dtype == "complex64"
    torch.testing.assert_close(torch.tensor(value.first), torch.stack([torch.ones(4), turned], -1), rtol=0, atol=1e-5)
    assert value.min == pytest.approx(1)
    assert value.max == pytest.approx(1)
    assert look(llama, walked, at, "freqs_cis[-1]").rows[0] == value.first[:2]


def test_names_of_shapes_are_true(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    """A dimension named in a comment of model.py has that size in the whole trace."""
    args, T = llama.args, len(ids)
    sizes = {
        "B": {1},
        "T": {T},
        "S": {T},
        "1": {1},
        "dim": {args.dim},
        "ffn_dim": {args.ffn_dim},
        "heads": {args.n_heads, args.n_kv_heads},
        "n_heads": {args.n_heads},
        "n_kv_heads": {args.n_kv_heads},
        "head_dim": {args.head_dim},
        "head_dim/2": {args.head_dim // 2},
    }
    named = [value for stop in walked.stops for value in stop.values if value.meaning]
    assert len(named) > 50
    for value in named:
        if value.name in ("x", "inverse_rms", RETURNED) and value.shape and value.shape[1] == 1:
            continue  # after the last layer only the last token is computed
        names = re.findall(r"[\w/]+", value.meaning)
        assert value.shape is not None
        assert all(size in sizes[name] for name, size in zip(names, value.shape, strict=True)), value


def test_memory_that_is_not_written_has_no_numbers(
    llama: Llama, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the cache has allocated may hold any values, so they are not shown."""
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: plain(*args, **kwargs).fill_(torch.nan))
    stops = walk(llama, ids).stops
    assert {stop.function for stop in stops} >= {"KVCache._grown", "KVCache.update"}
    assert not any(value.infinite for stop in stops for value in stop.values)
    taken = value_of(next(stop for stop in stops if stop.text.strip().startswith("k, v = (like")), "k")
    assert taken.shape == (1, llama.args.n_kv_heads, len(ids), llama.args.head_dim)
    assert taken.mean is None
    assert taken.first == ()


def test_taps_that_are_on_apply(llama: Llama, ids: list[int]) -> None:
    """With attention ablated the stream passes the layer unchanged, and the trace shows that."""
    probs: list[Tensor] = []
    changed = llama.intervened(
        {
            "layers.1.attention.out": lambda value, _start: torch.zeros_like(value),
            "layers.2.attention.probs": lambda value, _start: probs.append(value),
        }
    )
    walked = walk(changed, ids)
    before = value_of(walked.stops[number_of(walked, "return x + self.feed_forward", 0)], RETURNED)
    behind = value_of(walked.stops[number_of(walked, "x = x + self.attention", 1)], "x")
    assert (behind.mean, behind.first) == (before.mean, before.first)
    scores = value_of(walked.stops[number_of(walked, "scores = scores.masked_fill", 2)], "scores")
    T, heads = len(ids), llama.args.n_heads
    assert scores.infinite == heads * T * (T - 1) // 2
    assert scores.min is not None
    shares = value_of(walked.stops[number_of(walked, "return scores.float().softmax", 2)], RETURNED)
    assert shares.first == tuple(probs[0][0, -1, -1, :4].tolist())
    json.dumps([stop.as_json() for stop in walked.stops], allow_nan=False)
    assert not walked.fits(llama, ids)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_each_precision_can_be_walked_through(
    tiny_dir: Path, ids: list[int], walked: ExecutionTrace, precision: str
) -> None:
    """The same statements with each kind of weights, and the logits of the engine."""
    other = Llama.load(tiny_dir, precision=precision, device="cpu")
    other.prepare()
    found = walk(other, ids)
    assert [stop.first_line for stop in found.stops] == [stop.first_line for stop in walked.stops]
    logits = other.engine.forward_with_hooks([ids], {})[0, -1]
    assert value_of(found.stops[-1], RETURNED).first == tuple(logits[:4].tolist())
    other.close()


def test_of_a_long_text_the_last_piece_is_walked_through(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the last token are the same as in a single chunk."""
    ids = llama.encode(TEXT * 5)
    whole = walk(llama, ids)
    assert whole.begin == 0
    monkeypatch.setattr(execution, "CHUNK", 16)
    stages: list[str] = []
    found = walk(llama, ids, lambda stage, _done, _total: stages.append(stage))
    assert found.begin == (len(ids) - 1) // 16 * 16 > 16
    q = value_of(found.stops[number_of(found, "q, k, v = q.transpose", 2)], "q")
    assert q.shape is not None
    assert q.shape[2] == len(ids) - found.begin
    expected = value_of(whole.stops[number_of(whole, "q, k, v = q.transpose", 2)], "q").first
    assert q.first == pytest.approx(expected, abs=1e-4)
    k = value_of(found.stops[number_of(found, "k, v = cache.update", 2)], "k")
    assert k.shape is not None
    assert k.shape[2] == len(ids)
    assert (stages.count("reading"), stages.count("stepping")) == (found.begin // 16, 3)


def test_only_a_meaning_that_fits_is_shown() -> None:
    """The last shape in the comment with that many dimensions is used, and tuples have one summary per element."""
    pair = (torch.ones(2, 3), torch.zeros(2, 3, 4))
    both = list(summaries("it", pair, ("(T, S)", "(T, dim)", "(B, T, dim)"), True))
    assert [(value.name, value.meaning, value.mean) for value in both] == [
        ("it[0]", "(T, dim)", 1.0),
        ("it[1]", "(B, T, dim)", 0.0),
    ]
    assert next(summaries("it", torch.ones(2), ("(T, S)",), True)).meaning == ""


def test_a_name_keeps_its_meaning_while_it_keeps_its_shape(walked: ExecutionTrace) -> None:
    """The residual stream does, until the last token is sliced out of it."""
    at = number_of(walked, "x = block")
    assert value_of(walked.stops[at], "x").meaning == "(B, T, dim)"
    assert value_of(walked.stops[number_of(walked, "x = x[:, -1:]")], "x").meaning == ""


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    (value,) = summaries("it", torch.tensor([[1.0, torch.inf, torch.nan, 3.0]]), (), True)
    assert (value.infinite, value.mean, value.max, value.first) == (2, 2.0, 3.0, (1.0, None, None, 3.0))
    (nothing,) = summaries("it", torch.full((2,), torch.nan), (), True)
    assert (nothing.infinite, nothing.mean, nothing.first) == (2, None, (None, None))


# --- Walking ----------------------------------------------------------------------------------


def test_next_stays_into_enters_out_leaves(walked: ExecutionTrace) -> None:
    at = number_of(walked, "heads = ", 1)
    assert walked.stops[walked.step_into(at)].text.strip().startswith("q = self.wq")
    v = walked.next(at, 3)
    assert walked.stops[v].text.strip().startswith("v = self.wv")
    inner = walked.step_into(v)
    assert walked.stops[inner].function == "apply_rotary_emb"
    after = walked.next(v)
    assert walked.stops[after].text.strip().startswith("q = apply_rotary_emb")
    assert after == walked.step_into(v, 4) == walked.step_out(inner)
    assert walked.back(after, 4) == v
    last = number_of(walked, "return self.wo", 1)
    assert walked.next(last) == walked.step_out(at) == number_of(walked, "x = x + self.attention", 1)
    assert walked.to(2) == number_of(walked, "x32 =", 2)


@pytest.mark.parametrize("step", ["next", "step_into", "step_out"])
def test_nothing_comes_behind_the_end(walked: ExecutionTrace, step: str) -> None:
    end = len(walked.stops) - 1
    with pytest.raises(UsageError, match="ends before that"):
        getattr(walked, step)(end)
    with pytest.raises(UsageError, match="ends before that"):
        walked.step_into(0, 10**12)
    assert walked.step_into(0, end) == end


def test_nothing_comes_before_the_beginning(walked: ExecutionTrace) -> None:
    assert walked.back(3, 3) == 0
    with pytest.raises(UsageError, match="there are 3 before"):
        walked.back(3, 4)
    for layer in (-1, 3):
        with pytest.raises(UsageError, match=f"layer must be an integer from 0 to 2, not {layer}"):
            walked.to(layer)


def test_a_walk_fits_one_text_and_one_network(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    assert walked.fits(llama, ids)
    assert not walked.fits(llama, ids[:-1])
    assert not walked.fits(llama.intervened({}), ids)


def test_a_walk_waits_for_packed_weights(tiny_dir: Path, ids: list[int]) -> None:
    """So print and the trace agree, before `prepare` and after."""
    other = Llama.load(tiny_dir, precision="int8", device="cpu")
    stages: list[str] = []
    before = walk(other, ids, lambda stage, *_: stages.append(stage))
    assert stages[0] == "packing"
    other.prepare()
    assert before.fits(other, ids)
    assert walk(other, ids).stops == before.stops
    other.close()


# --- Printing ---------------------------------------------------------------------------------


def test_what_print_takes() -> None:
    assert parsed("q") == ("q", ())
    assert parsed(" q [0,3, -1,:8] ") == ("q", (0, 3, -1, slice(None, 8, None)))
    assert parsed("q[...]") == parsed("q[…]") == ("q", (...,))
    assert parsed("return[0][1:2]".replace("][", ", ")) == ("return", (0, slice(1, 2, None)))
    assert parsed("x[-3::2]") == ("x", (slice(-3, None, 2),))


@pytest.mark.parametrize(
    "expression",
    ["", "q[", "q[]", "q.shape", "q[a]", "q[f()]", "q[None]", "q[1.5]", "q[True]", "q['a']", "q[0][1]", "q + 1", "1",
     "__import__('os').system('true')", "q[__import__('os')]", "q[(1, 2), 3]", "q[" + "-" * 190 + "1]", "q[\0]"],
)  # fmt: skip
def test_what_print_refuses(expression: str) -> None:
    """Anything that would need evaluation."""
    if expression == "q[" + "-" * 190 + "1]":
        assert parsed(expression) == ("q", (1,))
        return
    with pytest.raises(UsageError, match="cannot be printed"):
        parsed(expression)


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("nothing", "'nothing' is not in scope here. In scope: x, freqs_cis, mask"),
        ("self", "'self' is not in scope"),
        ("q[5]", r"The index \[5\] is out of range: q is a tensor of shape \(1, 4, \d+, 64\)"),
        ("q[0, 0, 0, 0, 0]", "out of range: q is"),
        ("q[::-1]", "out of range: q is"),
        ("q[99999999999999999999999]", "out of range: q is"),
        ("layer[0]", "out of range: layer is 1"),
        ("heads[2]", "out of range: heads is"),
        ("heads[...]", "out of range: heads is"),
    ],
)
def test_what_is_not_there(llama: Llama, walked: ExecutionTrace, expression: str, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        look(llama, walked, number_of(walked, "k, v = cache.update", 1), expression)


def test_what_is_no_tensor_is_shown_as_it_is(llama: Llama, walked: ExecutionTrace) -> None:
    at = number_of(walked, "k, v = cache.update", 1)
    assert look(llama, walked, at, "layer").text == "1"
    assert look(llama, walked, at, "heads").text == "(-1, 64)"
    assert look(llama, walked, at, "heads[1]").text == "64"


def test_parts_of_a_tuple_and_single_numbers(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    at = number_of(walked, "return held[0]", 1)
    values = tapped(llama, ids, "layers.1.attention.v")
    assert look(llama, walked, at, "return[1, 0, 1, -1]").rows[0] == tuple(values[0, 1, -1, :4].tolist())
    one = look(llama, walked, at, "return[1, 0, 1, -1, 7]")
    assert (one.shape, one.rows, one.left_out) == ((), ((float(values[0, 1, -1, 7]),),), False)


def test_numbers_are_bounded(llama: Llama, walked: ExecutionTrace) -> None:
    """16 rows of 4; one dimension is wrapped into several rows."""
    at = number_of(walked, "x = self.tok_embeddings")
    seen = look(llama, walked, at, "x")
    assert (len(seen.rows), len(seen.rows[0]), seen.index, seen.left_out) == (len(seen.labels), 4, "[-1]", True)
    row = look(llama, walked, at, "x[0, -1]")
    assert ([len(numbers) for numbers in row.rows], row.left_out) == ([4] * 16, True)
    assert row.labels[:3] == ("0", "4", "8")
    assert not look(llama, walked, at, "x[0, -1, :64]").left_out


# --- Cleanup ----------------------------------------------------------------------------------


class _StopError(Exception):
    pass


@pytest.fixture
def tracer() -> Iterator[Any]:
    """The trace function of a debugger."""
    before = sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: Any) -> None:
        return None

    sys.settrace(trace)
    yield trace
    sys.settrace(before)


def test_a_debugger_is_put_back(llama: Llama, ids: list[int], walked: ExecutionTrace, tracer: Any) -> None:
    """After a trace, a print that stops the network midway, and an interruption."""
    walk(llama, ids)
    assert sys.gettrace() is tracer
    look(llama, walked, number_of(walked, "q =", 1), "q")
    assert sys.gettrace() is tracer

    def interrupt(stage: str, done: int, _total: int) -> None:
        assert sys.gettrace() is not tracer
        if (stage, done) == ("stepping", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(llama, ids, interrupt)
    assert sys.gettrace() is tracer


def test_an_interruption_leaves_the_model_whole(llama: Llama, ids: list[int], walked: ExecutionTrace) -> None:
    """All hooks are removed, and the next trace and prediction are unchanged."""
    llama.predict(TEXT)
    before = llama.predict(TEXT)  # from the cache, as below
    cached = llama.engine.cached_tokens

    def interrupt(_stage: str, done: int, _total: int) -> None:
        if done == 2:
            raise _StopError

    changed = llama.intervened({"layers.1.resid_post": lambda value, _start: value * 0})
    with pytest.raises(_StopError):
        walk(changed, ids, interrupt)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.engine.model.modules())
    assert llama.engine.cached_tokens == cached
    assert walk(llama, ids).stops == walked.stops
    assert llama.predict(TEXT).top == before.top


@pytest.mark.parametrize("bad", [[], [10**6]])
def test_ids_that_cannot_be_run(llama: Llama, bad: list[int]) -> None:
    with pytest.raises(UsageError):
        walk(llama, bad)


# --- In the session ---------------------------------------------------------------------------


def test_a_pipe_walks_with_one_command_a_stop(session: Session, walked: ExecutionTrace) -> None:
    first = run(session, "/step")
    assert (first["stop"], first["stops"], first["text"].strip()) == (0, len(walked.stops), "T = tokens.shape[1]")
    assert run(session, "/step next 3")["stop"] == walked.next(0, 3)
    assert run(session, "/step to 1")["stop"] == walked.to(1)
    assert run(session, "/step n")["stop"] == walked.next(walked.to(1))
    assert run(session, "/step back")["stop"] == walked.to(1)
    assert run(session, "/step into 5")["stop"] == walked.to(1) + 5
    assert run(session, "/step out")["stop"] == walked.step_out(walked.to(1) + 5)
    assert run(session, "/step")["stop"] == walked.step_out(walked.to(1) + 5)
    printed = run(session, "/step print x[0, -1, :4]")
    assert printed["rows"] == [list(value_of(walked.stops[printed["stop"]], "x").first)]
    for empty in ("x[0:0]", "x[0, 0:0]", "x[..., 0:0]"):
        with pytest.raises(UsageError, match=r"The index \[.*0:0\] is out of range"):
            run(session, f"/step print {empty}")
    ended = run(session, "/step end")
    assert ended["ended"]
    assert run(session, "/step next")["stop"] == walked.next(0)


@pytest.mark.parametrize("line", ["sideways", "to", "to x", "next 0", "next x", "print", "print zz", "to 99", "back"])
def test_what_step_refuses(session: Session, line: str) -> None:
    """With a message, and the position in the trace does not change."""
    run(session, "/step")
    with pytest.raises(UsageError):
        run_command(session, f"/step {line}")
    assert run(session, "/step")["stop"] == 0


@pytest.mark.parametrize(("letter", "word"), [("s", "into"), ("step", "into"), ("pp x", "print x"), ("quit", "end")])
def test_commands_of_pdb_with_an_exact_equivalent(session: Session, letter: str, word: str) -> None:
    replies = []
    for line in (letter, word):
        run(session, "/step to 1")
        replies.append(run(session, f"/step {line}"))
    assert replies[0] == replies[1]


@pytest.mark.parametrize(("letter", "instead"), [("c", "'to 5'"), ("r", "'out'"), ("u", "'out'"), ("l", "/source")])
def test_other_commands_of_pdb_say_what_to_type(session: Session, letter: str, instead: str) -> None:
    run(session, "/step to 1")
    with pytest.raises(UsageError, match=instead):
        run_command(session, f"/step {letter}")


def test_the_finding_and_the_heading_name_the_line_that_ran(session: Session, walked: ExecutionTrace) -> None:
    at = number_of(walked, "q = self.wq", 1)
    stop = walked.stops[at]
    parts = execution_pages.page(walked, at).parts
    line = next(n for n, text in enumerate(lines(stop.path), 1) if text.strip().startswith("q = self.wq"))
    (q,) = stop.values
    shape = ", ".join(map(str, q.shape or ()))
    assert parts[0] == Finding(f"model.py:{line} ran in layer 1: q is ({shape}).")
    (code,) = (part for part in parts if isinstance(part, Code))
    assert code.first < line
    assert code.location == f"llama_scratch/model.py:{line}"
    assert f"model.py:{line} ran in layer 1." in execution_pages.finding(replace(stop, values=()))


def test_another_text_begins_another_walk(session: Session) -> None:
    """It says so, except for the first text."""
    assert not run(session, "/step next 2")["begins_anew"]
    session.predict("another text")
    reply = run_command(session, "/step into")[1]
    assert reply is not None
    assert (reply.facts["begins_anew"], reply.facts["stop"]) == (True, 1)
    assert "starts again" in shown(reply.view or "", 80)


def test_without_a_text_there_is_nothing_to_walk_through(llama: Llama) -> None:
    with pytest.raises(UsageError, match="There is no text yet"):
        run_command(started(llama), "/step")


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("plain", [False, True])
def test_a_stop_on_the_screen(session: Session, width: int, plain: bool) -> None:
    """The location, the marked line, and named values, within the width."""
    session.change_settings(plain=plain)
    run(session, "/step to 2")
    reply = run_command(session, "/step next 6")[1]
    assert reply is not None
    screen = shown(reply.view or "", width)
    flat = " ".join(screen.split())
    assert "Transformer.forward › layer 2 › Attention.forward" in flat
    assert "q = self.wq(x).unflatten" in flat.replace("self.wq(x) .unflatten", "self.wq(x).unflatten")
    assert "(B, T, n_heads, head_dim)" in flat
    marked = re.findall(r"(\d+) \(here\)" if plain else r"❱ (\d+)", flat)
    assert marked == [str(reply.facts["first_line"])]
    assert plain or all(len(line) <= width for line in screen.splitlines())
    printed = run_command(session, "/step print q[0, -1]")[1]
    assert printed is not None
    assert "(1, " in shown(printed.view or "", width)


def test_completion_knows_what_is_alive(session: Session) -> None:
    assert "/step into" in completions(session, "/step in")
    run(session, "/step to 1")
    assert completions(session, "/step print x") == ["/step print x", "/step print x32"]


def typed(session: Session, keys: str) -> dict[str, Any]:
    """Return what /step answers to these keys."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        session.screen.keyboard = cast(Keyboard, SimpleNamespace(input=pipe, released=nullcontext))
        pipe.send_text(keys)
        reply = run_command(session, "/step")[1]
    assert reply is not None
    assert reply.view is None  # it is already on the screen
    return reply.facts


@pytest.mark.parametrize("end", ["q", "\x03", "\x04", "end\r"])
def test_single_keys_walk_on_a_terminal(session: Session, walked: ExecutionTrace, end: str) -> None:
    """Enter and n: next. Then the prompt returns, and the position is kept."""
    place = walked.next(walked.next(walked.to(1)), 2)
    assert typed(session, f"t 1\rn\rn{end}")["stop"] == place
    assert typed(session, "iib" + end)["stop"] == place + 1
    assert typed(session, "o" + end)["stop"] == walked.step_out(place + 1)


def test_enter_does_not_go_into_a_call(session: Session, walked: ExecutionTrace) -> None:
    """At a statement where next and into differ."""
    before = number_of(walked, "v = self.wv", 1)
    assert walked.next(before) != walked.step_into(before)
    run(session, f"/step into {before}")
    assert typed(session, "\rq")["stop"] == walked.next(before)


def test_keys_print_list_and_refuse(session: Session) -> None:
    """Invalid input gets a message, and the trace continues."""
    facts = typed(session, "p T\r?zzz\rp nothing\rt 1\rq")
    screen = " ".join("".join(shown(view, 80) for view in session.screen.views).split())
    assert "T in Transformer.forward" in screen
    assert "Enter or n: next" in screen
    assert "Invalid action 'zzz' for /step" in screen
    assert "'nothing' is not in scope here" in screen
    assert facts["layer"] == 1


def test_an_error_keeps_what_look_showed() -> None:
    """A view has plain values."""
    seen = ValueView("q", "[0]", (1, 2), (2,), "float32", "", ("0",), ((1.0, None),), left_out=False)
    assert json.loads(json.dumps(seen.as_json(), allow_nan=False))["rows"] == [[1.0, None]]


@pytest.mark.parametrize(("height", "in_place"), [(60, True), (12, False)])
def test_a_stop_replaces_the_one_before_if_the_terminal_is_high_enough(
    session: Session, walked: ExecutionTrace, height: int, in_place: bool
) -> None:
    output = io.StringIO()
    session.screen.console = Console(file=output, force_terminal=True, width=80, height=height)
    session.screen.console.print("the line above")
    typed(session, "nn?q")
    screen = pyte.HistoryScreen(80, height, history=1000)
    pyte.Stream(screen).feed(output.getvalue().replace("\n", "\r\n"))
    rows = ["".join(row[x].data for x in range(80)) for row in screen.history.top] + list(screen.display)
    counts = [line.split()[1] for line in rows if re.match(r" stop \d+ of", line)]
    last = str(walked.next(walked.next(0)) + 1)
    assert counts[-1] == last
    assert (counts == [last]) is in_place
    assert "the line above" in [line.strip() for line in rows]
    assert screen.cursor.x == 0  # the prompt begins on a line of its own
    assert len(session.screen.views) == 4  # each stop and the help are recorded for /export
