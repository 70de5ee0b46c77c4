"""`Llama`, the entry point: load a model and answer prompts.

Other modules implement the steps, in this order: `find_model`, `open_checkpoint`, `load_network`, `Engine`,
`continue_ids`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama_scratch.chat_format import ChatFormat, Message
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.config import ModelArgs
from llama_scratch.download.locate import find_model
from llama_scratch.errors import UsageError, sanitize
from llama_scratch.inference.engine import Engine
from llama_scratch.inference.generation import continue_ids
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.loading import StorageOptions, load_network
from llama_scratch.inference.prompt_text import Prompt, encode_conversation
from llama_scratch.model import Transformer
from llama_scratch.precision.lazy_weight import Weight
from llama_scratch.results import Generated, ModelInfo, Step
from llama_scratch.sampling import GREEDY, Sampling
from llama_scratch.system.jobs import BackgroundJobs
from llama_scratch.system.mapped_files import MappedFiles
from llama_scratch.system.progress import Progress, silent
from llama_scratch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_scratch.microscope.inspection import Inspection

# With more threads than this, they only compete for the cores.
_MAX_THREADS_PER_CORE = 8


class Llama(LoadedModel):
    """A model in memory, created by `Llama.load`.

    Attributes:
        args: Dimensions of the network.
        tokenizer: Text ↔ ids.
        info: Name, format, precision, device and number of parameters.
        path: The model's directory or file.
        context: Maximum number of tokens of a prompt and its continuation together.
        engine: Ids → logits, with the KV cache.
        load_s: Loading time in seconds.
        chat: The model's chat format; None for a base model.
        speculate: Whether `generate` uses prompt lookup decoding, see `prompt_lookup`. It does not change the output.
        warnings: Messages about the model's files. Every prediction includes them.
        options: Arguments of `load` that change the model and are not stored in another attribute.
    """

    speculate = True

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        info: ModelInfo,
        *,
        context: int,
        chat: ChatFormat | None = None,
        path: Path | None = None,
        load_s: float = 0.0,
        packing: BackgroundJobs | None = None,
        weights: Callable[[Progress], Mapping[str, Weight]] | None = None,
        files: MappedFiles | None = None,
        warnings: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
    ):
        engine = Engine(model, context, packing, files=files)
        super().__init__(tokenizer, info, engine, load_s=load_s, warnings=warnings, weights=weights)
        self.path = path
        self.chat = chat
        self.options: Mapping[str, Any] = options or {}

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        precision: str = "auto",
        activations: str = "auto",
        device: str = "auto",
        rope_factor: float | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        context: int | None = None,
        threads: int | None = None,
        calibration: str | os.PathLike[str] | None = None,
        progress: Progress = silent,
    ) -> Llama:
        """Load a model.

        Args:
            source: A directory in Meta's or Hugging Face's format, a .gguf file, or a gs:// or az:// directory, which
                is downloaded. Or the name of a model that `llama-scratch pull` downloaded: "smollm2",
                "OWNER/REPO[@REVISION]" or "Llama3.2-1B". None searches the usual places, see `find_model`.
            precision: "fp32", "bf16", "fp16", "int8", "int4", or "auto" for the file's dtype; see `PRECISIONS`.
            activations: Dtype of the activations: "fp32", "bf16" (as in Meta's code), or "auto": float32 on a CPU.
            device: "cpu", "cuda", "mps", or "auto": CUDA if available, otherwise the CPU.
            rope_factor: RoPE scaling factor, instead of the model's own (32 for Llama 3.2 1B and 3B, 8 for larger).
            tokenizer: Path of tokenizer.model, if it is not with the weights.
            context: Maximum number of tokens. By default, the context length that the model was trained for.
            threads: Number of CPU threads. By default, torch's choice.
            calibration: Text file to calibrate int4 with. See `calibration_text` for the default.
            progress: Called with a stage, the amount done and the total.

        Raises:
            ModelNotFoundError: If there is no model at `source`, or `calibration` cannot be read.
            CheckpointError: If a file is damaged or not supported.
            UsageError: If an argument is invalid.
            OutOfMemoryError: If the model does not fit into memory.
        """
        start = time.perf_counter()
        path = find_model(source, progress)
        checkpoint = open_checkpoint(path, None if tokenizer is None else os.fspath(tokenizer))
        args = checkpoint.args.with_rope_factor(rope_factor)
        tokens = _context(context, args)
        _set_threads(threads)
        storage = StorageOptions(precision, activations, device, calibration)
        # The KV cache grows as needed. Requiring memory for the default context would reject models that fit.
        model, packing, info = load_network(checkpoint, args, storage, min(tokens, context or 4096), progress)
        options = {"tokenizer": tokenizer, "rope_factor": rope_factor, "context": context, "calibration": calibration}
        return cls(
            model,
            checkpoint.tokenizer,
            info,
            context=tokens,
            chat=checkpoint.chat,
            path=path,
            load_s=time.perf_counter() - start,
            packing=packing,
            weights=checkpoint.load,
            files=checkpoint.mapped,
            warnings=checkpoint.warnings,
            options=options | {"activations": None if activations == "auto" else activations},
        )

    def fingerprint(self, progress: Progress = silent) -> str:
        """Return the SHA-256 of the weight files, see `Checkpoint.fingerprint`."""
        return self.engine.files.sha256(progress)

    def close(self) -> None:
        """End the background jobs and the process of the chat template.

        Without this call, they end with the program.
        """
        super().close()
        if self.chat is not None:
            self.chat.close()

    def inspect(self, prompt: Prompt) -> Inspection:
        """Inspect a prompt: activations, attention, lenses, attribution, interventions.

        Raises:
            UsageError: As for `predict`.
            ContextLengthError: As for `predict`.
        """
        # Imported here so that it does not delay the first answer.
        from llama_scratch.microscope.inspection import Inspection

        return Inspection(self, prompt)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation in the model's chat format, up to the start of its answer.

        Messages are plain text: `<|eot_id|>` and similar names in them are not special tokens.

        Raises:
            UsageError: If this is a base model, or its format does not accept the messages.
            ContextLengthError: If a long conversation has more tokens than the context.
            CheckpointError: If the file's chat template is broken.
        """
        if self.chat is None:
            raise UsageError(
                f"{sanitize(self.info.name)} is a base model: it continues a text and was not trained for chat. "
                "Choose an Instruct model, such as `source=smollm2`."
            )
        return encode_conversation(self.tokenizer, self.chat, messages, self.context)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 20,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[Step]:
        """Continue a prompt token by token.

        Generation ends at a stop token, which is not returned, after `max_new_tokens`, or when the context is full.

        Args:
            prompt: A text, or token ids.
            max_new_tokens: Maximum number of tokens to generate.
            temperature: Divisor of the logits. 0 decodes greedily.
            top_k: Sample from the k most probable tokens.
            top_p: Sample from the nucleus with this total probability.
            min_p: Sample from tokens with at least this fraction of the most probable token's probability.
            seed: Random seed. None chooses one at random.

        Raises:
            UsageError: As for `predict`, or if a sampling option is out of range.
            ContextLengthError: As for `predict`.
        """
        return self.continuation(prompt, max_new_tokens, Sampling(temperature, top_k, top_p, min_p, seed))

    def continuation(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling) -> Iterator[Step]:
        """Continue a prompt like `generate`, with all sampling options in one object.

        Args:
            prompt: A text, or token ids.
            max_new_tokens: Maximum number of tokens to generate.
            sampling: Sampling options.
        """
        if max_new_tokens < 0:
            raise UsageError(f"{max_new_tokens} new tokens were requested, expected at least 0 (`max_new_tokens`).")
        ids = self.encode(prompt)
        self.engine.check(ids)
        return continue_ids(self, ids, max_new_tokens, sampling, speculate=self.speculate)

    def complete(self, prompt: Prompt, max_new_tokens: int, sampling: Sampling = GREEDY) -> Generated:
        """Generate a whole continuation.

        Args:
            prompt: A text, or token ids.
            max_new_tokens: Maximum number of tokens to generate.
            sampling: Sampling options.

        Returns:
            The continuation, with its finish reason and decoding time.
        """
        ids = self.encode(prompt)
        room = min(max_new_tokens, self.context - len(ids))
        start = time.perf_counter()
        steps = list(self.continuation(ids, max_new_tokens, sampling))
        new = tuple(step.id for step in steps)
        return Generated(
            text=self.tokenizer.decode(new),
            ids=new,
            logprobs=tuple(step.logprob for step in steps),
            finish_reason="stop" if len(new) < room else "length",
            decode_s=time.perf_counter() - start,
        )


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    max_threads = _MAX_THREADS_PER_CORE * (os.cpu_count() or 1)
    if not 1 <= threads <= max_threads:
        raise UsageError(f"{sanitize(threads)} threads were requested, expected 1 to {max_threads} (`threads`).")
    torch.set_num_threads(threads)


def _context(context: int | None, args: ModelArgs) -> int:
    if context is None:
        return args.max_seq_len
    if context < 1:
        raise UsageError(f"A context of {context} tokens was requested, expected at least 1 (`context`).")
    return context
