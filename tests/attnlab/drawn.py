"""Random small models of everything that attnlab runs, drawn part by part and not by family."""

from __future__ import annotations

from hypothesis import strategies as st

from planner.layers import (
    ACTIVATIONS,
    GQA,
    ALiBi,
    Dense,
    Layer,
    LearnedPositions,
    MoE,
    Norm,
    QKNorm,
    RoPE,
    Sinusoidal,
)
from planner.model import Model

PLACEMENTS = ("pre", "post", "post-sum", "sandwich", "parallel", "parallel-two")


@st.composite
def norms(draw):
    """Any norm of hidden states."""
    kind = draw(st.sampled_from(("rmsnorm", "layernorm")))
    weight = draw(st.booleans())
    return Norm(
        kind=kind,
        eps=1e-5,
        weight=weight,
        bias=kind == "layernorm" and weight and draw(st.booleans()),
        plus_one=weight and draw(st.booleans()),
    )


@st.composite
def attentions(draw, heads, kv_heads, head_dim):
    """Grouped-query attention with any of its parts."""
    qk_norm = None
    if draw(st.booleans()):
        kind = draw(st.sampled_from(("rmsnorm", "layernorm")))
        width = draw(st.sampled_from(("head", "full", "per-head", "head-list")))
        after = width != "full" and draw(st.booleans())
        qk_norm = QKNorm(norm=Norm(kind=kind, eps=1e-5), width=width, after_rope=after)
    window = draw(st.none() | st.integers(1, 40))
    is_mask = draw(st.booleans())
    return GQA(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        scaling=head_dim**-0.5,
        sliding_window=None if is_mask else window,
        masked_window=window if is_mask else None,
        chunked=window is not None and not is_mask and draw(st.booleans()),
        logit_softcap=draw(st.none() | st.just(2.0)),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        fused_qkv=(fused := draw(st.booleans())),
        interleaved_qkv=fused and draw(st.booleans()),
        qk_norm=qk_norm,
        sinks=draw(st.booleans()),
        rope=draw(st.booleans()),
        clip_qkv=draw(st.none() | st.just(0.5)),
        unbiased="" if fused else draw(st.sampled_from(("", "k", "qv"))),
    )


@st.composite
def denses(draw, gated):
    """A feed-forward with any of its parts."""
    return Dense(
        intermediate_size=draw(st.integers(1, 60)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=gated,
        bias=draw(st.booleans()),
        fused_gate_up=gated and draw(st.booleans()),
    )


@st.composite
def mixtures(draw, *, trained=False):
    """A mixture of experts with any of its parts; `trained`: of those that are planned."""
    groups, each = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    layout = draw(st.sampled_from(("grouped", "transposed", "flat")))
    gated = layout == "flat" or draw(st.booleans())
    routers = ("softmax", "sigmoid", "sigmoid-groups", "sparsemixer")
    router = draw(st.sampled_from(routers[:3] if trained else routers))
    even = st.sampled_from((8, 16, 32))
    shared = draw(st.none() | denses(draw(st.booleans())))
    return MoE(
        num_experts=groups * each,
        num_experts_per_tok=draw(st.integers(1, 2)),
        moe_intermediate_size=draw(even if trained else st.integers(1, 60) | even),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        router=router,
        shared=shared,
        shared_gate=shared is not None and draw(st.booleans()),
        bias=layout != "flat" and draw(st.booleans()),
        layout=layout,
        correction_bias=router == "softmax" and not trained and draw(st.booleans()),
        gated=gated,
        latent_size=draw(st.none() | st.sampled_from((8, 16) if trained else (3, 8))),
        latent_bias=draw(st.booleans()),
        swiglu_alpha=draw(st.none() | st.just(1.7)),
        swiglu_limit=draw(st.none() | st.just(0.1)),
        n_group=groups,
        topk_group=draw(st.integers(1, groups)),
        group_best=draw(st.integers(1, 2)),
        norm_topk_prob=router != "sigmoid" and draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from((1.0, 1.5))),
        router_jitter_noise=0.1,
    )


@st.composite
def models(draw, *, max_tokens=64, routed=False, trained=False):
    """One model; its layers may differ, and with `routed` or `trained` have experts."""
    kv_heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 6))
    gated = draw(st.booleans())
    fed = denses(gated)
    if routed or trained:
        fed = mixtures(trained=trained) | fed
    attention = attentions(kv_heads * shared, kv_heads, head_dim)
    even = st.sampled_from((8, 16, 32))
    kinds = [
        Layer(
            attention=draw(attention),
            feed_forward=draw(fed),
            norm=draw(norms()),
            placement=draw(st.sampled_from(PLACEMENTS)),
            residual_multiplier=draw(st.none() | st.just(0.3)),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    rope = RoPE(
        rope_theta=10_000.0,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        interleaved=draw(st.booleans()),
    )
    learned = LearnedPositions(offset=draw(st.sampled_from((0, 2))))
    places = (rope, learned, Sinusoidal(), ALiBi(scaled=draw(st.booleans())))
    positions = draw(st.sampled_from(places))
    return Model(
        name="drawn",
        model_type="drawn",
        hidden_size=draw(even if trained else st.integers(1, 40) | even),
        vocab_size=draw(st.integers(2, 90)),
        max_position_embeddings=max_tokens,
        layers=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))),
        final_norm=draw(st.none() | norms()),
        positions=positions,
        local_positions=rope if positions is rope and draw(st.booleans()) else None,
        tie_word_embeddings=draw(st.booleans()),
        dtype="fp32",
        lm_head_bias=draw(st.booleans()),
        embedding_norm=draw(st.none() | norms()),
        embedding_scale=draw(st.none() | st.just(3.0)),
        logit_scale=draw(st.none() | st.just(0.3)),
        final_logit_softcapping=draw(st.none() | st.just(3.0)),
        embedding_size=draw(st.none() | st.integers(1, 40)),
    )
