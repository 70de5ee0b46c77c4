"""Parts of the network by the names that people give them: L5, L5.attn, L5.ffn, L5.H3, L5.N120."""

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
    """A number of a layer, head or position. Raises `UsageError` for what is not one from 0 to `count` - 1."""
    number = whole_number(value)
    if number is None or not 0 <= number < count:
        name = sanitize(repr(value) if number is None else number)
        raise UsageError(f"There is no {what} {name}{where}, expected one from 0 to {count - 1}.")
    return number


@dataclass(frozen=True, order=True)
class NetworkPart:
    """A layer, or of it attention, the feed-forward, a head or a neuron.

    kind: "layer", "attn", "ffn", "head" or "neuron". index: of the head or neuron, else 0.
    """

    layer: int
    kind: str
    index: int = 0

    @classmethod
    def named(cls, name: str, args: ModelArgs) -> Self:
        """The part of a name. Raises `UsageError` for one that this network does not have."""
        if (match := _NAME.fullmatch(name.strip()) if isinstance(name, str) else None) is None:
            raise UsageError(
                f"'{sanitize(name)}' is not the name of a part, expected a layer such as L5, or of it L5.attn, "
                "L5.ffn, the head L5.H3 or the neuron L5.N120."
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
        return cls(numbered("layer", int(layer), args.n_layers), kind, numbered(kind, int(index), count, " in a layer"))

    @property
    def name(self) -> str:
        """As `named` reads it."""
        rest = {"layer": "", "head": f".H{self.index}", "neuron": f".N{self.index}"}
        return f"L{self.layer}{rest.get(self.kind, f'.{self.kind}')}"

    @property
    def places(self) -> tuple[str, ...]:
        """Where it writes, as `hooks` names places; without it the residual stream passes unchanged."""
        places = {
            "attn": ("attention.out",),
            "ffn": ("feed_forward.out",),
            "head": ("attention.heads",),
            "neuron": ("feed_forward.neurons",),
        }
        return tuple(f"layers.{self.layer}.{name}" for name in places.get(self.kind, (*places["attn"], *places["ffn"])))

    @property
    def place(self) -> str:
        """Where its value is copied from and to: of a layer the residual stream before it."""
        return f"layers.{self.layer}.resid_pre" if self.kind == "layer" else self.places[0]

    def of(self, value: Tensor) -> Tensor:
        """The part's own in a value from one of its places, (…, its size): a view."""
        if self.kind == "head":
            return value[..., self.index, :]  # (B, T, head_dim)
        if self.kind == "neuron":
            return value[..., self.index : self.index + 1]  # (B, T, 1)
        return value  # (B, T, dim)
