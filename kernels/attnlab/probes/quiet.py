"""A module is run for the probes and left as it was: modes, buffers, attributes, gradients."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NAMES = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
DROPOUTS = frozenset(
    [
        *(getattr(nn.functional, name) for name in _NAMES.split()),
        torch.dropout,
        torch.dropout_,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.native_dropout,
    ]
)
MULTI_HEAD = nn.functional.multi_head_attention_forward
ATTENTION = nn.functional.scaled_dot_product_attention


class NoDropout(TorchFunctionMode):
    """Every dropout passes its input on, also the one inside scaled_dot_product_attention.

    `decomposed`: attention is computed in plain operations, so that its softmax can be watched.
    """

    def __init__(self, *, decomposed: bool = False) -> None:
        super().__init__()
        self.decomposed = decomposed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept dropouts and attention."""
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            given = args[0] if args else kwargs["input"]
            return (given, torch.ones_like(given)) if func is torch.native_dropout else given
        if func is ATTENTION:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
            if self.decomposed:
                return plain_attention(*args, **kwargs)
        if func is MULTI_HEAD:
            return self._multi_head(args, kwargs)
        return func(*args, **kwargs)

    def _multi_head(self, args: Any, kwargs: Any) -> Any:
        """torch's own module calls its parts where this mode does not reach."""
        bound = inspect.signature(MULTI_HEAD).bind(*args, **kwargs)
        given = bound.arguments
        given["dropout_p"] = 0.0
        weights = given.get("need_weights", True)
        if self.decomposed:
            given["need_weights"] = True
        out, seen = MULTI_HEAD(*bound.args, **bound.kwargs)
        return out, seen if weights else None


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What scaled_dot_product_attention computes, by its documentation."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(times, -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    T, S = scores.shape[-2:]
    if is_causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
    weights = torch.softmax(scores, dim=-1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return weights.masked_fill(empty, 0.0) @ value


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run probes inside: no warnings, no log lines, and afterwards everything is as before."""
    modules = list(module.modules())
    kept = [(m, m.training, dict(m._buffers), _plain(m)) for m in modules]
    contents = [
        (buffer, buffer.detach().clone())
        for _, _, buffers, _ in kept
        for buffer in buffers.values()
        if buffer is not None
    ]
    grads = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    fast, level = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    rng = torch.random.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.random.set_rng_state(rng)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        for m, training, buffers, plain in kept:
            m.training = training
            m._buffers.clear()
            m._buffers.update(buffers)
            for name in _plain(m):
                if name not in plain:
                    delattr(m, name)
            m.__dict__.update(plain)
        for p, grad, wanted in grads:
            p.grad = grad
            p.requires_grad_(wanted)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that a forward may set: numbers, words, tensors that are no buffers."""
    simple = (int, float, str, bool, type(None), Tensor)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, simple)
    }


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode, and as it was afterwards."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, was in before:
            m.training = was
