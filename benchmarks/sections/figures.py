"""Medians and ratios over the samples of one run."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any


class Figures:
    """Medians and ratios over the samples of one run.

    Ratios are computed within a round, in which the machine is in the same state for both engines. The result is the
    median over the rounds. If one side has several engines, the fastest engine of each round is used.

    Args:
        results: The content of results.json.
    """

    def __init__(self, results: dict[str, Any]):
        self.results = results
        self._rates: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
        for sample in results["samples"]:
            case, moment = sample["case"], (sample["group"], sample["round"])
            size = results["cases"][case]
            for kind, count in (("prefill", size["context"]), ("decode", size["tokens"])):
                if count and sample[f"{kind}_s"]:
                    key = (kind, case, sample["engine"])
                    self._rates.setdefault(key, {})[moment] = count / sample[f"{kind}_s"]

    def rate(self, kind: str, case: str, engine: str) -> float | None:
        """Median tokens per second over all rounds.

        Args:
            kind: "prefill" or "decode".
            case: Name of the case.
            engine: Name of the engine.
        """
        rates = self._rates.get((kind, case, engine))
        return median(rates.values()) if rates else None

    def ratio(self, kind: str, case: str, ours: Iterable[str], others: Iterable[str]) -> float | None:
        """Median ratio of our speed to that of the others.

        Args:
            kind: "prefill" or "decode".
            case: Name of the case.
            ours: Names of our engines.
            others: Names of the other engines.

        Returns:
            The ratio, or None if there is no round with both.
        """
        ours_best, others_best = self._best(kind, case, ours), self._best(kind, case, others)
        ratios = [ours_best[moment] / others_best[moment] for moment in ours_best.keys() & others_best.keys()]
        return median(ratios) if ratios else None

    def _best(self, kind: str, case: str, engines: Iterable[str]) -> dict[tuple[int, int], float]:
        best: dict[tuple[int, int], float] = {}
        for engine in engines:
            for moment, rate in self._rates.get((kind, case, engine), {}).items():
                best[moment] = max(rate, best.get(moment, 0.0))
        return best

    def share(self, case: str, engine: str) -> float | None:
        """Memory bandwidth utilization of decode.

        Weight bytes read per second ÷ measured bandwidth of the round, as a median.

        Args:
            case: Name of the case.
            engine: Name of the engine.
        """
        rates = self._rates.get(("decode", case, engine))
        if not rates:
            return None
        weight_bytes = self.results["engines"][engine]["weight_bytes"]
        return float(median(rate * weight_bytes / self._bandwidth(moment) for moment, rate in rates.items()))

    def _bandwidth(self, moment: tuple[int, int]) -> float:
        samples = self.results["samples"]
        return float(median(s["bandwidth"] for s in samples if (s["group"], s["round"]) == moment))
