"""llama-scratch: next-token prediction with Llama 3, rebuilt by hand in pure torch.

>>> from llama_scratch import Llama
>>> llama = Llama.load("smollm2")  # doctest: +SKIP
>>> llama.predict("The capital of France is").next.text  # doctest: +SKIP
' Paris'

Importing the package imports no torch; the first use of `Llama` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_scratch.chat_format import Message
    from llama_scratch.errors import (
        CheckpointError,
        ContextLengthError,
        LlamaScratchError,
        ModelNotFoundError,
        OutOfMemoryError,
        UsageError,
    )
    from llama_scratch.llama import Llama
    from llama_scratch.results import Candidate, Generated, ModelInfo, Prediction, Step, Timing, Token
    from llama_scratch.sampling import Sampling
    from llama_scratch.tokenizer import Tokenizer

__all__ = [
    "Candidate",
    "CheckpointError",
    "ContextLengthError",
    "Generated",
    "Llama",
    "LlamaScratchError",
    "Message",
    "ModelInfo",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Prediction",
    "Sampling",
    "Step",
    "Timing",
    "Token",
    "Tokenizer",
    "UsageError",
]

__version__: str

_HOMES = {
    "Llama": "llama",
    "Message": "chat_format",
    "Sampling": "sampling",
    "Tokenizer": "tokenizer",
    **dict.fromkeys(("Candidate", "Generated", "ModelInfo", "Prediction", "Step", "Timing", "Token"), "results"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"llama_scratch.{_HOMES[name]}"), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("llama-scratch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
