"""Compare tokens and logits with llama.cpp on the same GGUF files.

    python -m benchmarks.formats

- Files written by `convert`: small random models with Llama 3's special tokens, and SmolLM2 in float32.
- Every supported type of GGUF tensors: SmolLM2, quantized by llama.cpp.
- Token ids of 10,000 random texts (drawn by hypothesis) and of a corpus of code and many scripts, for two vocabularies.

llama.cpp uses a float32 KV cache here, but rounds activations to the dtype of the weights. Therefore the logits are
close only for float32 files. Writes formats.json and results.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings

from benchmarks.engines import quiet_llama_cpp
from benchmarks.files import make_gguf, quantize_gguf
from benchmarks.machine import machine
from benchmarks.make_checkpoint import meta_tokenizer
from benchmarks.quality import Distance, text
from benchmarks.report import FOLDER, versions, write_report
from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.convert import convert
from llama_scratch.download.locate import find_model
from llama_scratch.system.progress import silent
from tests.helpers.checkpoints import tiny_params, write_meta
from tests.helpers.texts import CORPUS, drawn

POSITIONS = 256
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K")


def converted(folder: Path) -> list[dict[str, Any]]:
    """Compare llama.cpp's logits and tokens with ours for files from `convert`."""
    files = {}
    for scaled in (True, False):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f"random {str(dtype).removeprefix('torch.')}, {'scaled' if scaled else 'plain'} RoPE"
            source = write_meta(folder / name, params=tiny_params(use_scaled_rope=scaled), dtype=dtype, tied=scaled)
            files[name] = convert(source, folder / f"{name}.gguf", "gguf").path
    directory = convert(find_model("smollm2"), folder / "SmolLM2", "hf").path
    files["SmolLM2 by way of Hugging Face's form"] = convert(directory, folder / "SmolLM2.gguf", "gguf").path
    return [{"model": name, **against_llama_cpp(path, CORPUS)} for name, path in files.items()]


def quantized(folder: Path) -> list[dict[str, Any]]:
    """Compare llama.cpp's logits and tokens with ours for SmolLM2 in each GGUF type."""
    f32 = folder / "SmolLM2-F32.gguf"
    make_gguf(find_model("smollm2"), f32, torch.float32)
    rows = []
    for kind in KINDS:
        path = folder / f"SmolLM2-{kind}.gguf"
        if kind != "F32":
            quantize_gguf(f32, path, kind)
        types = open_checkpoint(path).storage(silent).types
        rows.append({"kind": kind, "types": types, **against_llama_cpp(path, text())})
    return rows


def against_llama_cpp(path: Path, content: str) -> dict[str, Any]:
    """Compare our fp32 with llama.cpp on one GGUF file.

    Compares the token ids of each line of text, and the logits at the first positions.

    Args:
        path: The file.
        content: The text.
    """
    import llama_cpp

    quiet_llama_cpp()
    float32 = int(llama_cpp.GGML_TYPE_F32)
    theirs = llama_cpp.Llama(
        str(path),
        n_ctx=POSITIONS,
        n_batch=POSITIONS,
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )
    ours = Llama.load(str(path), precision="fp32", context=POSITIONS)
    ids = ours.encode(content)[:POSITIONS]
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    found = ours.logits(ids)
    distance = Distance()
    distance.add(expected, found)
    lines = content.splitlines()
    unequal = unequal_texts(theirs, ours, lines)
    theirs.close()
    return {
        "texts": len(lines),
        "unequal_texts": len(unequal),
        "positions": len(ids),
        "relative_l2": float((found - expected).norm() / expected.norm()),
        "mean_kl": distance.mean_kl,
        "same_top": distance.same_top_share,
    }


def tokens(folder: Path) -> list[dict[str, Any]]:
    """Compare token ids on random texts and on the corpus, for two vocabularies.

    The corpus is compared as a whole and line by line.
    """
    import llama_cpp

    quiet_llama_cpp()
    tiny = write_meta(folder / "vocabulary", params=tiny_params(dim=64, n_heads=1, n_kv_heads=1, vocab_size=128_256))
    shutil.copyfile(meta_tokenizer(), tiny / "tokenizer.model")
    llama3 = convert(tiny, folder / "vocabulary.gguf", "gguf").path
    rows = []
    for name, path in {"SmolLM2": find_model("smollm2"), "Llama 3": llama3}.items():
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        ours = Llama.load(str(path), context=16)
        texts = drawn_texts()
        corpus = [CORPUS, *CORPUS.splitlines(keepends=True)]
        rows.append(
            {
                "vocabulary": name,
                "texts": len(texts),
                "unequal_texts": len(unequal_texts(theirs, ours, texts)),
                "corpus": len(CORPUS),
                "unequal_corpus": len(unequal_texts(theirs, ours, corpus)),
            }
        )
        theirs.close()
    return rows


def drawn_texts() -> list[str]:
    """Distinct random texts, drawn by hypothesis with a fixed seed."""
    seen: set[str] = set()

    @settings(max_examples=650, deadline=None, derandomize=True, database=None)
    @given(texts=drawn)
    def collect(texts: list[str]) -> None:
        seen.update(texts)

    collect()
    return sorted(seen)


def unequal_texts(theirs: Any, ours: Llama, texts: Sequence[str]) -> list[str]:
    """Return the texts with different token ids.

    Both treat names of special tokens as plain text. One difference is ignored: if a vocabulary lacks a byte (SmolLM2's
    lacks 21), ours emits the unknown token, like `tokenizers`, and llama.cpp skips the byte.

    Args:
        theirs: llama.cpp's model.
        ours: Our model.
        texts: The texts.
    """
    tokenizer = ours.tokenizer
    left_out = tokenizer.special_tokens.get(tokenizer.unknown or "")

    def differ(text: str) -> bool:
        found = theirs.tokenize(text.encode(), add_bos=tokenizer.bos_id is not None, special=False)
        return bool(found != [id for id in ours.encode(text) if id != left_out])

    return [text for text in texts if differ(text)]


def main() -> None:
    """Measure, record and print the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "versions": versions(),
            "machine": machine(),
            "convert": converted(folder),
            "types": quantized(folder),
            "tokens": tokens(folder),
        }
    (FOLDER / "formats.json").write_text(json.dumps(found, indent=1) + "\n")
    write_report(FOLDER)
    for part in ("convert", "types", "tokens"):
        for row in found[part]:
            print(row)


if __name__ == "__main__":
    main()
