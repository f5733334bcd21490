"""Oracle: the tensors inside transformers' live QuantizedCache, quanto's wrappers opened."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

import planner
from planner import CacheSpec, ConfigError, kv_cache_bytes
from planner.huggingface.fields import SAME_AS
from tests.planner.configs import TINY, build
from tests.planner.every_type import CASES
from tests.planner.quantised import held_bytes, live_quantised_cache, needs_hqq
from tests.properties import examples

COMPUTED = {"bf16": torch.bfloat16, "fp32": torch.float32}


def small(heads: int, width: int):
    """A llama of one layer, ours and transformers'."""
    config = {
        **TINY["llama"],
        "num_hidden_layers": 1,
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width,
    }
    return planner.read_config(config), LlamaConfig(**config)


def live_bytes(config, shape, *, steps, dtype, computed, **options):
    """Bytes that the cache holds after a prefill, and after each of `steps` tokens more."""
    batch, heads, tokens, width = shape
    cache = live_quantised_cache(config, dtype, **options)
    held = []
    for new in (tokens, *[1] * steps):
        k, v = (torch.randn(batch, heads, new, width, dtype=COMPUTED[computed]) for _ in "kv")
        cache.update(k, v, 0)
        held.append(held_bytes(cache.layers[0]))
    for kept in (cache.layers[0]._quantized_keys, cache.layers[0]._quantized_values):
        cache.layers[0]._dequantize(kept)  # hqq drops codes that fill no word, and fails here
    return held


def our_bytes(model, shape, *, steps, dtype, computed, **options):
    batch, _, tokens, _ = shape
    return [
        kv_cache_bytes(
            model,
            batch=batch,
            context_tokens=tokens + decoded,
            decoded_tokens=decoded,
            dtype=dtype,
            compute_dtype=computed,
            cache=CacheSpec(kind="quantised", **options),
        )
        for decoded in range(steps + 1)
    ]


def same_or_both_refused(shape, **case):
    model, config = small(shape[1], shape[3])
    try:
        expected = live_bytes(config, shape, **case)
    except (ValueError, RuntimeError, AssertionError):
        with pytest.raises(ConfigError, match=r"cache\.(q_group_size|axis_key|axis_value)="):
            our_bytes(model, shape, **case)
    else:
        assert our_bytes(model, shape, **case) == expected


SHAPES = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.sampled_from([8, 16, 20])
)
OPTIONS = {
    "steps": st.integers(0, 7),
    "computed": st.sampled_from(sorted(COMPUTED)),
    "q_group_size": st.sampled_from([1, 4, 7, 8, 16, 24, 64]),
    "residual_tokens": st.integers(0, 4),
}


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=SHAPES,
    dtype=st.sampled_from(["int4", "int2"]),
    axis_key=st.sampled_from([0, -1]),
    axis_value=st.sampled_from([0, -1]),
    **OPTIONS,
)
def test_quanto_holds_what_we_count_or_both_refuse(unpack_in_python, shape, **case):
    same_or_both_refused(shape, backend="quanto", **case)


@needs_hqq
@examples()
@given(
    shape=SHAPES,
    dtype=st.sampled_from(["int8", "int4", "int3", "int2", "int1"]),
    axis_key=st.sampled_from([0, 1]),
    axis_value=st.sampled_from([0, 1]),
    **OPTIONS,
)
def test_hqq_holds_what_we_count_or_both_refuse(shape, **case):
    assume(case["dtype"] != "int3" or 1 not in (case["axis_key"], case["axis_value"]))
    same_or_both_refused(shape, backend="hqq", **case)


@needs_hqq
@pytest.mark.parametrize(("shape", "group"), [((1, 2, 5, 16), 8), ((2, 2, 1, 8), 4)])
def test_hqq_does_not_give_back_what_int3_with_axis_1_took(shape, group):
    """Quantizer.dequantize cuts rows as if there were B · H / g of them; the planner refuses it."""
    _, config = small(shape[1], shape[3])
    options = {"backend": "hqq", "axis_key": 1, "q_group_size": group}
    cache, k = live_quantised_cache(config, "int3", **options), torch.randn(shape)
    cache.update(k, k, 0)
    try:
        given_back = cache.layers[0]._dequantize(cache.layers[0]._quantized_keys)
    except RuntimeError:
        return
    assert (given_back - k).abs().max() > (k.max() - k.min()) / 7


@pytest.mark.parametrize("computed", COMPUTED)
def test_fp8_holds_what_we_count(computed):
    model, config = small(2, 16)
    case = {"steps": 3, "dtype": "fp8", "computed": computed}
    assert our_bytes(model, (2, 2, 5, 16), **case) == live_bytes(config, (2, 2, 5, 16), **case)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 200])
def test_defaults_are_those_of_transformers(unpack_in_python, tokens):
    model, config = small(2, 64)
    shape = (1, 2, tokens, 64)
    case = {"steps": 130, "dtype": "int4", "computed": "bf16"}
    assert our_bytes(model, shape, **case) == live_bytes(config, shape, **case)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "mistral full, wide heads"])
@pytest.mark.parametrize("dtype", ["int4", "int2", "fp8"])
def test_a_model_fills_its_cache_as_counted(unpack_in_python, name, dtype):
    live = build(TINY[name], device="cpu")
    options = {} if dtype == "fp8" else {"q_group_size": 8, "residual_tokens": 3}
    cache = live_quantised_cache(live.config, dtype, **options)
    spec = CacheSpec(kind="quantised", **options)
    model = planner.read_config(TINY[name])
    for decoded in range(5):
        tokens = torch.zeros(2, 1 if decoded else 8, dtype=torch.long)
        with torch.no_grad():
            live(tokens, past_key_values=cache, use_cache=True)
        got = kv_cache_bytes(
            model,
            batch=2,
            context_tokens=8 + decoded,
            decoded_tokens=decoded,
            dtype=dtype,
            compute_dtype="bf16",
            cache=spec,
        )
        assert got == sum(map(held_bytes, cache.layers)), decoded


@pytest.mark.parametrize("kind", sorted(CASES.keys() - {"rwkv"}))  # whose state is no Cache
def test_models_are_taken_and_refused_as_by_transformers(kind):
    """By the config alone; encoder-decoders by GenerationMixin._prepare_cache_for_generation."""
    case = CASES[kind]
    given_config = {k: v for k, v in case.config.items() if k not in ("architectures", "dtype")}
    given_config["model_type"] = SAME_AS.get(kind, kind)
    config = AutoConfig.for_model(**given_config)
    model = planner.read_config(case.config)
    try:
        live_quantised_cache(config, "int4")
        taken = model.is_decoder and not config.is_encoder_decoder
    except (ValueError, AttributeError):
        taken = False
    try:
        kv_cache_bytes(model, batch=64, context_tokens=64, dtype="int4")
        ours = True
    except ConfigError as error:
        ours = "QuantizedCache has full attention layers only" not in str(error)
    assert ours == taken
