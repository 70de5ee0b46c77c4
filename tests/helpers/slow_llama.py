"""Run the program with a model that a test controls.

    python -m tests.helpers.slow_llama GATE [OPTIONS]

Loading takes until the file GATE exists, and then succeeds or raises the error that the file names. It does not need
torch; its progress shows whether torch was imported elsewhere. The tokens of a continuation are the lines of the file
GATE.tokens, one JSON string each, read as they are written; `null` ends the continuation.
"""

from __future__ import annotations

import builtins
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
    """The part of `ModelArgs` that the session uses."""

    rope_scaling: None = None


class SlowLlama:
    """The part of `Llama` that the session uses; it always predicts " comes"."""

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
        with ThreadPoolExecutor(1) as pool:  # like the readers; Python waits for its threads at exit
            pool.submit(wait_for_gate).result()
        if name := GATE.read_text():
            error: type[Exception] = getattr(errors, name, None) or getattr(builtins, name)
            raise error("The model fell over.")
        return cls()

    def prepare(self, *, wait: bool) -> None:
        """Do nothing."""

    def text_of(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids)
        return text

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
