"""Decoding with a cache against one forward over the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnlab.probes.bands import stated_windows
from attnlab.probes.localise import first_that, named, recorded
from attnlab.probes.quiet import mode
from attnlab.probes.subject import CACHE_NAMES, Probed, told, value
from planner.checks.edges import found
from planner.findings import Finding

PREFILL, STEPS, LONGEST = 5, 9, 80
NOISE = 20.0
"""Times what the same forward differs by at another length."""


def cache_drift(probed: Probed) -> Iterator[Finding]:
    """Logits of each decode step against an uncached forward over the tokens so far.

    It takes past_key_values (or cache_params) as transformers does, and attnlab's own caches. A
    window of up to 64 tokens is decoded past. It can miss drift that begins later than it decodes
    (14 tokens, or six past the window), caches of another interface, several tokens at a time, and
    beams.
    """
    if not probed.causal or probed.takes != "ids":
        return
    windows = [w for w in stated_windows(probed) if w is not None and w <= LONGEST - 16]
    first = prefilled(probed)
    steps = max([STEPS, *(w + 6 - first for w in windows)])
    limit = probed.trained_tokens or first + steps
    steps = min(steps, limit - first)
    if steps < 1:
        return
    ids = probed.draw(2, first + steps, seed=3)
    with mode(probed.module, training=False):
        try:
            cached = decoded(probed, ids)
        except Exception as error:
            text = told("decoding with the cache fails", error)
            ours = type(probed.module).__module__.startswith("transformers.")
            yield found(
                "cache-drift",
                text,
                title="Decoding with the cache fails",
                severity="medium" if ours else "high",  # loud, and generate() may call it otherwise
            )
            return
        if cached is None:
            return
        for finding in compared(probed, ids, cached):
            yield judged(probed, ids, finding)


def judged(probed: Probed, ids: Tensor, finding: Finding) -> Finding:
    """Less bad where it is as the type is meant: generate() hands positions to these classes, and
    rotary frequencies that change with the length differ from those of the cached keys.
    """
    if not type(probed.module).__module__.startswith("transformers."):
        return finding
    rope = value(probed.config, "rope_parameters") or {}
    kinds = {rope.get("rope_type")} if isinstance(rope, dict) else set()
    if kinds & {"dynamic", "longrope"}:
        title = "Rotary frequencies change with the length, cached keys keep theirs"
        return replace(finding, severity="medium", title=title)
    if probed.has("position_ids") and not probed.encoder:
        cached = decoded(probed, ids, told_positions=True)
        if cached is not None and not list(compared(probed, ids, cached)):
            title = "Without position_ids, decoding takes other positions"
            return replace(finding, severity="medium", title=title, do="Pass position_ids.")
    return finding


def compared(probed: Probed, ids: Tensor, cached: list[Tensor]) -> Iterator[Finding]:
    """Each step beside the uncached forward, within rounding."""
    drifts, noise, first = [], 0.0, prefilled(probed)
    whole = probed.outputs(ids)
    for n, got in enumerate(cached, first):
        alone = probed.outputs(ids[:, :n])[:, -1]
        scale = float(alone.abs().max().clamp_min(1e-30))
        drifts.append(float((got.double() - alone.double()).abs().max()) / scale)
        across = float((whole[:, n - 1].double() - alone.double()).abs().max()) / scale
        if across < 1e-3:  # more is a leak, not rounding
            noise = max(noise, across)
    bound = max(probed.tolerance, NOISE * noise)
    off = [n for n, drift in enumerate(drifts, first) if not drift <= bound]
    if not off:
        return
    begins, most = off[0], max(drifts, key=lambda d: d if d == d else float("inf"))
    yield found(
        "cache-drift",
        f"from token {begins - 1} on ({begins - first} decoded with the cache before it agree): "
        f"logits differ by up to {most:.2g} of the largest, rounding is {bound:.1g}; "
        f"{len(off)} of {len(drifts)} steps",
        where=where_first(probed, ids, begins),
    )


def decoded(probed: Probed, ids: Tensor, *, told_positions: bool = False) -> list[Tensor] | None:
    """The last token's output after the prefill and after each step; None: no cache known."""
    if type(getattr(probed.module, "model", None)).__name__ == "Model" and probed.has("cache"):
        return _attnlab(probed, ids)
    first = prefilled(probed)
    prefill = probed_prefill(probed, ids[:, :first])
    if prefill is None:
        return None
    out, cache, name = prefill
    outs = [out]
    for n in range(first, ids.shape[1]):
        more: dict[str, Any] = {name: cache}
        if probed.has("use_cache"):
            more["use_cache"] = True
        if told_positions:
            more["position_ids"] = torch.full((len(ids), 1), n, device=ids.device)
        with torch.no_grad():
            answer = probed.run(ids[:, n : n + 1], **more)
        outs.append(last_of(answer, ids[:, n : n + 1]))
        cache = cache_of(answer, name)
        if cache is None:
            return None
    return outs


def prefilled(probed: Probed) -> int:
    """Tokens of the prefill; a sequence-to-sequence decoder starts with one."""
    return 1 if probed.encoder else PREFILL


def last_of(answer: Any, ids: Tensor) -> Tensor:
    """The last position's output."""
    from attnlab.probes.subject import output_of

    return output_of(answer, ids)[:, -1]


def probed_prefill(probed: Probed, ids: Tensor) -> tuple[Tensor, Any, str] | None:
    """(last output, cache, name of the argument that takes it), or None."""
    names = [n for n in CACHE_NAMES if probed.has(n)]
    if not names:
        return None
    more = {"use_cache": True} if probed.has("use_cache") else {}
    with torch.no_grad():
        answer = probed.run(ids, **more)
    for name in names:
        cache = cache_of(answer, name)
        if cache is not None:
            return last_of(answer, ids), cache, name
    return None


def cache_of(answer: Any, name: str) -> Any:
    """The cache in an answer: by name, or what stands second in a tuple."""
    if isinstance(answer, dict):
        return answer.get(name)
    if isinstance(answer, tuple) and not hasattr(answer, "_fields"):
        return answer[1] if len(answer) > 1 else None
    for spelling in (name, *CACHE_NAMES):
        cache = getattr(answer, spelling, None)
        if cache is not None:
            return cache
    return None


def _attnlab(probed: Probed, ids: Tensor) -> list[Tensor]:
    from attnlab.caches import build_cache

    module: Any = probed.module
    cache = build_cache(
        module.model,
        None,
        batch=len(ids),
        tokens=ids.shape[1],
        dtype=module.dtype,
        device=module.device,
    )
    outs = [probed.outputs(ids[:, :PREFILL], cache=cache)[:, -1]]
    for n in range(PREFILL, ids.shape[1]):
        outs.append(probed.outputs(ids[:, n : n + 1], cache=cache)[:, -1])
    return outs


def where_first(probed: Probed, ids: Tensor, begins: int) -> str:
    """The first submodule whose last position differs between a cached and an uncached run."""
    if begins <= PREFILL or probed_prefill(probed, ids[:, :PREFILL]) is None:
        return ""
    try:
        _, cache, name = probed_prefill(probed, ids[:, : begins - 1])  # type: ignore[misc]
        with recorded(probed.module) as one:
            probed.outputs(ids[:, begins - 1 : begins], **{name: cache})
        with recorded(probed.module) as other:
            probed.outputs(ids[:, :begins])
    except Exception:
        return ""

    def differs(a: Tensor, b: Tensor) -> bool:
        if a.dim() != 3 or b.dim() != 3 or a.shape[1] != 1 or a.shape[2] != b.shape[2]:
            return False
        a, b = a[:, -1].double(), b[:, -1].double()
        return bool((a - b).abs().max() > 10 * probed.tolerance * b.abs().max())

    culprit = first_that(one, other, differs)
    return named(*culprit) if culprit else ""
