"""Our answers from GGUF files beside llama.cpp's; recorded by benchmarks/formats.py."""

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
        "## GGUF files, beside llama.cpp",
        "SmolLM2, quantized by llama.cpp, its rows of 576 in the types that it falls back to. Ours multiplies what the "
        "blocks stand for in fp32; llama.cpp rounds activations to 8 bits for quantized matrices, and to the weights' "
        "type for the others, which is the difference.",
        f"- Versions: {versions_text(formats['versions'])}",
        captioned(
            formats,
            table(["file", "matrices", "positions", "same top token", "mean KL", "distance of the logits"], types),
        ),
        "Texts that hypothesis draws, and a corpus of code and many scripts: how many have other token ids.",
        captioned(formats, table(["vocabulary", "texts", "other ids", "other ids in the corpus"], tokens)),
    ]
