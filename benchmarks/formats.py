"""What `convert` writes, read by llama.cpp: are the tokens ours, and the logits?

    python -m benchmarks.formats

Small random models with Llama 3's special tokens, and SmolLM2's weights as float32, are written as GGUF files.
llama.cpp computes with float32 for the cache here; it rounds activations to the type of the weights, so that only
the float32 files can be compared closely. Writes benchmarks/formats.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engines import quiet_llama_cpp
from benchmarks.report import FOLDER, versions
from llama_scratch import Llama
from llama_scratch.checkpoint.convert import convert
from llama_scratch.checkpoint.find import find_model
from tests.checkpoints import tiny_params, write_meta

CORPUS = Path(__file__).parent.parent / "tests" / "corpus.txt"
POSITIONS = 256


def converted_for_llama_cpp(folder: Path) -> list[dict[str, Any]]:
    """For each file that `convert` wrote: how far llama.cpp's logits are (relative L2), and whose tokens differ."""
    files = {}
    for scaled in (True, False):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f"random {str(dtype).removeprefix('torch.')}, {'scaled' if scaled else 'plain'} RoPE"
            source = write_meta(folder / name, params=tiny_params(use_scaled_rope=scaled), dtype=dtype, tied=scaled)
            files[name] = convert(source, folder / f"{name}.gguf", "gguf").path
    directory = convert(find_model("smollm2"), folder / "SmolLM2", "hf").path
    files["SmolLM2 by way of Hugging Face's form"] = convert(directory, folder / "SmolLM2.gguf", "gguf").path
    return [{"model": name, **compare_with_llama_cpp(path)} for name, path in files.items()]


def compare_with_llama_cpp(path: Path) -> dict[str, Any]:
    """Ours in fp32 and llama.cpp on one GGUF file."""
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
    llama = Llama.load(str(path), precision="fp32", context=POSITIONS)
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    unequal = [
        line
        for line in lines
        if theirs.tokenize(line.encode(), add_bos=True, special=False) != llama.tokenizer.encode(line, bos=True)
    ]
    ids = llama.tokenizer.encode("\n".join(lines), bos=True)[:POSITIONS]
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    found = llama.logits(ids)
    theirs.close()
    return {
        "texts": len(lines),
        "unequal_texts": len(unequal),
        "positions": len(ids),
        "relative_l2": float((found - expected).norm() / expected.norm()),
        "same_top": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"versions": versions(), "convert": converted_for_llama_cpp(Path(folder))}
    (FOLDER / "formats.json").write_text(json.dumps(found, indent=2) + "\n")
    for row in found["convert"]:
        print(row)


if __name__ == "__main__":
    main()
