"""Sampling options: each command shows or changes its setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama_scratch.repl.commands.arguments import number, whole_number
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session

command = commands_under("Sampling")


def _sampling(session: Session, **changes: Any) -> Reply:
    """Change sampling options in one assignment and report the result."""
    sampling = replace(session.settings.sampling, **changes)
    session.change_settings(sampling=sampling)
    if sampling.greedy:
        sentence = "Greedy decoding: always the most probable token (temperature 0)."
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
        sentence = f"Sampling with {', '.join(parts)}."
    return note(sentence, **vars(sampling))


@command("temperature", "[T]")
def _temperature(session: Session, argument: str) -> Reply:
    """Sampling temperature: 0 is greedy, 1 keeps the distribution.

    The logits are divided by the temperature. A value below 1 sharpens the distribution, one above 1 flattens it.
    """
    return _sampling(session, **({"temperature": number(argument, "/temperature")} if argument else {}))


@command("top-k", "[K]")
def _top_k(session: Session, argument: str) -> Reply:
    """Top-k sampling: keep the K most probable tokens; 0: all."""
    return _sampling(session, **({"top_k": whole_number(argument, "/top-k", least=0)} if argument else {}))


@command("top-p", "[P]")
def _top_p(session: Session, argument: str) -> Reply:
    """Nucleus sampling: keep the smallest set with probability P.

    Only the most probable tokens, with a total probability of at least P, can be sampled. 1 keeps all tokens.
    """
    return _sampling(session, **({"top_p": number(argument, "/top-p")} if argument else {}))


@command("min-p", "[P]")
def _min_p(session: Session, argument: str) -> Reply:
    """Min-p sampling: drop tokens below P × the top probability.

    The top probability is that of the most probable token. 0 keeps all tokens.
    """
    return _sampling(session, **({"min_p": number(argument, "/min-p")} if argument else {}))


@command("seed", "[N | off]", complete=lambda _session, _begun: ["off"])
def _seed(session: Session, argument: str) -> Reply:
    """Random seed for sampling; off: different text each time."""
    if not argument:
        return _sampling(session)
    return _sampling(session, seed=None if argument == "off" else whole_number(argument, "/seed", least=0))


@command("greedy")
def _greedy(session: Session, _: str) -> Reply:
    """Greedy decoding: always take the most probable token."""
    return _sampling(session, temperature=0.0)
