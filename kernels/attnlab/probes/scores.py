"""Softmax over keys: saturated, unscaled, scaled twice; heads without an effect."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed, value
from attnlab.probes.watch import Attention, watch
from attnlab.probes.watch import heads as all_heads
from planner.checks.edges import found
from planner.checks.scores import ONE_OVER_D_BY_DESIGN, UNSCALED_BY_DESIGN
from planner.findings import Finding

SATURATED, LEAST_KEYS, SINK = 0.8, 8, 0.9
LEAST_WIDTH = 8
MOST_HEADS = 48
"""Heads that are switched off one by one; of more, every n-th."""


def softmax_saturation(probed: Probed) -> Iterator[Finding]:
    """Entropy and largest weight by layer and head, the gradient through softmax, growth with d.

    Weights are watched at aten._softmax, with scaled_dot_product_attention computed in plain
    operations. It can miss attention that makes its softmax by hand, in a fused kernel of its own
    (flex, flash, xformers) or inside TorchScript; a norm of queries and keys is taken for a scale;
    and a trained head may be sharp on purpose, so that half the heads of a layer must be.
    """
    with mode(probed.module, training=False):
        _, attentions = watch(probed, probed.draw(2, probed.tokens))
    yield from saturated(attentions)
    yield from scale(probed, attentions)


def sharpness(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """By head: mean largest weight, entropy over its maximum, Σ p(1 − p) over its maximum.

    Of the rows that see at least eight keys.
    """
    p = attention.weights.float()
    seen = (attention.scores > -1e4).sum(-1)
    rows = seen >= LEAST_KEYS
    n = seen.clamp_min(2).float()
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1) / n.log()
    gradient = (p * (1 - p)).sum(-1) / (1 - 1 / n)

    def mean(x: Tensor) -> Tensor:
        return (x * rows).sum((0, 2)) / rows.sum((0, 2)).clamp_min(1)

    found_rows = rows.any()
    top = mean(p.amax(-1)) if found_rows else torch.zeros(p.shape[1], device=p.device)
    return top, mean(entropy), mean(gradient)


def first_key(attention: Attention) -> Tensor:
    """Share of the queries that look at the very first key most, by head: a sink, learned."""
    return (attention.weights.argmax(-1) == 0).float().mean((0, 2))


def saturated(attentions: list[Attention]) -> Iterator[Finding]:
    """Layers in which at least half of the heads are one-hot."""
    sharp = []
    for layer, attention in enumerate(attentions):
        top, entropy, gradient = sharpness(attention)
        hot = (top > SATURATED) & (first_key(attention) < SINK)
        if hot.float().mean() >= 0.5:
            sharp.append((layer, int(hot.sum()), top, entropy, gradient, attention))
    if not sharp:
        return
    layer, hot, top, entropy, gradient, attention = max(sharp, key=lambda s: float(s[2].mean()))
    d = attention.head_width
    spread = float(attention.scores[attention.scores > -1e4].float().std())
    growth = f", {spread / math.sqrt(d):.2g}·√d at head width {d}" if d else ""
    yield found(
        "softmax-saturation",
        f"{len(sharp)} of {len(attentions)} attentions; in {layer} {hot} of {len(top)} heads: mean "
        f"largest weight {float(top.mean()):.3f}, entropy {float(entropy.mean()):.1%} of its "
        f"maximum, gradient through softmax {float(gradient.mean()):.1%}, scores ± {spread:.3g}"
        f"{growth}",
        where=f"attention {layer}",
    )


def scale(probed: Probed, attentions: list[Attention]) -> Iterator[Finding]:
    """What multiplied q·k on its way to softmax, against 1/√d."""
    ratios: dict[int, tuple[float, int]] = {}
    for layer, attention in enumerate(attentions):
        origin, d = attention.origin, attention.head_width
        if origin is not None and d is not None and d >= LEAST_WIDTH and not origin.normed:
            ratios[layer] = abs(origin.factor) * math.sqrt(d), d
    kind = value(probed.config, "model_type")
    for layer, (ratio, d) in ratios.items():
        if ratio > max(0.6 * math.sqrt(d), 2.2) and kind not in UNSCALED_BY_DESIGN:
            yield found(
                "attention-unscaled",
                f"q·k is multiplied by {ratio / math.sqrt(d):.4g} before softmax, 1/√{d} is "
                f"{d**-0.5:.4g}: scores grow as √d",
                where=f"attention {layer}",
                severity="medium" if kind in ONE_OVER_D_BY_DESIGN else None,
            )
            return
    heads = [int(attention.weights.shape[1]) for attention in attentions]
    if ratios and all(
        n > 1 and layer in ratios and abs(ratios[layer][0] * math.sqrt(n) - 1) < 0.01
        for layer, n in enumerate(heads)
    ):
        ratio, d = ratios[0]
        yield found(
            "attention-scaled-twice",
            f"q·k is multiplied by {ratio / math.sqrt(d):.4g} before softmax, that is 1/√{d} over "
            f"the root of {heads[0]} heads",
            where="attention 0",
            severity="medium",
            title="Scores are scaled by the model's width, not the head's",
        )
        return
    low = {n: (r, d) for n, (r, d) in ratios.items() if r < 1.3 / math.sqrt(d)}
    if low and len(low) == len(attentions):
        layer, (ratio, d) = next(iter(low.items()))
        mup = kind in ONE_OVER_D_BY_DESIGN or value(probed.config, "attention_multiplier")
        yield found(
            "attention-scaled-twice",
            f"q·k is multiplied by {ratio / math.sqrt(d):.4g} before softmax, 1/√{d} is "
            f"{d**-0.5:.4g}",
            where=f"attention {layer}",
            severity="info" if mup else None,
        )


def dead_heads(probed: Probed) -> Iterator[Finding]:
    """Switch each head off (its weights become zero) and see whether the output moves.

    A head is dead if the output moves by less than a millionth of what its layer's most important
    head moves it by. It can miss a head that does the same for every input, one that is dead for
    other inputs than random tokens, and, in layers whose output is zero at initialisation on
    purpose, everything.
    """
    inputs = probed.draw(2, probed.tokens)
    with mode(probed.module, training=False):
        before, attentions = watch(probed, inputs)
        if not len(attentions) > 0 or not before.isfinite().all():
            return
        places = list(all_heads(attentions))
        per_layer: dict[int, dict[int, float]] = {}
        if len(places) > MOST_HEADS:  # whole layers: a head is held against its neighbours
            step = math.ceil(len(places) / MOST_HEADS)
            places = [(layer, head) for layer, head in places if layer % step == 0][
                : 2 * MOST_HEADS
            ]
        for layer, head in places:

            def off(index: int, weights: Tensor, at: tuple[int, int] = (layer, head)) -> Tensor:
                if index == at[0]:
                    batch = len(inputs)
                    weights.view(batch, -1, *weights.shape[-2:])[:, at[1]] = 0
                return weights

            after, _ = watch(probed, inputs, off)
            moved = float((after.double() - before.double()).abs().max())
            per_layer.setdefault(layer, {})[head] = moved
    dead = [
        f"{layer}.{head}"
        for layer, moved in per_layer.items()
        for head, by in moved.items()
        if by < 1e-6 * max(moved.values())
    ]
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        yield found(
            "dead-heads",
            f"{len(dead)} of {len(places)} heads change nothing when switched off: {shown} "
            "(attention.head)",
            where=f"attention {dead[0].partition('.')[0]}",
        )
