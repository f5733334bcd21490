"""Oracle: modules of transformers' own classes, and their caches after a real forward."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EncoderDecoderCache, StaticCache

import planner
from planner import CacheSpec, ConfigError, Deployment, Inference, kv_cache_bytes
from planner.huggingface import bart_like, t5
from planner.trained import lora
from planner.workload import LoRA
from tests.planner.oracle import assert_same_parameters, live_cache_bytes, live_model
from tests.properties import examples

T5 = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
BART = {"bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus"}
TYPES = (*T5, *BART, "whisper")
STACKS: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 10,
    "decoder_ffn_dim": 14,
    "max_position_embeddings": 40,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "num_mel_bins": 5,
    "vocab_size": 30,
    "pad_token_id": 1,
}
LAYERED: dict[str, Any] = {
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 14,
    "num_heads": 3,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "vocab_size": 30,
}
WHISPERS = ("ForConditionalGeneration", "Model", "ForAudioClassification")
FAMILIES = {"bart": bart_like.BART, "mbart": bart_like.MBART, "pegasus": bart_like.PEGASUS}
CLASSES = [
    *((kind, stem + ending) for kind, stem in T5.items() for ending in t5.ENDINGS),
    *((kind, f.stem + ending) for kind, f in FAMILIES.items() for ending in f.endings),
    *(("whisper", "Whisper" + ending) for ending in WHISPERS),
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in TYPES),
    ("t5", {"num_decoder_layers": None}),
    ("t5", {"num_decoder_layers": 4, "feed_forward_proj": "gated-gelu"}),
    ("t5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    ("t5", {"feed_forward_proj": "relu", "is_gated_act": True, "dense_act_fn": "gelu_new"}),
    ("t5", {"num_hidden_layers": 1, "num_decoder_layers": None}),
    ("t5", {"hidden_size": 18, "num_attention_heads": 2, "head_dim": 7}),
    ("mt5", {"feed_forward_proj": "relu", "relative_attention_num_buckets": 8}),
    ("umt5", {"num_decoder_layers": 5, "tie_word_embeddings": False}),
    ("bart", {"tie_word_embeddings": False, "scale_embedding": True}),
    ("bart", {"decoder_layers": 4, "activation_function": "relu"}),
    ("bart", {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}),
    ("mbart", {"tie_word_embeddings": False, "decoder_layers": 4}),
    ("pegasus", {"tie_word_embeddings": False, "decoder_layers": 4}),
    ("whisper", {"tie_word_embeddings": False, "decoder_layers": 4}),
    ("whisper", {"num_hidden_layers": 2, "max_source_positions": 9}),
]


def tiny(kind: str, **change: Any) -> dict[str, Any]:
    return {**(LAYERED if kind in T5 else STACKS), "model_type": kind, **change}


def build(config: dict[str, Any], device: str = "cpu") -> Any:
    """Bart's mask asks for a value, which the meta device has not."""
    auto = "speech" if config["model_type"] == "whisper" else "seq2seq"
    return live_model(config, auto=auto, device=device)


def cache_of(live: Any, batch: int, tokens: int, seen: int, *, capacity: int = 0) -> int:
    """Bytes after a forward over `seen` tokens of encoder and `tokens` of decoder."""
    inputs: dict[str, Any] = {"decoder_input_ids": torch.zeros(batch, tokens, dtype=torch.long)}
    if live.config.model_type == "whisper":
        mel = torch.zeros(batch, live.config.num_mel_bins, 2 * seen, dtype=torch.bfloat16)
        inputs["input_features"] = mel
    else:
        inputs["input_ids"] = torch.zeros(batch, seen, dtype=torch.long)
    if capacity:  # as generate() makes it
        config = live.config.get_text_config(decoder=True)
        inputs["past_key_values"] = EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=capacity),
            StaticCache(config=config, max_cache_len=seen),
        )
    with torch.no_grad():
        return live_cache_bytes(live(use_cache=True, **inputs).past_key_values)


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_and_caches_are_those_of_the_class(kind, change):
    config = tiny(kind, **change)
    model, live = planner.read_config(config), build(config)
    assert_same_parameters(model, live)
    assert model.active_parameter_count == model.parameter_count
    for batch, tokens, seen in ((3, 5, 5), (2, 6, 11)):
        frames = model.encoder_tokens or seen
        expected = cache_of(live, batch, tokens, frames)
        sizes: dict[str, Any] = {"batch": batch, "context_tokens": tokens}
        given = None if seen == tokens or model.encoder_tokens else seen
        assert kv_cache_bytes(model, **sizes, dtype="bf16", encoder_tokens=given) == expected


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_head_has_the_parameters_of_its_class(kind, name):
    for more in (
        {"tie_word_embeddings": False},
        {"id2label": {"0": "a"}},
        {"num_labels": 5, "id2label": {"0": "a"}},
    ):
        config = tiny(kind, architectures=[name], use_weighted_layer_sum="id2label" in more, **more)
        assert_same_parameters(planner.read_config(config), build(config, "meta"))


@pytest.mark.parametrize("kind", TYPES)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config = {"model_type": kind, "encoder_layers": 2, "num_decoder_layers": 1}
    model = planner.read_config(config)
    assert_same_parameters(model, build(config, "meta"))
    assert any(default.startswith("vocab_size=") for default in model.defaults)


@pytest.mark.parametrize("kind", TYPES)
def test_a_static_cache_holds_its_capacity_and_the_encoder(kind):
    config = tiny(kind)
    model, live = planner.read_config(config), build(config)
    frames = model.encoder_tokens or 7
    expected = cache_of(live, 2, 5, frames, capacity=20)
    static = CacheSpec(kind="static", capacity_tokens=20)
    sizes: dict[str, Any] = {"batch": 2, "context_tokens": 5, "encoder_tokens": frames}
    assert kv_cache_bytes(model, **sizes, cache=static) == expected


@given(data=st.data())
@examples(32)
def test_random_configs_have_the_parameters_and_caches_of_their_class(data):
    draw = data.draw
    kind, heads = draw(st.sampled_from(TYPES)), st.sampled_from([1, 2, 3, 4, 6])
    size, count, flag = st.integers(1, 40), st.integers(1, 4), st.booleans()
    change: dict[str, Any] = {
        "d_model": 12 * draw(st.integers(1, 4)),
        "vocab_size": draw(st.integers(4, 90)),
        "tie_word_embeddings": draw(flag),
    }
    if kind in T5:
        act = draw(st.sampled_from(["relu", "gelu", "silu", "gelu_new"]))
        change |= {
            "feed_forward_proj": draw(st.sampled_from(["", "gated-"])) + act,
            "num_layers": draw(count),
            "num_decoder_layers": draw(st.none() | count),
            "num_heads": draw(heads),
            "relative_attention_num_buckets": draw(st.integers(4, 40)),
        }
        change |= {name: draw(size) for name in ("d_kv", "d_ff")}
    else:
        for stack in ("encoder", "decoder"):
            change |= {
                f"{stack}_layers": draw(count),
                f"{stack}_ffn_dim": draw(size),
                f"{stack}_attention_heads": draw(heads),
            }
        change |= {"max_source_positions": draw(size), "num_mel_bins": draw(size)}
    config = tiny(kind, **change)
    model, live = planner.read_config(config), build(config)
    assert_same_parameters(model, live)
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    seen = model.encoder_tokens or draw(st.integers(1, 24))
    expected = cache_of(live, batch, tokens, seen)
    sizes: dict[str, Any] = {"batch": batch, "context_tokens": tokens}
    assert kv_cache_bytes(model, **sizes, dtype="bf16", encoder_tokens=seen) == expected
    assert seen != tokens or kv_cache_bytes(model, **sizes, dtype="bf16") == expected


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({}, 16**-0.5),
        ({"tie_word_embeddings": True}, 16**-0.5),
        ({"tie_word_embeddings": False}, None),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, None),
    ],
)
def test_t5_scales_its_logits_unless_it_is_said_not_to_be_tied(change, scale):
    config = tiny("t5", d_model=16, **change)
    model, live = planner.read_config(config), build(config, "meta")
    assert model.logit_scale == scale
    assert live.config.scale_decoder_outputs == (scale is not None)
    assert model.tie_word_embeddings


def test_the_encoder_stands_in_the_parameter_table_beside_the_decoder():
    model = planner.read_config(tiny("bart"))
    tensors, elements = model.parameter_groups()["encoder"]
    live = build(tiny("bart"), "meta").model.encoder
    assert tensors == len(dict(live.named_parameters())) - 1  # the shared embedding
    assert elements == sum(p.numel() for p in live.parameters()) - 30 * 24


@pytest.mark.parametrize("kind", ["mt5", "bart", "whisper"])
def test_activations_and_times_are_refused_and_so_is_vllm(kind):
    model = planner.read_config(tiny(kind))
    work = Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match="does not plan cross-attention"):
        planner.estimate(model, work, Deployment(gpu="h200"))
    if kind != "whisper":
        with pytest.raises(ConfigError, match="runtime=vllm does not"):
            kv_cache_bytes(model, batch=1, context_tokens=4, runtime="vllm")


@pytest.mark.parametrize("kind", TYPES)
def test_attnlab_keeps_what_a_static_cache_keeps_and_is_not_planned(kind):
    model, spec = planner.read_config(tiny(kind)), CacheSpec(kind="static", capacity_tokens=9)
    sizes: dict[str, Any] = {"batch": 2, "context_tokens": 4, "cache": spec}
    kept = kv_cache_bytes(model, **sizes, runtime="attnlab")
    assert kept == kv_cache_bytes(model, **sizes)
    work = Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match=r"plan.* cross-attention|cross-attention .* not plan"):
        planner.estimate(model, work, Deployment(gpu="h200", runtime="attnlab"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's call
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapters_stand_in_both_stacks_as_peft_puts_them(kind):
    targets = ("q", "v") if kind == "t5" else ("q_proj", "v_proj")
    config = peft.LoraConfig(r=2, target_modules=list(targets))
    live = peft.get_peft_model(build(tiny(kind), "meta"), config)
    made = lora.adapters(planner.read_config(tiny(kind)), LoRA(rank=2, targets=targets))
    expected = [tuple(p.shape) for p in live.parameters() if p.requires_grad]
    assert sorted(p.shape for p in made) == sorted(expected)


def test_whisper_hears_no_more_than_its_frames():
    model = planner.read_config(tiny("whisper"))
    with pytest.raises(ConfigError, match="encoder_tokens=13 is not allowed"):
        kv_cache_bytes(model, batch=1, context_tokens=4, encoder_tokens=13)
    encoder = planner.read_config(tiny("t5", architectures=["T5EncoderModel"]))
    assert kv_cache_bytes(encoder, batch=2, context_tokens=9) == 0
    with pytest.raises(ConfigError, match="encoder_tokens=13 is not allowed: None for t5"):
        kv_cache_bytes(encoder, batch=1, context_tokens=4, encoder_tokens=13)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t5", {"feed_forward_proj": "glu-gelu"}, "feed_forward_proj='glu-gelu' is not allowed"),
        ("t5", {"feed_forward_proj": "gated"}, "feed_forward_proj='gated' is not allowed"),
        ("t5", {"feed_forward_proj": None}, "feed_forward_proj=None is not allowed"),
        ("t5", {"relative_attention_num_buckets": 3}, "num_buckets=3 is not allowed"),
        ("t5", {"relative_attention_max_distance": 16}, "max_distance=16 is not allowed"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False is not read yet: True"),
        ("t5", {"sliding_window": 4}, "sliding_window=4 is not read yet: None"),
        ("t5", {"num_decoder_layers": 0}, "num_decoder_layers=0 is not allowed"),
        ("t5", {"num_layers": 9999}, "num_hidden_layers=9999 is not allowed"),
        ("t5", {"architectures": ["T5EncoderModel"], "is_decoder": True}, "is_decoder=True"),
        ("mt5", {"architectures": ["T5Model"]}, r"architectures\[0\]='T5Model' is not read yet"),
        ("bart", {"architectures": ["BartForCausalLM"]}, r"architectures\[0\]='BartForCausalLM'"),
        ("bart", {"architectures": "BartModels"}, r"architectures\[0\]='BartModels'"),
        ("bart", {"decoder_attention_heads": 5}, "not a multiple of decoder_attention_heads=5"),
        ("bart", {"encoder_attention_heads": 5}, "not a multiple of encoder_attention_heads=5"),
        ("bart", {"encoder_layers": None}, "num_hidden_layers is missing"),
        ("bart", {"is_encoder_decoder": None}, "is_encoder_decoder=None is not read yet: True"),
        ("bart", {"pad_token_id": 30}, "pad_token_id=30 is not allowed: a row of vocab_size=30"),
        ("bart", {"activation_function": "prelu"}, "activation_function='prelu' is not allowed"),
        ("mbart", {"decoder_ffn_dim": 0}, "decoder_ffn_dim=0 is not allowed"),
        ("pegasus", {"d_model": 0}, "hidden_size=0 is not allowed"),
        ("whisper", {"pad_token_id": None, "num_mel_bins": 0}, "num_mel_bins=0 is not allowed"),
        ("whisper", {"pad_token_id": 50256}, "pad_token_id=50256 is not allowed"),
        ("whisper", {"architectures": ["WhisperForCausalLM"]}, "WhisperForCausalLM"),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(tiny(kind, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 0}, "num_labels=0 is not allowed"),
        ({"num_labels": None}, "num_labels=None is not allowed"),
        ({"id2label": {}}, "num_labels=0 is not allowed"),
        ({"id2label": {"a": "b"}}, "id2label={'a': 'b'} is not allowed"),
        ({"id2label": ["a"]}, r"id2label=\['a'\] is not allowed"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config(tiny("bart", architectures=["BartForSequenceClassification"], **change))
