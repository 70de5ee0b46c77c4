"""/why, /ablate, /patch, /steer and /restore: arguments, effects, consistency."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_toolkit.formatted_text import to_plain_text
from rich.cells import cell_len
from rich.console import Console

from llama_scratch.errors import LlamaScratchError, UsageError
from llama_scratch.llama import Llama
from llama_scratch.microscope import attribution
from llama_scratch.microscope.effect import effect
from llama_scratch.microscope.interventions import Intervention, ablate, changed, mean_ablate
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.model import Attention
from llama_scratch.render.answer import before_and_after
from llama_scratch.render.text import percent, visible
from llama_scratch.repl.commands import completions, run_command
from llama_scratch.repl.conversation import checked
from llama_scratch.repl.dispatch import respond
from llama_scratch.repl.editor import _changes, _message
from llama_scratch.repl.live import LivePredictor
from llama_scratch.repl.loading import Loading
from llama_scratch.repl.session import Session
from llama_scratch.repl.state import Settings
from llama_scratch.repl.transitions import intervene
from llama_scratch.sampling import GREEDY
from llama_scratch.system.progress import Progress
from tests.helpers.assertions import assert_rejected
from tests.helpers.checkpoints import write_meta

PROMPT = "the rest is not"
SAME_LENGTH = "in the end it is"


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> Llama:
    return Llama.load(tiny_dir, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def smollm2(smollm2_fp32_path: Path) -> Llama:
    return Llama.load(smollm2_fp32_path, precision="fp32", device="cpu")


@pytest.fixture
def session(tiny: Llama) -> Session:
    """A session without a terminal on a small model with a BOS token."""
    return started(tiny)


@pytest.fixture
def real(smollm2: Llama) -> Session:
    return started(smollm2)


def started(llama: Llama, *, width: int = 80, interactive: bool = False, generate: int = 0) -> Session:
    def open(source: str, precision: str, progress: Progress) -> Llama:
        return Llama.load(source, precision=precision, device="cpu", progress=progress)

    console = Console(file=io.StringIO(), width=width)
    settings = Settings(5, generate, GREEDY)
    return Session(Loading.ended_with(llama), console, settings, open, interactive=interactive)


def run(session: Session, *lines: str) -> dict[str, Any]:
    """Run lines and return the last answer; check its JSON and all views."""
    for line in lines:
        output, reply = respond(session, line)
        if reply is not None and reply.view is not None:
            assert shown(reply.view).strip()
    facts: dict[str, Any] = json.loads(json.dumps(output, allow_nan=False))
    return facts


def shown(view: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        console.print(view, markup=False, highlight=False)
    return captured.get()


def state(session: Session) -> tuple[Any, ...]:
    return (
        session.state.snapshots,
        session.state.interventions,
        session.llama,
        session.state.turns.copy(),
        session.state.page,
    )


def rejected(session: Session, line: str) -> str:
    """Return the error message for a line. Check that the session is unchanged."""
    before = state(session)
    message = assert_rejected(lambda: respond(session, line), LlamaScratchError, exact=False)
    assert state(session) == before
    return message


def prompt_of(session: Session) -> str:
    return to_plain_text(_message(session))


# --- Persistence -----------------------------------------------------------------------------


def test_an_ablation_stays_on_and_each_answer_has_its_effect(real: Session, smollm2: Llama) -> None:
    """The answers before and after match those of two separate networks."""
    run(real, "The capital of France is")
    facts = run(real, "/ablate L23.H4")
    network = changed(smollm2, [ablate(smollm2, NetworkPart(23, "head", 4))])
    assert (facts["command"], facts["interventions"]) == ("ablate", ["-L23.H4"])
    assert facts["before"]["text"] == " Paris"
    assert facts["before"]["probability"] == pytest.approx(0.773, abs=1e-3)
    after = network.predict("The capital of France is").next
    assert (facts["after"]["id"], facts["after"]["probability"]) == (
        after.id, pytest.approx(after.probability, abs=1e-4)
    )  # fmt: skip
    assert facts["kl_bits"] > 0.1
    answer = run(real, "The opposite of hot is")
    assert answer["next"]["logprob"] == pytest.approx(network.predict("The opposite of hot is").next.logprob, abs=1e-4)
    expected = effect(smollm2, network, smollm2.encode("The opposite of hot is"), ["-L23.H4"]).as_json()
    assert answer["effect"]["interventions"] == ["-L23.H4"]
    for side in ("before", "after"):
        assert answer["effect"][side] == pytest.approx(expected[side], abs=1e-4)
    assert answer["effect"]["after"]["id"] == answer["next"]["id"]
    assert "effect" not in run(real, "/restore", "The opposite of hot is")


def test_without_a_text_it_is_on_for_the_first(session: Session) -> None:
    facts = run(session, "/ablate L1.H2 L2.ffn")
    assert facts == {"command": "ablate", "interventions": ["-L1.H2", "-L2.ffn"]}
    assert session.state.snapshots == ()
    assert run(session, PROMPT)["effect"]["interventions"] == ["-L1.H2", "-L2.ffn"]


def test_what_is_on_is_listed(session: Session) -> None:
    assert run(session, "/ablate")["interventions"] == []
    facts = run(session, PROMPT, "/ablate L1.H2", "/ablate L1.ffn mean", "/ablate")
    assert facts["interventions"] == [
        {"label": "-L1.H2", "meaning": "L1.H2 is zero-ablated."},
        {"label": "~L1.ffn", "meaning": f"L1.ffn is its mean over {len(session.ids)} tokens."},
    ]


def test_the_same_once_more_takes_the_place_of_the_first(session: Session) -> None:
    """Labels are unique, so /restore LABEL is unambiguous."""
    run(session, PROMPT, "/ablate L1.H2 L1.H2", "/ablate L0", "/ablate L1.H2")
    assert session.state.labels == ["-L0", "-L1.H2"]
    run(session, "/steer 1 2 ab | ac", "/steer 1 2 ab | ac")
    assert session.state.labels == ["-L0", "-L1.H2", "+2·(b−c)@L1"]


def test_directions_with_the_same_name_add_up(session: Session) -> None:
    """Labels name the first words that differ, which can be the same for other texts."""
    lines = ["/steer 1 2 ab | ac", "/steer 1 2 ab d | ac e", "/steer 1 2 ab f | ac g"]
    names = ["+2·(b−c)@L1", "+2·(b−c)@L1#2", "+2·(b−c)@L1#3"]
    run(session, PROMPT, *lines)
    assert session.state.labels == names
    assert len({intervention.meaning for intervention in session.state.interventions}) == 3
    run(session, lines[1])
    assert session.state.labels == [names[0], names[2], names[1]]
    run(session, f"/restore {names[1]}")
    assert session.state.labels == [names[0], names[2]]


@pytest.mark.parametrize("name", ["L1", "L1.attn", "L1.ffn", "L1.H3", "L1.N9", "1.3"])
def test_a_mean_is_over_the_text_so_far(session: Session, tiny: Llama, name: str) -> None:
    answer = run(session, PROMPT, f"/ablate {name} mean")
    part = NetworkPart.named(name, tiny.args)
    network = changed(tiny, [mean_ablate(tiny, part, session.ids)])
    assert answer["interventions"] == [f"~{part.name}"]
    assert answer["after"]["logprob"] == pytest.approx(network.predict(session.ids).next.logprob, abs=1e-4)


def test_restore_takes_off_one_or_all(session: Session, tiny: Llama) -> None:
    plain = run(session, PROMPT)
    run(session, "/ablate L1.H2 L0.ffn L2")
    assert "'-L9' is not an active intervention. Use one of -L1.H2, -L0.ffn, -L2." in rejected(session, "/restore -L9")
    assert completions(session, "/restore -L1") == ["/restore -L1.H2"]
    assert run(session, "/restore -L0.ffn")["interventions"] == ["-L1.H2", "-L2"]
    network = changed(tiny, [ablate(tiny, NetworkPart(1, "head", 2)), ablate(tiny, NetworkPart(2, "layer"))])
    assert session.state.snapshots[-1].prediction.next.logprob == pytest.approx(
        network.predict(session.ids).next.logprob, abs=1e-4
    )
    assert run(session, "/restore")["interventions"] == []
    assert session.llama is tiny
    assert session.state.snapshots[-1].prediction.next.logprob == pytest.approx(plain["next"]["logprob"], abs=1e-4)
    assert "No interventions are active" in rejected(session, "/restore")
    assert "No interventions are active" in rejected(session, "/restore -L2")


def test_patch_puts_one_activation_in(session: Session) -> None:
    """Patching the whole residual stream gives the other text's answer."""
    other = run(session, SAME_LENGTH)["next"]
    this = run(session, PROMPT)["next"]
    assert other["id"] != this["id"]
    facts = run(session, f"/patch L0@all {SAME_LENGTH}")
    assert facts["interventions"] == ["L0@all"]
    assert facts["after"]["id"] == other["id"]
    assert facts["after"]["probability"] == pytest.approx(other["probability"], abs=1e-4)
    run(session, "/restore")
    assert run(session, f"/patch L2@-1 {SAME_LENGTH}")["interventions"] == [f"L2@{len(session.ids) - 1}"]
    run(session, "/restore")
    # The texts differ in length, so -1 is the last position of each.
    longer = run(session, f"/patch L2@-1 x{SAME_LENGTH}")
    assert longer["kl_bits"] > 0
    run(session, "/restore", f'/patch 1.H3@2 "{SAME_LENGTH}"')
    assert session.state.labels == ["L1.H3@2"]


def test_patch_with_itself_changes_nothing(session: Session) -> None:
    for name in ("L1@all", "L0.H1@3", "L2.attn@-2", "L1.ffn@0", "L1.N4@1"):
        assert run(session, PROMPT, f"/patch {name} {PROMPT}")["kl_bits"] == pytest.approx(0, abs=1e-9)
        run(session, "/restore")


def test_patch_without_a_place_is_the_map_of_all(session: Session) -> None:
    """Causal tracing leaves the session unchanged."""
    run(session, PROMPT)
    before = session.state.snapshots
    facts = run(session, f"/patch {SAME_LENGTH}")
    assert [len(row) for row in facts["moved"]] == [len(session.ids)] * 4
    assert facts["moved"][3][-1] == pytest.approx(1, abs=1e-4)
    assert facts["moved"][0][0] == pytest.approx(0, abs=1e-4)  # BOS is the same
    assert (session.state.snapshots, session.state.interventions) == (before, ())


def test_steering_by_0_changes_nothing(session: Session) -> None:
    facts = run(session, PROMPT, "/steer 1 0 ab | ac")
    assert facts["interventions"] == ["+0·(b−c)@L1"]
    assert facts["kl_bits"] == pytest.approx(0, abs=1e-9)
    assert run(session, "/restore +0·(b−c)@L1")["interventions"] == []
    assert run(session, "/steer L1 -1.5 ab | ac")["interventions"] == ["-1.5·(b−c)@L1"]


def test_interventions_go_on_in_another_precision_and_end_with_another_model(
    session: Session, tiny: Llama, tmp_path: Path
) -> None:
    run(session, PROMPT, "/ablate L1.H2", f"/patch L2@3 {SAME_LENGTH}")
    labels = session.state.labels
    run(session, "/precision int8")
    assert session.state.labels == labels
    assert session.intact.info.precision == session.llama.info.precision == "int8"
    assert session.llama is not session.intact
    expected = effect(session.intact, session.llama, session.ids, labels).as_json()
    assert run(session, PROMPT)["effect"]["kl_bits"] == pytest.approx(expected["kl_bits"], abs=1e-3)
    run(session, "/precision fp32")
    heads = "layers.1.attention.heads"
    found: list[torch.Tensor] = []
    session.llama.engine.forward_with_hooks(
        [session.ids], {heads: lambda value, _start: found.append(value[0, :, 2].clone())}
    )
    assert not found[0].any()
    other = write_meta(tmp_path / "Other", seed=3)
    answer = run(session, f"/model {other}", PROMPT)
    assert session.state.interventions == ()
    assert session.llama is session.intact
    assert "effect" not in answer
    del tiny


def test_a_model_that_cannot_be_loaded_leaves_what_is_on(session: Session, tmp_path: Path) -> None:
    run(session, PROMPT, "/ablate L1.H2")
    rejected(session, f"/model {tmp_path / 'nothing'}")
    rejected(session, "/precision fp8")


def test_undo_goes_back_to_the_network_that_answered(session: Session, tiny: Llama) -> None:
    """The interventions match the restored answer, and nothing is recomputed."""
    plain = run(session, PROMPT)
    run(session, "/ablate L1.H2")
    ablated = session.state.snapshots[-1].prediction
    second = run(session, SAME_LENGTH)
    run(session, "/ablate L0.ffn", "/restore")
    cached = tiny.engine.cached_tokens
    for expected, labels in (
        (None, ["-L1.H2", "-L0.ffn"]),
        (second["next"], ["-L1.H2"]),
        ({"id": ablated.next.id}, ["-L1.H2"]),
        (plain["next"], []),
    ):
        answer = run(session, "/undo")
        assert session.state.labels == labels
        assert expected is None or answer["next"]["id"] == expected["id"]
        found = session.llama.predict(session.ids).next if labels else tiny.predict(session.ids).next
        assert found.logprob == pytest.approx(answer["next"]["logprob"], abs=1e-4)
    assert session.llama is tiny
    assert cached
    assert "nothing to undo" in rejected(session, "/undo")


def test_what_goes_on_from_an_intervention_is_of_the_changed_network(session: Session, tiny: Llama) -> None:
    """Covers /generate, /force, an empty line and --generate."""
    network = changed(tiny, [ablate(tiny, NetworkPart(1, "layer"))])
    run(session, PROMPT, "/ablate L1")
    expected = network.complete(session.ids, 6).ids
    assert expected != tiny.complete(session.ids, 6).ids
    assert run(session, "/generate 6")["ids"] == list(expected)
    accepted = run(session, "")
    assert accepted["effect"]["interventions"] == ["-L1"]
    assert [token["id"] for token in accepted["tokens"]][-6:] == list(expected)
    assert run(session, "/force #65")["effect"]["interventions"] == ["-L1"]
    session.change_settings(generate=3)
    answer = run(session, PROMPT)
    assert answer["generated"]["ids"] == list(network.complete(PROMPT, 3).ids)
    assert answer["effect"]["interventions"] == ["-L1"]


def test_live_prediction_is_of_the_changed_network(session: Session, tiny: Llama) -> None:
    live = LivePredictor(session, lambda: None)
    live._requested = PROMPT
    run(session, "/ablate L1")
    found = live._score(PROMPT).candidates
    network = changed(tiny, [ablate(tiny, NetworkPart(1, "layer"))])
    assert [c.id for c in found] == [c.id for c in network.predict(PROMPT).top]
    run(session, "/restore")
    assert [c.id for c in live._score(PROMPT).candidates] == [c.id for c in tiny.predict(PROMPT).top]


def test_a_chat_goes_on_with_them(real: Session, smollm2: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    real.update(chat=checked(real.llama))
    real.change_settings(generate=4)
    plain = run(real, "What is the capital of France?")
    run(real, "/ablate L28.ffn L29.ffn")
    changed_answer = run(real, "/chat on", "What is the capital of France?")
    network = changed(smollm2, [ablate(smollm2, NetworkPart(28, "ffn")), ablate(smollm2, NetworkPart(29, "ffn"))])
    ids = [token["id"] for token in changed_answer["tokens"]]
    assert changed_answer["generated"]["ids"] == list(network.complete(ids, 4).ids)
    assert changed_answer["generated"]["ids"] != plain["generated"]["ids"]
    assert prompt_of(real).endswith(" chat[-L28.ffn -L29.ffn]> ")
    monkeypatch.setattr(attribution, "LEFT_OUT", 2)
    found = run(real, "/why")
    assert [token["id"] for token in found["tokens"]] == real.ids
    assert found["answer"]["id"] == real.state.snapshots[-1].prediction.next.id


# --- Display --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [120, 80, 40])
def test_the_prompt_shows_what_is_on(tiny: Llama, width: int) -> None:
    """Labels are cut if they leave too little room for typing."""
    session = started(tiny, width=width)
    name = tiny.info.name if width >= 60 else ""
    assert prompt_of(session) == f"{name}> "
    run(session, "/ablate L1.H2")
    assert prompt_of(session) == f"{name}[-L1.H2]> "
    run(session, "/ablate L0.ffn")
    assert prompt_of(session) == (f"{name}[-L1.H2 -L0.ffn]> " if width > 40 else "[-L1.H2 +1]> ")
    run(session, "/ablate L2.attn L0.H1 L0.H2", "/steer 1 2 ab | ac")
    assert prompt_of(session).startswith(f"{name}[-L1.H2 ")
    assert cell_len(prompt_of(session)) <= len(name) + width // 3 + 4


@pytest.mark.parametrize(
    ("labels", "room", "expected"),
    [
        ([], 10, ""),
        (["-L5.H3"], 10, "[-L5.H3]"),
        (["-L5.H3", "-L6"], 10, "[-L5.H3 -L6]"),
        (["-L5.H3", "-L6"], 9, "[-L5.H3 +1]"),
        (["-L5.H3", "-L6", "-L7"], 12, "[-L5.H3 +2]"),
        (["-L5.H3", "-L6", "-L7"], 13, "[-L5.H3 -L6 +1]"),
        (["+2·(love−hate)@L12"], 13, "[+2·(love−hat…]"),
        (["+2·(love−hate)@L12", "-L6"], 13, "[+2·(love−… +1]"),
        (["+2·(爱−恨)@L12"], 9, "[+2·(爱−…]"),
    ],
)
def test_labels_that_do_not_fit_are_counted_or_cut(labels: list[str], room: int, expected: str) -> None:
    found = _changes(labels, room)
    assert found == expected
    assert cell_len(found) <= room + 2 or not labels


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_sees_before_and_after(smollm2: Llama, width: int) -> None:
    """Shown below each answer and after the command, but not after /restore."""
    session = started(smollm2, width=width, interactive=True)
    file = session.screen.console.file
    assert isinstance(file, io.StringIO)
    respond(session, "The capital of France is")
    reply = run_command(session, "/ablate L23.H4 L29.ffn")[1]
    assert reply is not None
    text = shown(reply.view, width)
    assert "With -L23.H4, -L29.ffn" in text
    assert " ".join(text.split()).count("77.3 %") == 2  # in the finding and in the table
    assert max(map(len, text.splitlines())) <= width
    file.truncate(0)
    respond(session, "The capital of France is")
    text = " ".join(file.getvalue().split())
    assert "-L23.H4, -L29.ffn: ␣Paris 77.3 % → " in text
    file.truncate(0)
    respond(session, "/restore")
    assert "77.3 %" in file.getvalue()


def test_an_effect_that_changes_the_answer_names_both(tiny: Llama) -> None:
    network = changed(tiny, [ablate(tiny, NetworkPart(1, "layer"))])
    found = effect(tiny, network, tiny.encode(PROMPT), ["-L1"])
    (first, after_first), (second, after_second) = found.answers
    text = " ".join(shown(before_and_after(found)).split())
    for before, after in ((first, after_first), (second, after_second)):
        percents = f"{percent(before.probability)} → {percent(after.probability)}"
        assert f"{visible(before.text).plain} {percents}" in text
    assert first.id == tiny.predict(PROMPT).next.id
    assert second.id == network.predict(PROMPT).next.id != first.id


def test_a_screen_reader_gets_lines(session: Session) -> None:
    session.change_settings(plain=True)
    run(session, PROMPT)
    for line in ("/why", "/ablate L1", f"/patch {SAME_LENGTH}"):
        reply = run_command(session, line)[1]
        assert reply is not None
        text = shown(reply.view, 10_000)
        assert "█" not in text
        assert len(text.splitlines()) > 3


def test_completion_knows_parts_tokens_and_labels(session: Session) -> None:
    run(session, PROMPT)
    assert completions(session, "/why ") == [
        f"/why {visible(c.text).plain}" for c in session.state.snapshots[-1].prediction.top
    ]
    assert all(NetworkPart.named(line.split()[1], session.llama.args) for line in completions(session, "/ablate L"))


# --- /why -------------------------------------------------------------------------------------


def test_why_is_about_the_answer_or_a_token_or_two(
    real: Session, smollm2: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word gets a leading space; candidates, JSON, ␣ and ids are taken literally."""
    run(real, "The capital of France is")
    monkeypatch.setattr(attribution, "LEFT_OUT", 0)
    monkeypatch.setattr(attribution, "CLAIMS", 0)
    monkeypatch.setattr(attribution, "_back", lambda _llama, _model, streams, *_: [0.0] * streams[0].shape[1])
    paris, london = (smollm2.tokenizer.encode(text)[0] for text in (" Paris", " London"))
    bare = smollm2.tokenizer.encode("Paris")[0]
    for line, answer, versus in (
        ("/why", paris, None),
        ("/why London", london, None),
        ("/why ␣London", london, None),
        ('/why " London"', london, None),
        ('/why "Paris"', bare, None),
        (f"/why #{london}", london, None),
        ("/why Paris vs London", paris, london),
        (f"/why ␣Paris  vs  #{london}", paris, london),
        ('/why " Paris" vs "Paris"', paris, bare),
        ("/why vs London", paris, london),
        ("/why <|im_end|>", smollm2.tokenizer.special_tokens["<|im_end|>"], None),
    ):
        facts = run(real, line)
        assert facts["answer"]["id"] == answer, line
        assert (facts["versus"] and facts["versus"]["id"]) == versus, line
        total = sum(contribution["logit"] for contribution in facts["contributions"])
        assert total + facts["remainder"] == pytest.approx(facts["logit"])
        assert abs(facts["remainder"]) <= 1e-3


def test_why_with_an_intervention_is_of_the_changed_network(session: Session) -> None:
    facts = run(session, PROMPT, "/ablate L1.H2", "/why")
    assert facts["answer"]["id"] == session.state.snapshots[-1].prediction.next.id
    assert {c["name"]: c["logit"] for c in facts["contributions"]}["L1.H2"] == 0
    assert "interventions" not in {c["name"] for c in facts["contributions"]}
    assert abs(facts["remainder"]) < 1e-3


def test_why_counts_bos_as_a_token(session: Session) -> None:
    facts = run(session, PROMPT, "/why")
    assert facts["influences"][0]["token"]["text"] == "<|begin_of_text|>"
    assert facts["influences"][0]["without"] is not None


def test_why_of_one_token_and_of_many(session: Session) -> None:
    session.predict([300])
    facts = run(session, "/why")
    assert [influence["without"] for influence in facts["influences"]] == [None]
    run(session, "the rest is not what one would think of it, but then")
    assert len(session.ids) > 16
    reply = run_command(session, "/why")[1]
    assert reply is not None
    assert sum(influence["without"] is not None for influence in reply.facts["influences"]) == 16
    text = " ".join(shown(reply.view).split())
    assert f"16 of {len(session.ids)} tokens were left out, one at a time" in text


def test_why_in_a_session_in_int8(tiny_dir: Path) -> None:
    session = started(Llama.load(tiny_dir, precision="int8", device="cpu"))
    session.llama.prepare()
    facts = run(session, PROMPT, "/ablate L0.H1", "/why")
    assert abs(facts["remainder"]) <= 1e-3
    assert any(influence["gradient_x_input"] for influence in facts["influences"])


# --- Wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["/why", "/ablate L1 mean", "/patch ab", "/patch L1@0 ab"])
def test_without_a_text_there_is_nothing_to_look_at(session: Session, line: str) -> None:
    assert "There is no text yet" in rejected(session, line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/why two words", "tokens ("),
        ("/why ab vs two words", "tokens ("),
        ("/why #99999", "99999 is not a token id"),
        ("/why #41 vs #41", "Both tokens are ')'."),
        ('/why ""', "'\"\"' is an empty text. Give a token as text"),
        ('/why a vs ""', "'\"\"' is an empty text"),
        ("/why Paris vs", "'Paris vs' has only one token. Add a second one after 'vs'"),
        ("/why \x1b[31m", "Give one token"),
        ("/ablate L3", "The layer must be an integer from 0 to 2, not 3."),
        ("/ablate L1.H4", "The head must be an integer from 0 to 3, not 4."),
        ("/ablate L1.N1024", "not 1024."),
        ("/ablate L1 nonsense", "'nonsense' is not the name of a part"),
        ("/ablate mean", "'mean' needs a part before it"),
        ("/ablate mean L1", "'mean' is not the name of a part"),
        ("/ablate \x1b[31m", "is not the name of a part"),
        ("/patch", "No text was given for /patch"),
        ("/patch ab", "Causal tracing needs the same number"),
        ('/patch ""', "No text was given for /patch. Give another text"),
        ('/patch L1@0 ""', "No text was given for /patch L1@0. Give the text"),
        ("/patch L1@\x1b[31m", "No text was given for /patch L1@\\x1b[31m"),
        (f"/patch {PROMPT}", "Both texts are answered with"),
        ("/patch L1@0", "No text was given for /patch L1@0"),
        ("/patch L3@0 ab", "The layer must be an integer from 0 to 2, not 3."),
        ("/patch L1.H9@0 ab", "The head must be an integer from 0 to 3, not 9."),
        ("/patch L1.x@0 ab", "'L1.x' is not the name of a part"),
        (f"/patch L1@99 {SAME_LENGTH}", "This text has no position '99'. Use 'all' or a number from -"),
        (f"/patch L1@-99 {SAME_LENGTH}", "This text has no position '-99'"),
        (f"/patch L1@99999999999999 {SAME_LENGTH}", "This text has no position '99999999999999'"),
        (f"/patch L1@x {SAME_LENGTH}", "Put a text that begins like L5@3 in double quotes."),
        ("/patch L1@99 a", "This text has no position '99'. Use a number from -"),
        (f"/patch L1@ {SAME_LENGTH}", "This text has no position ''"),
        ("/patch L1@5 a", "The other text has no position '5'. Use a number from -"),
        ("/patch L1@all a", "Give texts of the same length for 'all'."),
        ("/steer", "needs an argument"),
        ("/steer 1", "Invalid value '' for the scale. Use a number."),
        ("/steer 1 2", "Give two texts separated by |. Put a text that contains | in double quotes."),
        ("/steer 1 2 ab", "Give two texts separated by |"),
        ("/steer 1 2 ab | ac | ad", "Give two texts separated by |"),
        ("/steer 1 2 | ac", "Give two texts separated by |"),
        ("/steer x 2 ab | ac", "Invalid value 'x' for a layer. Use a whole number"),
        ("/steer -1 2 ab | ac", "Invalid value '-1' for a layer"),
        ("/steer 3 2 ab | ac", "The layer must be an integer from 0 to 2, not 3."),
        ("/steer 1 two ab | ac", "Invalid value 'two' for the scale. Use a number."),
        ("/steer 1 nan ab | ac", "The scale must be a finite number, not nan."),
        ("/steer 1 inf ab | ac", "finite number, not inf."),
        ("/steer 1 1e999 ab | ac", "finite number, not inf."),
        ("/steer 1 1e39 ab | ac", "steering vector overflow"),
        ("/steer 1 1e21 ab | ac", "steering vector overflow"),
        ("/restore", "No interventions are active"),
        ("/restore -L1", "No interventions are active"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(session: Session, line: str, said: str) -> None:
    """The session continues unchanged."""
    run(session, PROMPT)
    assert said in rejected(session, line)
    run(session, PROMPT)


def test_too_much_of_a_direction_is_refused_and_not_put_on(session: Session) -> None:
    """The error does not blame the weights. It comes with the first prompt."""
    huge = Intervention("huge", "Much.", {"layers.1.resid_post": lambda value, _start: value * float("inf")})
    intervene(session, [huge])
    assert "choose a smaller scale." in rejected(session, PROMPT)
    run(session, "/restore", PROMPT, "/ablate L1")
    with pytest.raises(UsageError, match="choose a smaller scale"):
        intervene(session, [*session.state.interventions, huge])
    assert session.state.labels == ["-L1"]
    run(session, PROMPT)


def test_what_is_refused_leaves_those_that_are_on(session: Session) -> None:
    run(session, PROMPT, "/ablate L1.H2")
    for line in ("/ablate L9", "/patch L1@99 ab", "/steer 1 nan a | b", "/why two words", "/patch ab"):
        rejected(session, line)
    assert session.state.labels == ["-L1.H2"]


# --- Interrupted ------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [False, True], ids=["intact", "changed"])
@pytest.mark.parametrize(
    "line",
    ["/ablate L1", "/ablate L1 mean", f"/patch L1@2 {SAME_LENGTH}", f"/patch {SAME_LENGTH}", "/steer 1 2 ab | ac",
     "/why", "/restore"],
)  # fmt: skip
def test_an_interruption_anywhere_leaves_the_session_as_it_was(
    session: Session, tiny: Llama, monkeypatch: pytest.MonkeyPatch, line: str, on: bool
) -> None:
    """Interrupts each call of a layer in turn. Afterwards the line succeeds."""
    run(session, PROMPT, *(["/ablate L0.H1"] if on or line == "/restore" else []))
    calls, at = 0, 0
    forward = type(tiny.engine.model.layers[0]).forward

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(type(tiny.engine.model.layers[0]), "forward", counting)
    before = state(session)
    while True:
        at, calls = at + 1, 0
        try:
            respond(session, line)
        except KeyboardInterrupt:
            assert state(session) == before
            assert not [m for m in tiny.engine.model.modules() if m._forward_hooks or m._forward_pre_hooks]
            attends = {m.attend for m in tiny.engine.model.modules() if isinstance(m, Attention)}
            assert len(attends) == 1
        else:
            break
    assert at > 3
    monkeypatch.undo()
    answer = session.state.snapshots[-1].prediction.next
    fresh = changed(tiny, session.state.interventions)
    assert float(fresh.engine.forward_with_hooks([session.ids], {})[0, 0].log_softmax(-1)[answer.id]) == pytest.approx(
        answer.logprob, abs=1e-4
    )


def test_an_interruption_of_the_effect_leaves_what_was_on(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts the last computation, before the intervention becomes active."""
    run(session, PROMPT, "/ablate L0.H1")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_scratch.microscope.effect.effect", interrupted)
    before = state(session)
    with pytest.raises(KeyboardInterrupt):
        respond(session, "/ablate L1")
    assert state(session) == before


def test_an_interruption_after_the_work_takes_it_back(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervention is not active, even if only the display was interrupted."""
    run(session, PROMPT, "/ablate L0.H1")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    before = state(session)
    monkeypatch.setattr("llama_scratch.render.pages.effect.page", interrupted)
    for line in ("/ablate L1 mean", "/ablate L1", f"/patch L1@2 {SAME_LENGTH}", "/steer 1 2 ab | ac"):
        with pytest.raises(KeyboardInterrupt):
            respond(session, line)
        assert state(session) == before
    monkeypatch.setattr(session.screen, "interactive", True)
    monkeypatch.setattr("llama_scratch.repl.answering.show_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        respond(session, "/restore")
    assert state(session) == before


# --- Files ------------------------------------------------------------------------------------


def test_load_takes_the_interventions_off_that_the_loaded_session_does_not_have(
    session: Session, tiny: Llama, tmp_path: Path
) -> None:
    plain = run(session, PROMPT)
    path = tmp_path / "plain.jsonl"
    run(session, f"/save {path}", "/ablate L1", SAME_LENGTH)
    output, reply = respond(session, f"/load {path}")
    assert reply is not None
    assert "The interventions are off." in shown(reply.view)
    assert session.state.interventions == ()
    assert session.llama is tiny
    assert output["next"]["logprob"] == pytest.approx(plain["next"]["logprob"], abs=1e-4)
    assert session.state.snapshots[-1].interventions == ()


def test_a_session_that_was_saved_with_interventions_on_is_loaded_with_them(
    session: Session, tiny: Llama, tmp_path: Path
) -> None:
    path = tmp_path / "changed.jsonl"
    changed = run(session, PROMPT, "/ablate L1", SAME_LENGTH)
    run(session, f"/save {path}")
    fresh = started(tiny)
    output, reply = respond(fresh, f"/load {path}")
    assert reply is not None
    assert "are off" not in shown(reply.view)
    assert fresh.state.labels == output["interventions"] == ["-L1"]
    assert output["next"]["logprob"] == pytest.approx(changed["next"]["logprob"], abs=1e-4)
    off = tmp_path / "off.jsonl"
    run(session, "/restore", f"/save {off}")
    reply = respond(started(tiny), f"/load {off}")[1]
    assert reply is not None
    assert "are off" not in shown(reply.view)


def test_a_file_that_is_refused_leaves_what_is_on(session: Session, tmp_path: Path) -> None:
    run(session, PROMPT, "/ablate L1")
    (tmp_path / "broken").write_text("{}")
    rejected(session, f"/load {tmp_path / 'broken'}")


def test_a_recording_with_interventions_runs_again(session: Session, tiny: Llama, tmp_path: Path) -> None:
    """The replay has the same answers and effects for every line."""
    from llama_scratch.repl import session_file
    from llama_scratch.repl.replay import run_again

    path = tmp_path / "session.jsonl"
    run(session, PROMPT, "/ablate L1.H2", SAME_LENGTH, f"/patch L2@3 {PROMPT}", PROMPT, "/why", "/steer 1 2 ab | ac")
    run(session, "/restore -L1.H2", PROMPT, "/undo", "/undo", "/restore", PROMPT, f"/save {path}")

    def never(_source: str, _precision: str, _progress: Progress) -> Llama:
        raise AssertionError

    report = run_again(session_file.load(path), tiny, never, Console(file=io.StringIO()))
    assert report.differences == []
    assert report.compared == report.turns == len(session.state.turns) - 1


def test_what_is_on_is_of_one_session(tiny: Llama) -> None:
    """Another session on the same model has no interventions."""
    one, other = started(tiny), started(tiny)
    run(one, PROMPT, "/ablate L1")
    assert other.state.labels == []
    assert "effect" not in run(other, PROMPT)


def test_moments_stay_within_their_limit(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_scratch.repl.state.MAX_SNAPSHOTS", 3)
    for line in (PROMPT, "/ablate L1", PROMPT, "/restore", "/ablate L2", "/precision fp16", "/precision fp32"):
        run(session, line)
        assert len(session.state.snapshots) <= 3


def test_a_recording_that_goes_on_from_a_loaded_one_runs_again(session: Session, tiny: Llama, tmp_path: Path) -> None:
    """The loaded session's interventions are active after /load, also in the replay."""
    from llama_scratch.repl import session_file
    from llama_scratch.repl.replay import run_again

    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(session, PROMPT, "/ablate L1", f"/save {first}")
    run(started(tiny), f"/load {first}", SAME_LENGTH)
    other = started(tiny)
    run(other, f"/load {first}", SAME_LENGTH, f"/save {second}")

    def never(_source: str, _precision: str, _progress: Progress) -> Llama:
        raise AssertionError

    assert run_again(session_file.load(second), tiny, never, Console(file=io.StringIO())).differences == []


def test_a_chats_answer_has_its_effect(real: Session) -> None:
    """The effect is on the answer's first token."""
    real.update(chat=checked(real.llama))
    real.change_settings(generate=2)
    answer = run(real, "/ablate L28.ffn", "What is the capital of France?")
    assert answer["effect"]["interventions"] == ["-L28.ffn"]
    assert answer["effect"]["after"]["id"] == answer["next"]["id"]
