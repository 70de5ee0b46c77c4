"""Calibrate int4 quantization with examples of the linear layers' inputs.

Examples are windows of tokens. The best examples are texts of the kind that the model will read. By default, half of
the tokens come from Python's documentation, which is part of every installation. The other half is sampled from the
model after random first tokens. Such text has about the same mix of subjects and languages as the training data.

Sources: Frantar et al. 2022, arXiv:2210.17323 (calibration); Liu et al. 2023, arXiv:2305.17888 (a model's own text).
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import os
import platform
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llama_scratch.errors import ModelNotFoundError, UsageError, sanitize
from llama_scratch.model import KVCache, Transformer, TransformerBlock, causal_mask, rotations
from llama_scratch.system.jobs import report_progress
from llama_scratch.system.progress import Progress, silent
from llama_scratch.system.small_files import read_start, reject_pointer, without_mark
from llama_scratch.tokenizer import Tokenizer

CALIBRATION_TOKENS = 16_384
"""Total tokens in the examples. With twice as many, the error is a few percent lower; with half, 10 % higher."""

LINEARS_BY_INPUT = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
"""Linear layers of a block, grouped by the input that they read, in order of execution."""


def collect_hessians(
    model: Transformer, windows: Sequence[Tensor], progress: Progress = silent
) -> Iterator[tuple[list[str], Tensor]]:
    """Compute H = E[x xᵀ] for the inputs x of all linear layers.

    Keeps one vector per token in memory, and the sums x xᵀ for one transformer block at a time.

    Args:
        model: The network. It must not be used for anything else until all H are computed.
        windows: Examples, (B, T) int64 each. Each is read from an empty context.
        progress: Called with "calibrating", the windows done and their total, over all layers.

    Yields:
        The names of the layers that share an input x, and H, (in, in) float32, in order of execution.
    """
    device, tokens = model.freqs.device, sum(window.numel() for window in windows)
    streams: list[Tensor] = [model.tok_embeddings(window.to(device)) for window in windows]  # (B, T, dim)
    for layer, block in enumerate(model.layers):
        sums = [_Products() for _ in LINEARS_BY_INPUT]
        readers = [block.get_submodule(names[0]) for names in LINEARS_BY_INPUT]
        hooks = [reader.register_forward_pre_hook(products) for reader, products in zip(readers, sums, strict=True)]
        try:
            for i, x in enumerate(streams):
                progress("calibrating", layer * len(streams) + i, len(model.layers) * len(streams))
                streams[i] = _forward_block(cast(TransformerBlock, block), x, model, layer)
        finally:
            for hook in hooks:
                hook.remove()
        for names in LINEARS_BY_INPUT:
            yield [f"layers.{layer}.{name}" for name in names], sums.pop(0).mean(tokens)
    output = _Products()
    for x in streams:
        output(model.output, (model.norm(x),))
    progress("calibrating", 1, 1)
    yield ["output"], output.mean(tokens)


# Rows of H to compute at a time. H is symmetric, so each row is computed only from the diagonal on.
_ROWS_PER_PRODUCT = 1024


def _forward_block(block: TransformerBlock, x: Tensor, model: Transformer, layer: int) -> Tensor:
    T = x.shape[1]
    freqs_cis = rotations(model.freqs, torch.arange(T, device=x.device))
    return cast(Tensor, block(x, freqs_cis, causal_mask(T, T, x.device), KVCache(model.args, T), layer))


class _Products:
    """A hook that sums x xᵀ over all inputs of a module."""

    def __init__(self) -> None:
        self._upper = torch.empty(0, 0)  # the upper triangle, and parts of the lower one, which are ignored

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()  # (B · T, in)
        if not len(self._upper):
            self._upper = x.new_zeros(x.shape[1], x.shape[1])
        for rows in range(0, x.shape[1], _ROWS_PER_PRODUCT):
            self._upper[rows : rows + _ROWS_PER_PRODUCT, rows:].addmm_(
                x[:, rows : rows + _ROWS_PER_PRODUCT].T, x[:, rows:]
            )

    def mean(self, tokens: int) -> Tensor:
        """The mean, (in, in)."""
        upper = self._upper.triu_().div_(tokens)
        return upper + upper.triu(1).T


# --- Examples ---------------------------------------------------------------------------------

_MAX_CHARACTERS_PER_TOKEN = 32  # limits how much of a file is read
_WINDOW_TOKENS = 1024  # length of a window
_SAMPLED_TOKENS = 256  # length of each text that is sampled from the model


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate 4-bit weights with.

    Attributes:
        name: Identifies the text in the cache of packed weights.
        windows: Function that returns windows for `collect_hessians`, given the network that reads them.
    """

    name: str
    windows: Callable[[Transformer], Sequence[Tensor]]


def calibration_text(tokenizer: Tokenizer, path: str | os.PathLike[str] | None) -> CalibrationText:
    """Return the calibration text from a file, or the default text.

    Args:
        tokenizer: The model's tokenizer.
        path: A text file. None for the default, see `examples`.

    Raises:
        ModelNotFoundError: If the file cannot be read.
        UsageError: If it is not a text file, or too short.
    """
    if path is None:
        name = f"its own words and Python {platform.python_version()}'s"
        return CalibrationText(name, lambda model: examples(model, tokenizer, progress=report_progress))
    text = read_text(path)
    tokens = windows(tokenizer, text)
    return CalibrationText(hashlib.sha256(text.encode()).hexdigest(), lambda _: tokens)


def examples(
    model: Transformer, tokenizer: Tokenizer, tokens: int = CALIBRATION_TOKENS, progress: Progress = silent
) -> list[Tensor]:
    """Create the default windows for `collect_hessians`, (B, T) int64 each.

    Half of the tokens come from Python's documentation, and half are sampled from the model. The windows depend only on
    the model and the version of Python.

    Args:
        model: The network to sample from.
        tokenizer: Its tokenizer.
        tokens: Total number of tokens.
        progress: As for `sample_model_text`.
    """
    documentation = _cut(tokenizer, stdlib_documentation(6 * (tokens // 2)), tokens // 2)
    missing = tokens - sum(window.numel() for window in documentation)
    sampled = sample_model_text(model, -(-missing // _SAMPLED_TOKENS), _start(tokenizer), progress)
    return [*documentation, *torch.split(sampled, _WINDOW_TOKENS // _SAMPLED_TOKENS)]


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a calibration text from a file. Of a long file, only the beginning is used.

    Raises:
        ModelNotFoundError: If the file cannot be read.
        UsageError: If it is not a UTF-8 text file.
    """
    name = sanitize(os.fspath(path), 200)
    limit = 4 * _MAX_CHARACTERS_PER_TOKEN * CALIBRATION_TOKENS  # in bytes; a character has up to 4
    try:
        start = read_start(Path(path).expanduser(), limit, error=UsageError, any_content=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ without a home directory
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ModelNotFoundError(
            f"{name} cannot be read ({reason}). Choose a readable text file (`calibration`)."
        ) from error
    reject_pointer(start, name, UsageError)
    try:
        # The limit can fall within a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(
            without_mark(start, name, UsageError), final=len(start) < limit
        )
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text (`calibration`). Save it as UTF-8.") from None
    if "\0" in text:
        raise UsageError(f"{name} contains zero bytes, so it is not text (`calibration`). Choose another file.")
    return text[: _MAX_CHARACTERS_PER_TOKEN * CALIBRATION_TOKENS].replace("\r\n", "\n").replace("\r", "\n")


def windows(tokenizer: Tokenizer, text: str, tokens: int = CALIBRATION_TOKENS) -> list[Tensor]:
    """Cut the beginning of a text into windows for `collect_hessians`, (1, T) int64.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        tokens: Total number of tokens.

    Raises:
        UsageError: If the text is shorter than one window.
    """
    if not (chunks := _cut(tokenizer, text[: _MAX_CHARACTERS_PER_TOKEN * tokens], tokens)):
        raise UsageError(
            f"The calibration text is shorter than {_WINDOW_TOKENS:,} tokens. Choose a text of several pages."
        )
    return chunks


def _cut(tokenizer: Tokenizer, text: str, tokens: int) -> list[Tensor]:
    """Return whole windows with up to `tokens` ids in total. Each begins with the BOS token."""
    ids, start = tokenizer.encode(text), _start(tokenizer)
    width = _WINDOW_TOKENS - len(start)
    count = min(-(-tokens // _WINDOW_TOKENS), len(ids) // width)
    return [torch.tensor([[*start, *ids[i * width : (i + 1) * width]]]) for i in range(count)]


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def sample_model_text(model: Transformer, count: int, start: Sequence[int] = (), progress: Progress = silent) -> Tensor:
    """Sample texts from the model after random first tokens: (count, 256) int64.

    Args:
        model: The network.
        count: Number of texts.
        start: Ids before the random first token, such as the BOS token.
        progress: Called with "sampling", the tokens done per text and their total.
    """
    chance = torch.Generator().manual_seed(0)
    first = torch.randint(model.args.vocab_size, (count, 1), generator=chance)
    ids = torch.cat([torch.tensor([start], dtype=torch.long).expand(count, -1), first], 1)
    cache, new = KVCache(model.args, _SAMPLED_TOKENS), ids
    while ids.shape[1] < _SAMPLED_TOKENS:
        progress("sampling", ids.shape[1], _SAMPLED_TOKENS)
        probabilities = model(new.to(model.freqs.device), cache)[:, -1].softmax(-1).cpu()
        new = torch.multinomial(probabilities, 1, generator=chance)
        ids = torch.cat([ids, new], 1)
    return ids


def stdlib_documentation(characters: int) -> str:
    """Return docstrings of Python's standard library in a random but fixed order.

    The text has up to `characters` characters. It is empty if the library's source files are not installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in library.rglob("*.py") if not _SKIPPED_FOLDERS & {*file.relative_to(library).parts})
    random.Random(0).shuffle(files)
    texts, length = [], 0
    for file in files:
        if length >= characters:
            break
        for text in _docstrings(file):
            texts.append(text)
            length += len(text) + 2
    return "\n\n".join(texts)[:characters]


# Third-party packages, code with few docstrings, and pydoc_data, which the benchmarks use for evaluation.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
_MIN_DOCSTRING = 400  # characters; shorter ones often only repeat the function's name


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, ValueError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _MIN_DOCSTRING:
                yield text
