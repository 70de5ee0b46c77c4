"""/info, /memory, /model, /precision: inspect the model or switch to another one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llama_scratch.errors import UsageError
from llama_scratch.precision import PRECISIONS
from llama_scratch.render import reports
from llama_scratch.repl.answering import explain
from llama_scratch.repl.commands.registry import Reply, commands_under, note
from llama_scratch.repl.session import Session
from llama_scratch.repl.transitions import switch

if TYPE_CHECKING:
    from llama_scratch.llama import Llama

command = commands_under("Model")


@command("info", replayed=False)
def _info(session: Session, _: str) -> Reply:
    """Model details: shape, parameters, tokenizer, RoPE."""
    from llama_scratch.checkpoint.describe import describe

    llama = session.llama
    if llama.path is None:
        raise UsageError("This model was not loaded from a file. Load one from a path with /model.")
    scaling = llama.args.rope_scaling
    factor = None if llama.args.rope_divisors else scaling.factor if scaling else 1  # the factor in use
    tokenizer = llama.options.get("tokenizer")
    with session.screen.progress() as progress:
        facts = describe(
            llama.path,
            None if tokenizer is None else str(tokenizer),
            factor,
            progress,
            precision=llama.info.precision,
            device=llama.info.device,
            activations=llama.options.get("activations") or "auto",
        )
    return Reply(facts, reports.rows(reports.model_facts(facts)))


@command("memory", replayed=False)
def _memory(session: Session, _: str) -> Reply:
    """Memory used by the model, and available memory."""
    from llama_scratch.system.memory import available_memory, resident

    llama = session.llama
    facts = {
        "weights_a_token": llama.weight_bytes,
        "kv_cache": llama.engine.cache_bytes,
        "cached_tokens": llama.engine.cached_tokens,
        "resident": resident(),
        "available": available_memory(),
    }
    rows = {
        "weights": f"{facts['weights_a_token'] / 1e6:,.0f} MB, read for each token",
        "KV cache": f"{facts['kv_cache'] / 1e6:,.1f} MB; {facts['cached_tokens']:,} tokens cached",
        "program": f"{facts['resident'] / 1e6:,.0f} MB resident, including mapped files",
        "free": f"{facts['available'] / 1e6:,.0f} MB available on this machine",
    }
    return Reply(facts, reports.rows(rows))


def _models(_session: Session, _begun: str) -> Iterable[str]:
    from llama_scratch.download.pypi import OPEN_MODELS

    return list(OPEN_MODELS)


@command("model", "[NAME | PATH]", complete=_models)
def _model(session: Session, argument: str) -> Reply:
    """Switch to another model, and answer the text with it."""
    if argument:
        _switch(session, argument, session.llama.info.precision)
    return _status(session)


@command("precision", "[NAME]", complete=lambda _session, _begun: [*PRECISIONS, "auto"])
def _precision(session: Session, argument: str) -> Reply:
    """Switch precision: auto, fp32, bf16, fp16, int8 or int4.

    The model is loaded again in that precision and answers the text. Interventions stay active.
    """
    if argument:
        _switch(session, None, argument)
    return _status(session)


def _switch(session: Session, source: str | None, precision: str) -> None:
    prediction = switch(session, source, precision)
    if prediction and session.screen.interactive:
        explain(session, prediction)


def _status(session: Session) -> Reply:
    llama: Llama = session.llama
    sentence = f"{llama.info.name}: {reports.describe(llama.info)}, context {llama.context:,} tokens."
    return note(sentence, **vars(llama.info), path=str(llama.path))
