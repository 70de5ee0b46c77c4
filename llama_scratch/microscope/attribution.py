"""Attribution of a logit to the network's components and to input tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from llama_scratch.errors import UsageError
from llama_scratch.hooks import hooked
from llama_scratch.inference.loaded_model import LoadedModel
from llama_scratch.microscope.activations import keep, layers
from llama_scratch.microscope.attention import read_attention
from llama_scratch.microscope.display import Displayable
from llama_scratch.microscope.interventions import ablate
from llama_scratch.microscope.parts import NetworkPart
from llama_scratch.model import Transformer, TransformerBlock
from llama_scratch.results import Candidate, JsonResult, Token
from llama_scratch.system.memory import memory_errors
from llama_scratch.system.progress import Progress, silent

# Maximum number of tokens for leave-one-out, chosen by gradient × input.
LEFT_OUT = 16
# Number of contributions to check by ablation.
CLAIMS = 3
# A component is decisive if ablating it removes at least this share of `Attribution.measure`.
DECISIVE = 0.5
# Maximum number of tokens per batch.
_ROWS = 512


@dataclass(frozen=True)
class Contribution:
    """The direct contribution of one component to the logit.

    Attributes:
        name: "embedding", a component (L5.H3, L5.ffn; L5.attn if a hook replaced its output), or "interventions" for
            changes to the residual stream.
        logit: The contribution.
    """

    name: str
    logit: float


@dataclass(frozen=True)
class TokenInfluence:
    """The influence of one input token on the logit.

    Attributes:
        token: The token.
        position: Its position.
        gradient_x_input: ∂logit/∂embedding · embedding; None until it is computed.
        without: The probability of the answer without this token in the text, if it was computed.
        versus_without: The same probability for `Attribution.versus`.
        fall: Decrease of `Attribution.measure` without this token; negative if it increases.
    """

    token: Token
    position: int
    gradient_x_input: float | None
    without: float | None
    versus_without: float | None
    fall: float | None


@dataclass(frozen=True)
class AblationCheck:
    """A contribution checked by ablating its component.

    Attributes:
        contribution: The contribution.
        after: The probability of the answer with the component ablated.
        versus_after: The same probability for `Attribution.versus`.
        fall: Decrease of `Attribution.measure` with the component ablated; negative if it increases.
        attended: The position with the most attention from the last token, if the component is a head.
        attention: The share of the attention on that position.
    """

    contribution: Contribution
    after: float
    versus_after: float | None
    fall: float
    attended: int | None = None
    attention: float | None = None


@dataclass(frozen=True)
class Attribution(Displayable, JsonResult):
    """Why a model predicts `answer` after `tokens`, or prefers it over `versus`.

    Attributes:
        tokens: The tokens of the text.
        answer: The token whose logit is attributed, with its probability at the model's precision.
        versus: The token that it is compared with, if any.
        logit: The logit of `answer`, or its difference from the logit of `versus`, computed in float32 from the
            file's weights.
        contributions: Direct logit attribution: the contributions of the embedding, of each head and of each
            feed-forward layer, with the scale of the final norm held constant.
        remainder: Rounding error, `logit` minus the sum of the contributions.
        influences: The influence of each token of the text.
        claims: The strongest contributions, checked by ablation at the model's precision.
    """

    tokens: tuple[Token, ...]
    answer: Candidate
    versus: Candidate | None
    logit: float
    contributions: tuple[Contribution, ...]
    remainder: float
    influences: tuple[TokenInfluence, ...]
    claims: tuple[AblationCheck, ...]

    @property
    def strongest(self) -> list[Contribution]:
        """Contributions of heads and feed-forward layers by absolute value, largest first."""
        return _strongest(self.contributions)

    @property
    def measure(self) -> float:
        """The quantity that is compared with and without a token or component.

        It is the probability of the answer or, with `versus`, the logit difference, at the model's precision.
        """
        return self.answer.logprob - self.versus.logprob if self.versus else self.answer.probability

    @property
    def decisive(self) -> list[AblationCheck]:
        """The components whose ablation removes at least `DECISIVE` of the measure.

        The largest change comes first.
        """
        there = [claim for claim in self.claims if claim.fall / (self.measure or 1.0) >= DECISIVE]
        return sorted(there, key=lambda claim: -abs(claim.fall))


def why(
    llama: LoadedModel,
    ids: Sequence[int],
    answer: int | None = None,
    versus: int | None = None,
    progress: Progress = silent,
) -> Attribution:
    """Attribute the logit of a token to components and to tokens of the text.

    Raises the same errors as `Llama.predict`. Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits" (direct logit attribution); Shrikumar et al. 2016, arXiv:1605.01713 (gradient × input); Li et al. 2016,
    arXiv:1612.08220 (leave-one-out).

    Args:
        llama: The model.
        ids: The token ids of the text.
        answer: The token, by default the most probable next token.
        versus: A token to compare with. If given, the logit difference is attributed.
        progress: As for `Llama.predict`.

    Raises:
        UsageError: If the two tokens are the same, or one does not exist.
    """
    *_, whole = growing(llama, ids, answer, versus, progress)
    return whole


def growing(
    llama: LoadedModel,
    ids: Sequence[int],
    answer: int | None = None,
    versus: int | None = None,
    progress: Progress = silent,
) -> Iterator[Attribution]:
    """Yield partial results of `why`, and finally the whole result.

    Leave-one-out comes first if the text is short enough to leave out every token: it needs no gradients then, and
    reading the weights in float32 takes time. Until they are read, `logit` is computed at the model's precision. The
    contributions follow, then everything else.

    Args:
        llama: The model.
        ids: The token ids of the text.
        answer: As for `why`.
        versus: As for `why`.
        progress: As for `why`.
    """
    for named in (answer, versus):
        if named is not None:
            llama.token(named)  # rejects unknown ids before the long computation
    logits = llama.engine.next_logits(ids, progress).values
    answer = int(logits.argmax()) if answer is None else answer
    if answer == versus:
        raise UsageError(f"Both tokens are {llama.token(answer).text!r}. Choose two different tokens.")
    target = _Target(answer, versus, logits)
    logprobs = logits.double().log_softmax(-1)

    def candidate(id: int) -> Candidate:
        return Candidate(id, llama.token(id).text, float(logprobs[id]))

    tokens, other = tuple(map(llama.token, ids)), None if versus is None else candidate(versus)
    without: dict[int, _Without] = {}
    if len(ids) <= LEFT_OUT:
        without = _left_out(llama, ids, target, range(len(ids)), progress)
    influences = _influences(tokens, [None] * len(ids), without)
    view = Attribution(tokens, candidate(answer), other, target.logit(logits), (), 0.0, influences, ())
    yield view
    with memory_errors("Attribution"):
        direct = _Direct(llama, ids, target, progress)
    view = replace(
        view,
        logit=direct.logit,
        contributions=tuple(direct.contributions),
        remainder=direct.logit - sum(contribution.logit for contribution in direct.contributions),
        influences=_influences(tokens, direct.gradient_x_input, without),
    )
    yield view
    if len(ids) > LEFT_OUT:
        ranked = sorted(range(len(ids)), key=lambda i: -abs(direct.gradient_x_input[i]))
        without = _left_out(llama, ids, target, ranked[:LEFT_OUT], progress)
        view = replace(view, influences=_influences(tokens, direct.gradient_x_input, without))
    yield replace(view, claims=_claims(llama, ids, target, direct.contributions, progress))


# (probability of the answer, probability of the other token, decrease of the measure)
_Without = tuple[float, float | None, float]


class _Target:
    """The logit to attribute: that of a token, optionally minus that of another.

    Args:
        answer: The id of the token.
        versus: The id of the other token, if any.
        before: The logits of the unmodified network, (vocab_size,).
    """

    def __init__(self, answer: int, versus: int | None, before: Tensor):
        self.answer, self.versus = answer, versus
        self._before = self._measure(before)

    def logit(self, logits: Tensor) -> float:
        """Return the logit of the token, or the logit difference."""
        return float(logits[self.answer] - (0.0 if self.versus is None else logits[self.versus]))

    def without(self, logits: Tensor) -> _Without:
        """Return the probabilities of both tokens, and the decrease of the measure.

        Args:
            logits: The logits of the modified network or text, (vocab_size,).
        """
        shares = logits.double().softmax(-1)
        other = None if self.versus is None else float(shares[self.versus])
        return float(shares[self.answer]), other, self._before - self._measure(logits)

    def _measure(self, logits: Tensor) -> float:
        return float(logits.double().softmax(-1)[self.answer]) if self.versus is None else self.logit(logits)


class _Direct:
    """One forward and backward pass in float32, with the weights from the file."""

    def __init__(self, llama: LoadedModel, ids: Sequence[int], target: _Target, progress: Progress):
        model = llama.differentiable(
            lambda _stage, done, total: progress("reading the weights in fp32, once", done, total)
        )
        n_layers, n_heads = llama.args.n_layers, llama.args.n_heads
        last = slice(-1, None)  # only the last position affects the logit directly
        kinds = {"resid_pre": slice(None), "attention.heads": last, "attention.out": last, "feed_forward.out": last}
        pieces: dict[str, list[list[Tensor]]] = {kind: [[] for _ in range(n_layers)] for kind in kinds}
        final: list[Tensor] = []
        hooks = {
            f"layers.{i}.{kind}": keep(values, kinds[kind]) for kind in kinds for i, values in enumerate(pieces[kind])
        }
        hooks[f"layers.{n_layers - 1}.resid_post"] = keep(final)
        progress("attributing", 0, 2 * n_layers)
        with torch.no_grad(), hooked(model, llama.engine.hooks), hooked(model, hooks):
            model(torch.tensor([ids], device=model.freqs.device))
        # (1, T or 1, …) each
        streams, heads, attentions, feed_forwards = ([value for (value,) in pieces[kind]] for kind in kinds)

        # logit = u·(x/rms(x))⊙w is linear in x if rms(x) is held constant, so the terms of x contribute additively.
        u = model.output.weight[target.answer].float()  # (dim,)
        if target.versus is not None:
            u = u - model.output.weight[target.versus].float()
        x = final[0][0, -1]  # (dim,)
        direction = u * model.norm.weight / (x.pow(2).mean() + model.norm.eps).sqrt()  # (dim,)
        self.logit = float(direction @ x)
        self.contributions = [Contribution("embedding", float(direction @ streams[0][0, -1]))]
        for i in range(n_layers):
            if f"layers.{i}.attention.out" in llama.engine.hooks:  # the hook replaces the sum over heads
                self.contributions.append(
                    Contribution(NetworkPart(i, "attn").name, float(direction @ attentions[i][0, -1]))
                )
            else:
                wo = cast(TransformerBlock, model.layers[i]).attention.wo.weight.float()  # (dim, n_heads · head_dim)
                by_head = (direction @ wo).view(n_heads, -1) * heads[i][0, -1]  # (n_heads, head_dim)
                shares = by_head.sum(-1).tolist()
                self.contributions += [
                    Contribution(NetworkPart(i, "head", h).name, share) for h, share in enumerate(shares)
                ]
            self.contributions.append(
                Contribution(NetworkPart(i, "ffn").name, float(direction @ feed_forwards[i][0, -1]))
            )
        self.gradient_x_input = _back(llama, model, streams, final[0], u, progress)
        if any(".resid_" in place for place in llama.engine.hooks):  # not attributable to a component
            lacking = self.logit - sum(contribution.logit for contribution in self.contributions)
            self.contributions.append(Contribution("interventions", lacking))


def _back(
    llama: LoadedModel, model: Transformer, streams: Sequence[Tensor], final: Tensor, u: Tensor, progress: Progress
) -> list[float]:
    """Return gradient × input for each token, one layer at a time to save memory.

    Args:
        llama: The model.
        model: The network from `LoadedModel.differentiable`.
        streams: The residual stream before each layer, (1, T, dim) each.
        final: The residual stream after the last layer, (1, T, dim).
        u: The direction in logit = u·norm(x), (dim,).
        progress: Called with the stage and the number of layers done.
    """
    x = final.requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(model.norm(x)[0, -1] @ u, x)
    with hooked(model, llama.engine.hooks):
        for i, layer in reversed(list(enumerate(layers(model, final.shape[1])))):
            progress("attributing", 2 * len(streams) - i, 2 * len(streams))
            x = streams[i].requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(layer(x), x, grad)  # (1, T, dim)
    products: list[float] = (grad * streams[0].detach()).sum(-1)[0].tolist()
    return products


def _left_out(
    llama: LoadedModel, ids: Sequence[int], target: _Target, chosen: Sequence[int], progress: Progress
) -> dict[int, _Without]:
    """Run the text once per chosen position, without the token at that position."""
    without: dict[int, _Without] = {}
    if len(ids) == 1:
        return without
    size = max(1, _ROWS // len(ids))
    for first in range(0, len(chosen), size):
        progress("leaving out", first, len(chosen))
        some = chosen[first : first + size]
        rows = [[*ids[:i], *ids[i + 1 :]] for i in some]
        logits = llama.engine.forward_with_hooks(rows, {})[:, 0]  # (some, vocab_size)
        without |= {i: target.without(row) for i, row in zip(some, logits, strict=True)}
    return without


def _influences(
    tokens: Iterable[Token], gradients: Sequence[float | None], without: dict[int, _Without]
) -> tuple[TokenInfluence, ...]:
    return tuple(
        TokenInfluence(token, i, gradients[i], *without.get(i, (None, None, None))) for i, token in enumerate(tokens)
    )


def _strongest(contributions: Sequence[Contribution]) -> list[Contribution]:
    parts = [part for part in contributions if part.name not in ("embedding", "interventions")]
    return sorted(parts, key=lambda contribution: -abs(contribution.logit))


def _claims(
    llama: LoadedModel, ids: Sequence[int], target: _Target, contributions: Sequence[Contribution], progress: Progress
) -> tuple[AblationCheck, ...]:
    strongest = _strongest(contributions)[:CLAIMS]
    claims = []
    for done, contribution in enumerate(strongest):
        progress("ablating", done, len(strongest))
        part = NetworkPart.named(contribution.name, llama.args)
        hooks = ablate(llama, part).hooks
        if part.kind != "head":
            logits = llama.engine.forward_with_hooks([ids], hooks)[0, 0]
            claims.append(AblationCheck(contribution, *target.without(logits)))
            continue
        rows: list[Tensor] = []  # the attention of the last token of each chunk, (S,)

        def keep(_layer: int, probs: Tensor, _start: int, head: int = part.index, rows: list[Tensor] = rows) -> None:
            rows[:] = [probs[head, -1]]

        # The attention of a head does not depend on its own output, so the ablated pass computes it too.
        logits = read_attention(llama, ids, [part.layer], keep, silent, hooks)
        attended = int(rows[0].argmax())
        claims.append(AblationCheck(contribution, *target.without(logits), attended, float(rows[0][attended])))
    return tuple(claims)
