"""Distance of each precision from fp32 on rotated weights; recorded by `benchmarks/quality.py --rotate`."""

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
        "The same for a network whose residual stream is turned by a random rotation, which is folded into the "
        "weights and changes no answer: SmolLM2's file holds four bits a weight, and rotated weights lie on no "
        f"format's grid. {quality['tokens']:,} tokens. llama.cpp keeps the output in 8 bits; int4 has it in 4.",
        captioned(quality, distances_table(quality)),
        "Rows of 576 weights do not fit into the blocks of 256 that llama.cpp's K types have, but those of w2 do. Its "
        "matrices alone, all in one type: ‖W − Ŵ‖² / ‖W‖², and ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² with the inputs X that it has "
        "on the text, on average over the layers.",
        captioned(quality, table(["engine", "bits a weight", "error of the weight", "error of the output"], rows)),
        "### Bounds of quality off the grid",
        captioned(quality, bounds_table(rotated_bounds(quality))),
    ]


def rotated_bounds(quality: dict[str, Any]) -> list[Bound]:
    """The bounds on how accurate int8 and int4 are on weights that lie on no format's grid."""
    distances = quality["distances"]
    bounds = []
    for ours, theirs, share in (("int8", "Q8_0", 1.0), ("int4", "Q4_0", 0.8)):
        if (our := distances.get(f"ours {ours}")) and (peer := distances.get(f"llama.cpp {theirs}")):
            kl, max_kl = our["mean_kl"], share * peer["mean_kl"]
            expected = f"≤ {max_kl:.2e}, {share:g} × llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, mean KL to fp32", expected, f"{kl:.2e}", kl <= max_kl))
            bits, max_bits = our["bits"], peer["bits"]
            expected = f"≤ {max_bits:.4f}, llama.cpp {theirs}'s"
            bounds.append(Bound(f"{ours}, bits a weight", expected, f"{bits:.4f}", bits <= max_bits))
    return bounds
