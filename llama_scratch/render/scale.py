"""The color scale of a heat map: the shade of each value, and the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_scratch.render.text import figure, percent


@dataclass(frozen=True)
class Kind:
    """A kind of field in a heat map, with a color scale of its own.

    Args:
        letter: The text of its fields.
        name: Its name in the legend.
        hue: The name of its scale in `colors`: "gray", "blue", "amber" or "pink".
    """

    letter: str
    name: str
    hue: str


@dataclass(frozen=True)
class Scale:
    """The color scale of a heat map, and its legend.

    Args:
        low: The value of the lightest shade. If it is negative, the scale diverges from 0.
        high: The value of the darkest shade.
        legend: Description of the values, such as "probability of the top prediction".
        percent: Whether the values are shares, shown as percentages.
        end_labels: Labels of both ends of the legend. By default, their values.
        kinds: The kinds of fields. A field has the hue of the kind whose letter is its text, by default gray.
    """

    low: float = 0.0
    high: float = 1.0
    legend: str = ""
    percent: bool = False
    end_labels: tuple[str, str] | None = None
    kinds: tuple[Kind, ...] = ()

    @property
    def signed(self) -> bool:
        """Whether the scale diverges from 0."""
        return self.low < 0

    def ends(self, values: Sequence[Sequence[float | None]]) -> tuple[float, float]:
        """The values at both ends of the legend.

        A diverging scale is cut to one half if all values have the same sign.

        Args:
            values: The values of the map.
        """
        if not self.signed:
            return self.low, self.high
        reach = max(-self.low, self.high)
        numbers = [value for row in values for value in row if value is not None and not math.isnan(value)]
        if all(value >= 0 for value in numbers):
            return 0.0, reach
        return -reach, (reach if any(value > 0 for value in numbers) else 0.0)

    def labels(self, values: Sequence[Sequence[float | None]]) -> tuple[str, str]:
        """The labels of `ends`.

        Args:
            values: The values of the map.
        """
        low, high = self.ends(values)
        if self.percent:
            return f"{100 * low:g}", f"{100 * high:g} %"
        return self.end_labels or (figure(low), figure(high))

    def figure(self, value: float) -> str:
        """Format a value of the map."""
        return percent(value) if self.percent else figure(value)

    def level(self, value: float | None) -> float | None:
        """The shade of a value: 0 to 1, or −1 to 1 if signed. None: the field is empty."""
        if value is None or math.isnan(value):
            return None
        if self.signed:
            reach = max(-self.low, self.high)
            return max(-1.0, min(1.0, value / reach))
        return max(0.0, min(1.0, (value - self.low) / ((self.high - self.low) or 1.0)))

    def shade(self, value: float | None, letter: str) -> tuple[str, float] | None:
        """The color of a field: a scale in `colors`, and the position on it, 0 to 1.

        Args:
            value: The value of the field.
            letter: Its text, which selects its kind.

        Returns:
            The name of the scale and the position, or None if the field is empty.
        """
        level = self.level(value)
        if level is None:
            return None
        if self.kinds:
            hues = {kind.letter: kind.hue for kind in self.kinds}
            return hues.get(letter, "gray"), abs(level)
        return ("m" if level < 0 else "p") if self.signed else "v", abs(level)
