"""Meta's model directory: `params.json`, `tokenizer.model` and `consolidated.00.pth`, or several shards of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.chat import Llama3Format
from llama_scratch.checkpoint.base import (
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    Stored,
    check_shapes,
    is_tied,
    name_of,
    reading,
    tie,
)
from llama_scratch.checkpoint.licence import read_licence
from llama_scratch.checkpoint.pth import load_pth
from llama_scratch.config import ModelArgs
from llama_scratch.errors import FETCH_AGAIN, CheckpointError, ModelNotFoundError
from llama_scratch.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llama_scratch.lazy import Weight

PARAMS, TOKENIZER, WEIGHTS = "params.json", "tokenizer.model", "consolidated.00.pth"
# Older checkpoints carry the rotation table, which is computed here.
_IGNORED = {"rope.freqs"}
_MAX_PARAMS = 1 << 20
# Nothing in the files says what a model was trained for; what Meta calls it does.
_CHAT = re.compile("instruct|chat", re.IGNORECASE)
# Which axis of a weight the shards share out: its outputs, or its inputs. Norms are whole in each.
_BY_ROWS = re.compile(r".*\.(wq|wk|wv|w1|w3)\.weight|output\.weight")
_BY_COLUMNS = re.compile(r".*\.(wo|w2)\.weight")


def open_meta(directory: Path, tokenizer: str | None = None) -> Checkpoint:
    """Read and check the small files; `tokenizer` is a tokenizer.model elsewhere.

    Raises `ModelNotFoundError` where a file is missing and `CheckpointError` where one is wrong.
    """
    required = [PARAMS, WEIGHTS] if tokenizer else [PARAMS, TOKENIZER, WEIGHTS]
    for file in required:
        if not (directory / file).is_file():
            raise ModelNotFoundError(_missing(directory, file))
    shards = _shards(directory)
    own_tokenizer = Tokenizer.from_meta(tokenizer or str(directory / TOKENIZER))
    args = ModelArgs.from_params_json(_read_params(directory / PARAMS), str(directory / PARAMS))
    name = name_of(directory)
    return Checkpoint(
        name=name,
        format="meta",
        path=shards[0],
        args=args,
        tokenizer=own_tokenizer,
        load=lambda progress: _load(shards, args, progress),
        inspect=lambda progress: _stored(_load(shards, args, progress)),
        chat=Llama3Format() if _CHAT.search(name) else None,
        files=tuple(shards),
        licence=read_licence(directory),
    )


def _shards(directory: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, … as many as there are, none of them missing between the others."""
    found = {path.name for path in directory.glob("consolidated.[0-9][0-9].pth")}
    names = [f"consolidated.{number:02}.pth" for number in range(len(found))]
    if missing := [name for name in names if name not in found]:
        raise ModelNotFoundError(
            f"There is no {missing[0]} in {directory}, which holds {max(found)}; fetch the missing shard."
        )
    return [directory / name for name in names]


def _load(shards: Sequence[Path], args: ModelArgs, progress: Progress) -> dict[str, Weight]:
    parts = []
    for shard in shards:
        with reading(shard):
            weights = load_pth(shard, progress)
        parts.append({name: weight for name, weight in weights.items() if name not in _IGNORED})
    if len(parts) == 1:
        check_shapes({name: tuple(weight.shape) for name, weight in parts[0].items()}, args, shards[0])
        return tie(parts[0])
    return _joined(shards, parts, args)


def _joined(shards: Sequence[Path], parts: Sequence[dict[str, Tensor]], args: ModelArgs) -> dict[str, Weight]:
    """The weights of a model whose shards each hold a part of every matrix; they stay where they are.

    Source: `fairscale`'s parallel layers, which Meta's reference code is built of.
    """
    from llama_scratch.lazy import Joined

    first = parts[0]
    for shard, part in zip(shards, parts, strict=True):
        if OUTPUT in part and part[OUTPUT].data_ptr() == part[EMBEDDING].data_ptr():
            del part[OUTPUT]
        described = [{name: (weight.shape, weight.dtype) for name, weight in p.items()} for p in (part, first)]
        norms = (name for name, weight in first.items() if weight.dim() == 1)
        if described[0] != described[1] or not all(part[name].equal(first[name]) for name in norms):
            raise CheckpointError(
                f"{shard} does not hold the same parts of a model as {shards[0].name}, so it is of another one; "
                + FETCH_AGAIN
            )
    axes = {name: _axis(name, weight, len(parts), args) for name, weight in first.items()}
    shapes = {name: tuple(weight.shape) for name, weight in first.items()}
    for name, axis in axes.items():
        if axis is not None:
            shapes[name] = tuple(n * (len(parts) if i == axis else 1) for i, n in enumerate(shapes[name]))
    check_shapes(shapes, args, shards[0].with_name(f"{shards[0].name} to {shards[-1].name}"))
    weights: dict[str, Weight] = dict(first)
    for name, axis in axes.items():
        if axis is not None:
            weights[name] = Joined([part[name] for part in parts], axis)
    return tie(weights)


def _axis(name: str, piece: Tensor, shards: int, args: ModelArgs) -> int | None:
    """The axis along which the shards' parts of a weight lie side by side; None: each holds all of it."""
    if _BY_ROWS.fullmatch(name):
        return 0
    if _BY_COLUMNS.fullmatch(name):
        return 1
    if name == EMBEDDING:  # Llama 2 shared out its columns, later ones its rows
        return int(len(piece) * shards != args.vocab_size)
    return None


def _stored(weights: Mapping[str, Weight]) -> Stored:
    return Stored(
        types=dict(Counter(str(weight.dtype).removeprefix("torch.") for weight in weights.values())),
        tied=is_tied(weights),
        dtype=weights[EMBEDDING].dtype,
    )


def _read_params(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_PARAMS:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, expected a few hundred; {FETCH_AGAIN}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text, expected JSON; {FETCH_AGAIN}") from error


def _missing(directory: Path, file: str) -> str:
    advice = f"name the directory that holds {PARAMS}, {TOKENIZER} and {WEIGHTS}."
    if (directory / "original" / file).is_file():
        advice = f"use --model-dir {directory / 'original'}."
    elif file == TOKENIZER:
        advice = "copy it there from the model's download, or name it with --tokenizer."
    return f"There is no {file} in {directory}; {advice}"
