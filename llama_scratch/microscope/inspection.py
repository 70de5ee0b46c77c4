"""`Inspection`: a prompt under the microscope, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import cast

from torch import Tensor

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_text import Prompt, whole_number
from llama_scratch.microscope import activations as stream
from llama_scratch.microscope import attention as maps
from llama_scratch.microscope import attribution, interventions, patching
from llama_scratch.microscope import effect as effects
from llama_scratch.microscope import lens as lenses
from llama_scratch.microscope import neurons as neuron_views
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.interventions import Intervention
from llama_scratch.microscope.parts import NetworkPart, numbered
from llama_scratch.results import Prediction, Token


class Inspection(Displayable):
    """What goes on in a network while it reads a prompt. Make one with `Llama.inspect`.

    Nothing is computed before it is asked for. An inspection keeps its prediction, the model its heads' scores and the
    network that gradients go through; all else runs the network again. `ablate`, `patch` and `steer` return another
    inspection, of the changed network; what they put in (means, activations, directions) is read from the intact one.

    tokens, ids: of the prompt, the beginning-of-text token included. interventions: what was changed, the first first.
    """

    def __init__(self, llama: LoadedModel, prompt: Prompt, changes: Sequence[Intervention] = ()):
        self._intact = llama
        self._llama = interventions.changed(llama, changes)
        self.ids: list[int] = llama.encode(prompt)
        llama.engine.check(self.ids)
        self.tokens: tuple[Token, ...] = tuple(map(llama.token, self.ids))
        self.interventions: tuple[Intervention, ...] = tuple(changes)

    @cached_property
    def prediction(self) -> Prediction:
        """What comes next, with all interventions."""
        return self._llama.predict(self.ids)

    # --- Looking ---

    @property
    def residual(self) -> Residual:
        """The residual stream: `residual[5]` is what layer 5 reads, (T, dim), and `residual[-1]` what the last left."""
        return Residual(self._llama, self.ids)

    @property
    def attention(self) -> AttentionMaps:
        """Attention probabilities: `attention[5]` of a layer, (n_heads, T, T), `attention[5, 3]` of a head, (T, T)."""
        return AttentionMaps(self._llama, self.ids)

    def activations(self, place: str) -> Tensor:
        """What stands at a place that `llama_scratch.hooks` names, (T, …).

        Not for q, k, v and probs, whose first size is heads.
        """
        return stream.activations(self._llama, self.ids, [place])[0]

    def lens(self, first: int | None = None, count: int = lenses.LENS_POSITIONS) -> lenses.Lens:
        """The best guess behind every layer, at the last `count` positions or from `first` on."""
        return lenses.lens(self._llama, self.ids, first, count)

    def heads(self, layer: int | None = None) -> maps.Heads:
        """All heads, or those of a layer: what kind each looks like, with the scores that say so."""
        return maps.heads(self._llama, self.ids, layer)

    def head(self, layer: int, head: int) -> maps.Head:
        """What one head looks at."""
        return maps.head(self._llama, self.ids, layer, head)

    def attribution(self, token: int | str | None = None, versus: int | str | None = None) -> attribution.Attribution:
        """Which parts and which tokens speak for a next token, by default the predicted one, and against another.

        Tokens are ids, or texts that are one token each: " Paris", with its space.
        """
        answer, other = (None if name is None else self._id(name) for name in (token, versus))
        return attribution.why(self._llama, self.ids, answer, other)

    def neurons(self, layer: int, count: int = 10) -> neuron_views.Neurons:
        """The strongest feed-forward neurons of a layer at the last token, and what each writes."""
        return neuron_views.neurons(self._llama, self.ids, layer, count)

    def trace(self, other: Prompt) -> patching.Trace:
        """Causal tracing: how far each activation of another prompt of as many tokens moves the answer."""
        return patching.trace(self._llama, self.ids, self._llama.encode(other))

    # --- Changing ---

    def ablate(self, *parts: str, mean: bool = False) -> Inspection:
        """With these parts switched off: "L5", "L5.attn", "L5.ffn", "L5.H3", "L5.N120".

        mean: each writes its mean over this prompt's tokens in place of nothing.
        """
        named = [NetworkPart.named(name, self._llama.args) for name in parts]
        return self._with(
            *(
                interventions.mean_ablate(self._intact, part, self.ids)
                if mean
                else interventions.ablate(self._intact, part)
                for part in named
            )
        )

    def patch(self, other: Prompt, part: str, positions: int | Sequence[int] | Mapping[int, int]) -> Inspection:
        """With a part's activations copied from another prompt.

        part: as for `ablate`; a layer stands for the residual stream before it. positions: one, several, or those
        here → those there, from 0.
        """
        if not isinstance(positions, Mapping):
            several = isinstance(positions, Iterable) and whole_number(positions) is None
            positions = {at: at for at in (cast(Iterable[int], positions) if several else [cast(int, positions)])}
        pairs = {numbered("position", here, len(self.ids), " here"): there for here, there in positions.items()}
        named = NetworkPart.named(part, self._llama.args)
        return self._with(interventions.patch(self._intact, named, self._intact.encode(other), pairs))

    def steer(self, layer: int, scale: float, toward: Prompt, away: Prompt) -> Inspection:
        """With a direction added behind a layer: `scale` times what `toward` has there more than `away`."""
        first, second = (self._intact.encode(prompt) for prompt in (toward, away))
        return self._with(interventions.steer(self._intact, layer, scale, first, second))

    def effect(self, top: int = 5) -> effects.Effect:
        """The answer before all interventions and with them."""
        labels = [intervention.label for intervention in self.interventions]
        return effects.effect(self._intact, self._llama, self.ids, labels, top)

    def _with(self, *more: Intervention) -> Inspection:
        return Inspection(self._intact, self.ids, [*self.interventions, *more])

    def _id(self, token: int | str) -> int:
        if not isinstance(token, str):
            return self._llama.token(token).id
        ids = self._llama.encode(token, bos=False, special=True)
        if len(ids) != 1:
            raise UsageError(
                f"'{sanitize(token)}' is {len(ids)} tokens, expected one; words bring their own space: ' Paris'."
            )
        return ids[0]


class Residual:
    """The residual stream of a prompt, a layer at a time; see `Inspection.residual`."""

    def __init__(self, llama: LoadedModel, ids: Sequence[int]):
        self._llama = llama
        self._ids = ids

    def __len__(self) -> int:
        return self._llama.args.n_layers + 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(stream.residuals(self._llama, self._ids))  # all of them in one pass

    def __getitem__(self, layer: int) -> Tensor:
        last = len(self) - 1
        layer = _index(layer, len(self), "stream")
        place = f"layers.{layer}.resid_pre" if layer < last else f"layers.{last - 1}.resid_post"
        return stream.activations(self._llama, self._ids, [place])[0]


class AttentionMaps:
    """The attention probabilities of a prompt, a layer at a time; see `Inspection.attention`."""

    def __init__(self, llama: LoadedModel, ids: Sequence[int]):
        self._llama = llama
        self._ids = ids

    def __len__(self) -> int:
        return self._llama.args.n_layers

    def __iter__(self) -> Iterator[Tensor]:
        return (self[layer] for layer in range(len(self)))

    def __getitem__(self, place: int | tuple[int, int]) -> Tensor:
        layer, head = place if isinstance(place, tuple) else (place, None)
        layer = _index(layer, len(self), "layer")
        head = None if head is None else _index(head, self._llama.args.n_heads, "head")
        return maps.attention_map(self._llama, self._ids, layer, head)


def _index(index: int, length: int, what: str) -> int:
    """An index from 0, or from the end. Raises IndexError, as a list does."""
    if not -length <= index < length:
        raise IndexError(f"There is no {what} {index}, expected one from 0 to {length - 1}.")
    return index % length
