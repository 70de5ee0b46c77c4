"""`Inspection`: a prompt under the microscope, for Python programs and notebooks."""

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
    """The internals of a network while it reads a prompt. Created by `Llama.inspect`.

    Everything is computed on demand. The inspection caches its prediction, and the model caches the scores of its heads
    and the network for gradients. Everything else runs the network again. `ablate`, `patch` and `steer` return a new
    inspection of the modified network. The activations that they insert come from the unmodified network.

    Attributes:
        tokens: The tokens of the prompt, including the beginning-of-text token.
        ids: Their ids.
        interventions: The interventions, in the order in which they were added.
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
        """The next-token prediction, with all interventions."""
        return self._llama.predict(self.ids)

    # --- Reading ---

    @property
    def residual(self) -> Residual:
        """The residual stream.

        `residual[5]` is the input of layer 5, (T, dim); `residual[-1]` is the output of the last layer.
        """
        return Residual(self._llama, self.ids)

    @property
    def attention(self) -> AttentionMaps:
        """The attention probabilities.

        `attention[5]` is a layer, (n_heads, T, T); `attention[5, 3]` is a head, (T, T).
        """
        return AttentionMaps(self._llama, self.ids)

    def activations(self, place: str) -> Tensor:
        """Return the activations at a place named in `llama_scratch.hooks`, (T, …).

        Raises `UsageError` for q, k, v and probs, which have heads as their first dimension.
        """
        return stream.activations(self._llama, self.ids, [place])[0]

    def lens(self, first: int | None = None, count: int = lenses.LENS_POSITIONS) -> lenses.Lens:
        """Return the logit lens: the top prediction after every layer.

        Args:
            first: The first position. By default, the last `count` positions are shown.
            count: Number of positions.
        """
        return lenses.lens(self._llama, self.ids, first, count)

    def heads(self, layer: int | None = None) -> maps.Heads:
        """Return all heads, or the heads of one layer, with their scores and kinds."""
        return maps.heads(self._llama, self.ids, layer)

    def head(self, layer: int, head: int) -> maps.Head:
        """Return the attention map of one head.

        Args:
            layer: The layer.
            head: The head within the layer.
        """
        return maps.head(self._llama, self.ids, layer, head)

    def attribution(self, token: int | str | None = None, versus: int | str | None = None) -> attribution.Attribution:
        """Attribute the logit of a next token to components and to tokens of the prompt.

        Args:
            token: A token id, or a text that is one token, such as " Paris" with its space. By default the predicted
                token.
            versus: A token to compare with. If given, the logit difference is attributed.
        """
        answer, other = (None if name is None else self._id(name) for name in (token, versus))
        return attribution.why(self._llama, self.ids, answer, other)

    def neurons(self, layer: int, count: int = 10) -> neuron_views.Neurons:
        """Return the strongest feed-forward neurons of a layer at the last token.

        Args:
            layer: The layer.
            count: Number of neurons.
        """
        return neuron_views.neurons(self._llama, self.ids, layer, count)

    def trace(self, other: Prompt) -> patching.Trace:
        """Causal tracing: patch each activation, one at a time, from another prompt.

        Both prompts must have the same number of tokens.
        """
        return patching.trace(self._llama, self.ids, self._llama.encode(other))

    # --- Interventions ---

    def ablate(self, *parts: str, mean: bool = False) -> Inspection:
        """Return an inspection with components ablated.

        Args:
            parts: Their names: "L5", "L5.attn", "L5.ffn", "L5.H3", "L5.N120".
            mean: Replace the output by its mean over the tokens of this prompt, instead of by zero.
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
        """Return an inspection with activations patched from another prompt.

        Args:
            other: The other prompt.
            part: The component, as for `ablate`. A layer means the residual stream before it.
            positions: One or more positions, from 0. A mapping gives, for positions in this prompt, positions in the
                other prompt.
        """
        if not isinstance(positions, Mapping):
            several = isinstance(positions, Iterable) and whole_number(positions) is None
            positions = {at: at for at in (cast(Iterable[int], positions) if several else [cast(int, positions)])}
        pairs = {numbered("position", here, len(self.ids), " in this text"): there for here, there in positions.items()}
        named = NetworkPart.named(part, self._llama.args)
        return self._with(interventions.patch(self._intact, named, self._intact.encode(other), pairs))

    def steer(self, layer: int, scale: float, toward: Prompt, away: Prompt) -> Inspection:
        """Return an inspection with a steering vector added after a layer.

        The vector is the difference between the activations of two prompts at their last tokens.

        Args:
            layer: The layer.
            scale: The factor of the vector.
            toward: The prompt that the vector leads toward.
            away: The prompt that it leads away from.
        """
        first, second = (self._intact.encode(prompt) for prompt in (toward, away))
        return self._with(interventions.steer(self._intact, layer, scale, first, second))

    def effect(self, top: int = 5) -> effects.Effect:
        """Compare the prediction with and without the interventions."""
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
                f"'{sanitize(token)}' is {len(ids)} tokens, not one. Words need a leading space: ' Paris'."
            )
        return ids[0]


class Residual:
    """The residual stream of a prompt, computed per layer. See `Inspection.residual`."""

    def __init__(self, llama: LoadedModel, ids: Sequence[int]):
        self._llama = llama
        self._ids = ids

    def __len__(self) -> int:
        return self._llama.args.n_layers + 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(stream.residuals(self._llama, self._ids))  # all layers in one forward pass

    def __getitem__(self, layer: int) -> Tensor:
        last = len(self) - 1
        layer = _index(layer, len(self), "residual stream")
        place = f"layers.{layer}.resid_pre" if layer < last else f"layers.{last - 1}.resid_post"
        return stream.activations(self._llama, self._ids, [place])[0]


class AttentionMaps:
    """The attention maps of a prompt, computed per layer. See `Inspection.attention`."""

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
    """Resolve an index from 0 or from the end. Raises IndexError like a list."""
    if not -length <= index < length:
        raise IndexError(f"The {what} index must be from {-length} to {length - 1}, not {index}.")
    return index % length
