"""The program with a model that comes when a test wants it: `python -m tests.helpers.slow_llama GATE [OPTIONS]`.

Loading goes on until there is a file GATE, and then ends well, or with the error that the file names. It
needs no torch, and its stage says whether something else has imported that. A continuation's tokens are the lines of
the file GATE.tokens, JSON strings, each as soon as it is there; `null` ends the continuation.
"""

from __future__ import annotations

import builtins
import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace

from llama_scratch import errors
from llama_scratch.results import Candidate, ModelInfo, Prediction, Step, Timing, Token
from llama_scratch.system.progress import Progress, silent

GATE = Path(sys.argv[1])
TOKENS = {0: "What", 1: " comes"}


@dataclass
class Args:
    """What the session uses of a `ModelArgs`."""

    rope_scaling: None = None


class SlowLlama:
    """What the session uses of a `Llama`; it answers " comes" to everything."""

    info = ModelInfo("Slow-Llama", "none", "fp32", "cpu", 1_000_000)
    context = 64
    preparing = None
    warnings = ()
    engine = SimpleNamespace(files=SimpleNamespace(names=(), sha256=lambda progress: "0" * 64))
    path = None
    options: Mapping[str, object] = MappingProxyType({})
    args = Args()
    tokenizer = SimpleNamespace(
        bos_id=None,
        untypeable=frozenset(),
        decode=lambda ids: "".join(TOKENS.get(id, "") for id in ids),
    )

    @classmethod
    def load(cls, source: str, *, progress: Progress, **_: object) -> SlowLlama:
        progress("torch is imported" if "torch" in sys.modules else "no torch yet", 42, 100)
        with ThreadPoolExecutor(1) as pool:  # as the formats' readers do; Python's clean-up waits for its threads
            pool.submit(wait_for_gate).result()
        if name := GATE.read_text():
            error: type[Exception] = getattr(errors, name, None) or getattr(builtins, name)
            raise error("The model fell over.")
        return cls()

    def prepare(self, *, wait: bool) -> None:
        """There is nothing to prepare."""

    def predict(self, prompt: str, top: int = 5, *, special: bool = False, progress: Progress = silent) -> Prediction:
        best = Candidate(1, TOKENS[1], -0.5)
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        TOKENS[len(TOKENS)] = text
        token = Token(len(TOKENS) - 1, text)
        return Prediction(text, (token,), best, (best,), 1.0, (), self.info, Timing())

    def continuation(self, *_: object) -> Iterator[Step]:
        with Path(f"{GATE}.tokens").open() as file:
            line = ""
            while True:
                line += file.readline()
                if not line.endswith("\n"):
                    time.sleep(0.005)
                    continue
                if (text := json.loads(line)) is None:
                    return
                line = ""
                TOKENS[len(TOKENS)] = text
                yield Step(len(TOKENS) - 1, text, -0.5)


def wait_for_gate() -> None:
    """Wait until the test lets the loading end."""
    while not GATE.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    stand_in = ModuleType("llama_scratch.llama")
    stand_in.Llama = SlowLlama  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in
    del sys.argv[1]
    from llama_scratch.__main__ import main

    main()
