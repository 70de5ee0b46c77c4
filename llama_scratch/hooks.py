"""Hooks that read and replace activations, without changes to model.py.

A hook is called with the value at a place in the network. It returns a new value, or None to keep the old one. Hooks
are based on torch's module hooks, so a network without hooks runs at full speed.

    place                              shape
    embedding                          (B, T, dim)                   token embeddings
    layers.5.resid_pre                 (B, T, dim)                   the residual stream before the layer
    layers.5.attention.q               (B, n_heads, T, head_dim)     queries, rotated by their positions
    layers.5.attention.k               (B, n_kv_heads, S, head_dim)  rotated keys, cached ones first
    layers.5.attention.v               (B, n_kv_heads, S, head_dim)  values, likewise
    layers.5.attention.probs           (B, n_heads, T, S)            attention weights; rows sum to 1
    layers.5.attention.heads           (B, T, n_heads, head_dim)     output of each head, before wo
    layers.5.attention.out             (B, T, dim)                   attention's output, added to the stream
    layers.5.resid_mid                 (B, T, dim)                   the stream between attention and feed-forward
    layers.5.feed_forward.neurons      (B, T, ffn_dim)               silu(w1 x) · w3 x, before w2
    layers.5.feed_forward.out          (B, T, dim)                   feed-forward's output, added to the stream
    layers.5.resid_post                (B, T, dim)                   the stream after the layer
    norm                               (B, T or 1, dim)              the final RMSNorm's output
    logits                             (B, T or 1, vocab_size)

resid_pre, resid_mid and resid_post are named as in TransformerLens (Nanda & Bloom 2022). Its names for q, k, v, probs,
heads and neurons are hook_rot_q, hook_rot_k, hook_v, hook_pattern, hook_z and mlp.hook_post. Its hook_q and hook_k are
before the rotation.
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
"""A function of a value and the position of its first new token.

Returns a new value, or None to keep the old one.
"""

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
    """List all places of a network, in order of execution."""
    layers = [f"layers.{layer}.{place}" for layer in range(n_layers) for place in _LAYER]
    return ["embedding", *layers, "norm", "logits"]


@contextmanager
def hooked(model: Transformer, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Attach hooks to a network within a `with` block.

    Nested blocks can hook the same place. Their hooks are called in the order of attachment.

    Args:
        model: The network.
        hooks: Place → hook.

    Raises:
        UsageError: If a place does not exist.
    """
    if not hooks:
        yield
        return
    position = _Position()
    attentions = [cast(TransformerBlock, layer).attention for layer in model.layers]
    attends = [attention.attend for attention in attentions]
    try:
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(position.begin, with_kwargs=True).remove)
            for place, hook in hooks.items():
                stack.callback(_attach(model, place, partial(position.call, hook)))
            yield
    finally:
        # Ctrl-C can arrive after a hook is attached but before its removal is registered. Such a hook stays attached,
        # so it must do nothing from now on.
        position.over = True
        for attention, attend in zip(attentions, attends, strict=True):
            attention.attend = attend


class _Position:
    """Passes the position of a forward pass to the hooks.

    After `over` is set, hooks are no longer called.
    """

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
    """Attach a hook and return the function that detaches it."""
    if place in _WHOLE:
        return _output({"embedding": model.tok_embeddings, "norm": model.norm, "logits": model.output}[place], call)
    layers, _, rest = place.partition(".")
    number, _, name = rest.partition(".")
    n_layers = model.args.n_layers
    if layers != "layers" or name not in _LAYER or not number.isdecimal() or int(number) >= n_layers:
        raise UsageError(
            f"There is no place '{sanitize(place)}' in this network. Choose a place such as "
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
    """Hook an input and replace it in place, because other modules read the same tensor."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if (new := call(args[0])) is not None:
            args[0].copy_(new)

    return module.register_forward_pre_hook(hook).remove


def _heads(attention: Attention, call: _Call) -> Callable[[], None]:
    """Hook the input of wo, split into heads."""

    def cut(x: Tensor) -> Tensor | None:
        new = call(x.unflatten(-1, (-1, attention.head_dim)))  # (B, T, n_heads, head_dim)
        return None if new is None else new.flatten(-2)

    return _input(attention.wo, cut)


class _Attend:
    """Replaces a layer's `attend` while hooks for q, k, v or probs are attached."""

    def __init__(self, attention: Attention):
        self._attention = attention
        self._plain = attention.attend
        self._calls: dict[str, list[_Call]] = {name: [] for name in _ATTENTION}

    @classmethod
    def of(cls, attention: Attention) -> _Attend:
        """Return the layer's `_Attend`, or install a new one."""
        probe = attention.attend if isinstance(attention.attend, cls) else cls(attention)
        attention.attend = probe
        return probe

    def attach(self, name: str, call: _Call) -> Callable[[], None]:
        self._calls[name].append(call)
        return partial(self._detach, name, call)

    def _detach(self, name: str, call: _Call) -> None:
        self._calls[name].remove(call)
        if not any(self._calls.values()):
            self._attention.attend = self._plain

    def _apply(self, name: str, value: Tensor) -> Tensor:
        for call in self._calls[name]:
            new = call(value)
            value = value if new is None else new
        return value

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._apply(name, value) for name, value in zip("qkv", (q, k, v), strict=True))
        if not self._calls["probs"]:
            return self._plain(q, k, v, mask)
        return attend_with(self._apply("probs", attention_probs(q, k, mask)), v)
