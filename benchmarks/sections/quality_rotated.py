"""Accuracy on rotated weights; recorded by `benchmarks/quality.py --rotate`."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import Bound, bounds_table, captioned, table
from benchmarks.sections.quality import distances_table


def section(quality: dict[str, Any]) -> list[str]:
    """Render the section."""
    rows = [
        [engine, f"{error['bits']:.2f}", f"{error['weight']:.2e}", f"{error['output']:.2e}"]
        for engine, error in quality["w2"].items()
    ]
    return [
        "## Quality off the grid",
        "The same measures for a network whose residual stream is rotated at random. The rotation is folded into the "
        "weights and does not change the answers. SmolLM2's file has 4-bit weights, which a 4-bit format may represent "
        f"exactly by chance; rotated weights are off every format's grid. {quality['tokens']:,} tokens. llama.cpp "
        "keeps the output in 8 bits, our int4 in 4.",
        captioned(quality, distances_table(quality)),
        "Rows of 576 weights do not fit the 256-weight blocks of llama.cpp's K-quants, but rows of w2 do. Errors of "
        "the w2 matrices, all in one type, mean over the layers: ‖W − Ŵ‖² / ‖W‖² for the weight, and "
        "‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² for the output, with the inputs X of w2 on the text.",
        captioned(quality, table(["engine", "bits per weight", "weight error", "output error"], rows)),
        "### Bounds of quality off the grid",
        captioned(quality, bounds_table(rotated_bounds(quality))),
    ]


def rotated_bounds(quality: dict[str, Any]) -> list[Bound]:
    """The bounds on the accuracy of int8 and int4 with rotated weights."""
    distances = quality["distances"]
    bounds = []
    for ours, theirs, share in (("int8", "Q8_0", 1.0), ("int4", "Q4_0", 0.8)):
        if (our := distances.get(f"ours {ours}")) and (peer := distances.get(f"llama.cpp {theirs}")):
            kl, max_kl = our["mean_kl"], share * peer["mean_kl"]
            expected = f"≤ {max_kl:.2e}, {share:g} × llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, mean KL to fp32", expected, f"{kl:.2e}", kl <= max_kl))
            bits, max_bits = our["bits"], peer["bits"]
            expected = f"≤ {max_bits:.4f}, llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, bits per weight", expected, f"{bits:.4f}", bits <= max_bits))
    return bounds
