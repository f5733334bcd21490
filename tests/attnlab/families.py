"""Tiny configs of every family that attnlab runs, as transformers writes them."""

import transformers as hf

import planner
from planner.runtimes.attnlab import unplanned_parts

V = 97
LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
MHA = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GPT2 = dict(
    vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
OPT = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=64, pad_token_id=1, dropout=0.0,
)  # fmt: skip
FALCON = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True,
    max_position_embeddings=64, ffn_hidden_size=48, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
MIXTURE = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16)
MLA = dict(
    **MHA, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6,
    qk_rope_head_dim=8, v_head_dim=10, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
    topk_group=1, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
)  # fmt: skip
MAMBA2 = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2,
    state_size=10, chunk_size=8, tie_word_embeddings=False, pad_token_id=None,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MAMBA = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=6, time_step_rank=3,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
BAMBA = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=10, mamba_chunk_size=8
)
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=10, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]


def rope(kind, **more):
    return dict(rope_type=kind, rope_theta=10_000.0, **more)


ROPES = {
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=3.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn with betas": rope(
        "yarn", factor=8.0, original_max_position_embeddings=8, beta_fast=20, beta_slow=2,
        mscale=0.7, mscale_all_dim=0.9,
    ),
    "yarn, given factor": rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8
    ),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "longrope": rope(
        "longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        original_max_position_embeddings=10,
    ),
}  # fmt: skip

FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**LLAMA, head_dim=16),
    "llama with biases": lambda: hf.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    **{
        f"llama, {name} rope": lambda r=r: hf.LlamaConfig(**LLAMA, head_dim=16, rope_parameters=r)
        for name, r in ROPES.items()
    },
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen2 sliding from layer 1": lambda: hf.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=16, attention_bias=True),
    "gemma": lambda: hf.GemmaConfig(**{**LLAMA, "tie_word_embeddings": True}, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(
        **{**LLAMA, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **{**LLAMA, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        layer_types=SLIDING,
        rope_parameters={
            "full_attention": rope("linear", factor=8.0),
            "sliding_attention": dict(rope_type="default", rope_theta=100.0),
        },
    ),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT2),
    "gpt_bigcode, all heads": lambda: hf.GPTBigCodeConfig(**GPT2, multi_query=False),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=5, bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**MHA, attention_bias=True),
    "gpt_neox in sequence": lambda: hf.GPTNeoXConfig(**MHA, use_parallel_residual=False),
    "gptj": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4),
    "gptj, tied": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4, tie_word_embeddings=True),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=V, hidden_size=36, n_layer=2, n_head=6, bos_token_id=None, eos_token_id=None
    ),
    "mpt": lambda: hf.MptConfig(vocab_size=V, d_model=36, n_layers=2, n_heads=6, max_seq_len=64),
    "mpt, clipped": lambda: hf.MptConfig(
        vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=64,
        attn_config={"clip_qkv": 0.3, "softmax_scale": 0.4},
    ),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-350m": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=24, do_layer_norm_before=False),
    "falcon-7b": lambda: hf.FalconConfig(**FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": lambda: hf.FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-rw": lambda: hf.FalconConfig(
        **FALCON, alibi=True, multi_query=False, parallel_attn=False
    ),
    "phi": lambda: hf.PhiConfig(**LLAMA, partial_rotary_factor=0.5),
    "phi with norms": lambda: hf.PhiConfig(**LLAMA, qk_layernorm=True),
    "phi3": lambda: hf.Phi3Config(
        **LLAMA, rope_parameters=dict(partial_rotary_factor=0.5, rope_theta=10_000.0)
    ),
    "phi3, longrope": lambda: hf.Phi3Config(
        **LLAMA,
        original_max_position_embeddings=10,
        rope_parameters=rope(
            "longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0]
        ),
    ),
    "olmo": lambda: hf.OlmoConfig(**LLAMA, clip_qkv=0.5),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA),
    "olmo3": lambda: hf.Olmo3Config(**LLAMA, sliding_window=5, layer_types=SLIDING),
    "cohere": lambda: hf.CohereConfig(**LLAMA, logit_scale=0.3, use_qk_norm=True),
    "cohere2": lambda: hf.Cohere2Config(
        **LLAMA, logit_scale=0.3, sliding_window=5, layer_types=SLIDING
    ),
    "stablelm": lambda: hf.StableLmConfig(**LLAMA, qk_layernorm=True, use_qkv_bias=True),
    "stablelm, parallel": lambda: hf.StableLmConfig(**LLAMA, use_parallel_residual=True),
    "starcoder2": lambda: hf.Starcoder2Config(**LLAMA, sliding_window=5),
    "smollm3": lambda: hf.SmolLM3Config(**{**LLAMA, "num_hidden_layers": 4}),
    "granite": lambda: hf.GraniteConfig(
        **LLAMA, embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "glm": lambda: hf.GlmConfig(**LLAMA, head_dim=16),
    "glm4": lambda: hf.Glm4Config(**LLAMA, head_dim=16),
    "nemotron": lambda: hf.NemotronConfig(**LLAMA, head_dim=16),
    "deepseek_v2": lambda: hf.DeepseekV2Config(**{**MLA, "q_lora_rank": None}),
    "deepseek_v2, best groups": lambda: hf.DeepseekV2Config(
        **MLA, topk_method="group_limited_greedy", routed_scaling_factor=1.5
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**MLA),
    "deepseek_v3, halves": lambda: hf.DeepseekV3Config(
        **MLA, rope_interleave=False, attention_bias=True
    ),
    "deepseek_v3, yarn": lambda: hf.DeepseekV3Config(
        **{**MLA, "first_k_dense_replace": 2},
        rope_parameters={**ROPES["yarn"], "mscale": 0.7, "mscale_all_dim": 0.9},
    ),
    "exaone4": lambda: hf.Exaone4Config(**LLAMA, sliding_window=5, layer_types=SLIDING),
    "mamba": lambda: hf.MambaConfig(**MAMBA),
    "falcon_mamba": lambda: hf.FalconMambaConfig(**MAMBA, use_bias=True, use_conv_bias=False),
    "mamba2": lambda: hf.Mamba2Config(**MAMBA2),
    "mamba2, bounded steps": lambda: hf.Mamba2Config(
        **{**MAMBA2, "n_groups": 8}, time_step_limit=(0.4, 0.9), use_bias=True, use_conv_bias=False,
        residual_in_fp32=False, hidden_act="gelu",
    ),
    "bamba": lambda: hf.BambaConfig(**LLAMA, **BAMBA, attn_layer_indices=[1]),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **LLAMA, **BAMBA, layer_types=["mamba", "attention"], num_local_experts=0,
        shared_intermediate_size=48, embedding_multiplier=3.0, residual_multiplier=0.3,
        attention_multiplier=0.2, logits_scaling=2.0, position_embedding_type="nope",
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **{k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, head_dim=16,
        layers_block_type=["mamba", "mlp", "attention"], mamba_num_heads=8, mamba_head_dim=8,
        n_groups=2, ssm_state_size=10, chunk_size=8,
    ),
    "jamba": lambda: hf.JambaConfig(
        **LLAMA, mamba_d_state=6, mamba_dt_rank=3, num_experts=4, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **LLAMA, **DELTA, head_dim=16, mlp_only_layers=[0, 1], partial_rotary_factor=0.5
    ),
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**LLAMA, **DELTA, head_dim=16),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**LLAMA, **DELTA),
    "kimi_linear": lambda: hf.KimiLinearConfig(
        **MHA, num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=8,
        v_head_dim=10, linear_num_heads=4, linear_head_dim=8, mlp_layer_types=["dense"] * 2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, lru_width=32,
        intermediate_size=96, attention_window_size=5, num_key_value_heads=1, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **LLAMA, layer_types=["conv", "full_attention"], conv_bias=True
    ),
    "seed_oss": lambda: hf.SeedOssConfig(**LLAMA, head_dim=16),
    "ernie4_5": lambda: hf.Ernie4_5Config(**LLAMA, head_dim=16),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=5, num_experts_per_tok=2),
    "mixtral, sliding": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4, sliding_window=5),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **LLAMA, **MIXTURE, shared_expert_intermediate_size=24, decoder_sparse_step=2
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **LLAMA, **MIXTURE, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "olmoe": lambda: hf.OlmoeConfig(**LLAMA, num_experts=6, num_experts_per_tok=3, clip_qkv=0.5),
    "gpt_oss": lambda: hf.GptOssConfig(
        **LLAMA, head_dim=16, num_local_experts=5, num_experts_per_tok=2, sliding_window=5
    ),
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **LLAMA, num_local_experts=5, embedding_multiplier=3.0, residual_multiplier=0.3,
        attention_multiplier=0.2, logits_scaling=2.0,
    ),
    "phimoe": lambda: hf.PhimoeConfig(**LLAMA, num_local_experts=5, router_jitter_noise=0.2),
    "ernie4_5_moe": lambda: hf.Ernie4_5_MoeConfig(
        **LLAMA, moe_num_experts=6, moe_k=3, moe_intermediate_size=16, moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **LLAMA, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, n_group=4,
        topk_group=2, moe_intermediate_size=16, first_k_dense_replace=1, routed_scaling_factor=1.5,
    ),
    "llama4_text": lambda: hf.Llama4TextConfig(
        **{**LLAMA, "num_hidden_layers": 4}, head_dim=16, num_local_experts=5,
        num_experts_per_tok=2, intermediate_size_mlp=40, interleave_moe_layer_step=2,
        attention_chunk_size=5, floor_scale=4, attn_scale=0.5,
    ),
    "minimax_m2": lambda: hf.MiniMaxM2Config(
        **LLAMA, head_dim=16, num_local_experts=5, num_experts_per_tok=2
    ),
    "dbrx": lambda: hf.DbrxConfig(
        vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10_000.0},
        ffn_config={
            "hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2
        },
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip

PLANNED = [
    name
    for name, make in FAMILIES.items()
    if not unplanned_parts(planner.read_config(make().to_dict()))
]
"""Those whose passes the planner's attnlab runtime writes as programs."""
