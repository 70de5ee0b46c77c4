"""Answers for people: what the terminal shows, as rich's renderables or as plain sentences."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.padding import Padding
from rich.panel import Panel
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text
from wcwidth import iter_graphemes
from wcwidth import width as cells

from llama_scratch.errors import escape_controls, sanitize
from llama_scratch.render.lines import json_line
from llama_scratch.render.messages import user_message
from llama_scratch.results import Candidate, ModelInfo, Prediction

if TYPE_CHECKING:  # it brings torch
    from llama_scratch.microscope.effect import Effect

SPACE = "␣"
_BLOCKS = " ▏▎▍▌▋▊▉█"


def visible(text: str, style: str = "") -> Text:
    r"""A token's text with nothing in it that a terminal would hide or obey: " a\n" → ␣a\n.

    Spaces become ␣, control and invisible characters their escapes, and a combining mark that stands
    first gets a circle to sit on.
    """
    shown = Text(style=style)
    for i, char in enumerate(text):
        kind = unicodedata.category(char)
        if char == " ":
            shown.append(SPACE, style="dim")
        elif kind[0] in "CZ":
            shown.append(char.encode("unicode_escape").decode(), style="dim")
        elif kind[0] == "M" and i == 0:
            shown.append("◌" + char)
        else:
            shown.append(char)
    return shown or Text("(empty)", style="dim")


def readable(text: str) -> str:
    """Running text for a terminal: line breaks and tabs stay, every other control character becomes its escape."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else repr(char)[1:-1] for char in text
    )


class Wrapped:
    """Running text that comes piece by piece, wrapped on the terminal while it is written.

    A character is written as soon as it is complete. If its word turns out to be too long for the line, the word
    is erased there and written again on the next line.

    Args:
        width: Cells per line.
        begin: Text that is on the first line already.
        indent: Text at the beginning of each further line.
    """

    def __init__(self, width: int, begin: str = "", indent: str = ""):
        self._width = width
        self._indent = indent
        self._done = ""  # the lines before this one
        self._start(begin)
        self._incomplete = ""

    @property
    def text(self) -> str:
        """All lines as they are on the screen."""
        return self._done + "".join(self._line)

    def push(self, text: str, *, final: bool = False) -> list[Text | Control]:
        """Take the next piece of the text; `final` if it is the last. Returns what to print, without line ends."""
        characters = list(iter_graphemes(self._incomplete + text))
        # More may belong to the last character, such as a skin tone. A mark on a letter takes no cell, so that can come
        # later.
        self._incomplete = "" if final or not characters or characters[-1].isascii() else characters.pop()
        return [written for character in characters for written in self._add(character)]

    def resize(self, width: int) -> list[Text | Control]:
        """Go on in another width. Returns what to print for that."""
        self._width = width
        return self._break() if self._column > width else []

    def _start(self, text: str) -> None:
        self._line = list(iter_graphemes(text))
        self._column = cells(text)
        self._fixed = len(self._line)  # characters that stay on this line

    def _add(self, character: str) -> list[Text | Control]:
        if character == "\n":
            return self._break()
        if character == "\t":
            character = " " * (8 - self._column % 8)
        fits = self._column + cells(character) <= self._width or len(self._line) == self._fixed
        if not fits and not character.isspace():
            return self._wrap(character)
        self._line.append(character)
        self._column += cells(character)
        return [Text(character)] if fits else []  # white space over the edge is not seen

    def _wrap(self, character: str) -> list[Text | Control]:
        """Begin the next line with a character, and with the part of its word that is on this line."""
        line = [*self._line, character]
        at = next((i for i in range(len(line) - 1, self._fixed, -1) if _may_break(line[i - 1], line[i])), len(line) - 1)
        word = line[at:]
        if cells(self._indent) + sum(map(cells, word)) > self._width:  # it has to be cut anyway
            word = [character]
        erase: list[Text | Control] = []
        if len(word) > 1:
            del self._line[1 - len(word) :]
            erase = [Control.move_to_column(sum(map(cells, self._line))), _ERASE_TO_END]
        return [*erase, *self._break(), *(written for each in word for written in self._add(each))]

    def _break(self) -> list[Text | Control]:
        self._done += "".join(self._line).rstrip() + "\n"
        self._start(self._indent)
        return [Text("\n" + self._indent)]


_ERASE_TO_END = Control((ControlType.ERASE_IN_LINE, 0))


def _may_break(before: str, after: str) -> bool:
    """Whether a line can end between two characters: after a space and beside East Asian characters and emoji.

    Closing punctuation, hyphens and marks such as ー do not begin a line there, and opening brackets do not end one.
    """
    if after.isspace() or before in "\N{NO-BREAK SPACE}\N{FIGURE SPACE}\N{NARROW NO-BREAK SPACE}":
        return False
    if before.isspace():
        return True
    if not any(unicodedata.east_asian_width(character[0]) in "WFH" for character in (before, after)):
        return False
    opening, closing = ("Ps", "Pi", "Sc"), ("Pe", "Pf", "Po", "Pd", "Lm")
    return unicodedata.category(before[0]) not in opening and unicodedata.category(after[0]) not in closing


def percent(probability: float) -> str:
    """A probability as a person reads it; never 0 or 100 for what is not."""
    if 0 < probability < 0.0005:
        return "<0.1 %"
    if 0.9995 <= probability < 1:
        return ">99.9 %"
    return f"{100 * probability:.1f} %"


class Bar:
    """A horizontal bar of a probability, in eighths of a character, as wide as there is room."""

    def __init__(self, probability: float):
        self.probability = probability

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, 40)
        if options.encoding.startswith("utf"):
            eighths = round(8 * width * self.probability)
            bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8]
        else:
            bar = "#" * round(width * self.probability)
        yield Text(bar.rstrip(), style="cyan")


def answer(prediction: Prediction) -> RenderableType:
    """The argmax token in a frame, its runners-up, a bar for each probability, and what it took."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=24, vertical="middle")
    table.add_column(justify="right", no_wrap=True, vertical="middle")
    table.add_column(ratio=1, vertical="middle")
    best, *others = prediction.top
    framed = Panel(visible(best.text, "bold reverse green"), expand=False, style="green")
    table.add_row(framed, Text(percent(best.probability), style="bold"), Bar(best.probability))
    for candidate in others:
        # Indented by the frame's width, so that the tokens stand below each other.
        token = Text.assemble("  ", visible(candidate.text), "  ")
        table.add_row(token, Text(percent(candidate.probability)), Bar(candidate.probability))
    parts: list[RenderableType] = [Padding(table, (0, 0, 1, 1)), note(took(prediction))]
    return Group(*parts, *(warning(sentence) for sentence in prediction.warnings), Text())


def took(prediction: Prediction) -> str:
    """The line under an answer: entropy, tokens, how many came from the cache, time, the precision that answered."""
    timing = prediction.timing
    plural = "" if timing.prompt_tokens == 1 else "s"
    reused = f", {timing.reused_tokens} reused" if timing.reused_tokens else ""
    milliseconds = f"{1000 * timing.prefill_s:,.0f} ms"
    cost = f"{timing.prompt_tokens} token{plural}{reused} · {milliseconds} · {prediction.model.precision}"
    return f"entropy {prediction.entropy_bits:.2f} bits · {cost}"


def context(text: str, accepted: str, width: int) -> RenderableType:
    """The end of the text so far, with what was just accepted set off behind it."""
    old, new = readable(text), readable(accepted)
    room = max(8, 4 * width - len(new))
    if len(old) > room:
        old = "…" + old[-room:]
    return Padding(Text.assemble((old, "dim"), (new, "bold green")), (0, 0, 0, 1))


def plain_answer(prediction: Prediction) -> str:
    """The answer as lines that a screen reader reads well."""
    lines = [_plain_candidate("Next token", prediction.next)]
    lines += [_plain_candidate(f"Number {rank}", c) for rank, c in enumerate(prediction.top[1:], start=2)]
    lines += [f"Entropy {prediction.entropy_bits:.2f} bits."]
    return "\n".join(lines + [f"Note: {sentence}" for sentence in prediction.warnings])


def _plain_candidate(title: str, candidate: Candidate) -> str:
    return f"{title}: {json_line(candidate.text)}, {percent(candidate.probability)}"


def warning(sentence: str) -> RenderableType:
    """A sentence that explains something about the prompt."""
    return _indented(sentence, "yellow")


def note(sentence: str) -> RenderableType:
    """A sentence about an answer, or about the thing that was done."""
    return _indented(sentence, "dim")


def effect(with_it: Candidate, without: Candidate) -> RenderableType:
    """What difference it makes that a prompt ends as the warning says: the answers with and without its last token."""
    parts = [
        f"{when} {visible(candidate.text).plain} {percent(candidate.probability)}"
        for when, candidate in (("With that token:", with_it), ("without it:", without))
    ]
    return _indented(", ".join(parts) + ".", "yellow")


def before_and_after(effect: Effect) -> RenderableType:
    """What interventions did to an answer, in a line."""
    parts = [
        f"{visible(before.text).plain} {percent(before.probability)} → {percent(after.probability)}"
        for before, after in effect.answers
    ]
    return Group(_indented(f"{', '.join(effect.labels)}: {', '.join(parts)}.", "magenta"), Text())


def error(sentence: str) -> RenderableType:
    """A sentence that says what went wrong."""
    return _indented(escape_controls(user_message(sentence)), "red")


def _indented(sentence: str, style: str) -> RenderableType:
    return Padding(Text(sentence, style=style), (0, 0, 0, 1), expand=False)


def banner(model: ModelInfo, context: int, *, live: bool = True, chat: bool = False) -> RenderableType:
    """The lines above the first prompt.

    Args:
        model: The model that answers.
        context: Maximum number of tokens in a sequence.
        live: Whether a token is suggested while the user types.
        chat: Whether a line is a message of a conversation.
    """
    first = "Type a prompt to see the next token; [bold]Enter[/] answers."
    if live:
        first = "Type a prompt to see the next token; [bold]Tab[/] takes the suggested one, [bold]Enter[/] answers."
    if chat:
        first = "Type a message; [bold]Enter[/] sends it."
    return Group(
        Text.assemble((f"{model.name}", "bold"), (f"  {describe(model)}, context {context:,} tokens", "dim")),
        Text.from_markup(f"{first}\n[bold]/help[/] lists the commands, [bold]Ctrl-D[/] leaves.\n"),
    )


def describe(model: ModelInfo) -> str:
    """A model in a few words."""
    return f"{model.parameters / 1e6:,.0f} M parameters, {model.precision} on {model.device}"


def model_facts(facts: dict[str, Any]) -> dict[str, str]:
    """What `info` shows of a model: names and values."""
    shape, rope, tokenizer, memory = facts["shape"], facts["rope"], facts["tokenizer"], facts["memory"]
    held = {
        name: f"{part['parameters']:,} parameters ({percent(part['share'])})" for name, part in facts["parts"].items()
    }
    heads = f"{shape['n_heads']} query heads, {shape['n_kv_heads']} key/value heads, {shape['head_dim']} wide"
    others = f" and {len(facts['files']) - 1} more" * (len(facts["files"]) > 1)
    stops = [sanitize(stop) for stop in tokenizer["stops"]]
    pattern = f"{tokenizer['pattern']}'s pattern" if tokenizer["pattern"] else "a pattern of its own"
    needed = ", ".join(f"{name} {size(parts['total'])}" for name, parts in memory["needed"].items())
    return {
        "name": sanitize(facts["name"]),
        "file": f"{sanitize(facts['path'], 1000)}{others} ({facts['format']}, {size(facts['bytes'])})",
        "license": facts["licence"] or "not stated in the files",
        "weights": ", ".join(f"{count} {kind}" for kind, count in facts["stored"].items())
        + f" tensors; runs in {facts['precision']}",
        "parameters": f"{facts['parameters']:,}" + (" (the output is the embedding)" * facts["tied_output"]),
        "embedding": held["embedding"],
        "layers": f"{shape['n_layers']}, {shape['dim']:,} wide",
        "attention": f"{heads}; {held['attention']}",
        "feed-forward": f"SwiGLU, {shape['ffn_dim']:,} wide; {held['feed_forward']}",
        "norms": f"RMSNorm, epsilon {shape['norm_eps']:g}; {held['norms']}",
        "output": "the embedding" if facts["tied_output"] else held["output"],
        "RoPE": f"base {rope['theta']:,.0f}, {_scaling(rope)}",
        "context": f"{facts['context']:,} tokens",
        "tokenizer": f"{tokenizer['kind']}, {pattern}; {tokenizer['tokens']:,} tokens, "
        f"{tokenizer['special']} of them special; "
        f"{'begins with ' + sanitize(tokenizer['bos']) if tokenizer['bos'] else 'no beginning-of-text token'}; "
        f"{'ends at ' + ' '.join(stops) if stops else 'no token ends a text'}",
        "chat": "it has a format for conversations" if facts["chat"] else "no format, as of a base model",
        "memory": f"{needed}, with {memory['context']:,} tokens on {memory['device']}, besides the mapped weights",
        "kernels": facts["kernels"],
        **({"warnings": " ".join(facts["warnings"])} if facts["warnings"] else {}),
    }


def _scaling(rope: dict[str, Any]) -> str:
    if rope["divisors"]:
        return f"each pair divided by a number of its own, {min(rope['divisors']):g} to {max(rope['divisors']):g}"
    scaled = f"scaled by a factor of {rope['scaling']['factor']:g}" if rope["scaling"] else "not scaled"
    return f"{scaled} (--rope-factor)" if rope["by_option"] else scaled


def size(count: int) -> str:
    """Bytes as a person reads them.

    >>> size(2_471_645_608), size(98_362_432)
    ('2.47 GB', '98 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def rows(pairs: Mapping[str, str]) -> RenderableType:
    """Names and values, one pair a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(name), Text(value))
    return Padding(table, (0, 0, 0, 1))


def groups(titled: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """Names and values in groups, each under its title, all in the same columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, pairs in titled.items():
        table.add_row(Text(title, style="not bold dim"))
        for name, value in pairs.items():
            table.add_row(Text(name), Text(value))
    return Padding(table, (0, 0, 0, 1))


def as_text(view: RenderableType, width: int = 100) -> str:
    """A view as lines without colors; a text as it is."""
    if isinstance(view, Text):
        return view.plain
    console = Console(no_color=True, color_system=None, highlight=False, width=width, emoji=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(view, markup=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def explained(title: str, text: str) -> RenderableType:
    """A title, and paragraphs below it: a line break within one is none."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return Group(Padding(Text(title, style="bold"), (0, 0, 0, 1)), *(_indented(p, "") for p in paragraphs))
