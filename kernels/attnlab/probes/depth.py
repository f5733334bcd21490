"""Where norms stand, and how activations and gradients change from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed, output_of
from planner.checks.edges import found
from planner.findings import Finding

LEAST_LAYERS = 4
PER_LAYER, IN_ALL = 1.5, 30.0
"""A factor per layer that compounds, and what it has to come to."""
GRADIENTS_IN_ALL = 1e3
DEEP, MEDIUM_DEPTH = 24, 12


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Root mean squares behind each layer; `normed`: whether every token has the same there."""

    name: str
    activations: list[float]
    gradients: list[float]
    normed: list[bool]


def residual_growth(probed: Probed) -> Iterator[Finding]:
    """Activations and gradients behind each of the layers, the longest list of equal modules.

    Post-norm is told by layers whose output has one length for every token, or is the output of a
    norm module. It can miss stacks of fewer than four layers, layers that are called in another
    order or share their weights, growth that training brings, and, where norms have trained
    weights and no module of their own, post-norm.
    """
    with mode(probed.module, training=False):
        depth = measured(probed)
    if depth is None:
        return
    n = len(depth.activations)
    yield from post_norm(probed, depth)
    first, last = depth.activations[0], depth.activations[-1]
    growth = last / max(first, 1e-30)
    factor = growth ** (1 / (n - 1))
    if (factor > PER_LAYER and growth > IN_ALL) or (factor < 1 / PER_LAYER and growth < 1 / IN_ALL):
        yield found(
            "residual-growth",
            f"activations behind layer 1 of {n} have an RMS of {first:.3g}, behind the last "
            f"{last:.3g}: × {factor:.2f} a layer",
            where=depth.name,
        )
    smallest, largest = min(depth.gradients), max(depth.gradients)
    if depth.gradients and largest > GRADIENTS_IN_ALL * max(smallest, 1e-30):
        at = depth.gradients.index(largest) + 1
        yield found(
            "residual-growth",
            f"gradients by layer range from {smallest:.2g} to {largest:.2g} (largest behind layer "
            f"{at} of {n})",
            where=depth.name,
            title="Gradients vanish or explode with depth",
        )


def post_norm(probed: Probed, depth: Depth) -> Iterator[Finding]:
    """norm(x + f(x)) in nearly all layers of a deep decoder."""
    n = len(depth.normed)
    if not probed.causal or n < MEDIUM_DEPTH or sum(depth.normed) < 0.9 * n:
        return
    first, last = depth.gradients[0], depth.gradients[-1]
    yield found(
        "post-norm-deep",
        f"{sum(depth.normed)} of {n} layers end in a norm; the gradient is {first:.2g} behind the "
        f"first layer and {last:.2g} behind the last",
        where=depth.name,
        severity="high" if n > DEEP else "medium",
    )


def measured(probed: Probed) -> Depth | None:
    """One forward and backward with the outputs of every layer kept; None: no stack of layers."""
    name, layers = stack_of(probed.module)
    if layers is None:
        return None
    outs: list[Tensor] = []
    ends: list[Tensor] = []
    normed: list[bool] = []

    def norm_hook(m: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            ends.append(out)

    def layer_hook(m: nn.Module, args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(first, Tensor) and first.dim() == 3 and first.requires_grad:
            first.retain_grad()
            outs.append(first)
            size = first.detach().double().pow(2).mean(-1).sqrt().flatten()
            even = bool(size.std() < 1e-3 * size.mean()) and float(size.mean()) > 0
            normed.append(even or any(end is first for end in ends[-2:]))

    norms = [m for m in layers.modules() if "norm" in type(m).__name__.lower()]
    handles = [m.register_forward_hook(norm_hook) for m in norms]
    handles += [m.register_forward_hook(layer_hook) for m in layers]
    inputs = probed.draw(2, probed.tokens, seed=8)
    try:
        with torch.enable_grad():
            for p in probed.module.parameters():
                p.grad = None
            out = output_of(probed.run(inputs), inputs).float()
            generator = torch.Generator().manual_seed(9)
            weights = torch.randn(out.shape, generator=generator).to(out.device)
            (out * weights).mean().backward()
    except RuntimeError:  # an operation without a backward
        return None
    finally:
        for handle in handles:
            handle.remove()
        for p in probed.module.parameters():
            p.grad = None
    if len(outs) != len(layers) or not all(x.grad is not None for x in outs):
        return None
    return Depth(
        name=name,
        activations=[rms(x) for x in outs],
        gradients=[rms(x.grad) for x in outs if x.grad is not None],
        normed=normed,
    )


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().pow(2).mean().sqrt())


def stack_of(
    module: nn.Module, *, least: int = LEAST_LAYERS
) -> tuple[str, nn.ModuleList | nn.Sequential | None]:
    """The longest list of modules of one class: in the decoder, where there are two."""
    stacks = [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential)
        and len(m) >= least
        and len({type(child) for child in m}) == 1
        and next(iter(m.parameters()), None) is not None
        and not isinstance(m[0], nn.Linear | nn.LayerNorm)
    ]
    if not stacks:
        return "", None
    decoders = [stack for stack in stacks if "decoder" in stack[0]]
    return max(decoders or stacks, key=lambda stack: (len(stack[1]), -len(stack[0])))
