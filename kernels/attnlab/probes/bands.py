"""Which keys attention reaches, against the module's config: windows and linear biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab import alibi
from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed, value, whole
from attnlab.probes.watch import Attention, visible, watch
from planner.checks.edges import found
from planner.errors import ConfigError
from planner.findings import Finding
from planner.huggingface import read_config

LONGEST_WINDOW = 512
ALIBI_TYPES = ("bloom",)
WINDOW_FIELDS = ("sliding_window", "window_size", "attention_window", "window")


def window_reach(probed: Probed) -> Iterator[Finding]:
    """The farthest key with any weight, layer by layer, against the config's window.

    A query sees its own and the window − 1 positions before it. It can miss windows over 512
    tokens, windows of modules without a config, layers whose kinds the config does not list, and
    weights that no softmax shows (fused kernels).
    """
    if not probed.causal:
        return
    stated = stated_windows(probed)
    windows = [w for w in stated if w is not None]
    if not windows or max(windows) > LONGEST_WINDOW:
        return
    tokens = next_prime(max(probed.tokens, max(windows) + 9))
    if probed.trained_tokens is not None and tokens > probed.trained_tokens > max(windows):
        tokens = probed.trained_tokens
    with mode(probed.module, training=False):
        _, attentions = watch(probed, probed.draw(1, tokens))
    if not attentions:
        return
    if len(stated) == 1:
        stated = stated * len(attentions)
    if len(stated) != len(attentions):
        return
    for layer, (window, attention) in enumerate(zip(stated, attentions, strict=True)):
        if window is None:
            continue
        reach = farthest(attention)
        if reach > window - 1:
            yield found(
                "window-mismatch",
                f"attention {layer} reaches {reach} tokens back, sliding_window={window} allows "
                f"{window - 1}: {reach - window + 1} too many",
                where=f"attention {layer}",
            )
            return
        if reach < window - 1 < tokens - 1:
            yield found(
                "window-mismatch",
                f"attention {layer} reaches {reach} tokens back, sliding_window={window} allows "
                f"{window - 1}",
                where=f"attention {layer}",
                severity="medium",
                title="Attention stops short of its window",
            )
            return


def farthest(attention: Attention) -> int:
    """The largest distance from a query back to a key with weight."""
    queries, keys = visible(attention).flatten(0, 1).any(0).nonzero(as_tuple=True)
    return int((queries - keys).max()) if len(queries) else 0


def next_prime(n: int) -> int:
    """The next prime, which no other size is likely to be."""
    while any(n % k == 0 for k in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def stated_windows(probed: Probed) -> list[int | None]:
    """The window of every attention by the config; one entry: of all of them."""
    described = getattr(probed.module, "model", None)
    if type(described).__name__ == "Model":
        try:  # what its config says, not what was made of it
            layers = read_config(described.config).layers
        except ConfigError:
            layers = described.layers
        return [
            getattr(x.attention, "sliding_window", None)
            or getattr(x.attention, "masked_window", None)
            for x in layers
        ]
    config = probed.config
    ours = type(probed.module).__module__.startswith("transformers.")
    names = WINDOW_FIELDS[:1] if ours else WINDOW_FIELDS
    kinds: Any = value(config, "layer_types")
    window = next((w for name in names if (w := whole(value(config, name)))), None)
    local = value(config, "attention_layers")
    if ours and isinstance(local, list) and whole(value(config, "window_size")):  # gpt_neo
        return [value(config, "window_size") if kind == "local" else None for kind in local]
    if window is None or value(config, "use_sliding_window") is False:
        return []
    if isinstance(kinds, list | tuple):
        attending = [kind for kind in kinds if "attention" in str(kind)]
        if any(k not in ("full_attention", "sliding_attention") for k in attending):
            return []  # chunks, linear attention: other rules
        return [window if kind == "sliding_attention" else None for kind in attending]
    return [window]


def linear_biases(probed: Probed) -> Iterator[Finding]:
    """What is added to q·k, head by head: ALiBi takes slope · distance away.

    Signs are judged wherever a bias is linear in the distance, slopes where the config says ALiBi.
    It can miss biases inside fused kernels, and slopes of models whose config does not say ALiBi.
    """
    declared = declares_alibi(probed)
    with mode(probed.module, training=False):
        _, attentions = watch(probed, probed.draw(2, probed.tokens))
    for layer, attention in enumerate(attentions):
        bias = attention.bias()
        if bias is None:
            continue
        slopes, fit = by_distance(bias, attention)
        linear = (fit > 0.999) & (slopes.abs() > 1e-4)
        rising = linear & (slopes > 0)
        if rising.sum() > len(slopes) / 2:
            yield found(
                "alibi-slopes",
                f"the bias of {int(rising.sum())} of {len(slopes)} heads rises with distance, by "
                f"{float(slopes.max()):.3g} a token at most: wrong sign",
                where=f"attention {layer}",
                severity="critical",
                title="ALiBi has the wrong sign",
            )
            return
        if declared and not linear.any():
            yield found(
                "alibi-slopes",
                "the config says ALiBi, and nothing linear in the distance is added to q·k",
                where=f"attention {layer}",
            )
            return
        if declared and (seen := other_slopes(slopes, attention)):
            yield found("alibi-slopes", seen, where=f"attention {layer}", severity="medium")
            return


def declares_alibi(probed: Probed) -> bool:
    """Whether the module's config says ALiBi."""
    config = probed.config
    described = getattr(getattr(probed.module, "model", None), "positions", None)
    if type(described).__name__ == "ALiBi":
        return True
    inner = value(config, "attn_config")
    words = (value(config, name) for name in ("position_embedding_type", "positions", "pos_emb"))
    return bool(
        value(config, "alibi") is True
        or value(config, "use_alibi") is True
        or value(inner, "alibi") is True
        or value(config, "model_type") in ALIBI_TYPES
        or any(isinstance(word, str) and word.lower() == "alibi" for word in words)
    )


def by_distance(bias: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """(slope of the bias by distance, share of its variance that is linear), by head."""
    T = bias.shape[-1]
    at = torch.arange(T, device=bias.device, dtype=torch.float64)
    distance = (at[:, None] - at[None, :]).expand_as(bias)
    seen = (attention.weights > 0) & (distance >= 0)
    n = seen.sum(-1, keepdim=True).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        x = torch.where(seen, x, 0.0)
        return torch.where(seen, x - x.sum(-1, keepdim=True) / n, 0.0)

    x, y = centred(distance), centred(bias)
    dims = (0, 2, 3)
    xx, xy, yy = ((a * b).sum(dims) for a, b in ((x, x), (x, y), (y, y)))
    slope = xy / xx.clamp_min(1e-30)
    fit = torch.where(yy > 1e-12, xy * xy / (xx * yy).clamp_min(1e-30), 0.0)
    return slope, fit


def other_slopes(slopes: Tensor, attention: Attention) -> str:
    """Empty where the slopes are ALiBi's, also times the scale of the scores."""
    expected = torch.tensor(alibi.slopes(len(slopes)), dtype=torch.float64, device=slopes.device)
    ratio = -slopes / expected
    origin = attention.origin
    allowed = [1.0] + ([abs(origin.factor)] if origin is not None else [])
    if any(((ratio / scale - 1).abs() < 0.02).all() for scale in allowed):
        return ""
    # the same slopes in another order of heads serve as well
    ordered = (-slopes).sort().values / expected.sort().values
    if any(((ordered / scale - 1).abs() < 0.02).all() for scale in allowed):
        return ""
    return (
        f"slopes {float(-slopes[0]):.3g}, {float(-slopes[-1]):.3g} of the first and last of "
        f"{len(slopes)} heads, ALiBi has {float(expected[0]):.3g}, {float(expected[-1]):.3g}"
    )
