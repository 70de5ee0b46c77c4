"""Write a random model with the dimensions of Llama 3.2 1B in Meta's format.

    python -m benchmarks.make_checkpoint DIRECTORY [--n-layers N]

The weights are bf16 with a tied output, 2.47 GB, as in Meta's file. The tokenizer is Meta's, from the llama-models
package (`pip install '.[test]'`). Sizes and speed are the same as for the real model, but the answers are random.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from llama_scratch.checkpoint.meta.params import parse_params

LLAMA_3_2_1B: dict[str, Any] = {
    "dim": 2048,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "n_heads": 32,
    "n_kv_heads": 8,
    "n_layers": 16,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}


def make_checkpoint(directory: Path, params: dict[str, Any] = LLAMA_3_2_1B) -> None:
    """Write params.json, tokenizer.model and consolidated.00.pth to a directory.

    Args:
        directory: The directory.
        params: Content of params.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(params)
    args = parse_params(text)
    (directory / "params.json").write_text(text)
    shutil.copyfile(meta_tokenizer(), directory / "tokenizer.model")
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in args.weight_shapes().items():
        if name == "output.weight":
            weights[name] = weights["tok_embeddings.weight"]
        elif len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weights[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(
                0, 1 / math.sqrt(shape[1]), generator=generator
            )
    torch.save(weights, directory / "consolidated.00.pth")


def meta_tokenizer() -> Path:
    """Meta's tokenizer.model in the installed llama-models package."""
    spec = importlib.util.find_spec("llama_models.llama3")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llama-models is not installed. Run: pip install '.[test]'")
    return Path(spec.submodule_search_locations[0]) / "tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--n-layers", type=int, default=LLAMA_3_2_1B["n_layers"])
    arguments = parser.parse_args()
    make_checkpoint(arguments.directory, LLAMA_3_2_1B | {"n_layers": arguments.n_layers})
    size = (arguments.directory / "consolidated.00.pth").stat().st_size
    print(f"{arguments.directory}: {size:,} bytes of weights")


if __name__ == "__main__":
    main()
