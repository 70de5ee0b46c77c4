"""Worker process of one engine: loads a model once and measures on request.

    python -m benchmarks.engines '{"kind": "ours", …}'

Requests and replies are JSON Lines on standard input and output. The parent process is benchmarks/compare.py. Each
engine imports only the packages that it needs, because the memory of its process is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict


class Setup(TypedDict):
    """Settings of a worker."""

    kind: str
    path: str
    variant: str
    flash: bool
    threads: int
    context: int


class Engine(Protocol):
    """An engine with a loaded model.

    Attributes:
        weight_bytes: Weight bytes that are read per decoded token.
        prepare_s: Seconds of preparation after loading.
        kernels: Instruction set of our kernels; "" if the engine does not use our kernels.
    """

    weight_bytes: int
    prepare_s: float
    kernels: str

    def run(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Measure prefill and decode, starting with an empty cache.

        Args:
            ids: Token ids.
            new: Number of ids at the end that are decoded one by one.

        Returns:
            Seconds of prefill and of decode.
        """

    def logits(self, ids: Sequence[int]) -> list[float]:
        """Logits after the last of `ids`."""


class Ours:
    """This package in one precision, with packed weights."""

    def __init__(self, setup: Setup):
        import torch

        from llama_scratch import Llama
        from llama_scratch.inference import speed as bench
        from llama_scratch.precision import kernels

        self._bench = bench
        self._llama = Llama.load(
            setup["path"],
            precision=setup["variant"],
            context=setup["context"],
            threads=setup["threads"],
            calibration=__file__,  # a short text saves minutes with int4 and does not affect the speed
        )
        start = time.perf_counter()
        self._llama.prepare()
        self.prepare_s = time.perf_counter() - start
        self.weight_bytes = self._llama.weight_bytes
        self.kernels = str(torch.ops.llama_scratch.machine()) if kernels.ready() else ""

    def run(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        return self._bench.timed(self._llama, list(ids), new)

    def logits(self, ids: Sequence[int]) -> list[float]:
        values: list[float] = self._llama.logits(ids)[-1].tolist()
        return values


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with its default batch size and cache.

    The defaults are batches of 512 tokens and a 16-bit KV cache.
    """

    prepare_s = 0.0
    kernels = ""

    def __init__(self, setup: Setup):
        import llama_cpp

        quiet_llama_cpp()
        self.weight_bytes = matrix_bytes(Path(setup["path"]))
        self._cpp = llama_cpp
        self._llama = llama_cpp.Llama(
            setup["path"],
            n_ctx=setup["context"],
            n_batch=512,
            n_threads=setup["threads"],
            n_threads_batch=setup["threads"],
            flash_attn=setup["flash"],
            verbose=False,
        )

    def run(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        first = len(ids) - new
        self._llama.reset()
        start = time.perf_counter()
        self._eval(ids[:first])
        read = time.perf_counter()
        for id in ids[first:]:
            self._eval([id])
        return read - start, time.perf_counter() - read

    def _eval(self, ids: Sequence[int]) -> Any:
        self._llama.eval(ids)
        return self._cpp.llama_get_logits_ith(self._llama.ctx, -1)  # waits for the computation

    def logits(self, ids: Sequence[int]) -> list[float]:
        self._llama.reset()
        values: list[float] = self._eval(ids)[: self._llama.n_vocab()]
        return values


def quiet_llama_cpp() -> None:
    """Silence llama.cpp's log except for errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            sys.stderr.write(text.decode(errors="replace"))

    _log_callbacks.append(log)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))


# Prevents garbage collection of the callbacks, because llama.cpp calls them until the process ends.
_log_callbacks: list[Any] = []


def matrix_bytes(path: Path) -> int:
    """Bytes of a GGUF file's matrices that are read per decoded token.

    The embedding is included only if it is also the output projection.
    """
    from llama_scratch.checkpoint.gguf.header import read_header

    sizes = {tensor.name: tensor.size for tensor in read_header(path).tensors if len(tensor.shape) == 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


class CTranslate2:
    """CTranslate2's generator, which chooses the new tokens itself."""

    prepare_s = 0.0
    kernels = ""

    def __init__(self, setup: Setup):
        import ctranslate2

        self._generator = ctranslate2.Generator(
            setup["path"], compute_type=setup["variant"], intra_threads=setup["threads"], inter_threads=1
        )
        self.weight_bytes = _linear_parameters(Path(setup["path"]).with_name("hf") / "config.json")

    def run(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        prompt = [str(id) for id in ids[: len(ids) - new]]
        stamps: list[float] = []

        def stamp(_: Any) -> bool:
            stamps.append(time.perf_counter())
            return False

        start = time.perf_counter()
        # The time of the first new token is part of prefill, because in all engines prefill computes its logits.
        self._generator.generate_batch(
            [prompt],
            max_length=new + 1,
            min_length=new + 1,
            include_prompt_in_result=False,
            callback=stamp,
        )
        return stamps[0] - start, stamps[-1] - stamps[0]

    def logits(self, ids: Sequence[int]) -> list[float]:
        import numpy as np

        output = self._generator.forward_batch([[str(id) for id in ids]])
        values: list[float] = np.array(output)[0, -1].tolist()
        return values


class Transformers:
    """Hugging Face's `LlamaForCausalLM`, eager, with its default attention and cache."""

    prepare_s = 0.0
    kernels = ""

    def __init__(self, setup: Setup):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup["threads"])
        torch.set_grad_enabled(False)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setup["variant"]]
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(setup["path"], dtype=dtype)
        self.weight_bytes = _linear_parameters(Path(setup["path"]) / "config.json") * dtype.itemsize

    def run(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        tokens = self._torch.tensor([ids])
        first = len(ids) - new
        start = time.perf_counter()
        cache = self._model(tokens[:, :first], use_cache=True, logits_to_keep=1).past_key_values
        read = time.perf_counter()
        for i in range(first, len(ids)):
            self._model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return read - start, time.perf_counter() - read

    def logits(self, ids: Sequence[int]) -> list[float]:
        values: list[float] = self._model(self._torch.tensor([ids]), logits_to_keep=1).logits[0, -1].tolist()
        return values


KINDS: dict[str, type] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "transformers": Transformers,
}


def _linear_parameters(config: Path) -> int:
    """Number of weights of all linear layers, from a Hugging Face config.json."""
    shape = json.loads(config.read_text())
    dim, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = 2 * dim * heads * shape["head_dim"] + 3 * dim * shape["intermediate_size"]
    return int(shape["num_hidden_layers"] * layer + dim * shape["vocab_size"])


def resident() -> dict[str, int]:
    """Private memory and file pages of this process in bytes; 0 if unknown."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {"anonymous_bytes": 0, "file_bytes": 0}
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return {"anonymous_bytes": 1024 * kib["Anonymous"], "file_bytes": 1024 * (kib["Rss"] - kib["Anonymous"])}


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement.

    Args:
        engine: The engine.
        request: The request, see `Worker.ask`.

    Returns:
        The reply.
    """
    ids: list[int] = request["ids"]
    match request["do"]:
        case "run":
            prefill_s, decode_s = engine.run(ids, request["new"])
            return {"prefill_s": prefill_s, "decode_s": decode_s}
        case "edit":
            # Measure a changed last token; the rest of the prompt is a prefix cache hit.
            whole_s, _ = engine.run(ids, 0)
            edited_s, _ = engine.run([*ids[:-1], (ids[-1] + 1) % request["vocab_size"]], 0)
            return {"whole_s": whole_s, "edited_s": edited_s}
        case "logits":
            return {"logits": engine.logits(ids)}
        case unknown:
            raise ValueError(unknown)


def main() -> None:
    """Load the engine and answer requests until the input ends."""
    # Redirect output of libraries to stderr, so that it does not mix with the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    setup: Setup = json.loads(sys.argv[1])
    start = time.perf_counter()
    try:
        engine: Engine = KINDS[setup["kind"]](setup)
        load_s = time.perf_counter() - start - engine.prepare_s
        engine.run([1, 2, 3], 1)  # warm-up: includes the time and memory of a first call
    except Exception as error:  # noqa: BLE001 - the parent skips this engine and reports the reason
        replies.write(json.dumps({"error": str(error) or type(error).__name__}) + "\n")
        return
    ready = {
        "load_s": load_s,
        "prepare_s": engine.prepare_s,
        "weight_bytes": engine.weight_bytes,
        "kernels": engine.kernels,
    }
    replies.write(json.dumps(ready | resident()) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
