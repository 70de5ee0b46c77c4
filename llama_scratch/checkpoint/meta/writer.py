"""Writes Meta's form: `params.json`, `tokenizer.model`, `consolidated.00.pth`, and `checklist.chk` with their MD5s."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_scratch.checkpoint.base import Checkpoint
from llama_scratch.checkpoint.meta.reader import PARAMS, TOKENIZER, WEIGHTS
from llama_scratch.config import EMBEDDING, OUTPUT, ModelArgs, RopeScaling, ffn_dim, is_tied
from llama_scratch.errors import CheckpointError, sanitize
from llama_scratch.system.memory import require_memory
from llama_scratch.system.progress import Progress
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_scratch.precision.lazy_weight import Weight

CHECKLIST = "checklist.chk"
# `multiple_of` and `ffn_dim_multiplier` of Meta's models: 3.2 1B, 3.2 3B, 70B, 8B, and those before.
_USUAL: list[tuple[int, float | None]] = [(256, 1.5), (256, 1.0), (4096, 1.3), (1024, 1.3), (256, None)]
_RESERVED = "<|reserved_special_token_"


def write_meta(checkpoint: Checkpoint, weights: Mapping[str, Weight], directory: Path, progress: Progress) -> None:
    """Write a model into a new directory. Raises `CheckpointError` for one that Meta's form has no place for."""
    files = {PARAMS: _params(checkpoint).encode(), TOKENIZER: _tokenizer_model(checkpoint)}
    directory.mkdir()
    sums = {}
    for name, content in files.items():
        (directory / name).write_bytes(content)
        sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    sums[WEIGHTS] = _write_weights(weights, directory / WEIGHTS, progress)
    (directory / CHECKLIST).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


# --- params.json ------------------------------------------------------------------------------


def _params(checkpoint: Checkpoint) -> str:
    """The text from which `ModelArgs.from_params_json` makes the same shape."""
    args = checkpoint.args
    multiple_of, multiplier = _ffn_fields(args.dim, args.ffn_dim)
    params: dict[str, Any] = {
        "dim": args.dim,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "n_layers": args.n_layers,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "vocab_size": args.vocab_size,
    }
    if args.head_dim * args.n_heads != args.dim:
        params["head_dim"] = args.head_dim
    if args.rope_scaling:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": args.rope_scaling.factor}
    if args.rope_divisors or (args.rope_scaling and args.rope_scaling != RopeScaling(args.rope_scaling.factor)):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} scales its rotary embedding in a way of its own, expected that of "
            f"Llama 3.1 for Meta's {PARAMS}; `to=gguf` holds it."
        )
    params = {name: value for name, value in params.items() if value is not None}
    by_rule = ModelArgs.from_params_json(json.dumps(params))
    if by_rule.max_seq_len != args.max_seq_len:
        params["context_length"] = args.max_seq_len
    if ModelArgs.from_params_json(json.dumps(params)) != args:
        raise CheckpointError(f"the shape {sanitize(args, 300)} cannot be said in Meta's {PARAMS}; use another form.")
    return json.dumps(params, indent=2) + "\n"


def _ffn_fields(dim: int, width: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that make `ffn_dim` give this width: Meta's own where they do."""
    usual = (pair for pair in _USUAL if ffn_dim(dim, multiple_of=pair[0], multiplier=pair[1]) == width)
    hidden = ffn_dim(dim, multiple_of=1, multiplier=None)
    # Any number up to the width is rounded up to it.
    return next(usual, (width, None if hidden <= width else width / hidden))


# --- tokenizer.model --------------------------------------------------------------------------


def _tokenizer_model(checkpoint: Checkpoint) -> bytes:
    """`base64 rank` a line. The form says no more: its pattern and its special tokens are Llama 3's."""
    own = checkpoint.tokenizer
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(own.ranks.items(), key=lambda x: x[1])]
    content = b"".join(lines)
    try:
        read = Tokenizer.from_meta_bytes(content)
    except CheckpointError:
        read = None
    if (
        read is None
        or (own.ranks, own.pattern, own.bos_id) != (read.ranks, read.pattern, read.bos_id)
        or own.added_tokens
        or own.merges
        or not _same_layout(own.names, read.names)
    ):
        raise CheckpointError(
            f"{sanitize(checkpoint.name)} has another tokenizer than Llama 3's, which is the only one that Meta's "
            "form holds; `to=hf` and `to=gguf` hold any."
        )
    return content


def _same_layout(own: Mapping[str, int], llama3: Mapping[str, int]) -> bool:
    """Whether the special tokens are Llama 3's: each release gave names to some that were reserved before."""
    names = {id: name for name, id in own.items()}
    return len(own) == len(llama3) and all(
        names.get(id) == name or _RESERVED in names.get(id, "") or (_RESERVED in name and id in names)
        for name, id in llama3.items()
    )


# --- consolidated.00.pth ----------------------------------------------------------------------


def _write_weights(weights: Mapping[str, Weight], path: Path, progress: Progress) -> str:
    """torch.save, in which a tied output shares the embedding's storage; returns the file's MD5."""
    import torch

    from llama_scratch.precision.lazy_weight import LazyWeight, as_tensor

    # torch.save takes them all at once; those that are mapped need no memory.
    unmapped = [w.numel() * w.dtype.itemsize for w in weights.values() if isinstance(w, LazyWeight)]
    require_memory(sum(unmapped), f"Writing {path.name}")
    tensors = {name: as_tensor(w).contiguous() for name, w in weights.items() if name != OUTPUT or not is_tied(weights)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if is_tied(weights):
        tensors[OUTPUT] = tensors[EMBEDDING]
    with path.open("wb") as file:
        summed = _Summed(file, lambda done: progress("writing", min(done, total), total))
        try:
            torch.save(tensors, summed)  # type: ignore[arg-type]  # it writes and flushes
        except RuntimeError as error:  # torch's own, about the archive that it could not end
            raise summed.failed or error from error
    return summed.md5.hexdigest()


class _Summed:
    """A file that is written from its beginning to its end, with the MD5 of what was written.

    failed: what ended it, an interrupt or the system's refusal.
    """

    def __init__(self, file: Any, report: Any):
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._file = file
        self._report = report
        self._done = 0
        self.failed: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            self.md5.update(data)
            self._done += len(data)
            self._report(self._done)
        except BaseException as error:
            self.failed = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()
