"""Positions: the context against what they were trained for, rotary scaling against itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from planner.checks.edges import found
from planner.checks.subject import Subject
from planner.findings import Finding
from planner.layers import GQA, LearnedPositions, RoPE, Sinusoidal

KNOWN_ROPE = (
    "default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "mrope", "proportional",
)  # fmt: skip
BASE_BOUNDS = (
    (1_024, 4.3e3), (2_048, 1.6e4), (4_096, 2.7e4), (8_192, 8.4e4), (16_384, 3.1e5),
    (32_768, 6.4e5), (65_536, 2.1e6), (131_072, 7.8e6), (262_144, 3.6e7), (524_288, 6.4e7),
    (1_048_576, 5.1e8),
)  # fmt: skip
"""Context → the least rotary base that was found to carry it (arXiv:2405.14591, table 2)."""
SMALL, FAR_TOO_SMALL = 8.0, 16.0
"""Times the context that a base carries: models that work (gemma at 8 k) reach five of it."""
CLOSE = 0.99


def check_positions(subject: Subject) -> Iterator[Finding]:
    """Findings on positions."""
    yield from context(subject)
    yield from rope_parameters(subject)
    yield from rope_base(subject)


def context(subject: Subject) -> Iterator[Finding]:
    """The stated context beyond the trained positions."""
    model, asked = subject.model, subject.load.context_tokens
    limit = model.max_position_embeddings if model else subject.size("max_position_embeddings")
    if limit is None or asked is None or asked <= limit:
        return
    name = subject.spelled("max_position_embeddings")
    kind = model.positions if model else (RoPE if rope_of(subject) else None)
    seen = f"context {asked:,} > {name}={limit:,}"
    match kind:
        case LearnedPositions():
            yield found(
                "context-beyond-positions",
                f"{seen}, a learned table of {limit:,} rows",
                severity="critical",
                title="The context runs past the learned positions",
                where=name,
            )
        case Sinusoidal():
            yield found("context-beyond-positions", f"{seen}, sinusoidal", where=name)
        case None:
            return
        case RoPE() | type():
            scaling = rope_of(subject)
            reach = reached(scaling, limit)
            if asked <= reach or (model and windows_carry(subject, limit)):
                return
            kind_of_scaling = scaling.get("rope_type", scaling.get("type"))
            scaled = kind_of_scaling not in (None, "default")
            how = f"{kind_of_scaling} scaling reaches {reach:,}" if scaled else "RoPE unscaled"
            yield found("context-beyond-positions", f"{seen}, {how}", where=name)


def windows_carry(subject: Subject, limit: int) -> bool:
    """Whether no layer looks back farther than the trained length: distances stay known."""
    model = subject.model
    if model is None:
        return False
    windows = [
        layer.attention.sliding_window
        for layer in model.layer_kinds()
        if isinstance(layer.attention, GQA) and layer.attention.rope
    ]
    return bool(windows) and all(w is not None and w <= limit for w in windows)


def reached(scaling: Mapping[str, Any], limit: int) -> int:
    """Tokens that the scaling was set for."""
    factor, original = positive(scaling.get("factor")), original_length(scaling)
    match scaling.get("rope_type", scaling.get("type")):
        case "yarn":
            return max(limit, int((factor or 1) * (original or limit)))
        case "dynamic":
            return int(limit * (factor or 1))
    return limit


def rope_of(subject: Subject) -> dict[str, Any]:
    """The rotary parameters that the config states; of several kinds of layers the full one's."""
    given = subject.text.get("rope_scaling") or subject.text.get("rope_parameters")
    if not isinstance(given, Mapping):
        theta = subject.text.get("rope_theta")
        return {"rope_theta": theta} if theta is not None else {}
    inner = given.get("full_attention")
    if isinstance(inner, Mapping):
        given = inner
    stated = {"rope_theta": subject.text.get("rope_theta")}
    return {**stated, **given}


def positive(value: Any) -> float | None:
    """The value if it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if value > 0 and math.isfinite(value) else None


def original_length(scaling: Mapping[str, Any]) -> float | None:
    """`original_max_position_embeddings` of the parameters."""
    return positive(scaling.get("original_max_position_embeddings"))


def rope_parameters(subject: Subject) -> Iterator[Finding]:
    """Scaling that says something else than the context does."""
    scaling = rope_of(subject)
    kind = scaling.get("rope_type", scaling.get("type"))
    limit = subject.size("max_position_embeddings")
    if limit is None and subject.model is not None:
        limit = subject.model.max_position_embeddings
    name = "rope_scaling" if subject.text.get("rope_scaling") else "rope_parameters"
    original = original_length(scaling) or positive(
        subject.text.get("original_max_position_embeddings")
    )
    stated = positive(scaling.get("factor"))

    def contradiction(seen: str, **more: Any) -> Finding:
        return found("rope-contradiction", seen, where=name, **more)

    if kind in (None, "default"):
        if original and limit and limit > original / CLOSE:
            yield found(
                "context-beyond-positions",
                f"max_position_embeddings={limit:,} > original_max_position_embeddings="
                f"{original:,.0f}, RoPE unscaled",
                where=name,
            )
        if stated is not None and stated != 1:
            yield contradiction(
                f"factor={stated:g} with rope_type={kind!r}, which has none: it does nothing",
                severity="medium",
            )
        return
    if kind not in KNOWN_ROPE:
        yield contradiction(f"rope_type={str(kind)[:40]!r} is none of {', '.join(KNOWN_ROPE)}")
        return
    if "factor" in scaling and (stated is None or stated < 1):
        yield contradiction(
            f"factor={str(scaling['factor'])[:20]}: a number from 1 on",
            do="A factor below 1 shortens the context. Set factor = wanted / trained length.",
        )
        return
    if kind == "yarn":
        yield from yarn(scaling, original, stated, limit, contradiction)
    if kind == "llama3":
        low, high = (positive(scaling.get(f"{end}_freq_factor")) for end in ("low", "high"))
        if low and high and low >= high:
            yield contradiction(f"low_freq_factor={low:g} ≥ high_freq_factor={high:g}")
        if original and limit and original > limit:
            yield contradiction(
                f"original_max_position_embeddings={original:,.0f} > "
                f"max_position_embeddings={limit:,}"
            )
    if kind in ("longrope", "su"):
        yield from longrope(subject, scaling, original, limit, contradiction)


def yarn(
    scaling: Mapping[str, Any],
    original: float | None,
    factor: float | None,
    limit: int | None,
    contradiction: Any,
) -> Iterator[Finding]:
    """YaRN (arXiv:2309.00071): factor × original is the context, beta_fast > beta_slow."""
    fast, slow = (positive(scaling.get(f"beta_{end}")) for end in ("fast", "slow"))
    if fast and slow and fast <= slow:
        yield contradiction(f"beta_fast={fast:g} ≤ beta_slow={slow:g}: by default 32 and 1")
    if factor is None or limit is None:
        return
    if original is None:
        if factor > 1:
            yield contradiction(
                f"factor={factor:g} without original_max_position_embeddings: "
                f"max_position_embeddings={limit:,} is taken for the trained length",
                severity="medium",
            )
        return
    if factor * original < CLOSE * limit:
        yield contradiction(
            f"factor × original = {factor:g} × {original:,.0f} = {factor * original:,.0f} < "
            f"max_position_embeddings={limit:,}"
        )
    elif CLOSE * factor * original > limit > original / CLOSE:
        yield contradiction(
            f"factor × original = {factor:g} × {original:,.0f} = {factor * original:,.0f} > "
            f"max_position_embeddings={limit:,}: stretched further than it is used",
            severity="info",
        )


def longrope(
    subject: Subject,
    scaling: Mapping[str, Any],
    original: float | None,
    limit: int | None,
    contradiction: Any,
) -> Iterator[Finding]:
    """LongRoPE (arXiv:2402.13753): a factor for each pair of rotary dimensions, short and long."""
    if original and limit and original > limit:
        yield contradiction(
            f"original_max_position_embeddings={original:,.0f} > max_position_embeddings={limit:,}"
        )
    model = subject.model
    if model is None or not isinstance(model.positions, RoPE):
        return
    pairs = model.positions.rotary_dim // 2
    for name in ("short_factor", "long_factor"):
        factors = scaling.get(name)
        if isinstance(factors, list) and len(factors) != pairs:
            yield contradiction(f"{name} has {len(factors)} factors for {pairs} rotary pairs")


def rope_base(subject: Subject) -> Iterator[Finding]:
    """A base below what the context needs, where no scaling stretches it."""
    scaling = rope_of(subject)
    model = subject.model
    if scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        return
    limit = subject.size("max_position_embeddings")
    theta = positive(scaling.get("rope_theta"))
    stated = theta is not None and subject.stated("max_position_embeddings")
    if model is not None:
        if not isinstance(model.positions, RoPE) or model.positions.rope_type != "default":
            return
        limit, theta = model.max_position_embeddings, model.positions.rope_theta
        if not any(isinstance(x.attention, GQA) and x.attention.rope for x in model.layer_kinds()):
            stated = False  # latent attention: positions are a small part of a head
    if limit is None or theta is None or windows_carry(subject, limit - 1):
        return
    carried = carries(theta)
    if limit <= SMALL * carried:
        return
    far = stated and limit > FAR_TOO_SMALL * carried
    yield found(
        "rope-base-too-small",
        f"rope_theta={theta:g}{'' if stated else ' (not stated: the class default)'} for "
        f"{limit:,} tokens; it was found to carry about {carried:,.0f}",
        severity="high" if far else "medium" if stated else "info",
        where="rope_theta",
    )


def carries(theta: float) -> float:
    """Context that a base carries, between the table's points by powers."""
    points = [(math.log(base), math.log(tokens)) for tokens, base in BASE_BOUNDS]
    x = math.log(max(theta, 1.0))
    upper = next((i for i, (at, _) in enumerate(points) if i and x <= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[upper - 1], points[upper]
    return math.exp(y0 + (x - x0) * (y1 - y0) / (x1 - x0))
