"""Causal tracing: which activations carry the difference between two texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.hooks import hooked
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.activations import layers, residuals
from llama_scratch.microscope.display import Displayable
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.progress import Progress, silent

# Tokens that go through a layer at a time.
_ROWS = 512


@dataclass(frozen=True)
class Trace(Displayable, JsonResult):
    """How far the answer moves when one activation of another text is put into this one.

    first, second: the tokens of this text and of the other; first_answer, second_answer: their next tokens.
    moved: for each layer, of each position: 0 where the answer stays as it is, 1 where it moves all the way to the
    other's, measured on logit(second answer) − logit(first answer). The activation is the residual stream before the
    layer; the last row is the stream behind the last layer.
    """

    first: tuple[Token, ...]
    second: tuple[Token, ...]
    first_answer: Candidate
    second_answer: Candidate
    moved: tuple[tuple[float, ...], ...]


def trace(llama: LoadedModel, ids: Sequence[int], other: Sequence[int], progress: Progress = silent) -> Trace:
    """Patch the residual stream of `other` into that of `ids`, one layer and position at a time.

    Raises `UsageError` where the texts have different numbers of tokens or the same answer, and as `Llama.predict`.
    Source: Vig et al. 2020, arXiv:2004.12265 (interchange of activations); Meng et al. 2022, arXiv:2202.05262, who
    corrupt a text with noise where this takes another text; the measure is the normalized logit difference of Zhang &
    Nanda 2023, arXiv:2309.16042.
    """
    if len(ids) != len(other):
        raise UsageError(
            f"The texts have {len(ids)} and {len(other)} tokens, expected the same number, so that each position has "
            "its counterpart; `tokens` shows how a text is cut."
        )
    ours, theirs = (residuals(llama, text, progress) for text in (ids, other))  # (n_layers + 1, T, dim)
    ends = torch.stack([ours[-1, -1], theirs[-1, -1]])  # (2, dim)
    logits = _logits(llama, ends)
    answers = logits.argmax(-1)  # (2,)
    if answers[0] == answers[1]:
        raise UsageError(
            f"Both texts are answered with {llama.token(int(answers[0])).text!r}, expected two answers; "
            "choose a text that the model goes on with in another way."
        )

    def difference(stream: Tensor) -> Tensor:  # (B, dim) → (B,)
        pair = _logits(llama, stream)[:, answers]
        return pair[:, 1] - pair[:, 0]

    clean, corrupt = difference(ends).tolist()
    moved = []
    for layer in range(llama.args.n_layers + 1):
        ends_patched = [_end(llama, rows, layer, progress) for rows in _patched(ours[layer], theirs[layer])]
        differences = torch.cat([difference(end) for end in ends_patched])  # (T,)
        moved.append(tuple(((differences - clean) / (corrupt - clean)).tolist()))
    first, second = (llama.candidates(row, 1)[0] for row in logits)
    return Trace(tuple(map(llama.token, ids)), tuple(map(llama.token, other)), first, second, tuple(moved))


def _patched(ours: Tensor, theirs: Tensor) -> Iterator[Tensor]:
    """The stream of a text, (T, dim), once for each position that has the other's: (some, T, dim) at a time."""
    T = len(ours)
    for positions in torch.split(torch.arange(T), max(1, _ROWS // T)):
        rows = ours.repeat(len(positions), 1, 1)
        rows[torch.arange(len(positions)), positions] = theirs[positions]
        yield rows


@torch.inference_mode()
def _end(llama: LoadedModel, x: Tensor, first: int, progress: Progress) -> Tensor:
    """What the layers from `first` on make of the stream, at the last token: (B, T, dim) → (B, dim)."""
    model = llama.engine.model
    with hooked(model, llama.engine.hooks):
        for layer in layers(model, x.shape[1])[first:]:
            progress("patching", first, llama.args.n_layers + 1)
            x = layer(x)
    return x[:, -1]


@torch.inference_mode()
def _logits(llama: LoadedModel, stream: Tensor) -> Tensor:
    """What is said of the stream behind the last layer, (B, dim) → (B, vocab_size) float32."""
    model = llama.engine.model
    logits: Tensor = model.output(model.norm(stream)).float().cpu()
    return logits
