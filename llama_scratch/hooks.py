"""Named places in the network at which values can be read and replaced. The network's text stays as it is.

A hook is a function of the value at a place; what it returns takes the value's place, None leaves it. Hooks hang on
torch's own hooks, so a network without any runs as if there were none.

    place                              shape
    embedding                          (B, T, dim)                   the tokens' vectors
    layers.5.resid_pre                 (B, T, dim)                   the residual stream before the layer
    layers.5.attention.q               (B, n_heads, T, head_dim)     queries, turned by their positions
    layers.5.attention.k               (B, n_kv_heads, S, head_dim)  keys, those in the cache first
    layers.5.attention.v               (B, n_kv_heads, S, head_dim)  values, likewise
    layers.5.attention.probs           (B, n_heads, T, S)            what each token looks at; rows add up to 1
    layers.5.attention.heads           (B, T, n_heads, head_dim)     what each head found, before wo
    layers.5.attention.out             (B, T, dim)                   what attention adds to the stream
    layers.5.resid_mid                 (B, T, dim)                   the stream between attention and feed-forward
    layers.5.feed_forward.neurons      (B, T, ffn_dim)               silu(w1 x) · w3 x, before w2
    layers.5.feed_forward.out          (B, T, dim)                   what the feed-forward adds to the stream
    layers.5.resid_post                (B, T, dim)                   the stream behind the layer
    norm                               (B, T or 1, dim)              the last vector, normed
    logits                             (B, T or 1, vocab_size)

resid_pre, resid_mid and resid_post are named as in TransformerLens (Nanda & Bloom 2022). What is q, k, v, probs,
heads, neurons here is hook_rot_q, hook_rot_k, hook_v, hook_pattern, hook_z, mlp.hook_post there: its hook_q and
hook_k come before the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from llama_scratch.errors import UsageError, sanitize
from llama_scratch.model import Attention, Transformer, TransformerBlock, attend_with, attention_probs

Hook = Callable[[Tensor, int], Tensor | None]
"""Called with the value at a place and the position of its first new token; what it returns takes the value's place."""

_WHOLE = ("embedding", "norm", "logits")
_ATTENTION = ("q", "k", "v", "probs")
_LAYER = (
    "resid_pre",
    *(f"attention.{name}" for name in (*_ATTENTION, "heads", "out")),
    "resid_mid",
    "feed_forward.neurons",
    "feed_forward.out",
    "resid_post",
)


def places(n_layers: int) -> list[str]:
    """All places of a network, in the order in which a token comes by."""
    layers = [f"layers.{layer}.{place}" for layer in range(n_layers) for place in _LAYER]
    return ["embedding", *layers, "norm", "logits"]


@contextmanager
def hooked(model: Transformer, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """In here the network calls the hooks. At one place the one that was put there first comes first.

    Raises `UsageError` for a place that there is not.
    """
    if not hooks:
        yield
        return
    here = _Here()
    attentions = [cast(TransformerBlock, layer).attention for layer in model.layers]
    attends = [attention.attend for attention in attentions]
    try:
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(here.begin, with_kwargs=True).remove)
            for place, hook in hooks.items():
                stack.callback(_attach(model, place, partial(here.call, hook)))
            yield
    finally:
        # First of all: Ctrl-C can fall between hanging a hook up and noting how to take it down. What is left behind
        # then does nothing.
        here.over = True
        for attention, attend in zip(attentions, attends, strict=True):
            attention.attend = attend


class _Here:
    """Where the network is in its text. over: the hooks are no longer called."""

    def __init__(self) -> None:
        self._start = 0
        self.over = False

    def begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = args[1] if len(args) > 1 else kwargs.get("cache")
        self._start = 0 if cache is None else cache.length

    def call(self, hook: Hook, value: Tensor) -> Tensor | None:
        return None if self.over else hook(value, self._start)


_Call = Callable[[Tensor], Tensor | None]


def _attach(model: Transformer, place: str, call: _Call) -> Callable[[], None]:
    """Hang a hook up; returns what takes it down."""
    if place in _WHOLE:
        return _output({"embedding": model.tok_embeddings, "norm": model.norm, "logits": model.output}[place], call)
    layers, _, rest = place.partition(".")
    number, _, name = rest.partition(".")
    n_layers = model.args.n_layers
    if layers != "layers" or name not in _LAYER or not number.isdecimal() or int(number) >= n_layers:
        raise UsageError(
            f"There is no place '{sanitize(place)}' in this network, expected one such as "
            f"layers.{n_layers - 1}.resid_post, with a layer from 0 to {n_layers - 1}."
        )
    block = cast(TransformerBlock, model.layers[int(number)])
    match name:
        case "resid_pre":
            return _input(block, call)
        case "resid_post":
            return _output(block, call)
        case "resid_mid":
            return _in_place(block.ffn_norm, call)
        case "attention.heads":
            return _heads(block.attention, call)
        case "attention.out":
            return _output(block.attention, call)
        case "feed_forward.neurons":
            return _input(block.feed_forward.w2, call)
        case "feed_forward.out":
            return _output(block.feed_forward, call)
    return _Attend.of(block.attention).attach(name.removeprefix("attention."), call)


def _output(module: nn.Module, call: _Call) -> Callable[[], None]:
    return module.register_forward_hook(lambda _module, _args, output: call(output)).remove


def _input(module: nn.Module, call: _Call) -> Callable[[], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = call(args[0])
        return None if new is None else (new, *args[1:])

    return module.register_forward_pre_hook(hook).remove


def _in_place(module: nn.Module, call: _Call) -> Callable[[], None]:
    """For an input that others read too, and that was made a moment before."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if (new := call(args[0])) is not None:
            args[0].copy_(new)

    return module.register_forward_pre_hook(hook).remove


def _heads(attention: Attention, call: _Call) -> Callable[[], None]:
    """The input of wo, cut into heads."""

    def cut(x: Tensor) -> Tensor | None:
        new = call(x.unflatten(-1, (-1, attention.head_dim)))  # (B, T, n_heads, head_dim)
        return None if new is None else new.flatten(-2)

    return _input(attention.wo, cut)


class _Attend:
    """Stands in the place of a layer's `attend` while there are hooks within attention."""

    def __init__(self, attention: Attention):
        self._attention = attention
        self._plain = attention.attend
        self._taps: dict[str, list[_Call]] = {name: [] for name in _ATTENTION}

    @classmethod
    def of(cls, attention: Attention) -> _Attend:
        """The one that is there already, or a new one."""
        probe = attention.attend if isinstance(attention.attend, cls) else cls(attention)
        attention.attend = probe
        return probe

    def attach(self, name: str, call: _Call) -> Callable[[], None]:
        self._taps[name].append(call)
        return partial(self._detach, name, call)

    def _detach(self, name: str, call: _Call) -> None:
        self._taps[name].remove(call)
        if not any(self._taps.values()):
            self._attention.attend = self._plain

    def _tap(self, name: str, value: Tensor) -> Tensor:
        for call in self._taps[name]:
            new = call(value)
            value = value if new is None else new
        return value

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._tap(name, value) for name, value in zip("qkv", (q, k, v), strict=True))
        if not self._taps["probs"]:
            return self._plain(q, k, v, mask)
        return attend_with(self._tap("probs", attention_probs(q, k, mask)), v)
