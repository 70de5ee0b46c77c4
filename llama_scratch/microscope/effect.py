"""The effect of interventions on the next-token prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_scratch.errors import UsageError
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.distributions import kl_bits
from llama_scratch.results import Candidate, JsonResult, to_json
from llama_scratch.system.progress import Progress, silent


@dataclass(frozen=True)
class Effect(Displayable, JsonResult):
    """The prediction before and after interventions.

    Attributes:
        labels: The labels of the interventions.
        tokens: The top tokens of both predictions, each as (before, after), sorted by the higher probability.
        kl_bits: Kullback–Leibler divergence D(before ‖ after) in bits.
    """

    labels: tuple[str, ...]
    tokens: tuple[tuple[Candidate, Candidate], ...]
    kl_bits: float

    @property
    def answers(self) -> tuple[tuple[Candidate, Candidate], ...]:
        """The pair of the top token before and, if it differs, of the top token after."""
        best = [max(self.tokens, key=lambda pair: pair[side].logprob) for side in (0, 1)]
        return tuple(dict.fromkeys(best))

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that prompts and commands print."""
        tokens = [
            {
                "id": before.id,
                "text": before.text,
                "probability_before": before.probability,
                "probability_after": after.probability,
            }
            for before, after in self.tokens
        ]
        before, after = (max((pair[side] for pair in self.tokens), key=lambda c: c.logprob) for side in (0, 1))
        return {
            "interventions": list(self.labels),
            "before": to_json(before),
            "after": to_json(after),
            "tokens": tokens,
            "kl_bits": self.kl_bits,
        }


def effect(
    before: LoadedModel,
    after: LoadedModel,
    ids: Sequence[int],
    labels: Sequence[str],
    top: int = 5,
    progress: Progress = silent,
) -> Effect:
    """Compare the predictions of a model with and without interventions.

    Raises the same errors as `Llama.predict`.

    Args:
        before: The model without interventions.
        after: The model with interventions.
        ids: The token ids of the text.
        labels: The labels of the interventions.
        top: Number of candidates of each model.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If `top` is less than 1.
    """
    if top < 1:
        raise UsageError(f"The number of candidates (`top`) must be at least 1, not {top}.")
    logprobs = [llama.engine.next_logits(ids, progress).values.double().log_softmax(-1) for llama in (before, after)]
    best = {id: None for p in logprobs for id in p.topk(min(top, p.numel())).indices.tolist()}
    tokens = [
        tuple(Candidate(id, before.token(id).text, float(p[id])) for p in logprobs)
        for id in sorted(best, key=lambda id: -max(float(p[id]) for p in logprobs))
    ]
    return Effect(tuple(labels), tuple((a, b) for a, b in tokens), float(kl_bits(*logprobs)))
