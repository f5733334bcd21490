from functools import cache

import pytest
import torch
import transformers

import planner
from attnlab.transformer import Transformer
from attnlab.weights import load_state_dict

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, head_dim=16),
    "llama-biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": lambda: transformers.LlamaConfig(
        **{**SIZES, "tie_word_embeddings": True}, head_dim=16, rope_parameters=LLAMA3_ROPE
    ),
    "llama-linear-rope": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0)
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=None
    ),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-hybrid": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "phi3-partial-rope": lambda: transformers.Phi3Config(
        **SIZES, rope_parameters=dict(partial_rotary_factor=0.5, rope_theta=10_000.0)
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**SIZES, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
}


@cache
def _pair(family):
    """A tiny random model of transformers (eager, float32) and ours with the same weights."""
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name or ".ln_" in name), std=0.2)
    model = planner.read_config(config.to_dict())
    ours = Transformer(model, dtype=torch.float32, device="cpu")
    load_state_dict(ours, theirs.state_dict())
    return theirs, ours.requires_grad_(False)


@pytest.fixture(params=list(CONFIGS))
def pair(request):
    return _pair(request.param)


@pytest.fixture
def llama_pair():
    return _pair("llama")


@pytest.fixture
def pairs():
    """family → (the model of transformers, ours)."""
    return _pair


@pytest.fixture
def ids():
    return torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(1))
