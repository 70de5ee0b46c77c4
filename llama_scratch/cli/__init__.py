"""The command line: options, subcommands, messages and exit codes.

`app` has the main command and `run`. `options` declares the options. `models`, `measure` and `replay` have one function
per subcommand. `opening` loads the model, `config_file` reads the user's defaults, and `process` handles the
streams and the exit codes. Read `app` first, then `options` and `opening`.
"""


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Imports typer only when called."""
    from llama_scratch.cli import app

    return app.run(arguments)
