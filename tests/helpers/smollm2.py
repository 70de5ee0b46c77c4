"""SmolLM2 for comparisons with real weights.

Texts, and the same weights in this package and in transformers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch.llama import Llama
from tests.helpers import reference

# English, code and other scripts with digits, quotes and white space: about 600 tokens.
TEXTS = {
    "prose": """The harbour was quiet in the early morning. Two fishermen were mending a net on the quay, and neither
of them looked up when the ferry came in. "You're late," said the older one at last, to nobody in particular. It had
left the island at 5:40, as it had done every day since 1962, and it had been late for most of them. On the deck stood
a woman with a suitcase and a birdcage; the cage was empty. She asked for the way to the post office, was told that
it had been closed for eleven years, and thanked them as if that were good news.""",
    "facts": """Water boils at 100 degrees Celsius at sea level, and at about 71 degrees on the summit of Mount Everest.
The reason is that the pressure of the air falls with height: there is less of it above. A pressure cooker does the
opposite. It keeps the steam in until the pressure is about twice that outside, so that water boils at 120 degrees and
beans are done in a quarter of the time. The capital of France is Paris, and 2 + 2 = 4.""",
    "code": '''def bisect(values: list[int], wanted: int) -> int:
    """The first index whose value is not smaller than `wanted`."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


for (let i = 0; i < items.length; i++) { console.log(`${i}: ${items[i]}`); }
SELECT name, COUNT(*) FROM people WHERE age >= 18 GROUP BY name ORDER BY 2 DESC;
''',
    "scripts": """Der Zug nach Köln fährt um 8 Uhr ab. L'été dernier, nous étions à la mer. ¿Dónde está la biblioteca?
Москва — столица России. 東京は日本の首都です。 서울은 한국의 수도입니다. القاهرة عاصمة مصر.
🙂 Ελλάδα, Ísland, Türkiye.""",
}


@pytest.fixture(scope="module")
def llama(smollm2_path: Path) -> Llama:
    return Llama.load(smollm2_path, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def weights(smollm2_path: Path) -> dict[str, Tensor]:
    """The file's weights in float32 by Meta's names, read with the gguf package."""
    return _weights(smollm2_path)


@cache  # shared by all modules that use the fixture
def _weights(smollm2_path: Path) -> dict[str, Tensor]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    renamed = {
        "token_embd": "tok_embeddings",
        "output_norm": "norm",
        "blk": "layers",
        "attn_norm": "attention_norm",
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
        "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "ffn_up": "feed_forward.w3",
    }
    weights = {}
    for tensor in GGUFReader(smollm2_path).tensors:
        name = ".".join(renamed.get(part, part) for part in tensor.name.split("."))
        weights[name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    return weights | {"output.weight": weights["tok_embeddings.weight"]}


# Not read from the file, to detect errors in reading it.
SHAPE = {
    "n_layers": 30,
    "n_heads": 9,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "rope_factor": None,
}


@pytest.fixture(scope="module")
def huggingfaces(smollm2_path: Path) -> Any:
    """The network in transformers with these weights."""
    return _huggingfaces(smollm2_path)


@cache
def _huggingfaces(smollm2_path: Path) -> Any:
    return reference.transformers_llama(_weights(smollm2_path), SHAPE)
