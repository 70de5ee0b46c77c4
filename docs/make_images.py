"""Make the pictures of README.md and docs/.

    make images        (python -m docs.make_images [NAME …])

Most are screens of real sessions: the program runs with SmolLM2 on a pseudo-terminal, once on a light background and
once on a dark one. NAME.png is the light picture and NAME-dark.png the dark one.
The picture of the architecture takes its numbers from the `ModelArgs` of Llama 3.2 1B's params.json.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from docs.architecture_figure import DARK, LIGHT, architecture
from llama_scratch.llama import Llama
from llama_scratch.microscope import attention
from llama_scratch.microscope import patching as tracing
from llama_scratch.render.pages import attention as attention_pages
from llama_scratch.render.pages import patching
from llama_scratch.render.to_png import png
from tests.helpers.screenshots import ENVIRONMENTS, FONTS, THEMES, draw, framed
from tests.helpers.terminal import Terminal

FOLDER = Path(__file__).parent.parent / "OutputImages"

# --- Screens of sessions ----------------------------------------------------------------------


def ablation(theme: str) -> Image.Image:
    """From a prompt to the head that its answer depends on: type, answer, head off, the answer falls."""
    with _start(theme, columns=54, rows=5) as terminal:
        _clear(terminal)
        terminal.type("The capital of France is")
        terminal.wait_for("· entropy")
        terminal.settle(1)
        typed = _screen(terminal, theme)
    with _start(theme, columns=54, rows=22) as terminal:
        _clear(terminal)
        _answered(terminal, "The capital of France is", "enter")
        answer = _screen(terminal, theme, end=11)
        terminal.type("ctrl-l", "/ablate L23.H4", "enter")
        terminal.wait_for("/source")
        terminal.settle(1)
        falls = _screen(terminal, theme)
    left = [("1  Type: the next token appears in gray", typed), ("2  Enter: the answer", answer)]
    return _panels([left, [("3  One attention head off: the answer falls", falls)]], theme)


def session(theme: str) -> Image.Image:
    """A prompt and its answer, one accepted token, and another prompt."""
    with _start(theme) as terminal:
        for keys in (["The capital of France is", "enter"], ["enter"], ["The opposite of hot is", "enter"]):
            _answered(terminal, *keys)
        return _picture(terminal, theme)


def before_enter(theme: str) -> Image.Image:
    """Live prediction: a prompt before Enter is pressed."""
    with _start(theme, rows=12) as terminal:
        terminal.type("The capital of France is")
        terminal.wait_for("· entropy")
        terminal.settle(1)
        return _picture(terminal, theme)


def after_enter(theme: str) -> Image.Image:
    """The answer to the same prompt."""
    with _start(theme, rows=16) as terminal:
        _answered(terminal, "The capital of France is", "enter")
        return _picture(terminal, theme)


def tree(theme: str) -> Image.Image:
    """The most probable continuations, as a tree."""
    return _view(theme, "The opposite of hot is", "/tree 3x2", "moves back", rows=56)


def surprisal(theme: str) -> Image.Image:
    """The surprisal of each token of a sentence."""
    with _start(theme, rows=40) as terminal:
        terminal.type("/surprisal The cat sat on the xylophone and ate the moon.", "enter")
        terminal.wait_for("perplexity")
        terminal.settle(1)
        return _picture(terminal, theme)


def chat(theme: str) -> Image.Image:
    """A conversation."""
    with _start(theme, "--chat", rows=34) as terminal:
        for line in ("What is the capital of France?", "And what is it famous for?"):
            terminal.type(line, "enter")
            terminal.settle(6)
        return _picture(terminal, theme)


def why(theme: str) -> Image.Image:
    """Attribution of a prediction on one screen."""
    return _view(theme, "The capital of France is", "/why Paris vs Rome", "/source attribution", rows=68)


def lens(theme: str) -> Image.Image:
    """The logit lens."""
    return _view(theme, "The capital of France is", "/lens", "/source guesses", rows=60)


def _start(theme: str, *options: str, columns: int = 84, rows: int = 48) -> Terminal:
    terminal = Terminal(
        "--model", "smollm2", *options, columns=columns, rows=rows, env=ENVIRONMENTS[theme], timeout=120
    )
    terminal.wait_for("commands")  # the banner above the first prompt
    terminal.settle(3)  # until its background jobs have finished
    return terminal


def _view(theme: str, prompt: str, command: str, end: str, rows: int) -> Image.Image:
    """A prompt, its answer, and the output of a command, which ends with the text `end`."""
    with _start(theme, rows=rows) as terminal:
        _answered(terminal, prompt, "enter")
        terminal.type(command, "enter")
        terminal.wait_for(end)
        terminal.settle(1)
        return _picture(terminal, theme)


def _clear(terminal: Terminal) -> None:
    """Clear the screen after the model is loaded."""
    _answered(terminal, "Hello", "enter")
    terminal.type("/clear", "enter")
    terminal.settle(1)


def _answered(terminal: Terminal, *keys: str) -> None:
    answers = terminal.seen("entropy")
    terminal.type(*keys)
    terminal.wait_for_more("entropy", answers)
    terminal.settle()


def _screen(terminal: Terminal, theme: str, end: int | None = None) -> Image.Image:
    """Draw the lines of the screen before line `end`."""
    return draw(terminal.segments()[:end], terminal.screen.columns, THEMES[theme])


def _picture(terminal: Terminal, theme: str) -> Image.Image:
    return framed(_screen(terminal, theme), THEMES[theme])


def _panels(columns: Sequence[Sequence[tuple[str, Image.Image]]], theme: str) -> Image.Image:
    """Arrange screens in columns, each screen under its caption.

    Args:
        columns: The captions and screens of each column.
        theme: "dark" or "light".
    """
    margin, caption = 30, 60
    colors = THEMES[theme]
    paper, text = tuple(colors.background_color), tuple(colors.foreground_color)
    wide = max(screen.width for column in columns for _, screen in column)
    high = max(sum(caption + screen.height + margin for _, screen in column) for column in columns)
    picture = Image.new("RGB", (len(columns) * (wide + 2 * margin), high + margin), paper)
    canvas = ImageDraw.Draw(picture)
    font = ImageFont.truetype(str(FONTS / "DejaVuSans-Bold.ttf"), 26)
    for n, column in enumerate(columns):
        left, top = n * (wide + 2 * margin) + margin, margin
        for title, screen in column:
            canvas.text((left, top + 12), title, fill=text, font=font)
            picture.paste(screen, (left, top + caption))
            top += caption + screen.height + margin
        if n:  # a thin line between the columns
            edge = tuple(colors.ansi_colors[8])
            canvas.line((left - margin, margin, left - margin, picture.height - margin), fill=edge, width=2)
    return picture


# --- Sheets -----------------------------------------------------------------------------------


def trace() -> Image.Image:
    """Causal tracing of a fact, as /picture draws it."""
    llama = Llama.load("smollm2", precision="fp32")
    ids, other = (llama.encode(f"The capital of {country} is") for country in ("France", "Italy"))
    return Image.open(io.BytesIO(png(patching.page(tracing.trace(llama, ids, other)))))


def induction() -> Image.Image:
    """The induction head of docs/induction.md on a text that repeats."""
    llama = Llama.load("smollm2", precision="fp32")
    ids = llama.encode("The cat sat on the mat. The dog lay on the rug. The cat sat on the mat. The dog lay on the")
    return Image.open(io.BytesIO(png(attention_pages.head(attention.head(llama, ids, 18, 6)))))


def llama_1b(theme: str) -> Image.Image:
    """The architecture of Llama 3.2 1B."""
    data = io.BytesIO()
    architecture(DARK if theme == "dark" else LIGHT).savefig(data, format="png", dpi=110)
    return Image.open(data)


# Drawn once per theme.
PAIRS: dict[str, Callable[[str], Image.Image]] = {
    "ablation": ablation,
    "llamaFromScratchReadMePicture": session,
    "llama321BPicture": llama_1b,
    "prompt1": before_enter,
    "prompt1Output": after_enter,
    "tree": tree,
    "surprisal": surprisal,
    "chat": chat,
    "why": why,
    "lens": lens,
}
SHEETS: dict[str, Callable[[], Image.Image]] = {"trace": trace, "induction": induction}


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join((*PAIRS, *SHEETS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pictures (default: all): {names}")
    for name in parser.parse_args().names or (*PAIRS, *SHEETS):
        if name in PAIRS:
            pictures = {name: PAIRS[name]("light"), f"{name}-dark": PAIRS[name]("dark")}
        else:
            pictures = {name: SHEETS[name]()}
        for file, picture in pictures.items():
            path = FOLDER / f"{file}.png"
            # 256 colors are enough for screens, and make small files.
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(path)


if __name__ == "__main__":
    main()
