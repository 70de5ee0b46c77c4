"""/source: every part is found by each of its names, with its location."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import llama_scratch
from llama_scratch import config, model
from llama_scratch.errors import UsageError
from llama_scratch.inference import engine
from llama_scratch.llama import Llama
from llama_scratch.microscope import source as module
from llama_scratch.microscope.source import CONCEPTS, Source, concepts, names, source
from llama_scratch.render.page import Table
from llama_scratch.render.pages import source as pages
from llama_scratch.repl.commands import COMMANDS, completions, run_command
from llama_scratch.repl.session import Session
from tests.helpers.processes import loaded_after
from tests.helpers.sessions import run, shown, started

ROOT = Path(llama_scratch.__file__).parent.parent


@pytest.fixture
def session(tiny_dir: Path) -> Session:
    return started(Llama.load(tiny_dir, precision="fp32", device="cpu"))


def names_of(found: Source) -> list[str]:
    return [passage.name for passage in found.passages]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rope", ["model.rope_frequencies", "model.rotations", "model.apply_rotary_emb"]),
        ("norm", ["model.RMSNorm"]),
        ("attention", ["model.Attention", "model.attend"]),
        ("Feed-Forward", ["model.FeedForward"]),
        ("apply_rotary_emb", ["model.apply_rotary_emb"]),
        ("apply_rotary_emb()", ["model.apply_rotary_emb"]),
        ("KVCache.update", ["model.KVCache.update"]),
        ("kvcache.update", ["model.KVCache.update"]),
        ("model.attend", ["model.attend"]),
        ("llama_scratch.model.attend", ["model.attend"]),
        ("_grown", ["model.KVCache._grown"]),
        ("CHUNK", ["precision.memory_estimate.CHUNK"]),
        ("places", ["hooks.places"]),  # a method has the same name
        ("model", ["model.py"]),
        ("model.py", ["model.py"]),
        ("checkpoint.meta.reader", ["checkpoint/meta/reader.py"]),
        ("meta/reader.py", ["checkpoint/meta/reader.py"]),
        ("llama_scratch/model.py", ["model.py"]),
        ("model.py:1", ["model.py"]),  # outside of all definitions
        (f"model.py:{model.KVCache.update.__code__.co_firstlineno + 1}", ["model.KVCache.update"]),
        (f"llama_scratch/model.py:{model.KVCache.__init__.__code__.co_firstlineno}", ["model.KVCache.__init__"]),
        ("kernels.cpp", ["precision/kernels.cpp"]),
        ("kernels.cpp.operators", ["precision/kernels.cpp.operators"]),
        ("cpp/rows.h", ["precision/cpp/rows.h"]),
        ("cpp/layer.h.the_layer", ["precision/cpp/layer.h.the_layer"]),
        ("llama_scratch/precision/cpp/layer.h:1", ["precision/cpp/layer.h"]),
        ("kernels.py", ["precision/kernels.py"]),
        ("kernels.build", ["precision.kernels.build"]),
        ("/surprisal", ["microscope.surprisal.surprisal"]),
        ("choices", ["microscope.choices.choices"]),
        ("/generate", ["repl.commands.text._generate"]),
    ],
)
def test_each_kind_of_name(name: str, found: list[str]) -> None:
    """A concept, a function, a method, a constant, a module, a command."""
    assert names_of(source(name)) == found


@pytest.mark.parametrize("name", CONCEPTS)
def test_each_concept_is_there(name: str) -> None:
    """So renamed and removed definitions are noticed."""
    assert len(source(name).passages) == len(CONCEPTS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_leads_to_what_computes_it(name: str) -> None:
    """To the microscope if it uses that, else to its own function."""
    found = names_of(source(f"/{name}"))
    own = COMMANDS[name].run
    whole = inspect.getsource(own)
    if "llama_scratch.microscope" in whole:
        assert all(other.startswith("microscope.") for other in found)
    else:
        assert found == [f"{own.__module__.removeprefix('llama_scratch.')}.{own.__name__}"]


def test_every_name_that_is_offered_leads_somewhere() -> None:
    """Completion offers only names with a unique result."""
    offered = names()
    assert len(offered) == len(set(offered)) > 500
    assert {"rope", "KVCache", "model.KVCache", "model.KVCache.update", "model.py", "/lens"} <= set(offered)
    assert not any("._" in f".{name}" for name in offered)
    for name in offered:
        assert source(name).passages


@pytest.mark.parametrize(
    "part",
    [
        model.RMSNorm,
        model.KVCache.update,
        model.attend,
        config.ModelArgs.weight_shapes,
        engine.Engine.forward_with_hooks,
    ],
)
def test_the_text_is_that_of_the_part(part: type) -> None:
    """Byte for byte as in Python's inspect, with the right line numbers."""
    passage = source(f"{part.__module__}.{part.__qualname__}").passages[0]
    assert passage.text == inspect.getsource(part).rstrip("\n")
    assert passage.first_line == inspect.getsourcelines(part)[1]
    lines = (ROOT / passage.path).read_text(encoding="utf-8").splitlines()
    assert lines[passage.first_line - 1 : passage.last_line] == passage.text.splitlines()


def test_decorators_and_the_comment_above_belong_to_it() -> None:
    """A section's heading alone does not, a section's comment does."""
    assert source("KVCache.capacity").passages[0].text.lstrip().startswith("@property\n")
    assert source("rope_frequencies").passages[0].text.startswith("# --- Rotary embedding -")
    assert "Treat each query and key as" in source("rope").passages[0].text
    assert source("memory_estimate.CHUNK").passages[0].text.startswith("# Tokens per chunk")
    assert source("KVCache").passages[0].text.startswith("class KVCache:")
    assert source("causal_mask").passages[0].text.startswith("def causal_mask")


def test_a_file_is_shown_whole() -> None:
    found = source("model").passages[0]
    assert (found.path, found.first_line) == ("llama_scratch/model.py", 1)
    assert found.text + "\n" == Path(model.__file__).read_text(encoding="utf-8")


def test_a_section_of_cpp_goes_to_the_next_heading() -> None:
    """With its heading; the last one to the end. A line inside finds the section."""
    found = source("cpp/panels.h.activations").passages[0]
    text = (ROOT / "llama_scratch" / "precision" / "cpp" / "panels.h").read_text(encoding="utf-8")
    assert found.text.startswith("// --- Activations ---")
    assert text.partition(found.text)[2].startswith("\n\n// --- ")
    assert source(f"cpp/panels.h:{found.last_line}").passages == (found,)
    assert found.path == "llama_scratch/precision/cpp/panels.h"


def test_each_place_that_a_view_prints_is_taken() -> None:
    """As in the list of concepts, and as in the heading of a passage."""
    listed = pages.contents(concepts()).parts[0]
    assert isinstance(listed, Table)
    places = {row[0].text: row[2].text for row in listed.rows}
    for concept, (passage, *_) in concepts().items():
        for place in (places[concept], f"{passage.path}:{passage.first_line}"):
            assert source(place).passages == (passage,)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("atend", "No part of this program is named 'atend'. Did you mean attend"),
        ("/lenz", "Did you mean /lens"),
        ("qqqqqqqq", "No part of this program is named 'qqqqqqqq'."),
        ("\x1b[31m", "No part of this program is named"),
        ("x" * 1000, "…'"),
        ("update", "Choose one: model.KVCache.update, "),
        ("forward", "Choose one: model.RMSNorm.forward, model.Attention.forward, "),
        ("forward", ", …."),
        ("", "is named ''"),
        (".", "is named '.'"),
        ("../setup", "No part of this program is named"),
        ("model.py:0", "model.py has no line 0. Its lines are 1 to "),
        ("model.py:99999", "model.py has no line 99999. Its lines are 1 to "),
        ("nothing.py:5", "is named 'nothing.py:5'"),
        ("model.py:x", "is named 'model.py:x'"),
        ("loading.py:-1", "No part of this program is named"),
    ],
)
def test_what_is_not_there_or_not_one(name: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        source(name)
    message = str(caught.value)
    assert sentence in message
    assert message.isprintable()


def test_it_needs_neither_torch_nor_the_parts_themselves() -> None:
    """Files are read, not imported."""
    loaded = loaded_after("from llama_scratch.microscope.source import source, names; source('rope'), names()")
    assert "llama_scratch.microscope.source" in loaded
    assert not {"torch", "numpy", "rich", "llama_scratch.model"} & loaded


def test_the_command_and_its_completion(session: Session) -> None:
    """The facts contain the text. Without a name the concepts are listed.

    Neither needs a text or a model.
    """
    facts = run(session, "/source attend")
    (passage,) = facts["passages"]
    assert (passage["name"], passage["path"]) == ("model.attend", "llama_scratch/model.py")
    assert ast.parse(passage["text"]).body[0].name == "attend"
    assert list(run(session, "/source")["concepts"]) == list(CONCEPTS)
    assert "/source apply_rotary_emb" in completions(session, "/source apply_ro")


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("line", ["/source", "/source KVCache.update", "/source rope", "/source int8"])
def test_it_fits_the_screen(session: Session, width: int, plain: bool, line: str) -> None:
    """With the location of each passage."""
    session.change_settings(plain=plain)
    reply = run_command(session, line)[1]
    assert reply is not None
    screen = shown(reply.view or "", width)
    assert plain or all(len(row) <= width for row in screen.splitlines())
    if line == "/source KVCache.update":
        first = source("KVCache.update").passages[0].first_line
        assert f"llama_scratch/model.py:{first}" in screen or f"llama_scratch/model.py, line {first}:" in screen
        assert "self, layer: int" in " ".join(screen.split())


def test_a_file_that_was_read_is_not_read_again() -> None:
    """Completion runs at every key."""
    names()
    before = module.lines.cache_info().misses
    names()
    assert module.lines.cache_info().misses == before
