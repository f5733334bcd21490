"""The llama.cpp runtime against what the library printed.

The figures are libllama's start-up log: commit 0c1e57098 (llama-cpp-python 0.3.36), CPU backend,
n_batch 2048 or the context, n_ubatch 512, GGUF files of these shapes with f16 weights of zeros.
"""

from __future__ import annotations

import pytest

import planner
from planner import ConfigError, Deployment, Inference, kv_cache_bytes

MIB = 2**20
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 65_536,
    "torch_dtype": "float16",
}
LLAMA_8B_SHAPES = {
    **LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize(
    ("config", "batch", "context", "dtype", "printed_mib"),
    [
        (LLAMA, 1, 4096, "fp16", 4.00),
        (LLAMA, 1, 1000, "fp16", 1.00),
        (LLAMA, 3, 1000, "fp16", 3.00),
        (LLAMA, 1, 4096, "bf16", 4.00),
        (LLAMA, 1, 4096, "fp32", 8.00),
        (LLAMA, 1, 4096, "int8", 2.125),  # printed 2.12
        (LLAMA, 1, 4096, "int4", 1.125),  # printed 1.12
        (GEMMA2, 1, 4096, "fp16", 8.00 + 2.00),
        (GEMMA2, 2, 4096, "fp16", 16.00 + 4.00),
        (GEMMA2, 1, 768, "fp16", 1.50 + 1.50),
        (GEMMA2, 1, 4096, "int8", 4.25 + 1.0625),  # printed 4.25 and 1.06
    ],
)
def test_the_cache_is_what_llama_cpp_allocates(config, batch, context, dtype, printed_mib):
    got = kv_cache_bytes(
        planner.load_model(config),
        batch=batch,
        context_tokens=context,
        dtype=dtype,
        runtime="llama.cpp",
    )
    assert got == printed_mib * MIB


@pytest.mark.parametrize(
    ("config", "context", "attention", "printed_mib", "short"),
    [
        (LLAMA, 4096, "flash", 64.50, 0.02),
        (LLAMA, 1000, "flash", 64.50, 0.02),
        (LLAMA, 4096, "eager", 77.51, 0.05),
        (LLAMA_8B_SHAPES, 8192, "flash", 124.01, 0.20),
        (LLAMA_8B_SHAPES, 8192, "eager", 572.01, 0.05),
        (LLAMA_8B_SHAPES, 65_536, "flash", 180.01, 0.14),
    ],
)
def test_the_compute_buffer_is_short_by_the_holes_of_ggmls_allocator(
    config, context, attention, printed_mib, short
):
    """Uncalibrated, and said so: never above what is printed, at most `short` of it below."""
    deploy = Deployment(gpu="cpu", runtime="llama.cpp", attention=attention)
    e = planner.estimate(
        planner.load_model(config), Inference(batch=1, prompt_tokens=context), deploy
    )
    assert e.peak_note.startswith("uncalibrated")
    assert 1 - short <= e.memory.activations_bytes / (printed_mib * MIB) <= 1


def test_quantised_values_need_flash_attention():
    """llama_init_from_model: "quantized V cache requires flash_attn to be enabled"."""
    deploy = Deployment(gpu="h200", runtime="llama.cpp", attention="eager", kv_dtype="int8")
    with pytest.raises(ConfigError, match="quantised values need attention='flash'"):
        planner.estimate(planner.load_model(LLAMA), Inference(batch=1, prompt_tokens=100), deploy)


def test_heads_of_broken_blocks_are_refused():
    model = planner.load_model({**LLAMA, "head_dim": 48})
    with pytest.raises(ConfigError, match="heads of 48 are not whole blocks of 32"):
        kv_cache_bytes(model, batch=1, context_tokens=9, dtype="int8", runtime="llama.cpp")


def test_windows_that_are_not_read_are_refused():
    model = planner.load_model({**LLAMA, "model_type": "starcoder2", "sliding_window": 64})
    with pytest.raises(ConfigError, match="does not plan the sliding windows of model_type=star"):
        kv_cache_bytes(model, batch=1, context_tokens=9, runtime="llama.cpp")


def test_scales_and_overhead_have_rows_of_their_own():
    deploy = Deployment(gpu="h200", runtime="llama.cpp", kv_dtype="int4")
    model, work = planner.load_model("llama-3.1-8b"), Inference(batch=2, prompt_tokens=5000)
    e = planner.estimate(model, work, deploy)
    for row in e.rows:
        text = row.substituted.replace("·", "*")
        if row.component == "kv_cache":
            assert row.count * eval(text) == row.size_bytes, row
    assert [r.item for r in e.rows if r.component == "kv_cache"][1] == "full attention, scales"
    assert "cuBLAS workspace" not in {r.item for r in e.rows}
    assert sum(r.size_bytes for r in e.rows) == e.memory.total_bytes
