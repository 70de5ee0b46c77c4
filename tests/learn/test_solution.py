"""The solutions, compared with the package's own functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_scratch import model, sampling
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.config import ModelArgs, RopeScaling
from llama_scratch.inference.loaded_model import entropy_bits
from llama_scratch.learn import solution
from llama_scratch.learn.exercises import SCALED, SMALL, exercises_of, small_network
from llama_scratch.model import Transformer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(args: ModelArgs) -> Transformer:
    """The package's network with the weights of `small_network`."""
    transformer = Transformer(args)
    transformer.load_state_dict(small_network(), strict=True, assign=True)
    return transformer.requires_grad_(False)


@pytest.mark.parametrize("args", [SMALL, SCALED])
def test_forward_is_the_package_s(args: ModelArgs) -> None:
    ids = torch.arange(40) % args.vocab_size
    expected = network(args)(ids[None], all_positions=True)[0]
    torch.testing.assert_close(solution.forward(ids, small_network(), args), expected, rtol=1e-4, atol=1e-4)


def test_scaling_matters_in_the_inputs() -> None:
    """Otherwise a file that forgets `scaled_frequencies` would pass."""
    ids = torch.arange(12)
    plain, scaled = (solution.forward(ids, small_network(), args) for args in (SMALL, SCALED))
    assert (plain - scaled).norm() / plain.norm() > 0.01


def test_softmax_and_entropy() -> None:
    logits = random(3, 50)
    torch.testing.assert_close(solution.softmax(logits), logits.softmax(-1))
    assert solution.entropy(logits[0].softmax(-1)) == pytest.approx(float(entropy_bits(logits[0])), rel=1e-5)


def test_bpe_is_the_tokenizer_s(smollm2_path: Path) -> None:
    tokenizer = open_checkpoint(smollm2_path).tokenizer
    ranks = {tokenizer.token_bytes(id): id for id in range(17, tokenizer.n_vocab)}
    for word in (" Paris", " unbelievable", " tokenization", "xyz"):
        assert solution.bpe(word.encode(), ranks) == tokenizer.encode(word)
    assert solution.bpe(b" Paris", ranks) == [7042]


def test_norm_rotation_and_frequencies() -> None:
    norm = model.RMSNorm(16, 1e-5)
    norm.weight.data = random(16, seed=1)
    x = random(5, 16)
    torch.testing.assert_close(solution.rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())
    args = replace(SMALL, rope_scaling=RopeScaling(32.0))
    freqs = solution.frequencies(args.head_dim, args.rope_theta)
    torch.testing.assert_close(freqs, model.rope_frequencies(SMALL))
    torch.testing.assert_close(solution.scaled_frequencies(freqs, 32.0, 1, 4, 8192), model.rope_frequencies(args))
    freqs_cis = solution.rotations(freqs, 7)
    torch.testing.assert_close(freqs_cis, model.rotations(freqs, torch.arange(7)))
    q = random(7, 3, 16)
    torch.testing.assert_close(solution.rotate(q, freqs_cis), model.apply_rotary_emb(q[None], freqs_cis)[0])


def test_attention_to_a_cache() -> None:
    q, k, v = random(3, 16), random(7, 16, seed=1), random(7, 16, seed=2)
    expected = model.attend(q[None, None], k[None, None], v[None, None], model.causal_mask(3, 7, q.device))[0, 0]
    torch.testing.assert_close(solution.attend_to_cache(q, k, v), expected)


def test_grouped_attention_and_feed_forward() -> None:
    q, k, v = random(6, 8, 16), random(6, 2, 16, seed=1), random(6, 2, 16, seed=2)
    Q, K, V = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = model.attend(Q, K, V, model.causal_mask(6, 6, q.device))[0].transpose(0, 1)
    torch.testing.assert_close(solution.grouped_attention(q, k, v), expected)
    x, w1, w2, w3 = random(5, 8), random(20, 8, seed=1), random(8, 20, seed=2), random(20, 8, seed=3)
    torch.testing.assert_close(solution.feed_forward(x, w1, w2, w3), (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (10, 0.9, 0.1)]
)
def test_distribution_is_what_sample_draws_from(top_k: int, top_p: float, min_p: float) -> None:
    logits = random(40) * 3
    p = solution.distribution(logits, 1.5, top_k, top_p, min_p)
    options = sampling.Sampling(1.5, top_k, top_p, min_p, seed=0)
    generator = options.generator()
    drawn = {sampling.sample(logits, options, generator) for _ in range(3000)}
    assert drawn <= set(p.nonzero().flatten().tolist())
    assert drawn >= set((p > 0.005).nonzero().flatten().tolist())


def test_gptq_compensates_the_error_of_the_issue_s_two_weights() -> None:
    w, H = torch.tensor([0.45, 0.45]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def cost(rounded: Tensor) -> float:
        return float((rounded - w) @ H @ (rounded - w))

    assert cost(w.round()) == pytest.approx(0.7695)
    assert cost(solution.gptq(w, H)) == pytest.approx(0.0595, abs=1e-6)


def test_quantize_and_the_dot_product() -> None:
    w, x = random(64), random(64, seed=1)
    q_w, s_w = solution.quantize(w)
    q_x, s_x = solution.quantize(x)
    assert solution.block_dot(q_w, s_w, q_x, s_x) == pytest.approx(float(w @ x), abs=0.3)
    torch.testing.assert_close(q_w.reshape(-1, 32) * s_w[:, None], w.reshape(-1, 32), rtol=0, atol=0.02)


def test_the_cost_of_a_token() -> None:
    """1.2 billion weights in 16 bits are 2.47 GB; at 25 GB/s, 10.1 tokens per second."""
    (exercise,) = exercises_of(17)
    args = exercise.inputs()[0][0]
    assert solution.tokens_per_second(args, 16, 25e9) == pytest.approx(10.11, abs=0.01)
