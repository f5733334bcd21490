"""All probes of a module, in order; what the first of them saw stands first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from attnlab.probes.bands import linear_biases, window_reach
from attnlab.probes.cache import cache_drift
from attnlab.probes.causal import causal_leak
from attnlab.probes.depth import residual_growth
from attnlab.probes.localise import named, recorded
from attnlab.probes.masks import mask_defects
from attnlab.probes.numerics import batch_dependence, fp16_hazards
from attnlab.probes.positions import extrapolation
from attnlab.probes.quantised import quantised_cache
from attnlab.probes.quiet import mode, undisturbed
from attnlab.probes.scores import dead_heads, softmax_saturation
from attnlab.probes.subject import Probed, examine, runs, told
from attnlab.probes.watch import watch
from planner.checks.edges import found
from planner.errors import check_choice
from planner.findings import SHARP, Finding

PROBES: dict[str, Callable[[Probed], Iterator[Finding]]] = {
    "causal_leak": causal_leak,
    "softmax_saturation": softmax_saturation,
    "window_reach": window_reach,
    "linear_biases": linear_biases,
    "cache_drift": cache_drift,
    "extrapolation": extrapolation,
    "residual_growth": residual_growth,
    "mask_defects": mask_defects,
    "fp16_hazards": fp16_hazards,
    "batch_dependence": batch_dependence,
    "dead_heads": dead_heads,
    "quantised_cache": quantised_cache,
}
"""By name; each one's docstring says what it can miss."""

FOLLOW_A_LEAK = ("cache-drift", "padding-attends")


def check(
    module: nn.Module,
    *,
    takes: str = "ids",
    causal: bool | None = None,
    vocab_size: int | None = None,
    width: int | None = None,
    trained_tokens: int | None = None,
    sample: Tensor | None = None,
    probes: tuple[str, ...] | None = None,
) -> list[Finding]:
    """Sharp edges of a module, the worst first. It is run many times and left as it was.

    It takes token ids [B, S], or embeddings [B, S, D] with takes="embeddings", and returns a tensor
    [B, S, …] or an object with .logits or .last_hidden_state. `causal` None: what its class and
    config say, of a plain module that it is a decoder unless its name says otherwise. `vocab_size`,
    `width` and `trained_tokens` None: the config's, else what its tables show. `sample`: an input
    from which `takes` and `width` are read. Raises ConfigError for a module that cannot be run.
    """
    chosen = PROBES if probes is None else {check_choice("probes", p, PROBES): None for p in probes}
    with undisturbed(module) if isinstance(module, nn.Module) else torch.no_grad():
        probed = examine(
            module,
            takes=takes,
            causal=causal,
            vocab_size=vocab_size,
            width=width,
            trained_tokens=trained_tokens,
            sample=sample,
        )
        with mode(module, training=False):
            probed, first = runs(probed)
        if not first.isfinite().all():
            return [not_finite(probed, first)]
        findings = []
        for name in chosen:
            try:
                findings += list(PROBES[name](probed))
            except Exception as error:  # one probe that a module does not stand is not the end
                findings.append(found("not-checked", told(name, error), where=name))
    return ordered(findings)


def ordered(findings: list[Finding]) -> list[Finding]:
    """The worst first, else as they were found. What a leak brings with it counts for less."""
    if any(finding.id == "causal-leak" for finding in findings):
        findings = [
            replace(f, severity="medium", seen=f"{f.seen} (may follow from the causal leak)")
            if f.id in FOLLOW_A_LEAK
            else f
            for f in findings
        ]
    return sorted(findings, key=lambda f: SHARP.index(f.severity))


def not_finite(probed: Probed, out: Tensor) -> Finding:
    """The first submodule that made NaN or inf; rows without a key, if that was it."""
    with mode(probed.module, training=False):
        with recorded(probed.module) as made:
            probed.outputs(probed.draw(2, probed.tokens))
        _, attentions = watch(probed, probed.draw(2, probed.tokens))
    where = next((named(name, m) for name, m, x in made if not x.isfinite().all()), "")
    share = float((~out.isfinite()).double().mean())
    for layer, attention in enumerate(attentions):
        empty = (attention.scores == -torch.inf).all(-1)
        if empty.any():
            rows = sorted(set(empty.nonzero()[:, -1].tolist()))[:5]
            return found(
                "masked-row-nan",
                f"attention {layer} hides every key from queries {rows}; {share:.0%} of the "
                "outputs are NaN or inf",
                where=where,
                severity="critical",
            )
    return found("not-finite", f"{share:.0%} of the outputs are NaN or inf", where=where)
