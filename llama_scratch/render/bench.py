"""What `bench` measured: a table for people, names and values for a pipe."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llama_scratch.render.text import rows


def bench_table(found: dict[str, Any]) -> RenderableType:
    """Speeds beside each other, and below them what they rest on; fits into 40 columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "tok/s", "GFLOP/s", "limit", style="dim")
    for prompt in found["prefill"]:
        speed = Text(_speed(prompt["tokens_per_s"]), style="bold")
        table.add_row(f"prefill {prompt['tokens']:,}", speed, f"{prompt['gflops_per_s']:,.0f}", "")
    for step in found["decode"]:
        speed, share = Text(_speed(step["tokens_per_s"]), style="bold"), step["share_of_limit"]
        table.add_row(f"decode at {step['context']:,}", speed, "", f"{share:.0%}")
    return Group(Padding(table, (1, 0, 1, 1)), rows(_facts(found)), Text())


def bench_lines(found: dict[str, Any]) -> dict[str, str]:
    """The same as names and values."""
    speeds = {}
    for prompt in found["prefill"]:
        speed = f"{_speed(prompt['tokens_per_s'])} tokens/s, {prompt['gflops_per_s']:,.0f} GFLOP/s"
        speeds[f"prefill {prompt['tokens']}"] = speed
    for step in found["decode"]:
        speed = f"{_speed(step['tokens_per_s'])} tokens/s, {step['share_of_limit']:.0%} of the limit"
        speeds[f"decode at {step['context']}"] = speed
    return speeds | _facts(found)


def _facts(found: dict[str, Any]) -> dict[str, str]:
    model, decode = found["model"], found["decode"]
    facts = {
        "model": f"{model['name']}, {model['precision']} on {model['device']}, {found['threads']} threads",
        "bandwidth": f"{found['bandwidth'] / 1e9:.1f} GB/s read",
        "weights": f"{_size(found['weight_bytes'])} a token",
    }
    if decode:
        facts["KV cache"] = _at_each(decode, [_size(step["kv_bytes"]) for step in decode])
        facts["arithmetic"] = _at_each(decode, [f"{step['flops'] / 1e9:.2f} GFLOP" for step in decode])
        facts["limit"] = "bandwidth ÷ (weights + KV cache)"
    facts |= {
        "load": f"{found['load_s']:.1f} s, then {found['prepare_s']:.1f} s of preparation",
        "peak memory": _size(found["peak_bytes"]),
    }
    left_out = [f"prefill {size:,}" for size in found["left_out"]["prefill"]]
    left_out += [f"decode at {size:,} and {found['tokens']} more" for size in found["left_out"]["decode"]]
    if left_out:
        facts["left out"] = f"{', '.join(left_out)}: the context is {found['context']:,} tokens"
    return facts


def _at_each(decode: list[dict[str, Any]], values: list[str]) -> str:
    return "a token: " + ", ".join(
        f"{value} at {step['context']:,}" for value, step in zip(values, decode, strict=True)
    )


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
