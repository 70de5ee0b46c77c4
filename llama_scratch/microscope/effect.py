"""What interventions change about an answer."""

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
    """The next token before and after: the best tokens of either, most probable first.

    tokens: each with its probabilities before and after. kl_bits: Kullback–Leibler divergence of the answer
    afterwards from the one before. labels: of the interventions.
    """

    labels: tuple[str, ...]
    tokens: tuple[tuple[Candidate, Candidate], ...]
    kl_bits: float

    @property
    def answers(self) -> tuple[tuple[Candidate, Candidate], ...]:
        """The best token before, and the best one after where that is another."""
        best = [max(self.tokens, key=lambda pair: pair[side].logprob) for side in (0, 1)]
        return tuple(dict.fromkeys(best))

    def as_json(self) -> dict[str, Any]:
        """As it stands in an answer, and as the commands print it."""
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
    """What is said after a text by a model, and by the same one with interventions. Raises as `Llama.predict` does."""
    if top < 1:
        raise UsageError(f"{top} candidates were asked for, expected at least 1.")
    logprobs = [llama.engine.next_logits(ids, progress).values.double().log_softmax(-1) for llama in (before, after)]
    best = {id: None for p in logprobs for id in p.topk(min(top, p.numel())).indices.tolist()}
    tokens = [
        tuple(Candidate(id, before.token(id).text, float(p[id])) for p in logprobs)
        for id in sorted(best, key=lambda id: -max(float(p[id]) for p in logprobs))
    ]
    return Effect(tuple(labels), tuple((a, b) for a, b in tokens), float(kl_bits(*logprobs)))
