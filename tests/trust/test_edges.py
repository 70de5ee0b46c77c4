"""Edge cases of numbers: correct answers or errors, and valid JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from llama_scratch.errors import CheckpointError, ContextLengthError, LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope import (
    attention,
    attribution,
    cache,
    choices,
    diff,
    execution,
    interventions,
    lens,
    neurons,
    rope,
    surprisal,
    tree,
)
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.model import Transformer
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.results import ModelInfo
from llama_scratch.sampling import Sampling, sample
from llama_scratch.tokenizer import LLAMA3_PATTERN, Tokenizer
from tests.helpers.checkpoints import random_weights, tiny_args, write_meta
from tests.helpers.command_line import Result, Runner, one_sentence
from tests.helpers.reference import forward
from tests.helpers.terminal import Terminal

CONTEXT = 64
NO_NUMBERS = "weights are damaged"


@pytest.fixture(scope="module")
def llama(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", context=CONTEXT)


@pytest.fixture(scope="module")
def weights(tiny_dir: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(tiny_dir / "consolidated.00.pth")
    return found


@pytest.fixture
def ask(llama_scratch: Runner, tiny_dir: Path) -> Callable[..., Result]:
    """Run the command line with --json and check that each line is strict JSON."""

    def run(*arguments: str, stdin: bytes = b"", model: Path = tiny_dir) -> Result:
        context = () if "--context" in arguments else ("--context", str(CONTEXT))
        result = llama_scratch("--model-dir", str(model), *context, "--json", *arguments, stdin=stdin)
        for line in result.out.splitlines():
            strict(line)
        return result

    return run


def strict(line: str) -> dict[str, Any]:
    def none(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found: dict[str, Any] = json.loads(line, parse_constant=none)
    return found


def best_after(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits of the next token from the independent float64 implementation."""
    shape = {
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_factor": 32.0,
    }
    return forward(weights, shape, ids).logits[-1]


# --- NaN and Inf in weights -------------------------------------------------------------------

SPOILED = [
    ("tok_embeddings.weight", math.nan, (104,)),
    ("tok_embeddings.weight", math.inf, (104, 3)),
    ("norm.weight", math.nan, (3,)),
    ("output.weight", -math.inf, (7, 3)),
    ("layers.1.attention.wk.weight", math.inf, (3, 3)),
    ("layers.2.feed_forward.w2.weight", math.nan, (3, 3)),
    ("layers.2.attention_norm.weight", math.inf, (2,)),
]


def spoiled(folder: Path, source: Path, name: str, value: float, place: tuple[int, ...]) -> Path:
    """Copy the small model with one weight replaced by NaN or infinity."""
    folder.mkdir()
    for file in ("params.json", "tokenizer.model"):
        (folder / file).write_bytes((source / file).read_bytes())
    weights = torch.load(source / "consolidated.00.pth")
    weights[name] = weights[name].clone()  # the output shares its memory with the embedding
    weights[name][place] = value
    torch.save(weights, folder / "consolidated.00.pth")
    return folder


def views(llama: Llama, ids: list[int]) -> dict[str, Callable[[], object]]:
    """Every library call that reads a text."""
    part = NetworkPart.named("L1.H1", llama.args)
    return {
        "predict": lambda: llama.predict(ids),
        "logits": lambda: llama.logits(ids),
        "generate": lambda: list(llama.generate(ids, 2)),
        "lens": lambda: lens.lens(llama, ids).as_json(),
        "heads": lambda: attention.heads(llama, ids).as_json(),
        "head": lambda: attention.head(llama, ids, 1, 1, 0).as_json(),
        "why": lambda: attribution.why(llama, ids).as_json(),
        "neurons": lambda: neurons.neurons(llama, ids, 1, 3).as_json(),
        "surprisal": lambda: surprisal.surprisal(llama, ids, 5).as_json(),
        "rope": lambda: rope.rope(llama, ids, None, 1, 0).as_json(),
        "cache": lambda: cache.cache(llama, ids).as_json(),
        "tree": lambda: tree.tree(llama, ids, 2, 2).as_json(),
        "diff": lambda: diff.diff(llama, ids, ids[:2], 5).as_json(),
        "choices": lambda: choices.choices(llama, ids, ["a", "b"]).as_json(),
        "ablate": lambda: interventions.changed(llama, [interventions.ablate(llama, part)]).predict(ids),
        "mean": lambda: interventions.mean_ablate(llama, part, ids),
        "patch": lambda: interventions.patch(llama, part, ids, {0: 0}),
        "steer": lambda: interventions.steer(llama, 1, 1.0, ids, ids[:2]),
    }


@pytest.mark.parametrize(("name", "value", "place"), SPOILED, ids=lambda value: str(value))
def test_a_weight_that_is_no_number_is_said_everywhere(
    ask: Callable[..., Result], tiny_dir: Path, tmp_path: Path, name: str, value: float, place: tuple[int, ...]
) -> None:
    """With --json and in every library call: exit code 4, and no numbers are shown."""
    model = spoiled(tmp_path / "spoiled", tiny_dir, name, value, place)
    for precision in ("fp32", "int8"):
        result = ask("--precision", precision, "--prompt", "h h", model=model)
        assert (result.code, NO_NUMBERS in one_sentence(result)) == (4, True)
    llama = Llama.load(model, precision="fp32", context=CONTEXT)
    for look in views(llama, llama.encode("h h")).values():
        with pytest.raises(CheckpointError, match=NO_NUMBERS):
            look()
    walked = execution.walk(llama, llama.encode("h h")).stops  # the walk shows where the NaN starts
    json.dumps([stop.as_json() for stop in walked], allow_nan=False)
    infinite = [value.infinite for stop in walked for value in stop.values]
    assert any(infinite)


def test_a_text_goes_on_where_another_one_met_a_weight_that_is_no_number(tiny_dir: Path, tmp_path: Path) -> None:
    """The damaged embedding of "h" does not affect the next answer via the cache."""
    model = spoiled(tmp_path / "spoiled", tiny_dir, "tok_embeddings.weight", math.nan, (104,))
    llama, whole = (Llama.load(path, precision="fp32", context=CONTEXT) for path in (model, tiny_dir))
    session = Session(
        Loading.ended_with(llama),
        Console(file=io.StringIO()),
        Settings(5, 0, Sampling()),
        lambda *_: Llama.load(model, precision="fp32", context=CONTEXT),
    )
    expected = [candidate.id for candidate in whole.predict("zz").top]
    respond(session, "zz")
    for line in ("zz h", "/diff zz | h", "/surprisal h", "/patch hh", "/force #104", "/choices hz | z"):
        with pytest.raises(CheckpointError, match=NO_NUMBERS):
            respond(session, line)
        assert session.now is not None
        for found in (session.now.prediction, llama.predict("zz")):
            assert [candidate.id for candidate in found.top] == expected


def test_a_session_says_that_weights_are_damaged_and_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    model = spoiled(tmp_path / "spoiled", tiny_dir, "norm.weight", math.nan, (3,))
    with Terminal("--model-dir", str(model), "--no-live") as terminal:
        terminal.wait_for("lists the commands")
        terminal.command("the nation", "damaged")
        terminal.command("/surprisal the nation", "damaged")
        terminal.type("/quit", "enter")
        assert terminal.wait() == 0
        assert "nan" not in terminal.text.replace("nation", "")


# --- A full context ---------------------------------------------------------------------------


@pytest.mark.parametrize("room", [2, 1, 0, -1])
def test_a_prompt_to_the_last_token_of_the_context_and_beyond(
    ask: Callable[..., Result], weights: dict[str, Tensor], room: int
) -> None:
    """Generation fills the context and predicts the token after the last one.

    A longer prompt is an error.
    """
    result = ask("--precision", "fp32", "--generate", "5", "--prompt", "7" * (CONTEXT - 1 - room))
    if room < 0:
        assert (result.code, f"{CONTEXT + 1} tokens, expected at most {CONTEXT}" in one_sentence(result)) == (2, True)
        return
    answer = strict(result.out)
    ids = [token["id"] for token in answer["tokens"]]
    assert (result.code, len(ids)) == (0, CONTEXT - room)
    assert answer["next"]["id"] == int(best_after(weights, ids).argmax())
    generated = answer["generated"]
    assert generated["finish_reason"] == "length"
    assert len(generated["ids"]) == room
    for place, id in enumerate(generated["ids"]):
        assert id == int(best_after(weights, [*ids, *generated["ids"][:place]]).argmax())


def test_a_session_at_the_end_of_the_context(ask: Callable[..., Result]) -> None:
    """Views of the text work; commands that append to it fail and leave it unchanged."""
    full = "7" * (CONTEXT - 1)
    looks = [
        "/surprisal",
        "/tree 2x2",
        "/lens",
        "/attention L0.H0",
        "/why",
        "/neurons 0",
        "/kv",
        "/rope",
        "/step",
        "/arch",
    ]
    adds = ["/force #5", "/choices a | b", "/tree 1x1 1.1", full + "7"]
    nothing = ["/generate 3", "/ablate L0.H0", "/restore", "/context"]
    result = ask("--commands", stdin="\n".join([full, *looks, *adds, *nothing]).encode())
    *answers, context = map(strict, result.out.splitlines())
    assert len(answers) == 1 + len(looks) + len(nothing) - 1
    assert result.err.count("expected at most") == result.err.count("\n") == len(adds)
    assert (result.code, context["tokens"]) == (2, CONTEXT)
    assert next(answer for answer in answers if answer.get("command") == "generate")["ids"] == []


def test_live_prediction_at_the_end_of_the_context(tiny_dir: Path) -> None:
    """The limit is shown while typing and after Enter; a shorter line is answered."""
    with Terminal("--model-dir", str(tiny_dir), "--context", "8", columns=100) as terminal:
        terminal.wait_for("lists the commands")
        terminal.type("7777777")
        terminal.wait_for("8 tokens")
        terminal.type("7")
        terminal.settle()
        assert "entropy" not in terminal.lines[-1] or "8 tokens" not in terminal.lines[-1]
        terminal.type("enter")
        terminal.wait_for("expected at most 8")
        terminal.type("777", "enter")
        terminal.wait_for("4 tokens,")
        terminal.type("/quit", "enter")
        assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("context", "code", "said"),
    [
        ("0", 2, "at least 1"),
        ("-1", 2, "at least 1"),
        ("1", 2, "at most 1"),
        ("2", 0, ""),
        ("1" + "0" * 30, 5, "needs"),
    ],
)
def test_sizes_of_the_context(ask: Callable[..., Result], context: str, code: int, said: str) -> None:
    result = ask("--context", context, "--prompt", "h")
    assert result.code == code
    assert said in (one_sentence(result) if code else "")


def test_views_of_a_text_that_fills_a_context_of_two(ask: Callable[..., Result]) -> None:
    result = ask("--context", "2", "--commands", stdin=b"h\n/lens\n/surprisal\n/attention\n/generate\n/tree 1x1\n")
    assert [strict(line).get("command") for line in result.out.splitlines()] == [
        None, "lens", "surprisal", "generate", "tree",
    ]  # fmt: skip
    assert "the context is 2 tokens" in result.err


# --- Prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "special", "ids"),
    [
        (" ", False, [32]),
        ("\n\n", False, [10, 10]),
        ("\0", False, [0]),
        ("a\0b", False, [97, 0, 98]),
        ("\udce9", False, [239, 191, 189]),  # U+FFFD
        ("\ud800\udc00", False, [240, 144, 128, 128]),  # a pair is a character
        ("<|eot_id|>", True, [309]),
        ("<|end_of_text|><|eot_id|>", True, [301, 309]),
        ("<|begin_of_text|>", True, [300]),
        ("/", False, [47]),
    ],
    ids=repr,
)
def test_prompts_of_nothing_but_odd_characters_or_special_tokens(
    ask: Callable[..., Result], weights: dict[str, Tensor], prompt: str, special: bool, ids: list[int]
) -> None:
    result = ask("--precision", "fp32", "--generate", "2", *(["--special"] * special), "--prompt", prompt)
    answer = strict(result.out)
    assert [token["id"] for token in answer["tokens"]] == [300, *ids]
    assert answer["next"]["id"] == int(best_after(weights, [300, *ids]).argmax())


def test_no_prompt_at_all(ask: Callable[..., Result], llama: Llama) -> None:
    for arguments, stdin in ((["--prompt", ""], b""), (["--prompt", "-"], b""), (["--prompt", "-"], b"\n")):
        result = ask(*arguments, stdin=stdin)
        assert (result.code, "is empty" in one_sentence(result)) == (2, True)
    assert ask(stdin=b"\n\n\n") == Result(0, "", "")
    with pytest.raises(UsageError, match="is empty"):
        llama.predict([])
    with pytest.raises(ContextLengthError):
        llama.predict([5] * (CONTEXT + 1))
    for ids in ([-1], [556], [2**70], [1.0], ["a"], [None], [math.nan]):
        with pytest.raises(UsageError):
            llama.predict(ids)  # type: ignore[arg-type]


# --- Options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", ["temperature 0", "temperature 1e-9", "top-p 0", "top-k 1", "min-p 1", "top-p 1e-300"]
)
def test_options_that_leave_one_token_take_the_best(ask: Callable[..., Result], option: str) -> None:
    name, value = option.split()
    chance = [] if name == "temperature" else ["--temperature", "1"]
    arguments = ["--generate", "8", "--seed", "3", *chance, f"--{name}", value, "--prompt", "the nation"]
    greedy = strict(ask("--generate", "8", "--prompt", "the nation").out)["generated"]
    assert strict(ask(*arguments).out)["generated"] == greedy


@pytest.mark.parametrize("option", ["top-p 1", "top-k 0", "min-p 0", "top-k 1000000000000000000000000000000"])
def test_options_that_leave_all_tokens_change_nothing(ask: Callable[..., Result], option: str) -> None:
    name, value = option.split()
    arguments = ["--generate", "8", "--seed", "3", "--temperature", "1", "--prompt", "the nation"]
    drawn = strict(ask(*arguments).out)["generated"]
    assert strict(ask(*arguments, f"--{name}", value).out)["generated"] == drawn
    assert drawn != strict(ask("--generate", "8", "--prompt", "the nation").out)["generated"]


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 1e9, 1e308])
def test_temperatures_at_the_ends(temperature: float) -> None:
    """Toward 0 only the most likely tokens are drawn, toward infinity all alike."""
    logits = torch.tensor([3.0, -2.0, 3.0, 2.999, -1e30])
    sampling = Sampling(temperature=temperature, seed=1)
    generator = sampling.generator()
    drawn = [sample(logits, sampling, generator) for _ in range(400)]
    shares = [drawn.count(id) / 400 for id in range(5)]
    cold = [0.5, 0, 0.5, 0, 0]
    hot = [0.2] * 5 if temperature > 1e30 else [0.25, 0.25, 0.25, 0.25, 0]
    assert shares == pytest.approx(cold if temperature < 1 else hot, abs=0.08)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_seeds_at_the_ends_repeat(ask: Callable[..., Result], seed: int) -> None:
    arguments = ["--generate", "5", "--temperature", "1", "--seed", str(seed), "--prompt", "the"]
    first, again = (strict(ask(*arguments).out)["generated"] for _ in range(2))
    assert first == again


REFUSED = [
    *(f"temperature {value}" for value in ("-1", "nan", "inf", "-inf", "1e400", "x")),
    *(f"top-p {value}" for value in ("-0.1", "1.1", "nan")),
    *(f"min-p {value}" for value in ("-0.1", "1.1", "nan")),
    *(f"top-k {value}" for value in ("-1", "1.5", "x")),
    *(f"seed {value}" for value in ("-1", 2**63, 2**64 - 1, 10**40)),
    *(f"top {value}" for value in ("0", "-1", "1.5")),
    *(f"generate {value}" for value in ("-1", "x")),
    *(f"threads {value}" for value in ("0", "-1", "100000", 10**30)),
    *(f"rope-factor {value}" for value in ("0", "-1", "0.5", "nan", "inf")),
]


@pytest.mark.parametrize("option", REFUSED)
def test_options_out_of_their_range_are_refused(ask: Callable[..., Result], option: str) -> None:
    name, value = option.split()
    result = ask("--prompt", "h", f"--{name}", value)
    assert one_sentence(result)
    assert result.code == 2


def test_a_seed_that_is_too_large_is_told_the_largest(ask: Callable[..., Result]) -> None:
    assert f"from 0 to {2**63 - 1}." in one_sentence(ask("--seed", str(2**64 - 1), "--prompt", "h"))


@pytest.mark.parametrize("value", [1, 556, 557, 10**30])
def test_more_candidates_than_there_are(ask: Callable[..., Result], value: int) -> None:
    answer = strict(ask("--top", str(value), "--prompt", "h").out)
    assert len(answer["top"]) == min(value, 556)
    assert sum(c["probability"] for c in answer["top"]) == pytest.approx(1) or value == 1


@pytest.mark.parametrize("value", [0, 1, 10**30])
def test_numbers_of_tokens_to_generate(ask: Callable[..., Result], value: int) -> None:
    answer = strict(ask("--generate", str(value), "--prompt", "h").out)
    assert len(answer.get("generated", {"ids": []})["ids"]) == min(value, CONTEXT - 2)


# --- A vocabulary of one ----------------------------------------------------------------------


@pytest.fixture
def one() -> Llama:
    """A model whose vocabulary is only the unknown token."""
    args = tiny_args(vocab_size=1)
    model = Transformer(args)
    model.load_state_dict(random_weights(args), strict=False)
    tokenizer = Tokenizer({}, {"<unk>": 0}, LLAMA3_PATTERN, unknown="<unk>")
    return Llama(model.requires_grad_(False), tokenizer, ModelInfo("one", "meta", "fp32", "cpu", 1), context=16)


def test_a_vocabulary_of_one_is_certain_of_it(one: Llama) -> None:
    found = one.predict("ab", top=5)
    assert [(c.id, c.probability) for c in found.top] == [(0, 1.0)]
    assert found.entropy_bits == 0
    for temperature in (0.0, 1e-9, 1.0, 1e9):
        assert [step.id for step in one.generate("a", 99, temperature=temperature, seed=1)] == [0] * 15


def test_views_with_a_vocabulary_of_one(one: Llama) -> None:
    """Each view works or raises an error.

    Head scores need random ordinary tokens, and there are none.
    """
    refused = {}
    for name, look in views(one, [0, 0, 0]).items():
        try:
            found = look()
        except LlamaScratchError as error:
            refused[name] = str(error)
        else:
            if isinstance(found, dict):
                json.dumps(found, allow_nan=False)
    assert refused.keys() == {"heads", "head"}
    assert all("0 ordinary tokens" in said for said in refused.values())


@pytest.mark.parametrize(("size", "vocabulary"), [(1, None), (257, b"YQ== 0\n"), (256, b"")])
def test_checkpoints_with_next_to_no_vocabulary_are_refused(
    ask: Callable[..., Result], tmp_path: Path, size: int, vocabulary: bytes | None
) -> None:
    params = json.loads((write_meta(tmp_path / "whole") / "params.json").read_text())
    model = write_meta(tmp_path / "small", params=params | {"vocab_size": size})
    if vocabulary is not None:
        (model / "tokenizer.model").write_bytes(vocabulary)
    result = ask("--prompt", "a", model=model)
    assert result.code == 4
    one_sentence(result)
