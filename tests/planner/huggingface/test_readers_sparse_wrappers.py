"""Oracle: multimodal classes of transformers, on the CPU where a mask depends on data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import planner
from planner import CacheSpec, ConfigError, kv_cache_bytes
from tests.planner.huggingface.test_readers_sparse_latent import (
    DENSE,
    FULL,
    INDEXED,
    SPARSE,
    YARN,
    assert_half_of_the_experts_are_idle,
    assert_same_cache,
)
from tests.planner.oracle import (
    assert_same_parameters,
    live_cache_bytes,
    live_model,
    live_prefill,
)
from tests.properties import examples

LARGE4: dict[str, Any] = {
    k: v for k, v in INDEXED.items() if k not in ("q_lora_rank", "num_hidden_layers")
} | {"num_hidden_layers": 6}
PIXTRAL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "patch_size": 2,
}
GLM5: dict[str, Any] = {
    **{k: v for k, v in INDEXED.items() if k != "qk_rope_head_dim"},
    "pad_token_id": 0,
    "index_topk": 8,
    "index_kpool": 4,
    "linear_head_dim": 5,
    "linear_num_heads": 3,
    "hc_mult": 2,
}
GLM5_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 20,
    "out_hidden_size": 12,
    "projection_intermediate_size": 14,
    "patch_size": 2,
}
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "glm5_next": (GLM5, GLM5_VISION),
    "mistral_large4": (LARGE4, PIXTRAL),
}
OWN_SOURCES = [0, 1, 0, 3, 1, 1]


def wrapper(
    kind: str,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **change: Any,
) -> dict[str, Any]:
    inside, tower = WRAPPERS[kind]
    config = {
        "model_type": kind,
        "text_config": {**inside, **(text or {})},
        "vision_config": {**tower, **(vision or {})},
        **change,
    }
    return copy.deepcopy(config)


def live_wrapper(config: dict[str, Any]) -> Any:
    """On the CPU where a mask depends on data; the scan of linear attention is left out."""
    kind = config["model_type"]
    auto = "image_text" if kind in WRAPPERS else "model"
    device = "cpu" if kind.startswith("glm5") else None
    return live_model(copy.deepcopy(config), auto=auto, device=device)


@pytest.fixture(autouse=True)
def _no_scan(monkeypatch):
    from transformers.models.glm5_next import modeling_glm5_next

    def no_scan(query, key, value, *, g, beta, initial_state, **_):
        import torch

        return value, torch.zeros(value.shape[0], *value.shape[2:], value.shape[-1])

    monkeypatch.setattr(modeling_glm5_next, "chunk_kimi_delta_attention", no_scan)


WRAPPED: list[dict[str, Any]] = [
    *(wrapper(kind) for kind in WRAPPERS),
    *(wrapper(kind, tie_word_embeddings=True) for kind in WRAPPERS),
    *(wrapper(kind, text={"tie_word_embeddings": True}) for kind in WRAPPERS),
    wrapper("glm5_next", architectures=["Glm5NextModel"]),
    wrapper("mistral_large4", architectures=["MistralLarge4Model"]),
    {"model_type": "glm5_next_text", **GLM5},
    {"model_type": "mistral_large4_text", **LARGE4},
    {"model_type": "glm5_next", "vision_config": GLM5_VISION, **GLM5, "num_hidden_layers": 8},
    wrapper("glm5_next", text={"layer_types": [FULL] * 4, "attention_bias": True}),
    wrapper(
        "glm5_next",
        text={
            "layer_types": ["mamba", *["indexed_attention"] * 3],
            "indexer_types": ["shared", "full", "shared", "full"],
            "mlp_layer_types": [SPARSE, DENSE, DENSE, SPARSE],
            "index_kpool": 1,
        },
    ),
    wrapper(
        "glm5_next",
        text={
            "linear_attn_config": {"head_dim": 7, "num_heads": 2, "short_conv_kernel_size": 3},
            "num_local_experts": 6,
            "first_k_dense_replace": 1,
            "model_type": "glm5",
        },
    ),
    wrapper(
        "glm5_next",
        vision={
            "attention_bias": False,
            "num_hidden_layers": 1,
            "spatial_merge_size": 3,
            "temporal_patch_size": 1,
            "in_channels": 1,
            "rope_theta": 5.0,
        },
    ),
    wrapper("mistral_large4", text={"kv_source_layers": OWN_SOURCES, "attention_bias": True}),
    wrapper(
        "mistral_large4",
        text={"kv_source_layers": OWN_SOURCES, "indexer_types": ["full", "shared"] * 3},
    ),
    wrapper("mistral_large4", text={"no_rope_layers": [0, 1] * 4, "first_k_dense_replace": 4}),
    wrapper("mistral_large4", text={"no_rope_layer_interval": 1, "index_head_dim": 3}),
    wrapper("mistral_large4", text={"rope_scaling": YARN, "num_experts": 6, "q_lora_rank": 9}),
    wrapper(
        "mistral_large4",
        vision={"num_channels": 1, "model_type": "pixtral", "head_dim": 8},
        spatial_merge_size=3,
        multimodal_projector_bias=True,
        vision_feature_layer=[-1, -2],
    ),
    wrapper("mistral_large4", text_config=None),
]


@pytest.mark.parametrize(
    "config", WRAPPED, ids=[f"{i} {config['model_type']}" for i, config in enumerate(WRAPPED)]
)
def test_text_models_and_their_wrappers_are_those_of_the_class(config):
    model, live = planner.read_config(copy.deepcopy(config)), live_wrapper(config)
    assert_same_parameters(model, live)
    assert model.text_type == type(live.config.get_text_config()).model_type
    if config.get("text_config") is None and config["model_type"] == "mistral_large4":
        return  # full size
    for tokens in (1, 9):
        assert_same_cache(model, live, 2, tokens)
    expected = live_cache_bytes(live_prefill(live, 2, 7, static=True))
    spec = CacheSpec(kind="static", capacity_tokens=7)
    assert kv_cache_bytes(model, batch=2, context_tokens=3, dtype="bf16", cache=spec) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "glm5_next", "text_config": {"num_hidden_layers": 4}},
        {"model_type": "glm5_next_text", "num_hidden_layers": 2},
        {"model_type": "mistral_large4", "text_config": {"num_hidden_layers": 4}},
        {"model_type": "mistral_large4", "vision_config": {}, "text_config": LARGE4},
        {"model_type": "mistral_large4_text", "num_hidden_layers": 3},
    ],
    ids=lambda config: "-".join(config),
)
def test_absent_fields_of_wrappers_take_the_defaults_of_their_classes(config):
    auto = "image_text" if config["model_type"] in WRAPPERS else "model"
    live = live_model(copy.deepcopy(config), auto=auto)
    assert_same_parameters(planner.read_config(config), live)


@given(data=st.data())
@examples(24, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_wrappers_have_the_parameters_and_caches_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(sorted(WRAPPERS)))
    layers, heads, flag = draw(st.integers(1, 6)), draw(st.integers(1, 4)), st.booleans()
    pool = draw(st.integers(1, 5))
    text = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(1, 40)),
        "moe_intermediate_size": draw(st.integers(1, 40)),
        "vocab_size": draw(st.integers(1, 50)),
        "kv_lora_rank": draw(st.integers(1, 20)),
        "qk_nope_head_dim": draw(st.integers(1, 9)),
        "v_head_dim": draw(st.integers(1, 9)),
        "n_shared_experts": draw(st.integers(1, 3)),
        "index_head_dim": draw(st.integers(4, 9)),
        "index_n_heads": draw(st.integers(1, 4)),
        "index_topk": pool * draw(st.integers(1, 4)),
        "attention_bias": draw(flag),
    }
    if kind == "glm5_next":
        kinds = [*["linear_attention"] * (layers - 1), FULL]
        text |= {
            "layer_types": draw(st.permutations(kinds)),
            "index_kpool": pool,
            "q_lora_rank": draw(st.integers(1, 20)),
            "linear_head_dim": draw(st.integers(1, 9)),
            "linear_num_heads": draw(st.integers(1, 4)),
            "linear_conv_kernel_dim": draw(st.integers(1, 6)),
            "hc_mult": draw(st.integers(1, 4)),
        }
    else:
        sources = [i if draw(flag) or not i else 0 for i in range(layers)]
        text |= {
            "kv_source_layers": sources,
            "no_rope_layers": [draw(st.integers(0, 1))] * layers,
            "index_topk_freq": draw(st.integers(0, 3)),
            "index_skip_topk_offset": draw(st.integers(1, 3)),
            "first_k_dense_replace": draw(st.integers(0, 6)),
        }
    config = wrapper(kind, text=text, tie_word_embeddings=draw(flag))
    model, live = planner.read_config(copy.deepcopy(config)), live_wrapper(config)
    assert_same_parameters(model, live)
    assert_same_cache(model, live, draw(st.integers(1, 3)), draw(st.integers(1, 24)))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_active_parameters_of_wrappers_count_their_towers_whole(kind):
    assert_half_of_the_experts_are_idle(wrapper(kind), live_wrapper(wrapper(kind)))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_estimates_refuse_what_no_program_runs(kind):
    model = planner.read_config(wrapper(kind))
    for runtime in ("attnlab", "vllm"):
        with pytest.raises(ConfigError, match=f"runtime={runtime} does not"):
            kv_cache_bytes(model, batch=1, context_tokens=4, runtime=runtime)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("glm5_next", {"text": {"num_key_value_heads": 2}}, "num_key_value_heads=2 is not"),
        ("glm5_next", {"text": {"qk_rope_head_dim": 4}}, "qk_rope_head_dim=4 is not allowed: 0"),
        ("glm5_next", {"text": {"index_topk": 6}}, "index_topk=6 is not a multiple of index_kpool"),
        ("glm5_next", {"text": {"layer_types": ["attention"] * 4}}, "layer_types has 'attention'"),
        ("glm5_next", {"text": {"index_topk_freq": 4}}, r"indexer_types\[3\]='shared' is not"),
        ("glm5_next", {"text": {"linear_attn_config": 3}}, "linear_attn_config=3 is not allowed"),
        (
            "glm5_next",
            {"text": {"linear_attn_config": {"num_heads": None}}},
            "linear_num_heads is missing",
        ),
        ("glm5_next", {"vision": {"num_heads": 5}}, "hidden_size=32 is not num_heads=5 times"),
        ("glm5_next", {"vision": {"patch_size": [2, 2]}}, r"patch_size=\[2, 2\] is not allowed"),
        ("glm5_next", {"vision": {"rope_parameters": YARN}}, "rope_type='yarn' is not allowed"),
        ("glm5_next", {"text_config": 3}, "text_config=3 is not allowed: an object"),
        ("glm5_next", {"architectures": ["Glm5NextTextModel"]}, "is not read yet"),
        ("mistral_large4", {"text": {"kv_source_layers": [0]}}, "kv_source_layers=.* a list of 6"),
        (
            "mistral_large4",
            {"text": {"kv_source_layers": [0, 0, 1, 3, 4, 5]}},
            r"kv_source_layers\[2\]=1 is not allowed: an earlier layer",
        ),
        (
            "mistral_large4",
            {"text": {"kv_source_layers": [0, 1, 2, 0, 4, 5]}},
            r"kv_source_layers\[3\]=0 is not allowed: of the two layers one has positions",
        ),
        ("mistral_large4", {"text": {"no_rope_layers": [1]}}, "no_rope_layers=.* a list of 6"),
        ("mistral_large4", {"text": {"no_rope_layer_interval": 0}}, "interval=0 is not allowed"),
        ("mistral_large4", {"text": {"layer_types": [FULL] * 6}}, "layer_types has 'full"),
        ("mistral_large4", {"text": {"final_logit_softcapping": None}}, "softcapping is missing"),
        ("mistral_large4", {"vision": {"model_type": "siglip"}}, "model_type='siglip' is not read"),
        ("mistral_large4", {"vision": {"num_attention_heads": 5}}, "num_attention_heads=5 times"),
        ("mistral_large4", {"vision": {"head_dim": 4}}, "head_dim=4 is not allowed: 8"),
        ("mistral_large4", {"vision_feature_layer": []}, r"vision_feature_layer=\[\] is not"),
        ("mistral_large4", {"projector_hidden_act": "no"}, "projector_hidden_act='no' is not"),
    ],
)
def test_a_value_that_a_wrapper_does_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(wrapper(kind, **change))
    assert "\n" not in str(caught.value)
