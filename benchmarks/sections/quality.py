"""Distance of each precision from fp32; recorded by benchmarks/quality.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, percent, table, versions_text


def section(quality: dict[str, Any]) -> list[str]:
    """Render the section."""
    return [
        "## Quality",
        f"Accuracy relative to our fp32: dequantized weights of {quality['model']}, {quality['tokens']:,} tokens of "
        f"{quality['text']} in windows of {quality['window']:,}. For each token: the Kullback-Leibler divergence from "
        "fp32, whether the most likely token is the same, and the perplexity of the next token. Bits per weight are "
        "those of the linear layers and the output, including scales.",
        f"- Versions: {versions_text(quality['versions'])}",
        captioned(quality, distances_table(quality)),
        "### Bounds of quality",
        captioned(quality, bounds_table(quality_bounds(quality))),
    ]


def quality_bounds(quality: dict[str, Any]) -> list[Bound]:
    """The bounds on the accuracy of fp16 and int8."""
    distances = quality["distances"]
    bounds = []
    if fp16 := distances.get("ours fp16"):
        kl, same = fp16["mean_kl"], fp16["same_top"]
        bounds.append(Bound("fp16, mean KL to fp32", "≤ 1e-5", f"{kl:.1e}", kl <= 1e-5))
        bounds.append(Bound("fp16, same top-1 as fp32", "≥ 99.8 %", percent(same, 2), same >= 0.998))
    if (int8 := distances.get("ours int8")) and (q8_0 := distances.get("llama.cpp Q8_0")):
        kl, max_kl = int8["mean_kl"], 1.05 * q8_0["mean_kl"]
        bounds.append(
            Bound("int8, mean KL to fp32", f"≤ {max_kl:.2e}, 1.05 × llama.cpp Q8_0's", f"{kl:.2e}", kl <= max_kl)
        )
        same, least = int8["same_top"], q8_0["same_top"] - 0.003
        expected = f"≥ {percent(least, 2)}, 0.3 points below llama.cpp Q8_0's"
        bounds.append(Bound("int8, same top-1 as fp32", expected, percent(same, 2), same >= least))
    return bounds


def distances_table(quality: dict[str, Any]) -> str:
    """Render the table of distances, one row per engine."""
    rows = [["ours fp32", "0", percent(1, 2), "32.00", f"{quality['perplexity']:.3f}"]]
    for name, distance in quality["distances"].items():
        bits_and_perplexity = [f"{distance['bits']:.2f}", f"{distance['perplexity']:.3f}"]
        rows.append([name, f"{distance['mean_kl']:.2e}", percent(distance["same_top"], 2), *bits_and_perplexity])
    return table(["engine", "mean KL (nats)", "same top-1", "bits per weight", "perplexity"], rows)
