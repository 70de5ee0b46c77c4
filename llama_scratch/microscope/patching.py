"""Causal tracing: which activations carry the difference between two prompts."""

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

# Maximum number of tokens per batch.
_ROWS = 512


@dataclass(frozen=True)
class Trace(Displayable, JsonResult):
    """The effect of each activation of another prompt on the prediction.

    Attributes:
        first: The tokens of the prompt.
        second: The tokens of the other prompt.
        first_answer: The next token after the prompt.
        second_answer: The next token after the other prompt.
        moved: The logit difference logit(second answer) − logit(first answer) with one activation patched, for each
            layer and position. It is normalized: 0 is the value for the prompt, 1 the value for the other prompt. The
            activation is the residual stream before the layer, and in the last row the stream after the last layer.
    """

    first: tuple[Token, ...]
    second: tuple[Token, ...]
    first_answer: Candidate
    second_answer: Candidate
    moved: tuple[tuple[float, ...], ...]


def trace(llama: LoadedModel, ids: Sequence[int], other: Sequence[int], progress: Progress = silent) -> Trace:
    """Patch the residual stream from another prompt, one layer and position at a time.

    Raises the same errors as `Llama.predict`. Sources: Vig et al. 2020, arXiv:2004.12265 (interchange of activations);
    Meng et al. 2022, arXiv:2202.05262, who corrupt the prompt with noise instead; Zhang & Nanda 2023, arXiv:2309.16042
    (normalized logit difference).

    Args:
        llama: The model.
        ids: The token ids of the prompt.
        other: The token ids of the other prompt.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the prompts differ in length or have the same next token.
    """
    if len(ids) != len(other):
        raise UsageError(
            f"The texts have {len(ids)} and {len(other)} tokens. Causal tracing needs the same number: `tokens` shows "
            "the tokens of a text."
        )
    ours, theirs = (residuals(llama, text, progress) for text in (ids, other))  # (n_layers + 1, T, dim)
    ends = torch.stack([ours[-1, -1], theirs[-1, -1]])  # (2, dim)
    logits = _logits(llama, ends)
    answers = logits.argmax(-1)  # (2,)
    if answers[0] == answers[1]:
        raise UsageError(
            f"Both texts are answered with {llama.token(int(answers[0])).text!r}. "
            "Choose another text that the model continues differently."
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
    """Yield copies of a stream, each patched at one position from the other text.

    The streams are (T, dim). The copies come in batches of (n, T, dim), one copy per position.
    """
    T = len(ours)
    for positions in torch.split(torch.arange(T), max(1, _ROWS // T)):
        rows = ours.repeat(len(positions), 1, 1)
        rows[torch.arange(len(positions)), positions] = theirs[positions]
        yield rows


@torch.inference_mode()
def _end(llama: LoadedModel, x: Tensor, first: int, progress: Progress) -> Tensor:
    """Run the layers from `first` on: (B, T, dim) → (B, dim), the last token."""
    model = llama.engine.model
    with hooked(model, llama.engine.hooks):
        for layer in layers(model, x.shape[1])[first:]:
            progress("patching", first, llama.args.n_layers + 1)
            x = layer(x)
    return x[:, -1]


@torch.inference_mode()
def _logits(llama: LoadedModel, stream: Tensor) -> Tensor:
    """Logits of the final residual stream, (B, dim) → (B, vocab_size) float32."""
    model = llama.engine.model
    logits: Tensor = model.output(model.norm(stream)).float().cpu()
    return logits
