"""Does an earlier output move when a later token changes?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnlab.probes.localise import along_sequence, first_that, named, recorded
from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed
from attnlab.probes.watch import watch
from planner.checks.edges import found
from planner.findings import Finding

TRIALS, TRIALS_IN_TRAINING = 4, 2
KINDS = (
    (re.compile(r"[Cc]onv"), "a convolution reaches ahead"),
    (re.compile(r"[Nn]orm"), "a norm over the sequence"),
    (re.compile(r"[Rr]out|[Gg]at(e|ing)|M[oO]E|[Mm]oe|[Ee]xpert"), "routing over the sequence"),
    (re.compile(r"[Pp]ool"), "pooling over the sequence"),
)  # fmt: skip


def causal_leak(probed: Probed) -> Iterator[Finding]:
    """Change the tokens from t on and compare the outputs before t; also by gradient.

    In eval and in train mode with dropout 0, several t and draws of tokens. Leaks below rounding
    (1e-5 of the largest output) are seen by the gradient alone. It can miss a leak that only some
    inputs open (routing that changes with rare tokens), one past the 23 tokens that are probed,
    and, where no embedding receives the ids, a leak too weak to move an output.
    """
    if not probed.causal:
        return
    for training in (False, True):
        with mode(probed.module, training=training):
            leak = by_change(probed) or by_gradient(probed)
        if leak is None:
            continue
        seen, where, title = leak
        how = "train mode, dropout 0" if training else "eval mode"
        yield found(
            "causal-leak", f"{seen}; {how}", where=where,
            title=f"The decoder sees the future: {title}" if title else "",
        )  # fmt: skip
        return
    yield from self_masked(probed)


def movement(one: Tensor, other: Tensor) -> Tensor:
    """How far each position moved, relative to the largest output, [S]."""
    change = (one.double() - other.double()).abs()
    scale = one.double().abs().max().clamp_min(1e-30)
    dims = [d for d in range(change.dim()) if d != 1]
    return change.amax(dim=dims) / scale


def by_change(probed: Probed) -> tuple[str, str, str] | None:
    """The largest movement before the first changed token."""
    S = probed.tokens
    worst: tuple[float, int, int, Tensor, Tensor] | None = None
    for trial in range(TRIALS_IN_TRAINING if probed.module.training else TRIALS):
        inputs = probed.draw(2, S, seed=trial)
        before = probed.outputs(inputs)
        for t in sorted({1, S // 3, S // 2 + 1, S - 1} - {0}):
            changed = inputs.clone()
            changed[:, t:] = probed.draw(2, S, seed=100 + trial)[:, t:]
            moved = movement(before, probed.outputs(changed))[:t]
            most = float(moved.max())
            if most > probed.tolerance and (worst is None or most > worst[0]):
                first = int((moved > probed.tolerance / 10).nonzero()[0])
                worst = most, t, t - first, inputs, changed
    if worst is None:
        return None
    most, t, reach, inputs, changed = worst
    where, title = explained(probed, inputs, changed, t)
    seen = (
        f"tokens from {t} on changed, outputs up to {reach} before them moved by {most:.2g} of the "
        "largest"
    )
    return seen, where, title


def explained(probed: Probed, inputs: Tensor, changed: Tensor, t: int) -> tuple[str, str]:
    """The first submodule that lets the change through, and what it may be."""
    ahead = attention_ahead(probed, inputs)
    with recorded(probed.module) as one:
        probed.outputs(inputs)
    with recorded(probed.module) as other:
        probed.outputs(changed)

    def leaks(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        a, b = along_sequence(a, probed.tokens), along_sequence(b, probed.tokens)  # type: ignore[assignment]
        if a is None or b is None:
            return False
        return bool(movement(a, b)[:t].max() > probed.tolerance / 10)

    culprit = first_that(one, other, leaks)
    if culprit is None:
        return "", ahead or "between its submodules"
    name, m = culprit
    if ahead and not isinstance(m, nn.modules.conv._ConvNd):
        return named(name, m), ahead
    text = f"{type(m).__name__} {name.rpartition('.')[2]}"
    kind = next((words for pattern, words in KINDS if pattern.search(text)), "")
    return named(name, m), kind or f"through {type(m).__name__}"


def attention_ahead(probed: Probed, inputs: Tensor) -> str:
    """What the attention weights above the diagonal say."""
    _, attentions = watch(probed, inputs)
    for layer, attention in enumerate(attentions):
        seen = (attention.weights > 0).flatten(0, 1).any(0)
        ahead = int((seen.nonzero()[:, 1] - seen.nonzero()[:, 0]).max()) if seen.any() else 0
        if ahead > 0:
            many = seen.triu(1).sum() > probed.tokens * (probed.tokens - 1) // 4
            what = "no causal mask" if many else f"the mask is {ahead} off"
            return f"{what} in attention {layer}"
    return ""


def embedded(probed: Probed, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """(what the ids were embedded to, the outputs made of it) with gradients; None: no table."""
    if probed.takes == "embeddings":
        leaf = inputs.detach().clone().requires_grad_()
        return leaf, output_of_grad(probed, leaf)
    leaves: list[Tensor] = []

    def hook(m: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        given = args[0] if args else None
        if leaves or not isinstance(given, Tensor) or given.shape != inputs.shape:
            return None
        if not torch.equal(given, inputs) or not isinstance(out, Tensor):
            return None
        leaves.append(out.detach().requires_grad_())
        return leaves[0]

    tables = [m for m in probed.module.modules() if isinstance(m, nn.Embedding)]
    handles = [m.register_forward_hook(hook) for m in tables]
    try:
        out = output_of_grad(probed, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (leaves[0], out) if leaves else None


def output_of_grad(probed: Probed, inputs: Tensor) -> Tensor:
    """Outputs with gradients, in float32 at least."""
    from attnlab.probes.subject import output_of

    with torch.enable_grad():
        return output_of(probed.run(inputs), inputs).float()


def by_gradient(probed: Probed) -> tuple[str, str, str] | None:
    """Gradients of an output with respect to later embeddings; in a causal model exactly zero."""
    inputs = probed.draw(1, probed.tokens, seed=7)
    try:
        made = embedded(probed, inputs)
        if made is None or not made[1].requires_grad:
            return None
        leaf, out = made
        for i in (0, probed.tokens // 2, probed.tokens - 3):
            generator = torch.Generator().manual_seed(i)
            weights = torch.randn(out[0, i].shape, generator=generator).to(out.device)
            (grad,) = torch.autograd.grad((out[0, i] * weights).sum(), leaf, retain_graph=True,
                                          allow_unused=True)  # fmt: skip
            if grad is None:
                return None
            size = grad[0].double().norm(dim=-1)
            most = float(size[i + 1 :].max() / size.max().clamp_min(1e-30))
            if most > max(1e-7, probed.tolerance / 100):
                j = i + 1 + int(size[i + 1 :].argmax())
                seen = f"the gradient of output {i} by token {j} is {most:.2g} of the largest"
                return seen, "", attention_ahead(probed, inputs)
    except RuntimeError:  # an operation without a backward
        return None
    return None


def self_masked(probed: Probed) -> Iterator[Finding]:
    """A decoder's tokens that do not see themselves: the mask is off to the other side."""
    _, attentions = watch(probed, probed.draw(2, probed.tokens))
    blind = [
        layer
        for layer, attention in enumerate(attentions)
        if (attention.weights[..., 2:, :].diagonal(2, -2, -1) == 0).all()
        and (attention.weights[..., 2:, :] > 0).any()
    ]
    if attentions and len(blind) == len(attentions):
        yield found(
            "self-masked", f"no weight on the diagonal in all {len(blind)} attentions",
            where="attention 0",
        )  # fmt: skip
