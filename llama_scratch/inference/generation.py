"""Generate token by token: sample, verify drafts, and end at a stop token."""

from __future__ import annotations

import time
from collections.abc import Iterator

from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.inference.prompt_lookup import NGramDrafter
from llama_scratch.results import Step
from llama_scratch.sampling import Sampling, sample


def continue_ids(
    llama: LoadedModel, ids: list[int], max_new_tokens: int, sampling: Sampling, *, speculate: bool
) -> Iterator[Step]:
    """Yield the tokens that follow `ids`, see `Llama.generate`.

    Args:
        llama: The model.
        ids: The prompt.
        max_new_tokens: Maximum number of tokens to generate.
        sampling: Sampling options.
        speculate: Whether to use prompt lookup decoding.
    """
    generator = sampling.generator()
    stream = llama.tokenizer.stream()
    end = min(len(ids) + max_new_tokens, llama.context)
    drafts = NGramDrafter()
    while len(ids) < end:
        max_length = min(llama.engine.max_draft_length(ids), end - len(ids) - 1) if speculate else 0
        draft = drafts.propose(ids, max_length) if max_length else []
        start = time.perf_counter()
        rows = llama.engine.verify(ids, draft) if draft else llama.engine.next_logits(ids).values[None]
        seconds = time.perf_counter() - start
        before = len(ids) + 1
        for logits, guess in zip(rows, [*draft, None], strict=False):
            id = sample(logits, sampling, generator)
            stop = id in llama.tokenizer.stop_ids
            if stop or id != guess:
                llama.engine.trim(ids)
            if stop:
                return
            ids = [*ids, id]
            logprob = float(logits[id] - logits.logsumexp(-1))
            yield Step(id, stream.push(id, final=len(ids) == end), logprob)
            if id != guess:
                break
        if max_length:  # otherwise, the time may include reading the prompt or waiting for the weights
            drafts.record_cost(len(draft), len(ids) - before, seconds)
