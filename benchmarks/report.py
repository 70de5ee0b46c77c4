"""results.json and quality.json → results.md: the tables for people, and each bound with whether it is met.

`render` is a pure function, so that a test can hold the files in the repository together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent
PACKAGES = ("llama-scratch", "torch", "llama-cpp-python", "ctranslate2", "transformers", "gguf")
GB = 1e9


def versions() -> dict[str, str]:
    """The versions of all engines that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Bound:
    """A bound and the figure that was measured for it, both as text.

    Args:
        what: The measured quantity.
        expected: The bound.
        found: The figure.
        met: Whether the figure is within the bound.
        aim: The bound is an aim, not a promise.
        stated: The figure is stated without a verdict, because the bound does not hold for this CPU.
    """

    what: str
    expected: str
    found: str
    met: bool
    aim: bool = False
    stated: bool = False

    @property
    def verdict(self) -> str:
        """The text of the last column."""
        if self.stated:
            return "stated"
        return "met" if self.met else "aim not reached" if self.aim else "**not met**"

    def __str__(self) -> str:
        return f"{self.what}: {self.found}, expected {self.expected}: {self.verdict.strip('*')}"


# --- Figures ----------------------------------------------------------------------------------


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


# --- Bounds -----------------------------------------------------------------------------------

AVX2 = " (AVX2)"  # ends the name of an engine that may only use AVX2
BF16 = ("llama.cpp BF16", "llama.cpp BF16 flash")
F16 = ("llama.cpp F16",)
Q8_0 = ("llama.cpp Q8_0", "llama.cpp Q8_0 flash")
Q4_0, Q4_K_M = ("llama.cpp Q4_0",), ("llama.cpp Q4_K_M",)
IK_Q8_0, IK_Q4_K_M = ("ik_llama.cpp Q8_0",), ("ik_llama.cpp Q4_K_M",)
# Of prefill, and the text for it.
_PEERS_16 = (*BF16, *F16, *Q8_0), "llama.cpp's best of BF16, F16, Q8_0"
_PEERS = (*BF16, *Q8_0, *Q4_0, *Q4_K_M), "llama.cpp's best of BF16, Q8_0, Q4_0, Q4_K_M"

# CPU → precision → least ratio of prefill to the peers' best: up to 128 tokens, more tokens, the aim.
_PREFILL: dict[str, dict[str, tuple[float, float, float | None]]] = {
    "AVX2": {"bf16": (1.3, 1.3, None), "int8": (1.5, 1.4, 1.7), "int4": (2.0, 1.8, 2.3)},
    "AVX-512": {"bf16": (1.0, 1.0, None), "int8": (1.6, 1.6, None), "int4": (2.0, 2.0, None)},
}
# CPU → least ratio of SmolLM2's decode to llama.cpp's best.
_SMOLLM2 = {"AVX2": 1.5, "AVX-512": 2.0}
# Least ratio of prefill and of decode to ik_llama.cpp.
_IK = {"int8": (IK_Q8_0, 1.0, 1.0), "int4": (IK_Q4_K_M, 1.1, 1.3)}


def cpu_kind(machine: dict[str, Any]) -> str:
    """The kind of CPU that bounds are given for: "AVX2" or "AVX-512"; "" for any other."""
    return "AVX-512" if "avx512f" in machine["features"] else "AVX2" if "avx2" in machine["features"] else ""


def speed_bounds(results: dict[str, Any]) -> list[Bound]:
    """The bounds of the recorded CPU for which the run has figures.

    On a CPU with AVX-512 two kinds of ratios are stated without a verdict: those to ik_llama.cpp, and those of our
    AVX2 rows, because the peers beside them use AVX-512.
    """
    kind = cpu_kind(results["machine"])
    bounds = _ratio_bounds(results, "", stated=not kind)
    if edits := results["edits"]:
        ratio = median(edit["edited_s"] / edit["whole_s"] for edit in edits)
        what = f"prompt of {edits[0]['tokens']:,} tokens, last one changed"
        bounds.append(Bound(what, "≤ 1/50 of the whole's time", f"1/{1 / ratio:.0f}", ratio <= 1 / 50))
    bounds += _memory_bounds(results["engines"])
    return bounds + _ratio_bounds(results, AVX2, stated=kind != "AVX2")


def _ratio_bounds(results: dict[str, Any], suffix: str, *, stated: bool) -> list[Bound]:
    """The bounds on our speed beside that of others.

    Args:
        results: The recorded run.
        suffix: The end of our engines' names, "" or `AVX2`.
        stated: Whether all ratios are stated without a verdict.
    """
    figures = Figures(results)
    kind = "AVX2" if suffix else cpu_kind(results["machine"]) or "AVX2"
    bounds: list[Bound] = []

    def at_least(
        least: float, what: str, than: str, found: float | None, *, aim: bool = False, only_stated: bool = False
    ) -> None:
        if found is not None:
            expected = f"× {than}" if stated else f"≥ {least:g} × {than}"
            if only_stated and not stated:
                expected = f"the aim is {expected}"
            bounds.append(Bound(what, expected, f"{found:.2f} ×", found >= least, aim, stated or only_stated))

    def beside_ik(precision: str, case: str, measured: str, what: str) -> None:
        peer, prefill, decode = _IK[precision]
        found = figures.ratio(measured, case, [f"ours {precision}{suffix}"], peer)
        least = prefill if measured == "prefill" else decode
        at_least(least, what, f"{peer[0]}, repacked", found, only_stated=kind == "AVX-512")

    bf16, int8, int4 = (f"ours {precision}{suffix}" for precision in ("bf16", "int8", "int4"))
    limit = "bandwidth ÷ weight bytes"
    for case, size in results["cases"].items():
        if size["model"] != "1B":
            continue
        context = f"{size['context']:,}"
        if size["long"]:
            reference = "llama.cpp BF16, flash attention on or off"
            found = figures.ratio("prefill", case, [bf16], BF16)
            at_least(1.3, f"prefill of {context}, bf16{suffix}", reference, found)
            found = figures.ratio("decode", case, [bf16], BF16)
            at_least(1.2, f"decode at {context}, bf16{suffix}", reference, found)
        elif size["tokens"]:
            what = f"decode, bf16{suffix}"
            at_least(1, what, "llama.cpp BF16", figures.ratio("decode", case, [bf16], BF16))
            at_least(0.88, what, limit, figures.share(case, bf16))
            if not stated:
                at_least(0.92, what, "the same", figures.share(case, bf16), aim=True)
            what = f"decode, int8{suffix}"
            at_least(1.15, what, "llama.cpp Q8_0", figures.ratio("decode", case, [int8], Q8_0))
            at_least(0.92, what, limit, figures.share(case, int8))
            beside_ik("int8", case, "decode", what)
            what = f"decode, int4{suffix}"
            at_least(1.4, what, "llama.cpp Q4_K_M", figures.ratio("decode", case, [int4], Q4_K_M))
            at_least(0.9, what, limit, figures.share(case, int4))
            beside_ik("int4", case, "decode", what)
        else:
            for precision, (short, longer, aim) in _PREFILL[kind].items():
                peers, names = _PEERS_16 if precision == "bf16" else _PEERS
                what = f"prefill of {context}, {precision}{suffix}"
                found = figures.ratio("prefill", case, [f"ours {precision}{suffix}"], peers)
                at_least(short if size["context"] <= 128 else longer, what, names, found)
                if aim and not stated:
                    at_least(aim, what, "the same", found, aim=True)
                if precision in _IK:
                    beside_ik(precision, case, "prefill", what)
    small = [name for name, engine in results["engines"].items() if engine["model"] == "SmolLM2"]
    ours = [name for name in small if "ours" in name and name.endswith(AVX2) == bool(suffix)]
    found = figures.ratio("decode", "SmolLM2", ours, [name for name in small if "ours" not in name])
    at_least(_SMOLLM2[kind], f"SmolLM2 decode, best precision{suffix}", "llama.cpp's best of Q8_0 and Q4_0", found)
    return bounds


def _memory_bounds(engines: dict[str, dict[str, Any]]) -> list[Bound]:
    """The bounds on the memory beyond mapped files, once a model is loaded and has answered."""
    bounds = []
    # bf16 is read from the mapped file. Panels may be in memory once.
    for precision, weights in (("bf16", 0.0), ("int8", 1.15), ("int4", 1.15)):
        engine = engines.get(f"ours {precision}")
        if engine and (resident := engine["anonymous_bytes"]):
            most = weights * engine["weight_bytes"] + 0.4 * GB
            what = f"resident beyond mapped files, {precision}"
            bounds.append(Bound(what, f"≤ {most / GB:.2f} GB", f"{resident / GB:.2f} GB", bool(resident <= most)))
    return bounds


def quality_bounds(quality: dict[str, Any]) -> list[Bound]:
    """The bounds on how true fp16 and int8 are."""
    distances = quality["distances"]
    bounds = []
    if fp16 := distances.get("ours fp16"):
        kl, same = fp16["mean_kl"], fp16["same_top"]
        bounds.append(Bound("fp16, mean KL to fp32", "≤ 1e-5", f"{kl:.1e}", kl <= 1e-5))
        bounds.append(Bound("fp16, same top-1 as fp32", "≥ 99.8 %", _percent(same, 2), same >= 0.998))
    if (int8 := distances.get("ours int8")) and (q8_0 := distances.get("llama.cpp Q8_0")):
        kl, most = int8["mean_kl"], 1.05 * q8_0["mean_kl"]
        bounds.append(Bound("int8, mean KL to fp32", f"≤ {most:.2e}, 1.05 × llama.cpp Q8_0's", f"{kl:.2e}", kl <= most))
        same, least = int8["same_top"], q8_0["same_top"] - 0.003
        expected = f"≥ {_percent(least, 2)}, 0.3 below llama.cpp Q8_0's"
        bounds.append(Bound("int8, same top-1 as fp32", expected, _percent(same, 2), same >= least))
    return bounds


def rotated_bounds(quality: dict[str, Any]) -> list[Bound]:
    """The bounds on how true int8 and int4 are, on weights that no format has the grid of."""
    distances = quality["distances"]
    bounds = []
    for ours, theirs, share in (("int8", "Q8_0", 1.0), ("int4", "Q4_0", 0.8)):
        if (own := distances.get(f"ours {ours}")) and (peer := distances.get(f"llama.cpp {theirs}")):
            kl, most = own["mean_kl"], share * peer["mean_kl"]
            expected = f"≤ {most:.2e}, {share:g} × llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, mean KL to fp32", expected, f"{kl:.2e}", kl <= most))
            bits, most = own["bits"], peer["bits"]
            expected = f"≤ {most:.4f}, llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, bits a weight", expected, f"{bits:.4f}", bits <= most))
    return bounds


# --- Text -------------------------------------------------------------------------------------


def render(
    results: dict[str, Any] | None,
    quality: dict[str, Any] | None,
    startup: dict[str, Any] | None = None,
    keystrokes: dict[str, Any] | None = None,
    microscope: dict[str, Any] | None = None,
    formats: dict[str, Any] | None = None,
    loading: dict[str, Any] | None = None,
    rotated: dict[str, Any] | None = None,
    speculation: dict[str, Any] | None = None,
    kernels: dict[str, Any] | None = None,
) -> str:
    """Render results.md. Parts that were not measured are left out."""
    parts = [
        "# Measured",
        "Made by `make benchmark`, `make quality`, `make formats`, `python -m benchmarks.startup`, "
        "`python -m benchmarks.kernels`, `python -m benchmarks.keystrokes`, `python -m benchmarks.microscope` and "
        "`python -m benchmarks.speculation`; not edited by hand.",
    ]
    if results:
        parts += _speed(results)
    if kernels:
        parts += _kernels(kernels)
    if quality:
        parts += _quality(quality)
    if rotated:
        parts += _rotated(rotated)
    if startup:
        parts += _startup(startup)
    if keystrokes:
        parts += _keystrokes(keystrokes)
    if microscope:
        parts += _microscope(microscope)
    if loading:
        parts += _loading(loading)
    if formats:
        parts += _formats(formats)
    if speculation:
        parts += _speculation(speculation)
    return "\n\n".join(parts) + "\n"


def _captioned(recorded: dict[str, Any], table: str) -> str:
    """A table below the line that names the CPU it holds for."""
    return f"{_caption(recorded)}\n\n{table}"


def _caption(recorded: dict[str, Any]) -> str:
    """The CPU of a recorded file, its features, and the instruction sets of our kernels."""
    machine = recorded.get("machine")
    if not machine:
        return "CPU: not recorded."
    features = ", ".join(machine["features"]) or "features unknown"
    text = f"CPU: {machine['cpu']} ({features})."
    if "kernels" in machine:
        text += f" Our kernels: {machine['kernels'] or 'none'}"
        engines = recorded.get("engines", {}).items()
        limited = {engine["kernels"] for name, engine in engines if name.endswith(AVX2) and engine["kernels"]}
        text += "".join(f"; in rows marked{AVX2}: {kernels}" for kernels in sorted(limited)) + "."
    return text


def _speed(results: dict[str, Any]) -> list[str]:
    figures, machine = Figures(results), results["machine"]
    bandwidth = sorted(sample["bandwidth"] for sample in results["samples"])
    model = results["model"]
    rounds = f"{results['rounds']} rounds ({results['long_rounds']} of the long case)"
    return [
        "## Speed",
        f"{model['name']}: {model['parameters']:,} random weights in {model['layers']} layers of {model['dim']:,}, "
        f"one sequence at a time, {machine['threads']} threads. All engines take turns in one run of {rounds}; "
        "a figure is the median of tokens a second. In brackets: how many times "
        f"{results['reference']}'s, the median of the ratios within each round. "
        "The limit of decode is the read bandwidth ÷ the bytes of weights that a token needs. "
        f"Rows marked{AVX2} are ours with AVX2 alone, on a CPU that has more. ik_llama.cpp repacks its weights when it "
        "loads them; its llama-bench is a new process for each figure, and decodes from an empty cache. "
        "int4 is calibrated with a short text here, so its preparation takes minutes less than usual. "
        "“Resident” is the memory that is the process's own once it has loaded and answered once, “mapped” its pages "
        "of files, which the system takes back when it needs to. “Load” begins with the import of the library. "
        "“Distance” is the relative L2 distance of the logits after a short prompt from our fp32's.",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / GB:.0f} GB, "
        f"{machine['system']}\n"
        f"- Read bandwidth (`torch.dot`): median {median(bandwidth) / GB:.1f} GB/s, "
        f"{bandwidth[0] / GB:.1f} to {bandwidth[-1] / GB:.1f}\n"
        f"- Versions: {_versions(results['versions'])}\n"
        f"- While one engine ran, the others together used at most "
        f"{_percent(max(sample['others_cpu'] for sample in results['samples']), 1)} of one core",
        _captioned(results, _speed_table(figures)),
        _captioned(results, _memory_table(results)),
        *_small_table(figures),
        *_left_out(results),
        "### Bounds",
        _captioned(results, _bounds(speed_bounds(results))),
    ]


def _speed_table(figures: Figures) -> str:
    cases = {name: size for name, size in figures.results["cases"].items() if size["model"] == "1B"}
    columns = [("prefill", name, f"prefill {size['context']:,}") for name, size in cases.items() if _prefills(size)]
    columns += [("decode", name, f"decode at {size['context']:,}") for name, size in cases.items() if size["tokens"]]
    short = [name for name, size in cases.items() if size["tokens"] and not size["long"]]
    head = ["engine", *(title for _, _, title in columns), *("of the limit" for _ in short)]
    rows = [
        [
            engine,
            *(_rate(figures, kind, case, engine) for kind, case, _ in columns),
            *(_percent(figures.share(case, engine)) for case in short),
        ]
        for engine in _engines(figures.results, "1B")
    ]
    return _table(head, rows)


def _memory_table(results: dict[str, Any]) -> str:
    head = ["engine", "weights a token", "resident", "mapped", "load", "preparation", "distance"]
    rows = [
        [
            name,
            _gigabytes(engine["weight_bytes"]),
            _gigabytes(engine["anonymous_bytes"]),
            _gigabytes(engine["file_bytes"]),
            "–" if engine["load_s"] is None else f"{engine['load_s']:.1f} s",
            f"{engine['prepare_s']:.1f} s" if engine["prepare_s"] else "–",
            "–" if engine["distance"] is None else f"{engine['distance']:.1e}",
        ]
        for name, engine in _engines(results, "1B").items()
    ]
    return _table(head, rows)


def _engines(results: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    return {name: engine for name, engine in results["engines"].items() if engine["model"] == model}


def _prefills(size: dict[str, Any]) -> bool:
    return bool(size["long"] or not size["tokens"])


def _rate(figures: Figures, kind: str, case: str, engine: str) -> str:
    rate = figures.rate(kind, case, engine)
    if rate is None:
        return "–"
    ratio = figures.ratio(kind, case, [engine], [figures.results["reference"]])
    return f"{rate:,.1f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _gigabytes(count: int) -> str:
    return f"{count / GB:.2f} GB" if count else "–"


def _percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _small_table(figures: Figures) -> list[str]:
    rows = [
        [name, f"{rate:,.1f}", _percent(figures.share("SmolLM2", name)), f"{engine['weight_bytes'] / 1e6:,.0f} MB"]
        for name, engine in _engines(figures.results, "SmolLM2").items()
        if (rate := figures.rate("decode", "SmolLM2", name)) is not None
    ]
    if not rows:
        return []
    table = _table(["engine", "decode", "of the limit", "weights a token"], rows)
    return ["SmolLM2-135M, where each call's overhead decides:", _captioned(figures.results, table)]


def kernel_figures(case: dict[str, Any]) -> dict[str, str]:
    """Instruction set → how fast it multiplies: bytes of weights for one row, operations for several rows."""
    if case["rows"] == 1:
        return {name: f"{case['weight_bytes'] / seconds / GB:.1f} GB/s" for name, seconds in case["seconds"].items()}
    operations = 2 * case["rows"] * case["out"] * case["in"]
    return {name: f"{operations / seconds / GB:,.0f} GOP/s" for name, seconds in case["seconds"].items()}


def kernel_case(case: dict[str, Any]) -> str:
    """The product of a case in words."""
    return f"{case['kind']}, {case['rows']} {'row' if case['rows'] == 1 else 'rows'}"


def _kernels(kernels: dict[str, Any]) -> list[str]:
    cases = kernels["cases"]
    sets = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    rows = []
    for case in cases:
        figures = kernel_figures(case)
        shape = f"{case['out']:,} × {case['in']:,}"
        rows.append([kernel_case(case), shape, *(figures.get(name, "–") for name in sets)])
    return [
        "## Kernels",
        "One thread multiplies rows of activations and random weights. Figures are medians of "
        f"{kernels['rounds']} rounds in which the instruction sets take turns. Memory limits a single row, so its "
        "figure is bytes of weights per second; “any machine” is plain C++. "
        + ("All sets give the same bits." if kernels["same_bits"] else "**The sets give different bits.**"),
        f"- Versions: {_versions(kernels['versions'])}",
        _captioned(kernels, _table(["product", "weight", *sets], rows)),
    ]


def _left_out(results: dict[str, Any]) -> list[str]:
    if not results["left_out"]:
        return []
    return ["Left out:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in results["left_out"].items())]


def _quality(quality: dict[str, Any]) -> list[str]:
    return [
        "## Quality",
        f"How far the answers are from our fp32's: {quality['model']}'s dequantized weights, {quality['tokens']:,} "
        f"tokens of {quality['text']} in windows of {quality['window']:,}; after each token the Kullback-Leibler "
        "divergence from fp32, whether the most probable token is the same, and the perplexity of the next one. Bits "
        "are those of a weight of the linear layers, the output among them, with all scales.",
        f"- Versions: {_versions(quality['versions'])}",
        _captioned(quality, _distances(quality)),
        "### Bounds of quality",
        _captioned(quality, _bounds(quality_bounds(quality))),
    ]


def _rotated(quality: dict[str, Any]) -> list[str]:
    rows = [
        [engine, f"{error['bits']:.2f}", f"{error['weight']:.2e}", f"{error['output']:.2e}"]
        for engine, error in quality["w2"].items()
    ]
    return [
        "## Quality off the grid",
        "The same for a network whose residual stream is turned by a random rotation, which is folded into the "
        "weights and changes no answer: SmolLM2's file holds four bits a weight, and rotated weights lie on no "
        f"format's grid. {quality['tokens']:,} tokens. llama.cpp keeps the output in 8 bits; int4 has it in 4.",
        _captioned(quality, _distances(quality)),
        "Rows of 576 weights do not fit into the blocks of 256 that llama.cpp's K types have, but those of w2 do. Its "
        "matrices alone, all in one type: ‖W − Ŵ‖² / ‖W‖², and ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² with the inputs X that it has "
        "on the text, on average over the layers.",
        _captioned(quality, _table(["engine", "bits a weight", "error of the weight", "error of the output"], rows)),
        "### Bounds of quality off the grid",
        _captioned(quality, _bounds(rotated_bounds(quality))),
    ]


def _distances(quality: dict[str, Any]) -> str:
    rows = [["ours fp32", "0", _percent(1, 2), "32.00", f"{quality['perplexity']:.3f}"]]
    for name, of in quality["distances"].items():
        more = [f"{of['bits']:.2f}", f"{of['perplexity']:.3f}"]
        rows.append([name, f"{of['mean_kl']:.2e}", _percent(of["same_top"], 2), *more])
    return _table(["engine", "mean KL (nats)", "same top-1", "bits a weight", "perplexity"], rows)


def startup_bounds(startup: dict[str, Any]) -> list[Bound]:
    """The bounds on how long a person waits at the start."""
    seconds = startup["seconds"]
    prompt, over = seconds["prompt"], seconds["answer"] - seconds["torch"]
    bounds = [
        Bound("process start → prompt on the screen", "≤ 0.4 s", f"{prompt:.2f} s", prompt <= 0.4),
        Bound("process start → prompt on the screen", "≤ 0.25 s", f"{prompt:.2f} s", prompt <= 0.25, aim=True),
    ]
    if startup["model"] == "Llama3.2-1B":
        found = f"import torch + {over:.2f} s"
        what = "process start → answer of --prompt, 1B in 16 bits"
        bounds.append(Bound(what, "≤ import torch + 0.9 s", found, over <= 0.9))
    if compiling := seconds.get("compile"):
        bounds.append(Bound("compiling the kernels, once", "≤ 30 s", f"{compiling:.1f} s", compiling <= 30))
        kept, first = seconds["int8"], seconds["first int8"]
        waits = first - kept
        bounds.append(Bound("an answer in int8 waits for them", "≤ 0.3 s", f"{waits:.2f} s", waits <= 0.3))
    return bounds


def _startup(startup: dict[str, Any]) -> list[str]:
    rows = [[startup["rows"][name], f"{1000 * value:,.0f} ms"] for name, value in startup["seconds"].items()]
    return [
        "## Start",
        f"{startup['model']}, medians of {startup['runs']} runs with the disk's cache warm; the terminal is a "
        "pseudo-terminal of 200 columns.",
        f"- Versions: {_versions(startup['versions'])}",
        _captioned(startup, _table(["what", "time"], rows)),
        "### Bounds of the start",
        _captioned(startup, _bounds(startup_bounds(startup))),
    ]


# Names of the phases, and the 95th percentile that each must reach, in seconds.
_PHASES = {"loading": ("while torch is imported and the model loads", 0.15), "live": ("with live prediction", 0.03)}


def keystroke_bounds(keystrokes: dict[str, Any]) -> list[Bound]:
    """The bounds on how late a key appears."""
    bounds = []
    for phase, found in keystrokes["phases"].items():
        name, limit = _PHASES[phase]
        p95 = found["p95_s"]
        shown = f"{1000 * p95:.0f} ms"
        bounds.append(Bound(f"key → echo {name}, 95th percentile", f"≤ {1000 * limit:.0f} ms", shown, p95 <= limit))
    return bounds


def _keystrokes(keystrokes: dict[str, Any]) -> list[str]:
    rows = []
    for phase, found in keystrokes["phases"].items():
        lags = [f"{1000 * found[name]:,.0f} ms" for name in ("median_s", "p95_s", "longest_s")]
        rows.append([_PHASES[phase][0], f"{found['keys']}", *lags])
    return [
        "## Typing",
        f"{keystrokes['model']}, a key each {1000 * keystrokes['interval_s']:.0f} ms on a pseudo-terminal of 200 "
        "columns: from the key to the cursor's move.",
        f"- Versions: {_versions(keystrokes['versions'])}",
        _captioned(keystrokes, _table(["when", "keys", "median", "95th percentile", "longest"], rows)),
        "### Bounds of typing",
        _captioned(keystrokes, _bounds(keystroke_bounds(keystrokes))),
    ]


# What /lens and /why may take, in seconds.
_LOOKING = {"SmolLM2-135M-Instruct": {"lens": 2, "why": 3}, "Llama3.2-1B": {"lens": 8, "why": 20}}
# Two networks that are the same differ by so much in one run.
_SAME = 1.03


def microscope_bounds(microscope: dict[str, Any]) -> list[Bound]:
    """The bounds on how long the microscope takes, and on what it costs when it is not used."""
    bounds = []
    for model in microscope["models"]:
        for row, limit in _LOOKING.get(model["name"], {}).items():
            found, what = model["seconds"][row], f"{microscope['rows'][row]}, {model['name']}"
            bounds.append(Bound(what, f"≤ {limit} s", f"{found:.2f} s", found <= limit))
        what, ratio = f"a decode after a tap ÷ without one ever, {model['name']}", model["ratio"]
        bounds.append(Bound(what, f"≤ {_SAME}", f"{ratio:.3f}", ratio <= _SAME))
    return bounds


def _microscope(microscope: dict[str, Any]) -> list[str]:
    models = microscope["models"]
    rows = [
        [name, *(f"{1000 * model['seconds'][row]:,.1f} ms" for model in models)]
        for row, name in microscope["rows"].items()
    ]
    return [
        "## The microscope",
        f"Medians of {microscope['runs']} runs, each with another text, and of {microscope['tokens']} tokens that both "
        f"networks decode in turns; {microscope['threads']} threads, weights packed.",
        f"- Versions: {_versions(microscope['versions'])}",
        _captioned(microscope, _table(["what", *(f"{model['name']}, {model['precision']}" for model in models)], rows)),
        "### Bounds of the microscope",
        _captioned(microscope, _bounds(microscope_bounds(microscope))),
    ]


def _loading(loading: dict[str, Any]) -> list[str]:
    rows = []
    for row in loading["rows"]:
        times = [f"{row[f'{moment}_s']:.1f} s" for moment in ("loaded", "answered", "prepared")]
        sizes = [row["bytes"], row["answered_private"], row["prepared_private"], row["private"], row["mapped"]]
        rows.append([f"{row['form']}, {row['precision']}", *times, *(f"{size / GB:.2f} GB" for size in sizes)])
    head = ["form", "loaded", "first answer", "last form", "file", "private", "at most", "at the end", "mapped"]
    return [
        "## Loading",
        f"One model of Llama 3.2 1B's shape in every form; medians of {loading['rounds']} rounds in which all take "
        f"turns, each in a process of its own, {loading['threads']} threads, the disk's cache warm, torch imported. "
        "“Private” memory is the process's own: the most until the first answer, the most until the weights are in "
        "their last form, and what stays. “Mapped” are pages of files, which the system takes back when it needs to.",
        f"- Versions: {_versions(loading['versions'])}",
        _captioned(loading, _table(head, rows)),
    ]


def _formats(formats: dict[str, Any]) -> list[str]:
    types = [
        [
            row["kind"],
            ", ".join(f"{count} {name}" for name, count in row["types"].items() if name != "F32") or "all F32",
            f"{row['positions']}",
            f"{100 * row['same_top']:.1f} %",
            f"{row['mean_kl']:.1e}",
            f"{row['relative_l2']:.1e}",
        ]
        for row in formats["types"]
    ]
    tokens = [
        [row["vocabulary"], f"{row['texts']:,}", f"{row['unequal_texts']}", f"{row['unequal_corpus']}"]
        for row in formats["tokens"]
    ]
    return [
        "## GGUF files, beside llama.cpp",
        "SmolLM2, quantized by llama.cpp, its rows of 576 in the types that it falls back to. Ours multiplies what the "
        "blocks stand for in fp32; llama.cpp rounds activations to 8 bits for quantized matrices, and to the weights' "
        "type for the others, which is the difference.",
        f"- Versions: {_versions(formats['versions'])}",
        _captioned(
            formats,
            _table(["file", "matrices", "positions", "same top token", "mean KL", "distance of the logits"], types),
        ),
        "Texts that hypothesis draws, and a corpus of code and many scripts: how many have other token ids.",
        _captioned(formats, _table(["vocabulary", "texts", "other ids", "other ids in the corpus"], tokens)),
    ]


def _bounds(bounds: Sequence[Bound]) -> str:
    if not bounds:
        return "None of the bounds can be decided by what was measured."
    rows = [[bound.what, bound.expected, bound.found, bound.verdict] for bound in bounds]
    return _table(["what", "bound", "found", ""], rows, align="---")


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())


# What texts of a kind must reach, in times of plain decoding.
_DRAFTS = {"repeats": ("text that repeats itself", 1.5), "does not": ("text that does not", 0.98)}
_GREEDY = 10_000


def speculation_bounds(speculation: dict[str, Any]) -> list[Bound]:
    """The bounds on what guesses from the text itself gain and cost, and that they change nothing."""
    bounds = []
    for precision, kinds in speculation["precisions"].items():
        for kind, (name, least) in _DRAFTS.items():
            ratio = kinds[kind]["ratio"]
            bounds.append(Bound(f"{precision}, {name}", f"≥ {least} × plain", f"{ratio:.2f}", ratio >= least))
        compared, differ = kinds["many"]["compared"], sum(found["differ"] for found in kinds.values())
        met = compared >= _GREEDY and not differ
        expected, shown = f"0 of ≥ {_GREEDY:,} differ", f"{differ} of {compared:,}"
        bounds.append(Bound(f"{precision}, tokens of many openings, greedy", expected, shown, met))
    return bounds


def _speculation(speculation: dict[str, Any]) -> list[str]:
    names = {kind: name for kind, (name, _) in _DRAFTS.items()} | {"many": "many openings, greedy"}
    head = ["texts", "number", "plain", "with guesses", "ratio", "tokens compared", "differ"]
    rows = [
        [
            f"{precision}, {names[kind]}",
            f"{found['texts']}",
            f"{found['plain']:,.0f}",
            f"{found['drafts']:,.0f}",
            f"{found['ratio']:.2f}",
            f"{found['compared']:,}",
            f"{found['differ']}",
        ]
        for precision, kinds in speculation["precisions"].items()
        for kind, found in kinds.items()
    ]
    return [
        "## Guesses from the text itself",
        f"{speculation['model']}, up to {speculation['tokens']} tokens behind each text, generated with guesses that "
        f"are computed ahead and without, in turns, {speculation['rounds']} rounds (one of the many openings), "
        f"{speculation['threads']} threads: medians of tokens a second, and of the ratios within a turn. What does not "
        "repeat itself is drawn at a temperature of 1. Tokens differ where an id or a bit of its log probability does.",
        f"- Versions: {_versions(speculation['versions'])}",
        _captioned(speculation, _table(head, rows)),
        "### Bounds of guesses",
        _captioned(speculation, _bounds(speculation_bounds(speculation))),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    lines = [head, ["---", *(align for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: Path) -> None:
    """Write results.md from what lies beside it."""
    (folder / "results.md").write_text(render(*recorded(folder)))


def recorded(folder: Path) -> list[dict[str, Any] | None]:
    """Read the recorded files of a folder in the order of `render`'s parameters, None for a missing file."""
    names = (
        "results",
        "quality",
        "startup",
        "keystrokes",
        "microscope",
        "formats",
        "loading",
        "quality_rotated",
        "speculation",
        "kernels",
    )
    paths = (folder / f"{name}.json" for name in names)
    return [json.loads(path.read_text()) if path.is_file() else None for path in paths]
