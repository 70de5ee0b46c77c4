"""The command that measures speed: bench."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llama_scratch.cli.opening import load
from llama_scratch.cli.options import AsJson, ModelOptions, option, with_options
from llama_scratch.cli.process import Consoles, print_json
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.render.progress import progress_bar


@with_options
def bench(
    ctx: typer.Context,
    prefill: Annotated[
        str, option("--prefill", metavar="N,…", help="Lengths of the prompts that are read.")
    ] = "128,512,2048",
    decode_at: Annotated[
        str, option("--decode-at", metavar="N,…", help="Tokens before those that are decoded.")
    ] = "16,8192",
    tokens: Annotated[int, option("--tokens", metavar="N", help="Tokens decoded in each measurement.")] = 16,
    runs: Annotated[int, option("--runs", metavar="N", help="Measurements of each; the median counts.")] = 3,
    json: AsJson = False,
    *,
    options: ModelOptions,
) -> None:
    """How fast a model runs here: reading prompts, decoding, and its share of what the memory allows."""
    consoles: Consoles = ctx.obj
    prompts, contexts = _sizes(prefill, "--prefill"), _sizes(decode_at, "--decode-at")
    for value, name in ((tokens, "--tokens"), (runs, "--runs")):
        if value < 1:
            raise UsageError(f"{value} was given, expected at least 1 ({name}).")
    llama = load(options, consoles)
    with progress_bar(consoles.log, "Measuring") as progress:
        from llama_scratch.inference.speed import measure

        speed = measure(llama, prefill=prompts, decode_at=contexts, tokens=tokens, runs=runs, progress=progress)
    if json or consoles.json:
        print_json(speed)
        return
    from llama_scratch.render.reports import bench_lines, bench_table

    if sys.stdout.isatty():
        consoles.out.print(bench_table(speed))
    else:
        print("\n".join(f"{name}: {value}" for name, value in bench_lines(speed).items()))


def _sizes(text: str, name: str) -> list[int]:
    """ "128,512" → [128, 512], in order and each once; nothing if the text is empty."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
        raise UsageError(f"'{sanitize(text)}' was given, expected numbers of tokens such as 128,512 ({name}).")
    return sorted({int(size) for size in sizes})
