"""Medians and ratios over the samples of one run."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any


class Figures:
    """Medians and ratios over the samples of one run.

    Ratios are taken within a round, where both sides met the same state of the machine, and their
    median is what counts. Where one side is several engines, the fastest of the round stands for it.
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
        """Median tokens a second, of all rounds."""
        rates = self._rates.get((kind, case, engine))
        return median(rates.values()) if rates else None

    def ratio(self, kind: str, case: str, ours: Iterable[str], others: Iterable[str]) -> float | None:
        """How many times as fast the first are as the others."""
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
        """Decode's share of what the measured bandwidth allows: weights read a second ÷ bandwidth of the round."""
        rates = self._rates.get(("decode", case, engine))
        if not rates:
            return None
        weight_bytes = self.results["engines"][engine]["weight_bytes"]
        return float(median(rate * weight_bytes / self._bandwidth(moment) for moment, rate in rates.items()))

    def _bandwidth(self, moment: tuple[int, int]) -> float:
        samples = self.results["samples"]
        return float(median(s["bandwidth"] for s in samples if (s["group"], s["round"]) == moment))
