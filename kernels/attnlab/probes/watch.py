"""Attention weights as they are computed: every aten._softmax over keys, and where it came from.

Nothing goes by module names. Scores are followed from their product of queries and keys, so that
what multiplied them is known, and what was added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnlab.probes.quiet import NoDropout
from attnlab.probes.subject import Probed

# Shapes.  N batch · heads · T queries · S keys · d head width


@dataclass(frozen=True, slots=True)
class Origin:
    """What a tensor was made of: `factor` multiplied it since the last product of matrices.

    `left` @ `right` are the queries and keys of scores, `after` what multiplied their product.
    """

    factor: float = 1.0
    normed: bool = False
    left: Tensor | None = None
    right: Tensor | None = None
    after: float = 1.0

    @property
    def is_scores(self) -> bool:
        """Whether it is a product of queries and keys, scaled or masked."""
        return self.left is not None


@dataclass(frozen=True, slots=True)
class Attention:
    """One softmax over keys: `scores` [B, H, T, S] went in, `weights` came out."""

    scores: Tensor
    weights: Tensor
    origin: Origin | None

    @property
    def head_width(self) -> int | None:
        """d, where the scores could be followed."""
        left = self.origin.left if self.origin else None
        return None if left is None else int(left.shape[-1])

    def bias(self) -> Tensor | None:
        """What was added to q·k, [B, H, T, S]; None where it could not be followed."""
        origin = self.origin
        if origin is None or origin.left is None or origin.right is None:
            return None
        product = (origin.left.double() @ origin.right.double()) * origin.after
        if product.numel() != self.scores.numel():
            return None
        return self.scores.double() - product.reshape(self.scores.shape)


PRODUCTS = {"mm", "addmm", "linear", "convolution", "embedding"}
NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "native_group_norm"}
FORGET = {
    "exp",
    "pow",
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "elu",
    "softplus",
    "cumsum",
    "sum",
    "mean",
}


class Watch(TorchDispatchMode):
    """Records every softmax over `tokens` queries and keys; or lets `change` alter its result."""

    def __init__(self, tokens: int, change: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.tokens, self.change = tokens, change
        self.count = 0
        self.attentions: list[Attention] = []
        self._origins: dict[
            int, tuple[Tensor, Origin]
        ] = {}  # the tensor is kept: its id is its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and follow its result."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_") if hasattr(func, "overloadpacket") else ""
        if name == "_softmax" and self._over_keys(args):
            return self._attention(args[0], out)
        if self.change is not None:  # altered, not followed
            return out
        first = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return out
        origin = self._origin(name, args, kwargs or {}, first)
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self._keep(made, origin)
        return out

    def _over_keys(self, args: Any) -> bool:
        scores, dim = args[0], args[1]
        n = self.tokens
        last = dim in (-1, scores.dim() - 1)
        # one more key: a sink that takes weight away
        return last and scores.dim() >= 3 and scores.shape[-2] == n <= scores.shape[-1] <= n + 1

    def _attention(self, scores: Tensor, weights: Tensor) -> Tensor:
        kept = scores.unflatten(0, (-1, 1)) if scores.dim() == 3 else scores
        if kept.dim() > 4:
            kept = kept.flatten(1, -3)
        n = self.tokens
        if self.change is not None:
            changed = self.change(self.count, weights.reshape(kept.shape).clone())
            self.count += 1
            return changed.reshape(weights.shape)
        self.attentions.append(
            Attention(
                scores=kept[..., :n].detach().clone(),
                weights=weights.reshape(kept.shape)[..., :n].detach().clone(),
                origin=self._of(scores) if scores.shape[-1] == n else None,
            )
        )
        return weights

    def _keep(self, made: Tensor, origin: Origin | None) -> None:
        if origin is None:
            self._origins.pop(id(made), None)
        else:
            self._origins[id(made)] = made, origin

    def _of(self, tensor: Any) -> Origin | None:
        kept = self._origins.get(id(tensor))
        return kept[1] if kept is not None and kept[0] is tensor else None

    def _origin(self, name: str, args: Any, kwargs: Any, out: Tensor) -> Origin | None:
        if name in PRODUCTS:
            return Origin()
        if name in NORMS:
            return Origin(normed=True)
        if name in FORGET:
            return None
        if name == "bmm":
            return self._product(args[0], args[1], out, 1.0)
        if name == "baddbmm":
            return self._product(args[1], args[2], out, float(kwargs.get("alpha", 1.0)))
        if name in ("mul", "div"):
            return self._scaled(name, args)
        tensors: list[Any] = []
        for arg in args:
            tensors += arg if isinstance(arg, tuple | list) else [arg]
        known = [o for t in tensors if isinstance(t, Tensor) and (o := self._of(t)) is not None]
        return next((o for o in known if o.is_scores), known[0] if known else None)

    def _product(self, left: Tensor, right: Tensor, out: Tensor, alpha: float) -> Origin:
        n = self.tokens
        if out.shape[-2] % n or out.shape[-1] != n or left.shape[-1] == n:
            return Origin()
        a, b = self._of(left), self._of(right)
        factor = (a.factor if a else 1.0) * (b.factor if b else 1.0) * alpha
        normed = bool(a and a.normed) or bool(b and b.normed)
        if a is None or b is None:
            normed = True  # not followed: nothing is said about their scale
        return Origin(factor=factor, normed=normed, left=left, right=right, after=alpha)

    def _scaled(self, name: str, args: Any) -> Origin | None:
        one, other = args[0], args[1]
        if isinstance(one, Tensor) and self._of(one) is None and isinstance(other, Tensor):
            one, other = other, one
        origin = self._of(one)
        if origin is None:
            return None
        number = _number(other)
        if number is None:
            by_row = (
                isinstance(other, Tensor)
                and other.dim()
                and one.shape[-1] > 1
                and (other.shape[-1] == 1 or other.stride(-1) == 0)
            )
            return replace(origin, normed=True) if by_row else origin
        if name == "div":
            number = 1 / number if number else math.inf
        return replace(origin, factor=origin.factor * number, after=origin.after * number)


def _number(other: Any) -> float | None:
    if isinstance(other, bool | int | float):
        return float(other)
    if isinstance(other, Tensor) and other.numel() == 1:
        return float(other)
    return None


def watch(
    probed: Probed,
    inputs: Tensor,
    change: Callable[[int, Tensor], Tensor] | None = None,
    **more: Any,
) -> tuple[Tensor, list[Attention]]:
    """Outputs of the module and its self-attentions, in the order they were computed."""
    watching = Watch(inputs.shape[1], change)
    with NoDropout(decomposed=True), watching:
        out = probed.outputs(inputs, **more)
    found = [folded(attention, len(inputs)) for attention in watching.attentions]
    return out, found


def folded(attention: Attention, batch: int) -> Attention:
    """With heads beside the batch, also where they were in one dimension."""
    weights = attention.weights
    if weights.shape[1] == 1 and weights.shape[0] > batch and weights.shape[0] % batch == 0:
        shape = (batch, -1, *weights.shape[-2:])
        return replace(
            attention, scores=attention.scores.reshape(shape), weights=weights.reshape(shape)
        )
    return attention


def visible(attention: Attention) -> Tensor:
    """Keys that got any weight, [B, H, T, S]."""
    return attention.weights > 0


def heads(attentions: list[Attention]) -> Iterator[tuple[int, int]]:
    """(layer, head) of all of them."""
    for layer, attention in enumerate(attentions):
        for head in range(attention.weights.shape[1]):
            yield layer, head
