"""Agreement with llama.cpp on GGUF files; recorded by benchmarks/formats.py."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.layout import captioned, table, versions_text


def section(formats: dict[str, Any]) -> list[str]:
    """Render the section."""
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
        "## GGUF files compared with llama.cpp",
        "SmolLM2, quantized by llama.cpp, which uses fallback types for rows of 576. Ours dequantizes the blocks and "
        "multiplies in fp32. The differences come from llama.cpp's rounding of activations: to 8 bits for quantized "
        "matrices, and to the dtype of the weights for others.",
        f"- Versions: {versions_text(formats['versions'])}",
        captioned(
            formats,
            table(["file", "matrices", "positions", "same top-1", "mean KL (nats)", "relative L2"], types),
        ),
        "Number of texts with different token ids, among random texts (drawn by hypothesis) and in a corpus of code "
        "and many scripts.",
        captioned(formats, table(["vocabulary", "random texts", "different", "different in the corpus"], tokens)),
    ]
