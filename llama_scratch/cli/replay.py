"""The `replay` subcommand, which runs a saved session again."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from llama_scratch.cli.opening import load, opener
from llama_scratch.cli.options import AsJson, ModelOptions, model_options, with_options
from llama_scratch.cli.process import Consoles, print_json


@with_options
def replay(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Session file written by /save.")],
    json: AsJson = False,
    *,
    options: ModelOptions,
) -> None:
    """Run a saved session again and report differences. Exit code 1 if there are any.

    The model and the options are the same as in the recording, unless flags override them.
    """
    consoles: Consoles = ctx.obj
    from llama_scratch.repl import session_file
    from llama_scratch.repl.user_files import user_path

    recorded = session_file.load(user_path(file))
    # The recording takes precedence over the environment and the configuration file, which apply to other sessions.
    # An option that is not in the recording was not given. Version 0.1.0 did not record all options.
    flags, recorded_options = model_options(ctx, ["COMMANDLINE"]), ModelOptions(**recorded.header.options)
    if recorded.header.asked is None:
        recorded_options = recorded_options.overriding(options)
    if flags.source is not None:  # another model has its own tokenizer
        recorded_options = replace(recorded_options, tokenizer=None)
    options = flags.overriding(recorded_options)
    llama = load(options, consoles)
    from llama_scratch.repl.replay import run_again

    comparison = run_again(recorded, llama, opener(options), consoles.log)
    if json or consoles.json:
        print_json(comparison.as_json())
    else:
        print("\n".join(comparison.lines()))
    raise typer.Exit(1 if comparison.differences else 0)
