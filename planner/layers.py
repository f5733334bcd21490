"""The parts a model is described with. A variant is a type; a field has its config.json name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from planner.errors import ConfigError, check_size
from planner.mixers import Mixer
from planner.tensors import Parameter

Activation = Literal[
    "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2"
]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
Placement = Literal["pre", "post", "post-sum", "sandwich", "parallel", "parallel-two"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450); `plus_one`: 1 + weight.

    `weight=False`: normalisation alone, without a parameter (olmo).
    """

    kind: Literal["rmsnorm", "layernorm"]
    eps: float
    weight: bool = True
    bias: bool = False
    plus_one: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """A norm on queries and keys before the scores.

    `width` "head": one scale of head_dim for all heads (qwen3); "full": over all heads at once
    (olmo2); "per-head": a scale of its own for each head (cohere), which
    "head-list" keeps as a tensor for each head (stablelm). `after_rope`: they are rotated first
    (hunyuan).
    """

    norm: Norm
    width: Literal["head", "full", "per-head", "head-list"]
    after_rope: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GQA:
    """Grouped-query attention (arXiv:2305.13245). MHA: kv heads == heads. MQA: kv heads == 1.

    `scaling` multiplies q·k, `logit_softcap` is gemma-2's c·tanh(x/c) on the scores, and a query
    sees its own and the `sliding_window` − 1 positions before it (None: all of them), in an encoder
    `sliding_window` // 2 on each side. `fused_qkv`
    says that one matrix holds the three projections. `sinks`: a learned logit for each head that
    takes attention away (gpt-oss). `rope=False`: without the model's rotary positions (cohere2's
    full layers). `chunked`: the window is a chunk, a query sees its own chunk's positions only
    (llama4). `clip_qkv` bounds q, k and v (dbrx). `interleaved_qkv`: the rows of the fused matrix
    go head by head, q, k and v of each (gpt_neox), not all of q first. `masked_window`: a window
    that is a mask alone, work and cache stay whole (gpt_neo). `cache_heads`: heads that
    transformers caches where they are not the kv heads (falcon-40b: all of them). `unbiased`: the
    letters of projections without the bias that the others have (whisper's k). `shares_cache`: the
    keys and values are those of an earlier layer, this one projects and caches none (gemma3n).
    `attention_k_eq_v`: the values are the projected keys, there is no v_proj (gemma4). `v_norm`: a
    norm without scale on the values. `output_gate`: q_proj makes a gate on the heads' outputs
    beside the queries (qwen3_next). `temperature`: (attn_scale, floor_scale) of queries that grow
    with their position p, by 1 + attn_scale · ln(1 + ⌊(p + 1) / floor_scale⌋) (llama4).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None = None
    logit_softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: bool = False
    interleaved_qkv: bool = False
    masked_window: int | None = None
    qk_norm: QKNorm | None = None
    sinks: bool = False
    rope: bool = True
    chunked: bool = False
    clip_qkv: float | None = None
    cache_heads: int | None = None
    unbiased: str = ""
    shares_cache: bool = False
    output_gate: bool = False
    attention_k_eq_v: bool = False
    v_norm: bool = False
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_size("num_attention_heads", self.num_attention_heads)
        check_size("num_key_value_heads", self.num_key_value_heads)
        check_size("head_dim", self.head_dim)
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexer:
    """What picks the `index_topk` tokens that a query attends to (DeepSeek-V3.2, arXiv:2512.02556).

    It caches one key of `index_head_dim` for each token. `index_kpool`: it picks pools of so many
    tokens; a token's weight in its pool is cached beside the key, and whether it is padding
    (glm5_next). `own_queries`: made from the hidden state, normed, and scaled (mistral_large4).
    """

    index_n_heads: int
    index_head_dim: int
    index_topk: int
    index_kpool: int | None = None
    own_queries: bool = False

    def __post_init__(self) -> None:
        for field in ("index_n_heads", "index_head_dim", "index_topk"):
            check_size(field, getattr(self, field))
        if self.index_kpool is not None:
            check_size("index_kpool", self.index_kpool)
            if self.index_topk % self.index_kpool:
                raise ConfigError(
                    f"index_topk={self.index_topk} is not a multiple of "
                    f"index_kpool={self.index_kpool}"
                )

    @property
    def cached_width(self) -> int:
        """Elements cached for each token."""
        return self.index_head_dim if self.index_kpool is None else 2 * self.index_head_dim + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one shared latent per token.

    `q_lora_rank=None` projects the query directly. `bias` is on the down-projections and on o_proj.
    `indexer`: attention to the tokens that it picks; a layer without one among layers that have it
    attends to what the last one picked. `qk_rope_head_dim` 0: no positions. `shares_cache`: the
    latents are those of an earlier layer (mistral_large4).
    """

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int  # d_c
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # d_h^R
    v_head_dim: int
    scaling: float
    bias: bool = False
    rope_interleave: bool = True
    indexer: Indexer | None = None
    shares_cache: bool = False

    def __post_init__(self) -> None:
        for field in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            check_size(field, getattr(self, field))
        check_size("qk_rope_head_dim", self.qk_rope_head_dim, minimum=0)
        if self.q_lora_rank is not None:
            check_size("q_lora_rank", self.q_lora_rank)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """A feed-forward: down(act(up(x))), or gated (arXiv:2002.05202) down(act(gate(x)) · up(x))."""

    intermediate_size: int
    activation: Activation
    gated: bool
    bias: bool = False
    fused_gate_up: bool = False

    def __post_init__(self) -> None:
        check_size("intermediate_size", self.intermediate_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoE:
    """A mixture of gated experts: each token goes to `num_experts_per_tok` of `num_experts`.

    `shared_gate`: a linear of one output weighs the shared expert (qwen2_moe). `bias`: on router
    and experts (gpt-oss). `layout` of the routed weights: "grouped" [E, out, in], gate and up in
    one; "transposed" [E, in, out] (gpt-oss, llama4); "flat" three of [E · i, h] (dbrx).
    `correction_bias`: what is added to the scores for the choice alone, [1, E], is a parameter and
    not a buffer (ernie4_5_moe). `swiglu_limit` clamps gate and up, `swiglu_alpha` is the sigmoid's
    slope (gpt-oss). `linear_router`: the router is an nn.Linear, which quantisers replace, and not
    a class of its own. `gated=False`: experts are down(act(up(x))); `latent_size`: they work on a
    projection of so many dimensions (nemotron_h).
    Router "softmax" (mixtral): top-k of the softmax, renormalised if `norm_topk_prob`; "sigmoid"
    (llama4): sigmoids of the top-k scale the experts' inputs; "sparsemixer" (phimoe,
    arXiv:2409.12136): two experts, one after the other, each weighed among those that are at most
    2 · `router_jitter_noise` of their score behind. Router "sigmoid-groups"
    (DeepSeek-V3, arXiv:2412.19437): sigmoid scores plus a correction bias, top `topk_group` of
    `n_group` groups first, each judged by its `group_best` best scores (DeepSeek-V2: one, where it
    limits groups at all), in whatever router has groups. `shared` runs for every token.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    activation: Activation
    router: Literal["softmax", "sigmoid", "sigmoid-groups", "sparsemixer"]
    shared: Dense | None = None
    shared_gate: bool = False
    bias: bool = False
    layout: Literal["grouped", "transposed", "flat"] = "grouped"
    correction_bias: bool = False
    linear_router: bool = False
    gated: bool = True
    latent_size: int | None = None
    latent_bias: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        for field in ("num_experts", "moe_intermediate_size", "n_group", "topk_group"):
            check_size(field, getattr(self, field))
        check_size("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}"
            )
        if self.num_experts % self.n_group:
            raise ConfigError(
                f"num_experts={self.num_experts} is not a multiple of n_group={self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One block.

    Norms stand before attention and feed-forward ("pre"), after each ("post"), after each one's sum
    with the residual ("post-sum": opt-350m), on both sides ("sandwich"); "parallel": attention and
    feed-forward read one norm's output side by side; "parallel-two": each a norm of its own.
    `residual_multiplier` scales what attention and feed-forward add (granite).

    A block may lack attention or feed-forward (nemotron_h has one of them in each). `beside`: a
    second mixer on the same input (falcon_h1). `cross_attention`: to an encoder's output, with a
    norm of its own. `norms` names the norms where they are not those of the placement.
    `extra_parameters` are those that no field describes, named relative to the block. `left_alone`:
    words of linear layers that a quantiser leaves as they are here, unlike those of other blocks.
    """

    attention: GQA | MLA | Mixer | None
    feed_forward: Dense | MoE | None
    norm: Norm
    placement: Placement = "pre"
    residual_multiplier: float | None = None
    beside: GQA | Mixer | None = None
    cross_attention: GQA | None = None
    norms: tuple[str, ...] | None = None
    extra_parameters: tuple[Parameter, ...] = ()
    left_alone: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class RoPE:
    """Rotary positions (arXiv:2104.09864) over the first `rotary_dim` dimensions of a head.

    `scaling` holds the remaining `rope_parameters` of config.json, sorted; empty: unscaled.
    `interleaved`: neighbouring dimensions turn together (glm, cohere), not the two halves (llama).
    """

    rope_theta: float
    rotary_dim: int
    rope_type: str = "default"
    interleaved: bool = False
    scaling: tuple[tuple[str, float | int | tuple[float, ...] | str | bool | None], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedPositions:
    """A table with one row for each of `max_position_embeddings` positions, and `offset` more."""

    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinusoidal:
    """Sines and cosines added to the embedding (arXiv:1706.03762): no parameters, no end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ALiBi:
    """Linear biases on the scores (arXiv:2108.12409): no parameters, no table.

    `scaled`: the biases are multiplied by the attention's `scaling` too (falcon).
    """

    scaled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPositions:
    """None, or none that is described: recurrent models, an encoder's sinusoids, patches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBias:
    """Learned biases on the scores by bucketed distance (T5, arXiv:1910.10683).

    Their table is among the parameters of the block that holds it; those behind it add them too.
    All from `max_distance` on share one bucket.
    """

    max_distance: int = 128


Positions = RoPE | LearnedPositions | Sinusoidal | ALiBi | RelativeBias | NoPositions
