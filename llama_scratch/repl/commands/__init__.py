"""What can a line that begins with a slash do? Each module has the commands of one subject, a function each.

A command that shows something of the microscope is in a module of the same name as the microscope's and as its page.
Read `registry` first, which says how to add a command, then any command's module; `arguments` reads what follows a
command. Each module names its heading of /help once; the order of the imports below is the order of /help.
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
