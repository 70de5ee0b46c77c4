"""Names of components: L5, L5.attn, L5.ffn, L5.H3, L5.N120."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from llama_scratch.config import ModelArgs
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.inference.prompt_text import whole_number

_NAME = re.compile(r"[lL]?(\d{1,6})(?:\.(?:(attn|attention)|(ffn|mlp|feed_forward)|[hH]?(\d{1,6})|[nN](\d{1,6})))?")


def numbered(what: str, value: object, count: int, where: str = "") -> int:
    """Check the index of a layer, head, neuron or position, and return it as an int.

    Args:
        what: The noun for the error message.
        value: The index. Any integer type is accepted.
        count: Number of layers, heads, neurons or positions.
        where: A phrase after the noun in the error message.

    Raises:
        UsageError: If it is not an integer from 0 to `count` - 1.
    """
    number = whole_number(value)
    if number is None or not 0 <= number < count:
        name = sanitize(repr(value) if number is None else number)
        raise UsageError(f"The {what}{where} must be an integer from 0 to {count - 1}, not {name}.")
    return number


@dataclass(frozen=True, order=True)
class NetworkPart:
    """A component: a layer, its attention or feed-forward, a head or a neuron.

    Attributes:
        layer: The layer.
        kind: "layer", "attn", "ffn", "head" or "neuron".
        index: The head or neuron within the layer, otherwise 0.
    """

    layer: int
    kind: str
    index: int = 0

    @classmethod
    def named(cls, name: str, args: ModelArgs) -> Self:
        """Parse the name of a component.

        Args:
            name: Its name.
            args: The hyperparameters of the network.

        Raises:
            UsageError: If the network does not have that component.
        """
        if (match := _NAME.fullmatch(name.strip()) if isinstance(name, str) else None) is None:
            raise UsageError(
                f"'{sanitize(name)}' is not the name of a part, such as L5 (a layer), L5.attn, L5.ffn, L5.H3 (a head) "
                "or L5.N120 (a neuron)."
            )
        layer, attention, feed_forward, head, neuron = match.groups()
        kind, index, count = "layer", "0", 1
        if attention:
            kind = "attn"
        elif feed_forward:
            kind = "ffn"
        elif head:
            kind, index, count = "head", head, args.n_heads
        elif neuron:
            kind, index, count = "neuron", neuron, args.ffn_dim
        return cls(numbered("layer", int(layer), args.n_layers), kind, numbered(kind, int(index), count))

    @property
    def name(self) -> str:
        """The canonical name, which `named` reads."""
        rest = {"layer": "", "head": f".H{self.index}", "neuron": f".N{self.index}"}
        return f"L{self.layer}{rest.get(self.kind, f'.{self.kind}')}"

    @property
    def places(self) -> tuple[str, ...]:
        """The places of its output, named as in `hooks`.

        Setting the values there to 0 ablates the component: it adds nothing to the residual stream.
        """
        places = {
            "attn": ("attention.out",),
            "ffn": ("feed_forward.out",),
            "head": ("attention.heads",),
            "neuron": ("feed_forward.neurons",),
        }
        return tuple(f"layers.{self.layer}.{name}" for name in places.get(self.kind, (*places["attn"], *places["ffn"])))

    @property
    def place(self) -> str:
        """The place for patching. For a layer, it is the residual stream before the layer."""
        return f"layers.{self.layer}.resid_pre" if self.kind == "layer" else self.places[0]

    def of(self, value: Tensor) -> Tensor:
        """The component's slice of a value at one of its places, as a view."""
        if self.kind == "head":
            return value[..., self.index, :]  # (B, T, head_dim)
        if self.kind == "neuron":
            return value[..., self.index : self.index + 1]  # (B, T, 1)
        return value  # (B, T, dim)
