"""Reports for the user: banner, model facts, results of `bench` and `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llama_scratch.errors import sanitize
from llama_scratch.render.text import indented, percent, size
from llama_scratch.results import ModelInfo

if TYPE_CHECKING:
    from llama_scratch.checkpoint.findings import Verification

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def banner(model: ModelInfo, context: int, *, live: bool = True, chat: bool = False) -> RenderableType:
    """Render the lines above the first prompt.

    Args:
        model: The model.
        context: Maximum number of tokens in a sequence.
        live: Whether the next token is suggested while the user types.
        chat: Whether each line is a chat message.
    """
    first = "Type a prompt to see the next token. [bold]Enter[/] answers."
    if live:
        first = "Type a prompt to see the next token. [bold]Tab[/] accepts the suggestion, [bold]Enter[/] answers."
    if chat:
        first = "Type a message. [bold]Enter[/] sends it."
    return Group(
        Text.assemble((f"{model.name}", "bold"), (f"  {describe(model)}, context {context:,} tokens", "dim")),
        Text.from_markup(f"{first}\n[bold]/help[/] lists the commands, [bold]Ctrl-D[/] quits.\n"),
    )


def describe(model: ModelInfo) -> str:
    """Describe a model in a few words."""
    return f"{model.parameters / 1e6:,.0f} M parameters, {model.precision} on {model.device}"


def model_facts(facts: dict[str, Any]) -> dict[str, str]:
    """The names and values that `info` shows about a model."""
    shape, rope, tokenizer, memory = facts["shape"], facts["rope"], facts["tokenizer"], facts["memory"]
    held = {
        name: f"{part['parameters']:,} parameters ({percent(part['share'])})" for name, part in facts["parts"].items()
    }
    heads = f"{shape['n_heads']} query heads, {shape['n_kv_heads']} key/value heads, head size {shape['head_dim']}"
    others = f" and {len(facts['files']) - 1} more" if len(facts["files"]) > 1 else ""
    stops = [sanitize(stop) for stop in tokenizer["stops"]]
    pattern = f"{tokenizer['pattern']}'s pattern" if tokenizer["pattern"] else "a custom pattern"
    needed = ", ".join(f"{name} {size(parts['total'])}" for name, parts in memory["needed"].items())
    return {
        "name": sanitize(facts["name"]),
        "file": f"{sanitize(facts['path'], 1000)}{others} ({facts['format']}, {size(facts['bytes'])})",
        "license": facts["licence"] or "not stated in the files",
        "weights": ", ".join(f"{count} {kind}" for kind, count in facts["stored"].items())
        + f" tensors; runs in {facts['precision']}",
        "parameters": f"{facts['parameters']:,}" + (" (tied embeddings)" if facts["tied_output"] else ""),
        "embedding": held["embedding"],
        "layers": f"{shape['n_layers']}, hidden size {shape['dim']:,}",
        "attention": f"{heads}; {held['attention']}",
        "feed-forward": f"SwiGLU, intermediate size {shape['ffn_dim']:,}; {held['feed_forward']}",
        "norms": f"RMSNorm, epsilon {shape['norm_eps']:g}; {held['norms']}",
        "output": "tied to the embedding" if facts["tied_output"] else held["output"],
        "RoPE": f"base {rope['theta']:,.0f}, {_scaling(rope)}",
        "context": f"{facts['context']:,} tokens",
        "tokenizer": f"{tokenizer['kind']}, {pattern}; {tokenizer['tokens']:,} tokens, "
        f"{tokenizer['special']} of them special; "
        f"{'BOS ' + sanitize(tokenizer['bos']) if tokenizer['bos'] else 'no BOS token'}; "
        f"{'stops at ' + ' '.join(stops) if stops else 'no stop token'}",
        "chat": "has a chat template" if facts["chat"] else "no chat template (a base model)",
        "memory": f"{needed}, with {memory['context']:,} tokens on {memory['device']}, plus the mapped weights",
        "kernels": facts["kernels"],
        **({"warnings": " ".join(facts["warnings"])} if facts["warnings"] else {}),
    }


def _scaling(rope: dict[str, Any]) -> str:
    if rope["divisors"]:
        return f"each frequency divided by its own factor, {min(rope['divisors']):g} to {max(rope['divisors']):g}"
    scaled = f"scaled by a factor of {rope['scaling']['factor']:g}" if rope["scaling"] else "not scaled"
    return f"{scaled} (--rope-factor)" if rope["by_option"] else scaled


def rows(pairs: Mapping[str, str]) -> RenderableType:
    """Render names and values, one pair per line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(name), Text(value))
    return Padding(table, (0, 0, 0, 1))


# Minimum width of the terminal for two columns of groups.
_TWO_COLUMNS = 100


class Groups:
    """Groups of names and values, each below its title.

    They are in two columns if the terminal is wide enough.
    """

    def __init__(self, titled: Mapping[str, Mapping[str, str]]):
        self._titled = titled

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _TWO_COLUMNS:
            yield _groups(self._titled)
            return
        rows = 0
        half = sum(len(pairs) + 1 for pairs in self._titled.values()) / 2
        columns: tuple[dict[str, Mapping[str, str]], dict[str, Mapping[str, str]]] = {}, {}
        for title, pairs in self._titled.items():
            columns[rows >= half][title] = pairs
            rows += len(pairs) + 1
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for _ in columns:
            grid.add_column(ratio=1)
        grid.add_row(*map(_groups, columns))
        yield grid


def _groups(titled: Mapping[str, Mapping[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, pairs in titled.items():
        table.add_row(Text(title, style="not bold dim"))
        for name, value in pairs.items():
            table.add_row(Text(name), Text(value))
    return Padding(table, (0, 0, 0, 1))


def explained(title: str, text: str) -> RenderableType:
    """Render a title and paragraphs.

    Args:
        title: The title.
        text: Paragraphs, separated by blank lines. The lines of a paragraph are joined.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return Group(Padding(Text(title, style="bold"), (0, 0, 0, 1)), *(indented(p, "") for p in paragraphs))


# --- bench


def bench_table(report: dict[str, Any]) -> RenderableType:
    """Render speeds and the conditions of the measurement, within 40 columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "tok/s", "GFLOP/s", "limit", style="dim")
    for prompt in report["prefill"]:
        speed = Text(_speed(prompt["tokens_per_s"]), style="bold")
        table.add_row(f"prefill {prompt['tokens']:,}", speed, f"{prompt['gflops_per_s']:,.0f}", "")
    for step in report["decode"]:
        speed, share = Text(_speed(step["tokens_per_s"]), style="bold"), step["share_of_limit"]
        table.add_row(f"decode at {step['context']:,}", speed, "", f"{share:.0%}")
    return Group(Padding(table, (1, 0, 1, 1)), rows(_facts(report)), Text())


def bench_lines(report: dict[str, Any]) -> dict[str, str]:
    """The content of `bench_table` as names and values."""
    speeds = {}
    for prompt in report["prefill"]:
        speed = f"{_speed(prompt['tokens_per_s'])} tokens/s, {prompt['gflops_per_s']:,.0f} GFLOP/s"
        speeds[f"prefill {prompt['tokens']}"] = speed
    for step in report["decode"]:
        speed = f"{_speed(step['tokens_per_s'])} tokens/s, {step['share_of_limit']:.0%} of the limit"
        speeds[f"decode at {step['context']}"] = speed
    return speeds | _facts(report)


def _facts(report: dict[str, Any]) -> dict[str, str]:
    model, decode = report["model"], report["decode"]
    facts = {
        "model": f"{model['name']}, {model['precision']} on {model['device']}, {report['threads']} threads",
        "bandwidth": f"{report['bandwidth'] / 1e9:.1f} GB/s read",
        "weights": f"{size(report['weight_bytes'], 1)} per token",
    }
    if decode:
        facts["KV cache"] = _at_each(decode, [size(step["kv_bytes"], 1) for step in decode])
        facts["arithmetic"] = _at_each(decode, [f"{step['flops'] / 1e9:.2f} GFLOP" for step in decode])
        facts["limit"] = "bandwidth ÷ (weights + KV cache)"
    facts |= {
        "load": f"{report['load_s']:.1f} s, then {report['prepare_s']:.1f} s of preparation",
        "peak memory": size(report["peak_bytes"], 1),
    }
    left_out = [f"prefill {length:,}" for length in report["left_out"]["prefill"]]
    left_out += [f"decode at {length:,} and {report['tokens']} more" for length in report["left_out"]["decode"]]
    if left_out:
        facts["left out"] = f"{', '.join(left_out)}: the context is {report['context']:,} tokens"
    return facts


def _at_each(decode: list[dict[str, Any]], values: list[str]) -> str:
    return "per token: " + ", ".join(
        f"{value} at {step['context']:,}" for value, step in zip(values, decode, strict=True)
    )


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


# --- verify


def verify_table(verification: Verification) -> RenderableType:
    """Render each finding after its result, then the verdict, within 40 columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in verification.findings:
        what = Text.assemble((finding.part, "bold"), "  ", finding.sentence)
        table.add_row(Text(finding.result, style=_STYLES[finding.result]), what)
    verdict = Text(verification.verdict, style="bold red" if verification.wrong else "bold green")
    return Group(Padding(table, (0, 0, 1, 1)), Padding(verdict, (0, 0, 0, 1)))


def verify_lines(verification: Verification) -> list[str]:
    """The content of `verify_table` as lines, one finding per line."""
    return [f"{f.result}: {f.part}: {f.sentence}" for f in verification.findings] + [verification.verdict]
