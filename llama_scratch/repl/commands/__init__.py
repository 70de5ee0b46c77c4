"""Commands of the session, a function each, in modules by what they are about; `registry` says how to add one."""

# The modules put their commands into the registry.
from llama_scratch.repl.commands import chat, files, model, session, settings, text, views  # noqa: F401
from llama_scratch.repl.commands.registry import COMMANDS, Reply, completions, is_command, run_command, unescaped

__all__ = ["COMMANDS", "Reply", "completions", "is_command", "run_command", "unescaped"]
