"""The slash commands: one module per subject, one function per command.

Read `registry` first, which explains how to add a command, and then any command's module. If a command shows a view of
the microscope, its module usually has the same name as the modules in `microscope` and `render.pages`. `arguments`
parses the text after a command. Each module sets its heading in /help, and the order of the imports below is the order
in /help.
"""

# isort: off
from llama_scratch.repl.commands import text  # noqa: F401
from llama_scratch.repl.commands import tokens, surprisal, tree, choices, diff, compare  # noqa: F401
from llama_scratch.repl.commands import lens, attention, attribution, neurons, execution, source  # noqa: F401
from llama_scratch.repl.commands import interventions  # noqa: F401
from llama_scratch.repl.commands import architecture, rope, cache, numerics  # noqa: F401
from llama_scratch.repl.commands import sampling  # noqa: F401
from llama_scratch.repl.commands import chat  # noqa: F401
from llama_scratch.repl.commands import model  # noqa: F401
from llama_scratch.repl.commands import settings, history, saving, export, pictures, report, session  # noqa: F401

# isort: on
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
