"""How tokens are drawn: each command shows its setting, or changes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_scratch.repl.commands.arguments import number, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session

command = commands_under("Drawing tokens")


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
