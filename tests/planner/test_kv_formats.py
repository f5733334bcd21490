"""KV formats against figures that others published."""

from __future__ import annotations

import pytest

import planner
from planner import ConfigError
from planner.kv_format_names import KV_FORMATS, kivi, kv_format_bytes
from planner.kv_formats import Residual, Scales, StoredBytes, TensorFormat, attention_bytes
from planner.layers import GQA, MLA
from tests.planner.every_type import CASES

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


def test_four_bits_and_a_float32_norm_are_68_bytes_a_token_and_head():
    """The turboquant-vllm plugin (pypi.org/project/turboquant-vllm): 68 bytes for 256, 3.76x."""
    parts = stored("int4_per_token_head", tokens=5)
    assert parts.total_bytes == 2 * 5 * 68
    assert round(2 * 5 * 256 / parts.total_bytes, 2) == 3.76


@pytest.mark.parametrize(("name", "published_bits"), [("kivi-2", 3), ("kivi-4", 5)])
def test_kivi_takes_the_bits_that_others_count(name, published_bits):
    """TurboQuant, arXiv:2504.19874, Table 1, Llama-3.1-8B-Instruct: KV sizes of 3 and 5 for KIVI.

    Of what is quantised: groups of 32 add a scale and a minimum of 16 bits to each.
    """
    model = planner.load_model("llama-3.1-8b")
    parts = kv_format_bytes(model, format=name, batch=1, context_tokens=128 * 50)
    elements = 2 * 32 * 8 * 128 * 6400 - parts.residual_bytes // 2
    assert parts.residual_bytes == 32 * 8 * 128 * 128 * 2  # 128 tokens, of the values alone
    assert 8 * (parts.elements_bytes + parts.scales_bytes) == published_bits * elements


@pytest.mark.parametrize("prompt", [5, 128, 300])
def test_kivi_keeps_the_newest_tokens_as_its_code_does(prompt):
    """jy-yuan/KIVI, models/llama_kivi.py, step by step: what is full and what is quantised."""
    R, form = 128, KV_FORMATS["kivi-2"]
    full_keys, full_values = prompt % R, min(prompt, R)
    for tokens in range(prompt, prompt + 300):
        if tokens > prompt:
            full_keys += 1
            if full_keys == R:
                full_keys = 0
            full_values += 1
            if full_values > R:
                full_values -= 1
        assert form.keys.residual.of(tokens) == full_keys
        assert form.values.residual.of(tokens) == full_values


@pytest.mark.parametrize("name", [n for n in KV_FORMATS if not n.startswith("kivi")])
def test_what_has_no_residual_grows_with_every_token(name):
    sizes = [stored(name, tokens=tokens).total_bytes for tokens in range(40)]
    assert sorted(set(sizes)) == sizes


def test_a_models_bytes_in_a_format_are_its_layers():
    """Llama-3.1-8B, 1 000 tokens, by hand: 32 layers, 8 kv heads of 128, keys and values."""
    model = planner.load_model("llama-3.1-8b")
    parts = kv_format_bytes(model, format="int8_per_token_head", batch=2, context_tokens=1_000)
    assert parts.elements_bytes == 2 * 2 * 32 * 8 * 128 * 1_000
    assert parts.scales_bytes == 2 * 2 * 32 * 8 * 1_000 * 4
    assert (parts.residual_bytes, parts.padding_bytes) == (0, 0)


def test_a_sliding_layer_keeps_its_window():
    model = planner.load_model("mistral-7b-v0.1")
    long, window = (
        kv_format_bytes(model, format="q8_0", batch=1, context_tokens=n) for n in (9_000, 4_096)
    )
    assert long == window


def test_what_keeps_more_than_keys_and_values_is_refused():
    mamba = planner.read_config(CASES["mamba"].config)
    with pytest.raises(ConfigError, match="format='q8_0' is of keys and values, mamba keeps more"):
        kv_format_bytes(mamba, format="q8_0", batch=1, context_tokens=9)
    with pytest.raises(ConfigError, match="format='q9' is not allowed: one of fp32"):
        kv_format_bytes(planner.load_model("gpt2"), format="q9", batch=1, context_tokens=9)


def test_scales_are_counted_where_groups_do_not_come_out_even():
    """70 tokens of 2 sequences, 8 heads of 128, by hand."""
    many = GQA(num_attention_heads=8, num_key_value_heads=8, head_dim=128, scaling=1.0)
    elements = 2 * 2 * 70 * 8 * 128
    assert stored("fp8_per_head", many, batch=2, tokens=70).scales_bytes == 2 * 8 * 4
    per_channel = Scales(per="channel", group_size=64, dtype="fp16", zero_dtype="scale")
    for bits in (8, 4):
        for packed, kept in (("row", elements), ("group", elements // 70 * 128)):
            tensor = TensorFormat(bits=bits, scales=per_channel, packed=packed)
            parts = tensor.stored(batch=2, heads=8, tokens=70, width=128, computed="bf16") * 2
            assert parts.scales_bytes == 2 * 2 * 8 * 128 * 2 * (2 + 2)
            assert parts.elements_bytes == kept * bits // 8


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
        (lambda: kivi(2, residual_tokens=100), "residual_tokens=100 is not a multiple of"),
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
