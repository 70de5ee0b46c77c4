"""llama-scratch: a microscope for next-token prediction with Llama 3.

>>> from llama_scratch import Llama
>>> llama = Llama.load("smollm2")  # doctest: +SKIP
>>> llama.predict("The capital of France is").next.text  # doctest: +SKIP
' Paris'

Importing the package does not import torch; the first use of `Llama` does.
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

# Modules that were moved into packages. The old names, such as `llama_scratch.engine`, work until 0.3.
_MOVED = {
    "attention": "inference.long_attention",
    "background": "system.jobs",
    "bench": "inference.speed",
    "calibration": "precision.calibration",
    "chat": "chat_format",
    "cuda": "inference.cuda_graph",
    "engine": "inference.engine",
    "folders": "system.folders",
    "guard": "system.mapped_files",
    "kept": "precision.weight_cache",
    "kernels": "precision.kernels",
    "lazy": "precision.lazy_weight",
    "linear": "precision.linear",
    "quantise": "precision.quantize",
    "sandbox": "system.template_sandbox",
    "speculation": "inference.prompt_lookup",
    "step": "inference.fused_layers",
    "taps": "hooks",
    "unfinished": "system.atomic_files",
}


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        home = f"llama_scratch.{_MOVED[name]}"
        warnings = import_module("warnings")
        warnings.warn(f"llama_scratch.{name} has moved to {home}.", DeprecationWarning, stacklevel=2)
        return import_module(home)
    if name in _HOMES:
        return getattr(import_module(f"llama_scratch.{_HOMES[name]}"), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("llama-scratch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
