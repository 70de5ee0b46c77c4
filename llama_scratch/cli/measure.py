"""The `bench` subcommand, which measures speed."""

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
        str, option("--prefill", metavar="N,…", help="Prompt lengths to measure, in tokens.")
    ] = "128,512,2048",
    decode_at: Annotated[
        str, option("--decode-at", metavar="N,…", help="Context lengths to decode at, in tokens.")
    ] = "16,8192",
    tokens: Annotated[int, option("--tokens", metavar="N", help="Tokens to decode per measurement.")] = 16,
    runs: Annotated[int, option("--runs", metavar="N", help="Repetitions; the median is reported.")] = 3,
    json: AsJson = False,
    *,
    options: ModelOptions,
) -> None:
    """Measure prefill and decode in tokens per second.

    Decode is also compared with the speed limit set by memory bandwidth.
    """
    consoles: Consoles = ctx.obj
    prompts, contexts = _sizes(prefill, "--prefill"), _sizes(decode_at, "--decode-at")
    for value, name in ((tokens, "--tokens"), (runs, "--runs")):
        if value < 1:
            raise UsageError(f"{name} is {value}. It must be at least 1.")
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
    """Parse "128,512" into [128, 512], sorted and without duplicates."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
        raise UsageError(f"{name} is '{sanitize(text)}'. It must be numbers of tokens, such as 128,512.")
    return sorted({int(size) for size in sizes})
