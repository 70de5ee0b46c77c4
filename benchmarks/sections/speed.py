"""Speed and memory relative to others; recorded by benchmarks/compare.py."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.sections.figures import Figures
from benchmarks.sections.layout import AVX2, GB, bounds_table, captioned, percent, table, versions_text
from benchmarks.sections.speed_bounds import speed_bounds


def section(results: dict[str, Any]) -> list[str]:
    """Render the section."""
    figures, machine = Figures(results), results["machine"]
    bandwidth = sorted(sample["bandwidth"] for sample in results["samples"])
    model = results["model"]
    rounds = f"{results['rounds']} rounds ({results['long_rounds']} of the long case)"
    return [
        "## Speed",
        f"{model['name']}: {model['parameters']:,} random weights in {model['layers']} layers of {model['dim']:,}, "
        f"batch size 1, {machine['threads']} threads. All engines alternate in one run of {rounds}. "
        "Figures are median tokens per second. In brackets: the speed relative to "
        f"{results['reference']}, the median of the ratios within each round. "
        "The limit of decode is the read bandwidth ÷ the weight bytes per token. "
        f"Rows marked{AVX2} are our engines limited to AVX2 on a CPU that has more. ik_llama.cpp repacks its weights "
        "at load; its llama-bench is a new process for each figure and decodes from an empty cache. "
        "int4 is calibrated with a short text here, so its preparation takes minutes less than usual. "
        "“Private” is the memory excluding file pages after loading and one answer; “mapped” is the size of the file "
        "pages, which the system can reclaim. “Load” includes importing the library. "
        "“Distance” is the relative L2 distance of the logits from our fp32 after a short prompt.",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / GB:.0f} GB, "
        f"{machine['system']}\n"
        f"- Read bandwidth (`torch.dot`): median {median(bandwidth) / GB:.1f} GB/s, "
        f"{bandwidth[0] / GB:.1f} to {bandwidth[-1] / GB:.1f}\n"
        f"- Versions: {versions_text(results['versions'])}\n"
        f"- While one engine ran, the others together used at most "
        f"{percent(max(sample['others_cpu'] for sample in results['samples']), 1)} of one core",
        captioned(results, _speed_table(figures)),
        captioned(results, _memory_table(results)),
        *_small_table(figures),
        *_left_out(results),
        "### Bounds",
        captioned(results, bounds_table(speed_bounds(results))),
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
            *(percent(figures.share(case, engine)) for case in short),
        ]
        for engine in _engines(figures.results, "1B")
    ]
    return table(head, rows)


def _memory_table(results: dict[str, Any]) -> str:
    head = ["engine", "weights per token", "private", "mapped", "load", "preparation", "distance"]
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
    return table(head, rows)


def _small_table(figures: Figures) -> list[str]:
    rows = [
        [name, f"{rate:,.1f}", percent(figures.share("SmolLM2", name)), f"{engine['weight_bytes'] / 1e6:,.0f} MB"]
        for name, engine in _engines(figures.results, "SmolLM2").items()
        if (rate := figures.rate("decode", "SmolLM2", name)) is not None
    ]
    if not rows:
        return []
    small = table(["engine", "decode", "of the limit", "weights per token"], rows)
    return ["SmolLM2-135M, for which the overhead per call matters most:", captioned(figures.results, small)]


def _left_out(results: dict[str, Any]) -> list[str]:
    if not results["left_out"]:
        return []
    return ["Not measured:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in results["left_out"].items())]


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
