"""How answers are made: each command shows its setting, or changes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_scratch.repl.commands.registry import Reply, command, note, number, on_or_off, whole_number
from llama_scratch.repl.live import why_not_live
from llama_scratch.repl.session import Session


@command("top", "[N]")
def _top(session: Session, argument: str) -> Reply:
    """Show N candidates with each answer."""
    if argument:
        session.change_settings(top=whole_number(argument, "/top"))
        session.lists_candidates = True
    answer = "Each answer outside the chat" if session.state.chat else "Each answer"
    return note(f"{answer} shows {session.settings.top} candidates.", top=session.settings.top)


def _sampling(session: Session, **changes: Any) -> Reply:
    """Change how tokens are drawn, all or nothing, and say how they are from now on."""
    sampling = replace(session.settings.sampling, **changes)
    session.change_settings(sampling=sampling)
    if sampling.greedy:
        sentence = "Always the most probable token (temperature 0)."
    else:
        parts = [f"temperature {sampling.temperature:g}"]
        if sampling.top_k > 0:
            parts.append(f"top-k {sampling.top_k}")
        if sampling.top_p < 1:
            parts.append(f"top-p {sampling.top_p:g}")
        if sampling.min_p > 0:
            parts.append(f"min-p {sampling.min_p:g}")
        if sampling.seed is not None:
            parts.append(f"seed {sampling.seed}")
        sentence = f"Tokens are drawn with {', '.join(parts)}."
    return note(sentence, **vars(sampling))


@command("temperature", "[T]")
def _temperature(session: Session, argument: str) -> Reply:
    """How much chance: 0 none, 1 the model's own probabilities.

    Logits are divided by it: below 1 the probable becomes more probable, above 1 less.
    """
    return _sampling(session, **({"temperature": number(argument, "/temperature")} if argument else {}))


@command("top-k", "[K]")
def _top_k(session: Session, argument: str) -> Reply:
    """Draw from the K most probable tokens only; 0: from all."""
    return _sampling(session, **({"top_k": whole_number(argument, "/top-k", least=0)} if argument else {}))


@command("top-p", "[P]")
def _top_p(session: Session, argument: str) -> Reply:
    """Draw from the best tokens that have P together; 1: from all."""
    return _sampling(session, **({"top_p": number(argument, "/top-p")} if argument else {}))


@command("min-p", "[P]")
def _min_p(session: Session, argument: str) -> Reply:
    """Draw from tokens with P times the best one's probability."""
    return _sampling(session, **({"min_p": number(argument, "/min-p")} if argument else {}))


@command("seed", "[N | off]", complete=lambda _session, _begun: ["off"])
def _seed(session: Session, argument: str) -> Reply:
    """Where chance starts, so that it can be repeated; off: anywhere."""
    if not argument:
        return _sampling(session)
    return _sampling(session, seed=None if argument == "off" else whole_number(argument, "/seed", least=0))


@command("greedy")
def _greedy(session: Session, _: str) -> Reply:
    """Always take the most probable token."""
    return _sampling(session, temperature=0.0)


def _on_off(_session: Session, _begun: str) -> list[str]:
    return ["on", "off"]


@command("live", "[on | off]", _on_off)
def _live(session: Session, argument: str) -> Reply:
    """Predict while you type.

    The tokens of the line are colored by how much they surprise the model: green what it expected (under 1 bit),
    magenta what surprised it (4 bits), bold red what surprised it much (8 bits). The bottom line has the best next
    token, which is suggested after the cursor too. Not in a chat and not with --plain.
    """
    if argument:
        session.change_settings(live=on_or_off(argument, "/live"))
    state = "on" if session.settings.live else "off"
    sentence = f"Live prediction is {state}."
    if reason := why_not_live(session):
        sentence = f"There is no live prediction {reason}. Elsewhere it is {state}."
    return note(sentence, live=session.settings.live)


@command("special", "[on | off]", _on_off)
def _special(session: Session, argument: str) -> Reply:
    """Read <|eot_id|> and the like in a prompt as special tokens.

    off: as plain text, which is how it begins.
    """
    if argument:
        session.change_settings(special=on_or_off(argument, "/special"))
    kind = "special tokens" if session.settings.special else "plain text"
    return note(f"Names of special tokens in a prompt are {kind}.", special=session.settings.special)
