"""Attention scores: their scale, their range in fp16, and norms behind the residual."""

from __future__ import annotations

import math
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.subject import Subject
from planner.findings import Finding
from planner.layers import GQA, MLA

UNSCALED_BY_DESIGN = ("gpt_neo", "t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct")
"""Types whose initialisation takes the place of 1/√d: their classes have no scale."""
ONE_OVER_D_BY_DESIGN = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
"""Types whose scale is a field, and with which µP's 1/d (arXiv:2203.03466) is right."""
FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5", "gemma2", "gemma3", "gemma3_text", "gemma3n_text")
"""Trained in bf16, and known to leave fp16's range in their activations."""
LEAST_WIDTH = 8  # below, √d is less than 3 and nothing is told apart
DEEP, MEDIUM_DEPTH = 24, 12
FP16_MAX = 65_504
PEAK_OVER_STD, GROWTH = 6, 32
"""The largest of many scores in standard deviations; what training was seen to add."""


def check_scores(subject: Subject) -> Iterator[Finding]:
    """Findings on scores and norms."""
    yield from scaling(subject)
    yield from fp16(subject)
    yield from post_norm(subject)


def widths(subject: Subject) -> Iterator[tuple[int, float, bool]]:
    """(head width, what multiplies q·k, whether queries and keys are normed) by kind of layer."""
    kinds = set()
    for layer in subject.model.layer_kinds() if subject.model else ():
        match layer.attention:
            case GQA(head_dim=d, scaling=scale, qk_norm=norm):
                kinds.add((d, scale, norm is not None))
            case MLA(scaling=scale) as mla:
                kinds.add((mla.qk_head_dim, scale, False))
    yield from sorted(kinds)


def scaling(subject: Subject) -> Iterator[Finding]:
    """No 1/√d, or two of them."""
    if subject.model is None and subject.text.get("scale_attn_weights") is False:
        yield found("attention-unscaled", "scale_attn_weights=False", where="scale_attn_weights")
    for d, scale, normed in widths(subject):
        if d < LEAST_WIDTH or normed or subject.model_type in UNSCALED_BY_DESIGN:
            continue
        where = next((f for f in SCALE_FIELDS if subject.text.get(f) is not None), "")
        ratio = scale * math.sqrt(d)
        seen = f"q·k is multiplied by {scale:.4g}, 1/√{d} is {d**-0.5:.4g}"
        if ratio > max(0.6 * math.sqrt(d), 2.2):
            known = subject.model_type in ONE_OVER_D_BY_DESIGN and scale == 1
            yield found(
                "attention-unscaled",
                seen + (" (the class default of attention_multiplier)" if known else "")
                + f"; unit-variance q and k give scores of {scale * math.sqrt(d):.3g} ± "
                "where ± 1 is wanted",
                where=where,
                severity="medium" if known else None,
            )  # fmt: skip
        elif ratio < 1.7 / math.sqrt(d):
            mup = subject.model_type in ONE_OVER_D_BY_DESIGN
            yield found(
                "attention-scaled-twice",
                f"{seen}, 1/{d} is {1 / d:.4g}",
                where=where,
                severity="info" if mup else None,
                do="Right if it was trained with µP (1/d); else take head_dim ** -0.5."
                if mup
                else "",
            )


SCALE_FIELDS = (
    "scale_attn_weights", "attention_multiplier", "query_pre_attn_scalar", "softmax_scale",
    "attn_config",
)  # fmt: skip


def fp16(subject: Subject) -> Iterator[Finding]:
    """fp16 with scores or activations that can leave it."""
    model = subject.model
    if model is None or (subject.load.dtype or model.dtype) != "fp16":
        return
    if subject.model_type in FP16_OVERFLOWS:
        yield found(
            "fp16-overflow",
            f"model_type={subject.model_type} in fp16: trained in bf16, its activations are known "
            "to pass 65 504",
            where="dtype",
        )
    sigma = subject.number("initializer_range") or 0.02
    for d, scale, normed in widths(subject):
        if normed:
            continue
        # q and k of normed inputs: each element has the variance σ²·h
        std = math.sqrt(d) * sigma**2 * model.hidden_size
        reach = std * PEAK_OVER_STD * GROWTH
        unscaled = d >= LEAST_WIDTH and scale * math.sqrt(d) > 4
        if reach > FP16_MAX or (unscaled and subject.model_type not in UNSCALED_BY_DESIGN):
            yield found(
                "fp16-overflow",
                f"q·k before scaling has ± {std:.3g} at initialisation (head_dim {d}, "
                f"initializer_range {sigma:g}); {GROWTH} × that and a {PEAK_OVER_STD} σ peak are "
                f"{reach:,.0f} of 65 504" + (", and nothing scales it" if unscaled else ""),
                where="dtype",
                severity="high" if reach > FP16_MAX else "medium",
            )


def post_norm(subject: Subject) -> Iterator[Finding]:
    """Norms of the sum with the residual, in a deep decoder."""
    model = subject.model
    if model is None or not model.is_decoder:
        return
    deep = sum(n for layer, n in model.layer_kinds().items() if layer.placement == "post-sum")
    if deep >= MEDIUM_DEPTH:
        switch = "do_layer_norm_before"
        where = switch if switch in subject.text else subject.spelled("num_hidden_layers")
        yield found(
            "post-norm-deep",
            f"{deep} of {len(model.layers)} layers compute norm(x + f(x))",
            severity="high" if deep > DEEP else "medium",
            where=where,
        )
