"""Commands of the session, a function each, in modules by what they are about; `registry` says how to add one."""

# The modules put their commands into the registry.
from llama_scratch.repl.commands import (  # noqa: F401
    anatomy,
    chat,
    files,
    interventions,
    lens,
    model,
    pictures,
    report,
    session,
    settings,
    text,
    views,
    walk,
    why,
)
from llama_scratch.repl.commands.registry import (
    COMMANDS,
    Reply,
    completions,
    escaped,
    is_command,
    run_command,
    unescaped,
)

__all__ = ["COMMANDS", "Reply", "completions", "escaped", "is_command", "run_command", "unescaped"]
