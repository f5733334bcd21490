"""KV formats against figures that others published."""

from __future__ import annotations

import pytest

import planner
from planner import ConfigError
from planner.kv_format_names import KV_FORMATS
from planner.kv_formats import Residual, Scales, StoredBytes, TensorFormat, attention_bytes
from planner.layers import GQA, MLA

ONE_HEAD = GQA(num_attention_heads=1, num_key_value_heads=1, head_dim=128, scaling=1.0)


def stored(name, attention=ONE_HEAD, *, batch=1, tokens=1, computed="fp16", **more) -> StoredBytes:
    form = KV_FORMATS[name]
    return attention_bytes(form, attention, batch=batch, tokens=tokens, computed=computed, **more)


@pytest.mark.parametrize(
    ("name", "block_bytes"),
    [("q8_0", 34), ("q4_0", 18), ("q4_1", 20), ("q5_0", 22), ("q5_1", 24), ("iq4_nl", 18)],
)
def test_llama_cpp_blocks_have_the_sizes_of_ggml(name, block_bytes):
    """gguf-py/gguf/constants.py GGML_QUANT_SIZES: 32 elements in so many bytes."""
    assert stored(name).total_bytes == 2 * (128 // 32) * block_bytes


@pytest.mark.parametrize(
    ("name", "published"), [("turboquant_k8v4", 2.6), ("turboquant_4bit_nc", 3.8)]
)
def test_turboquant_compresses_as_vllm_says(name, published):
    """vLLM, quantization/turboquant/config.py: 2.6x and 3.8x, heads of 128 beside fp16."""
    assert round(2 * 128 * 2 / stored(name).total_bytes, 1) == published


def test_odd_slots_are_filled_up_to_even_bytes():
    odd = GQA(num_attention_heads=1, num_key_value_heads=1, head_dim=40, scaling=1.0)
    parts = stored("turboquant_k3v4_nc", odd, batch=2, tokens=3)
    assert (parts.total_bytes, parts.padding_bytes) == (6 * 42, 6)  # 15 + 2 + 20 + 4 = 41


def test_a_latent_cache_stores_a_latent_and_a_rotary_key():
    mla = MLA(
        num_attention_heads=128,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        scaling=1.0,
    )
    assert stored("bf16", mla, tokens=10).total_bytes == 10 * 576 * 2
    parts = stored("fp8", mla, tokens=10)
    assert (parts.elements_bytes, parts.scales_bytes) == (10 * 576, 2 * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scales(per="row"), r"scales\.per='row' is not allowed"),
        (lambda: Scales(per="flat"), r"scales\.group_size=None is not allowed"),
        (lambda: Scales(per="head", group_size=8), r"scales\.group_size=8 is not allowed"),
        (lambda: Residual(tokens=-1, rule="window"), r"residual\.tokens=-1 is not allowed"),
        (lambda: TensorFormat(bits=33), "bits=33 is not allowed"),
        (lambda: TensorFormat(bits=4, packed="group"), "packed='group' is not allowed"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_flat_groups_have_to_come_out_even():
    flat = TensorFormat(bits=4, scales=Scales(per="flat", group_size=64), packed="groups")
    with pytest.raises(ConfigError, match="group_size=64 does not divide"):
        flat.stored(batch=1, heads=2, tokens=3, width=16, computed="bf16")


def test_nothing_is_stored_of_no_tokens():
    for name in KV_FORMATS:
        assert stored(name, tokens=0).total_bytes == 0


def test_ggml_sizes_are_those_of_the_library():
    gguf = pytest.importorskip("gguf")
    for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert stored(name).total_bytes * block == 2 * 128 * size


def test_plain_formats_are_what_kv_cache_bytes_counts():
    model = planner.load_model("llama-2-7b")
    layer = model.layers[0].attention
    expected = planner.kv_cache_bytes(model, batch=2, context_tokens=9, dtype="bf16")
    assert 32 * stored("bf16", layer, batch=2, tokens=9).total_bytes == expected
