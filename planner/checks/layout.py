"""Sizes: heads that divide, GPUs that divide them, tensor-core multiples, windows, mixtures."""

from __future__ import annotations

import math
from collections.abc import Iterator

from planner.checks.edges import found
from planner.checks.subject import Subject
from planner.findings import Finding
from planner.layers import GQA, MLA, Dense, MoE

MULTIPLE = 8
"""Elements of 16 bit that tensor cores take at once (NVIDIA, deep learning performance guide)."""


def check_layout(subject: Subject) -> Iterator[Finding]:
    """Findings on sizes."""
    yield from heads(subject)
    yield from tensor_parallel(subject)
    yield from tensor_cores(subject)
    yield from windows(subject)
    yield from mixtures(subject)


def heads(subject: Subject) -> Iterator[Finding]:
    """hidden_size by heads, and heads by kv heads."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    h, H, G = (subject.size(name) for name in names)
    theirs = [subject.spelled(name) for name in names]
    latent = subject.size("kv_lora_rank") is not None
    if h and H and h % H and not latent and subject.size("head_dim") is None:
        yield found(
            "heads-do-not-divide",
            f"{theirs[0]}={h} is not a multiple of {theirs[1]}={H} and no head_dim is stated",
            where=theirs[1],
        )
    if H and G and H % G and not latent:
        yield found(
            "heads-do-not-divide",
            f"{theirs[1]}={H} is not a multiple of {theirs[2]}={G}",
            where=theirs[2],
        )


def tensor_parallel(subject: Subject) -> Iterator[Finding]:
    """The stated number of GPUs against heads and widths."""
    n = subject.load.tensor_parallel
    if n == 1:
        return
    H, G = subject.size("num_attention_heads"), subject.size("num_key_value_heads")
    if subject.model is not None:
        gqa = [
            layer.attention
            for layer in subject.model.layer_kinds()
            if isinstance(layer.attention, GQA | MLA)
        ]
        if gqa:
            H = gqa[0].num_attention_heads
            G = gqa[0].num_key_value_heads if isinstance(gqa[0], GQA) else None

    def rest(seen: str, where: str, **more: str) -> Finding:
        return found("tensor-parallel-does-not-divide", seen, where=where, **more)  # type: ignore[arg-type]

    if H and H % n:
        yield rest(
            f"{subject.spelled('num_attention_heads')}={H} among tensor_parallel={n} GPUs",
            subject.spelled("num_attention_heads"),
            severity="critical",
        )
    elif G and G % n:
        if n % G:
            yield rest(f"num_key_value_heads={G} among tensor_parallel={n}", "num_key_value_heads")
        else:
            yield rest(
                f"num_key_value_heads={G} < tensor_parallel={n}: each kv head is kept "
                f"{n // G} times",
                "num_key_value_heads",
                severity="info",
                title="KV heads are copied to several GPUs",
            )
    for width in sorted(feed_forward_widths(subject)):
        if width % n:
            yield rest(
                f"intermediate size {width} among tensor_parallel={n} GPUs", "intermediate_size"
            )


def feed_forward_widths(subject: Subject) -> set[int]:
    """Widths of all feed-forwards and experts."""
    found_widths = set()
    for layer in subject.model.layer_kinds() if subject.model else ():
        match layer.feed_forward:
            case Dense(intermediate_size=width) | MoE(moe_intermediate_size=width):
                found_widths.add(width)
    plain = subject.size("intermediate_size")
    if subject.model is None and plain is not None:
        found_widths.add(plain)
    return found_widths


def tensor_cores(subject: Subject) -> Iterator[Finding]:
    """Sizes that are padded in every product."""
    sizes = {"vocab_size": subject.size("vocab_size"), "hidden_size": subject.size("hidden_size")}
    if subject.model is not None:
        kinds = {layer.attention for layer in subject.model.layer_kinds()}
        for width in sorted({a.head_dim for a in kinds if isinstance(a, GQA)}):
            sizes["head_dim"] = width
    for width in sorted(feed_forward_widths(subject)):
        sizes["intermediate_size"] = width
    for name, size in sizes.items():
        if not size or size % MULTIPLE == 0:
            continue
        up = -(-size // 64) * 64 if name == "vocab_size" else -(-size // MULTIPLE) * MULTIPLE
        yield found(
            "off-tensor-core-multiple",
            f"{name}={size:,} leaves {size % MULTIPLE} by {MULTIPLE}; the next good size is {up:,}",
            where=subject.spelled(name),
            severity="medium" if name == "head_dim" else "info",
        )


def windows(subject: Subject) -> Iterator[Finding]:
    """A window that the config states and no layer has."""
    model, window = subject.model, subject.size("sliding_window")
    if model is None or window is None:
        return
    attentions = [x.attention for x in model.layer_kinds() if isinstance(x.attention, GQA)]
    if not attentions or any(a.sliding_window or a.masked_window for a in attentions):
        return
    limit = model.max_position_embeddings
    if limit is not None and window >= limit:
        return  # it would cut nothing
    text = subject.text
    if text.get("use_sliding_window") is False:
        why = "use_sliding_window=False"
    elif isinstance(text.get("layer_types"), list):
        why = "layer_types has no sliding_attention"
    elif subject.size("max_window_layers") is not None:
        why = f"max_window_layers={subject.size('max_window_layers')} of {len(model.layers)} layers"
    else:
        why = f"model_type={model.text_type} does not slide"
    yield found(
        "window-off",
        f"sliding_window={window:,} < {limit or 0:,} positions, but {why}: every layer attends "
        "to everything",
        where="sliding_window",
    )


CAPACITY_FACTORS = (
    "capacity_factor", "expert_capacity_factor", "moe_capacity_factor", "train_capacity_factor",
    "eval_capacity_factor", "moe_expert_capacity_factor",
)  # fmt: skip


def mixtures(subject: Subject) -> Iterator[Finding]:
    """Experts against the tokens that are routed to them."""
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    E = next((n for name in experts if (n := subject.size(name))), None)
    k = next((n for name in chosen if (n := subject.size(name))), None)
    if E and k and k >= E > 1:
        yield found(
            "moe-capacity",
            f"{k} of {E} experts for every token",
            title="Every token goes to every expert" if k == E else "More experts chosen than are",
            severity="medium" if k == E else "critical",
            where="num_experts_per_tok",
            do="Choose fewer experts: now it is a dense layer with a router's cost.",
        )
    for name in CAPACITY_FACTORS:
        factor = subject.number(name)
        if factor is not None and factor < 1:
            yield found(
                "moe-capacity",
                f"{name}={factor:g}: {1 - factor:.0%} of the tokens are dropped even with a "
                "balanced router",
                severity="high",
                where=name,
            )
    capacity, tokens = subject.size("expert_capacity"), subject.load.context_tokens
    if capacity and E and tokens:
        needed = math.ceil(tokens * (k or 1) / E)
        if needed > capacity:
            yield found(
                "moe-capacity",
                f"expert_capacity={capacity} for {tokens:,} tokens × {k or 1} / {E} experts = "
                f"{needed:,} each: at least {1 - capacity / needed:.0%} are dropped",
                severity="high",
                where="expert_capacity",
            )
