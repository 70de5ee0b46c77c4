"""The measurements that a report begins with: lens, attribution and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llama_scratch.hooks import Hook
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.attribution import Attribution
from llama_scratch.microscope.interventions import ablate
from llama_scratch.microscope.lens import Lens, lens
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.system.progress import Progress, silent

# Number of heads to check by ablation.
CHECKED = 2
# Maximum number of links per head, and minimum attention of a link.
_LINKS, _LEAST = 4, 0.05


@dataclass(frozen=True)
class Link:
    """Attention from the last token to another token.

    Attributes:
        position: Position of the other token.
        share: The attention, 0 to 1.
    """

    position: int
    share: float


@dataclass(frozen=True)
class Ablation:
    """An ablated component.

    Attributes:
        name: Its name.
        after: The probability of the answer without it.
    """

    name: str
    after: float


@dataclass(frozen=True)
class Summary:
    """Measurements of the prediction after a text.

    Attributes:
        lens: The logit lens. Its last position is the last token of the text.
        attribution: The attribution of the answer.
        ablations: The strongest components of the attribution and the strongest heads, each ablated.
        links: The strongest links of each head, best first.
    """

    lens: Lens
    attribution: Attribution
    ablations: tuple[Ablation, ...]
    links: Mapping[str, tuple[Link, ...]]

    @property
    def head(self) -> Ablation | None:
        """The head whose ablation leaves the answer least probable.

        None if no head was ablated.
        """
        return min((each for each in self.ablations if each.name in self.links), key=_after, default=None)

    @property
    def component(self) -> Ablation | None:
        """The component whose ablation leaves the answer least probable.

        None if no component was ablated.
        """
        return min(self.ablations, key=_after, default=None)


def _after(ablation: Ablation) -> float:
    return ablation.after


def summary(llama: LoadedModel, ids: Sequence[int], attribution: Attribution, progress: Progress = silent) -> Summary:
    """Measure the lens, the attention of all heads, and the ablation of the strongest.

    Raises the same errors as `Llama.predict`.

    Args:
        llama: The model.
        ids: The token ids of the text.
        attribution: The attribution of its prediction.
        progress: As for `lens`.
    """
    after = {claim.contribution.name: claim.after for claim in attribution.claims}
    parts = [NetworkPart.named(contribution.name, llama.args) for contribution in attribution.strongest]
    for head in [part for part in parts if part.kind == "head"][:CHECKED]:
        if head.name not in after:
            logits = llama.engine.forward_with_hooks([ids], ablate(llama, head).hooks)[0, 0]  # (vocab_size,)
            after[head.name] = float(logits.double().softmax(-1)[attribution.answer.id])
    # The forward pass of the lens also records the attention.
    last: dict[int, Tensor] = {}
    hooks = {f"layers.{layer}.attention.probs": _keep(last, layer) for layer in range(llama.args.n_layers)}
    layers = lens(llama.intervened(hooks), ids, progress=progress)
    return Summary(layers, attribution, tuple(Ablation(*each) for each in after.items()), _links(last))


def _keep(last: dict[int, Tensor], layer: int) -> Hook:
    def hook(probs: Tensor, _start: int) -> None:  # (1, n_heads, t, S); the last chunk has the last token
        last[layer] = probs[0, :, -1].float()

    return hook


def _links(last: Mapping[int, Tensor]) -> dict[str, tuple[Link, ...]]:
    links: dict[str, tuple[Link, ...]] = {}
    for layer, attention in last.items():  # (n_heads, T)
        best = attention.topk(min(_LINKS, attention.shape[-1]))
        for head, found in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            each = (Link(position, share) for position, share in zip(*found, strict=True))
            links[NetworkPart(layer, "head", head).name] = tuple(link for link in each if link.share >= _LEAST)
    return links
