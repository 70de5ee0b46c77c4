"""Reader of Meta's directories: params.json, tokenizer.model, consolidated.NN.pth."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from llama_scratch.chat_format import Llama3Format
from llama_scratch.checkpoint.base import (
    Checkpoint,
    WeightStorage,
    check_shapes,
    name_of,
    reading,
    same_view,
    tie,
)
from llama_scratch.checkpoint.license import read_license
from llama_scratch.checkpoint.meta.params import PARAMS, parse_params
from llama_scratch.checkpoint.meta.pickle_file import begin_checks, load_pth
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs, is_tied
from llama_scratch.errors import REDOWNLOAD_HINT, CheckpointError, LlamaScratchError, ModelNotFoundError
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress
from llama_scratch.system.small_files import read_text
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llama_scratch.precision.lazy_weight import Weight

TOKENIZER, FIRST_SHARD = "tokenizer.model", "consolidated.00.pth"
FP8_SCALES = "fp8_scales_0.pt"
# Older checkpoints also contain the RoPE frequencies. They are ignored, because they are computed from params.json.
_IGNORED = {"rope.freqs"}
_MAX_PARAMS = 1 << 20
# Only the model's name tells whether it was trained for chat.
_CHAT = re.compile("instruct|chat", re.IGNORECASE)
# The shards split these weights by outputs (rows) or by inputs (columns). Each shard has all norms.
_BY_ROWS = re.compile(r".*\.(wq|wk|wv|w1|w3)\.weight|output\.weight")
_BY_COLUMNS = re.compile(r".*\.(wo|w2)\.weight")


def open_meta(directory: Path, tokenizer: str | None = None) -> Checkpoint:
    """Open a model in Meta's format: read and check the small files.

    Args:
        directory: The model's directory.
        tokenizer: Path of a tokenizer.model that replaces the model's own.

    Raises:
        ModelNotFoundError: If a file is missing.
        CheckpointError: If a file is damaged or not supported.
    """
    for file in [PARAMS] if tokenizer else [PARAMS, TOKENIZER]:
        if not (directory / file).is_file():
            raise ModelNotFoundError(_missing(directory, file))
    shards = _shards(directory)
    if (directory / FP8_SCALES).exists():
        raise CheckpointError(
            f"{directory} holds {FP8_SCALES}, so it is Meta's quantized release in fp8, which is not supported. "
            "Use the release with bf16 in its name."
        )
    own_tokenizer = Tokenizer.from_meta(tokenizer or str(directory / TOKENIZER))
    args = parse_params(read_text(directory / PARAMS, _MAX_PARAMS), str(directory / PARAMS))
    name = name_of(directory)
    return Checkpoint(
        name=name,
        format="meta",
        path=shards[0],
        args=args,
        tokenizer=own_tokenizer,
        load=lambda progress: _load(shards, args, progress),
        storage=lambda progress: _stored(_load(shards, args, progress)),
        chat=Llama3Format() if _CHAT.search(name) else None,
        files=tuple(shards),
        license=read_license(directory),
    )


def check_ahead(directory: Path) -> None:
    """Start verifying the weights in the background, if the files are Meta's."""
    with contextlib.suppress(LlamaScratchError, OSError):
        begin_checks(_shards(directory))


def _shards(directory: Path) -> list[Path]:
    """List consolidated.00.pth, consolidated.01.pth and so on, without a gap."""
    files = {path.name for path in directory.glob("consolidated.[0-9][0-9].pth") if path.is_file()}
    if not files:
        raise ModelNotFoundError(_missing(directory, FIRST_SHARD))
    names = [_shard(number) for number in range(len(files))]
    if missing := [name for name in names if name not in files]:
        raise ModelNotFoundError(
            f"{missing[0]} not found in {directory}, which holds {max(files)}. Fetch the missing shard."
        )
    return [directory / name for name in names]


def _shard(number: int) -> str:
    return f"consolidated.{number:02}.pth"


def _load(shards: Sequence[Path], args: ModelArgs, progress: Progress) -> dict[str, Weight]:
    parts: list[dict[str, Tensor]] = []
    for number, shard in enumerate(shards):

        def report(stage: str, done: int, total: int, before: int = number) -> None:
            progress(stage, before * total + done, len(shards) * total)  # shards have equal sizes

        with reading(shard):
            weights = load_pth(shard, report)
        parts.append({name: weight for name, weight in weights.items() if name not in _IGNORED})
        if not number:  # before the others are read
            _check_number(shards, parts[0], args)
    if len(parts) == 1:
        check_shapes({name: tuple(weight.shape) for name, weight in parts[0].items()}, args, shards[0])
        return tie(_contiguous(parts[0]))
    return _joined(shards, parts, args)


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy transposed and strided views. All other tensors stay mapped."""
    views = {name: weight for name, weight in weights.items() if not weight.is_contiguous()}
    if not views:
        return dict(weights)
    require_memory(sum(view.nbytes for view in views.values()), "Copying weights that are stored as views")
    output, embedding = views.get(OUTPUT), views.get(EMBEDDING)
    copies = {name: view.contiguous() for name, view in views.items()}
    if output is not None and embedding is not None and same_view(output, embedding):
        copies[OUTPUT] = copies[EMBEDDING]
    return {**weights, **copies}


def _check_number(shards: Sequence[Path], part: Mapping[str, Tensor], args: ModelArgs) -> None:
    """Check the number of shards by the rows of layer 0's wq in the first shard."""
    wq, wo = (part.get(f"layers.0.attention.{name}.weight") for name in ("wq", "wo"))
    q_dim = args.n_heads * args.head_dim
    rows = q_dim if wq is None or wq.dim() != 2 else len(wq)
    if wq is None or wo is None or wq.shape != (rows, args.dim) or wo.shape != (args.dim, rows):
        return  # another model: `check_shapes` raises
    if rows * len(shards) < q_dim:
        raise ModelNotFoundError(
            f"{_shard(len(shards))} not found in {shards[0].parent}, but {FIRST_SHARD} holds only {rows} of {q_dim} "
            "rows of wq. Fetch the missing shards."
        )
    if rows * len(shards) > q_dim:
        raise CheckpointError(
            f"{shards[-1]} is one of {len(shards)} shards, which are too many: {FIRST_SHARD} holds {rows} of {q_dim} "
            "rows of wq. Remove the shards of the other model."
        )


def _joined(shards: Sequence[Path], parts: Sequence[dict[str, Tensor]], args: ModelArgs) -> dict[str, Weight]:
    """Join shards, which each have a part of every matrix, without copying.

    Source: `fairscale`'s parallel layers, used in Meta's reference code.
    """
    from llama_scratch.precision.lazy_weight import ShardedWeight

    for part in parts:
        if {EMBEDDING, OUTPUT} <= part.keys() and same_view(part[OUTPUT], part[EMBEDDING]):
            del part[OUTPUT]
    _check_alike(shards, parts)
    first = parts[0]
    axes = {name: axis for name, weight in first.items() if (axis := _axis(name, weight, len(parts), args)) is not None}
    shapes = {name: tuple(weight.shape) for name, weight in first.items()}
    for name, axis in axes.items():
        shapes[name] = tuple(n * (len(parts) if i == axis else 1) for i, n in enumerate(shapes[name]))
    check_shapes(shapes, args, shards[0].with_name(f"{shards[0].name} to {shards[-1].name}"))
    parts = [_contiguous(part) for part in parts]
    _check_contents(shards, parts)
    weights: dict[str, Weight] = dict(parts[0])
    for name, axis in axes.items():
        weights[name] = ShardedWeight([part[name] for part in parts], axis)
    return tie(weights)


def _check_alike(shards: Sequence[Path], parts: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that all shards have the same names, shapes and types."""
    first = {name: (weight.shape, weight.dtype) for name, weight in parts[0].items()}
    for shard, part in zip(shards, parts, strict=True):
        if {name: (weight.shape, weight.dtype) for name, weight in part.items()} != first:
            raise _of_another_model(shard, shards[0])


def _of_another_model(shard: Path, first: Path) -> CheckpointError:
    return CheckpointError(
        f"{shard} belongs to another model than {first.name}: names, shapes, types or norms differ. {REDOWNLOAD_HINT}"
    )


def _check_contents(shards: Sequence[Path], parts: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that all shards have the same norms, and that no two shards are equal."""
    for shard, part in zip(shards, parts, strict=True):
        if not all(_equal(part[name], weight) for name, weight in parts[0].items() if weight.dim() == 1):
            raise _of_another_model(shard, shards[0])
    for (one, part), (other, copy) in combinations(zip(shards, parts, strict=True), 2):
        if all(_equal(part[name], weight) for name, weight in copy.items()):
            raise CheckpointError(
                f"{other} holds the same weights as {one.name} instead of another part of the model. {REDOWNLOAD_HINT}"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors bitwise, so that NaN equals itself. `verify` reports NaN."""
    import torch

    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _axis(name: str, piece: Tensor, shards: int, args: ModelArgs) -> int | None:
    """Return the axis by which the shards split a weight, or None if it is not split."""
    if piece.dim() != 2:
        return None
    if _BY_ROWS.fullmatch(name):
        return 0
    if _BY_COLUMNS.fullmatch(name):
        return 1
    if name == EMBEDDING:  # Llama 2 split its columns, later models its rows
        return int(len(piece) * shards != args.vocab_size)
    return None


def _stored(weights: Mapping[str, Weight]) -> WeightStorage:
    return WeightStorage(
        types=dict(Counter(str(weight.dtype).removeprefix("torch.") for weight in weights.values())),
        tied=is_tied(weights),
        dtype=weights[EMBEDDING].dtype,
    )


def _missing(directory: Path, file: str) -> str:
    advice = f"Pass the directory that holds {PARAMS}, {TOKENIZER} and {FIRST_SHARD}."
    if file == TOKENIZER:
        advice = "Copy it there from the model's download, or pass its path as `tokenizer`."
    return f"{file} not found in {directory}. {advice}"
