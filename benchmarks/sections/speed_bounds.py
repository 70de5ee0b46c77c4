"""The bounds on our speed and memory compared with other engines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.sections.figures import Figures
from benchmarks.sections.layout import AVX2, GB, Bound

BF16 = ("llama.cpp BF16", "llama.cpp BF16 flash")
F16 = ("llama.cpp F16",)
Q8_0 = ("llama.cpp Q8_0", "llama.cpp Q8_0 flash")
Q4_0, Q4_K_M = ("llama.cpp Q4_0",), ("llama.cpp Q4_K_M",)
IK_Q8_0, IK_Q4_K_M = ("ik_llama.cpp Q8_0",), ("ik_llama.cpp Q4_K_M",)
# Peers for prefill, and their label.
_PEERS_16 = (*BF16, *F16, *Q8_0), "llama.cpp's best of BF16, F16, Q8_0"
_PEERS = (*BF16, *Q8_0, *Q4_0, *Q4_K_M), "llama.cpp's best of BF16, Q8_0, Q4_0, Q4_K_M"

# CPU → precision → minimum ratio of prefill to the best peer: for up to 128 tokens, for more tokens, and the target.
_PREFILL: dict[str, dict[str, tuple[float, float, float | None]]] = {
    "AVX2": {"bf16": (1.3, 1.3, None), "int8": (1.5, 1.4, 1.7), "int4": (2.0, 1.8, 2.3)},
    "AVX-512": {"bf16": (1.0, 1.0, None), "int8": (1.6, 1.6, None), "int4": (2.0, 2.0, None)},
}
# CPU → minimum ratio of SmolLM2's decode to llama.cpp's best.
_SMOLLM2 = {"AVX2": 1.5, "AVX-512": 2.0}
# Minimum ratio of prefill and of decode to ik_llama.cpp.
_IK = {"int8": (IK_Q8_0, 1.0, 1.0), "int4": (IK_Q4_K_M, 1.1, 1.3)}


def cpu_kind(machine: dict[str, Any]) -> str:
    """The kind of CPU that selects the bounds: "AVX2", "AVX-512" or "" for any other."""
    return "AVX-512" if "avx512f" in machine["features"] else "AVX2" if "avx2" in machine["features"] else ""


def speed_bounds(results: dict[str, Any]) -> list[Bound]:
    """The bounds for the recorded CPU, if the run has the figures.

    On a CPU with AVX-512, two kinds of ratios do not have a verdict: the ratios to ik_llama.cpp, and the ratios of our
    rows limited to AVX2, because their peers use AVX-512.
    """
    kind = cpu_kind(results["machine"])
    bounds = _Ratios(results, "", stated=not kind).bounds
    if edits := results["edits"]:
        ratio = median(edit["edited_s"] / edit["whole_s"] for edit in edits)
        what = f"prompt of {edits[0]['tokens']:,} tokens, last token changed"
        bounds.append(Bound(what, "≤ 1/50 of the full prefill", f"1/{1 / ratio:.0f}", ratio <= 1 / 50))
    bounds += _memory_bounds(results["engines"])
    return bounds + _Ratios(results, AVX2, stated=kind != "AVX2").bounds


class _Ratios:
    """The bounds on our relative speed, for engines with one kind of kernels.

    Args:
        results: The recorded run.
        suffix: Suffix of our engines' names, "" or `AVX2`.
        stated: Whether all ratios are reported without a verdict.
    """

    def __init__(self, results: dict[str, Any], suffix: str, *, stated: bool):
        self.bounds: list[Bound] = []
        self._results = results
        self._figures = Figures(results)
        self._suffix = suffix
        self._stated = stated
        self._cpu = "AVX2" if suffix else cpu_kind(results["machine"]) or "AVX2"
        for case, size in results["cases"].items():
            if size["model"] != "1B":
                continue
            if size["long"]:
                self._long(case, f"{size['context']:,}")
            elif size["tokens"]:
                self._decode(case)
            else:
                self._prefill(case, size["context"])
        self._small_model()

    def _long(self, case: str, context: str) -> None:
        reference = "llama.cpp BF16, flash attention on or off"
        for kind, what, least in (("prefill", "prefill of", 1.3), ("decode", "decode at", 1.2)):
            self._at_least(
                least, f"{what} {context}, bf16{self._suffix}", reference, self._ratio(kind, case, "bf16", BF16)
            )

    def _decode(self, case: str) -> None:
        limit = "bandwidth ÷ weight bytes"
        for precision, peers, least, least_share in (
            ("bf16", BF16, 1.0, 0.88),
            ("int8", Q8_0, 1.15, 0.92),
            ("int4", Q4_K_M, 1.4, 0.9),
        ):
            what = f"decode, {precision}{self._suffix}"
            share = self._figures.share(case, f"ours {precision}{self._suffix}")
            self._at_least(least, what, peers[0], self._ratio("decode", case, precision, peers))
            self._at_least(least_share, what, limit, share)
            if precision == "bf16" and not self._stated:
                self._at_least(0.92, what, "the same", share, aim=True)
            self._beside_ik("decode", case, precision, what)

    def _prefill(self, case: str, context: int) -> None:
        for precision, (short, longer, aim) in _PREFILL[self._cpu].items():
            peers, names = _PEERS_16 if precision == "bf16" else _PEERS
            what = f"prefill of {context:,}, {precision}{self._suffix}"
            ratio = self._ratio("prefill", case, precision, peers)
            self._at_least(short if context <= 128 else longer, what, names, ratio)
            if aim and not self._stated:
                self._at_least(aim, what, "the same", ratio, aim=True)
            self._beside_ik("prefill", case, precision, what)

    def _beside_ik(self, kind: str, case: str, precision: str, what: str) -> None:
        if precision in _IK:
            peer, prefill, decode = _IK[precision]
            least = prefill if kind == "prefill" else decode
            ratio = self._ratio(kind, case, precision, peer)
            self._at_least(least, what, f"{peer[0]}, repacked", ratio, only_stated=self._cpu == "AVX-512")

    def _small_model(self) -> None:
        small = [name for name, engine in self._results["engines"].items() if engine["model"] == "SmolLM2"]
        ours = [name for name in small if "ours" in name and name.endswith(AVX2) == bool(self._suffix)]
        ratio = self._figures.ratio("decode", "SmolLM2", ours, [name for name in small if "ours" not in name])
        what = f"SmolLM2 decode, best precision{self._suffix}"
        self._at_least(_SMOLLM2[self._cpu], what, "llama.cpp's best of Q8_0 and Q4_0", ratio)

    def _ratio(self, kind: str, case: str, precision: str, peers: Sequence[str]) -> float | None:
        return self._figures.ratio(kind, case, [f"ours {precision}{self._suffix}"], peers)

    def _at_least(
        self, least: float, what: str, than: str, ratio: float | None, *, aim: bool = False, only_stated: bool = False
    ) -> None:
        """Add a bound if the run has the figure.

        Args:
            least: The minimum ratio.
            what: The measured quantity.
            than: The engine or limit that it is compared with.
            ratio: The figure, or None.
            aim: Whether the bound is a target instead of a requirement.
            only_stated: Whether this ratio is reported without a verdict.
        """
        if ratio is None:
            return
        expected = f"× {than}" if self._stated else f"≥ {least:g} × {than}"
        if only_stated and not self._stated:
            expected = f"target {expected}"
        stated = self._stated or only_stated
        self.bounds.append(Bound(what, expected, f"{ratio:.2f} ×", ratio >= least, aim, stated))


def _memory_bounds(engines: dict[str, dict[str, Any]]) -> list[Bound]:
    """The bounds on the memory excluding mapped files, after loading and one answer."""
    bounds = []
    # bf16 weights are read from the mapped file. Packed weights may be in memory once.
    for precision, weights in (("bf16", 0.0), ("int8", 1.15), ("int4", 1.15)):
        engine = engines.get(f"ours {precision}")
        if engine and (resident := engine["anonymous_bytes"]):
            limit = weights * engine["weight_bytes"] + 0.4 * GB
            what = f"private memory, {precision}"
            bounds.append(Bound(what, f"≤ {limit / GB:.2f} GB", f"{resident / GB:.2f} GB", bool(resident <= limit)))
    return bounds
