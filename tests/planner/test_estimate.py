"""The joined answer: sums, refusals, the vllm pool, speed of import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import planner
from planner import CacheSpec, ConfigError, Deployment, Inference
from planner.runtimes.base import unplanned_part
from tests.planner.configs import TINY, build
from tests.planner.every_type import CASES as EVERY

H200 = Deployment(gpu="h200")


def of(name="llama-3.1-8b", deploy=H200, **work):
    arguments = {"batch": 1, "prompt_tokens": 1024, **work}
    return planner.estimate(planner.load_model(name), Inference(**arguments), deploy)


@pytest.mark.parametrize("runtime", ["transformers", "attnlab", "vllm", "llama.cpp"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b-v0.1", "gpt2", "gemma-2-9b"])
def test_the_rows_add_up_to_the_total(name, runtime):
    e = of(name, Deployment(gpu="h200", runtime=runtime), prompt_tokens=900, output_tokens=100)
    table = e.table()
    assert table["bytes"].sum() == e.memory.total_bytes
    by_component = table.groupby("component")["bytes"].sum()
    assert by_component["kv_cache"] == e.memory.kv_cache_bytes
    assert by_component["weights"] == e.memory.weights_bytes


@pytest.mark.parametrize("runtime", ["transformers", "attnlab", "vllm", "llama.cpp"])
def test_every_substituted_formula_gives_its_bytes(runtime):
    e = of("mistral-7b-v0.1", Deployment(gpu="h100-80gb", runtime=runtime), prompt_tokens=5_000)
    for row in e.rows:
        text = row.substituted.replace("·", "*").replace("−", "-")
        assert row.count * eval(text, {"min": min, "max": max}) == row.size_bytes, row


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weight_bytes_are_those_of_the_live_module(name, dtype):
    import torch

    live = build(TINY[name], dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    expected = sum(t.numel() * t.element_size() for t in (*live.parameters(), *live.buffers()))
    model = planner.read_config(TINY[name])
    e = planner.estimate(
        model, Inference(batch=1, prompt_tokens=4), Deployment(gpu="cpu", dtype=dtype)
    )
    assert e.memory.weights_bytes == expected


def planned(config):
    """The model, if transformers' passes are planned for it and its class has the type's name."""
    model = planner.read_config(config)
    named = config["model_type"] not in ("kimi_k2", "mistral4")  # no class, or none for text alone
    return model if named and unplanned_part(model) is None else None


CAUSAL = {kind: case.config for kind, case in EVERY.items() if case.auto == "causal"}


@pytest.mark.parametrize("kind", [kind for kind, config in CAUSAL.items() if planned(config)])
def test_weights_of_every_type_are_parameters_and_buffers_of_its_class(kind):
    import torch

    live = build(CAUSAL[kind], device="meta", dtype=torch.bfloat16)
    held = {id(t): t.numel() * t.element_size() for t in (*live.parameters(), *live.buffers())}
    work, deploy = Inference(batch=1, prompt_tokens=4), Deployment(gpu="h200", dtype="bf16")
    e = planner.estimate(planner.read_config(CAUSAL[kind]), work, deploy)
    assert e.memory.weights_bytes == sum(held.values())


def test_a_context_beyond_the_positions_is_refused():
    with pytest.raises(ConfigError, match="1025 reaches beyond max_position_embeddings=1024"):
        of("gpt2", prompt_tokens=1025)
    assert of("gpt2", prompt_tokens=1024).fits
    with pytest.raises(ConfigError, match="1025 reaches beyond"):
        of("gpt2", prompt_tokens=1024, output_tokens=2)


def test_what_does_not_fit_is_an_answer():
    e = of("llama-3.1-70b", Deployment(gpu="h100-80gb"))
    assert not e.fits
    assert e.headroom_bytes < 0
    assert "Does not fit" in e.explain()


def test_backends_that_a_class_refuses_are_refused():
    with pytest.raises(
        ConfigError, match="attention='sdpa' is not what gemma2 has in transformers: one of eager"
    ):
        of("gemma-2-9b", Deployment(gpu="h200", attention="sdpa"))
    assert of("gemma-2-9b").setting.attention == "eager"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "h2000"}, "gpu='h2000' is not in the catalogue: h200"),
        ({"runtime": "tgi"}, "runtime='tgi'"),
        ({"dtype": "int4"}, "dtype='int4' is not allowed"),
        ({"kv_dtype": "bf8"}, "kv_dtype='bf8' is not allowed"),
        ({"gpu": []}, r"gpu=\[\] is not in the catalogue"),
        ({"cache": "paged"}, "cache='paged' is not allowed: a CacheSpec"),
        ({"gpus": True}, "gpus=True is not allowed"),
        ({"gpus": 2}, "gpus=2 is not planned yet"),
        ({"tensor_parallel": 4}, "tensor_parallel=4 is not planned yet"),
        ({"mode": "turbo"}, "mode='turbo'"),
        ({"memory_utilization": 1.5}, r"memory_utilization=1\.5"),
        ({"weight_dtype": "fp4"}, "weight_dtype='fp4' is not allowed"),
        ({"cache": CacheSpec(kind="ring")}, "cache.kind='ring' is not in runtime=transformers"),
    ],
)
def test_bad_deployments_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        of(deploy=Deployment(**{"gpu": "h200", **fields}))


@pytest.mark.parametrize("field", ["batch", "prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("value", [0, -3, 1.0, "8", None, 2**31 + 1])
def test_bad_workloads_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}="):
        Inference(**{"batch": 1, "prompt_tokens": 8, field: value})


def test_attnlab_says_what_it_does_not_run_and_what_it_does_not_plan():
    deploy = Deployment(gpu="h200", runtime="attnlab")
    with pytest.raises(ConfigError, match="runtime=attnlab runs queries that grow with their pos"):
        of("llama-4-scout-text", deploy)
    mixtral = of("mixtral-8x7b", deploy)
    assert mixtral.peak_note == ""
    assert mixtral.latency.ttft_s > 0


def test_weights_quantised_on_loading_have_the_size_that_vllm_prints():
    """ "Model loading took" of vLLM 0.19 with --quantization fp8: 8.49 GiB (llm-d-planner)."""
    model, work = planner.load_model("llama-3.1-8b"), Inference(batch=1, prompt_tokens=8)
    deploy = Deployment(gpu="h100-80gb", runtime="vllm", weight_dtype="fp8")
    assert round(planner.estimate(model, work, deploy).memory.weights_bytes / 2**30, 2) == 8.49
    plain = Deployment(gpu="h100-80gb", weight_dtype="bf16")
    assert planner.estimate(model, work, plain).peak_note == ""


@pytest.mark.parametrize(
    ("runtime", "weight_dtype", "message"),
    [
        ("transformers", "fp8", "weight_dtype='fp8' is not what transformers quantises to"),
        ("attnlab", "nf4", "weight_dtype='nf4' is not what attnlab quantises to .*: int8"),
        ("vllm", "int8", "weight_dtype='int8' is not what vllm quantises to on loading: fp8"),
    ],
)
def test_a_runtime_quantises_on_loading_only_to_what_it_knows(runtime, weight_dtype, message):
    model, work = planner.load_model("llama-3.1-8b"), Inference(batch=1, prompt_tokens=8)
    deploy = Deployment(gpu="h200", runtime=runtime, weight_dtype=weight_dtype)
    with pytest.raises(ConfigError, match=message):
        planner.estimate(model, work, deploy)


def test_a_quantised_checkpoint_is_not_quantised_again():
    config = {**TINY["llama"], "quantization_config": {"quant_method": "fp8"}}
    model, work = planner.read_config(config), Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match="weight_dtype='nf4' is not allowed: the checkpoint is"):
        planner.estimate(model, work, Deployment(gpu="h200", weight_dtype="nf4"))
    e = planner.estimate(model, work, Deployment(gpu="h200"))
    assert e.peak_note == "approximate: the scratch of fp8 kernels is not planned"
    parts = e.table().query("component == 'weights'")
    assert parts["bytes"].sum() == e.memory.weights_bytes
    assert "attention, scales in fp32, 12 tensors" in set(parts["item"])


def test_a_quantisation_without_a_reader_is_refused():
    config = {**TINY["llama"], "quantization_config": {"quant_method": "magic"}}
    with pytest.raises(
        ConfigError, match=r"quantization_config\.quant_method='magic' is not known"
    ):
        planner.read_config(config)


@pytest.mark.parametrize(
    ("name", "change", "fields", "printed_tokens"),
    [
        ("llama-3.1-8b", {}, {}, 476_016),
        ("llama-3.1-8b", {}, {"kv_dtype": "fp8"}, 952_032),
        ("llama-3.1-8b", {}, {"dtype": "fp32"}, 175_296),
        ("llama-2-7b", {"vocab_size": 32016, "max_position_embeddings": 16384}, {}, 126_256),
    ],
)
def test_the_pool_of_vllm_is_what_it_prints(name, change, fields, printed_tokens):
    """The line "GPU KV cache size" in vLLM 0.19's start-up logs on an H100 with utilisation 0.95:
    Llama-3.1-8B-Instruct and CodeLlama-7b, llm-d-planner@d3121e059da8, accuracy/results/v0.19.0."""
    config = {**planner.load_model(name).config, **change}
    deploy = Deployment(gpu="h100-80gb", runtime="vllm", memory_utilization=0.95, **fields)
    work = Inference(batch=1, prompt_tokens=8191)
    e = planner.estimate(planner.load_model(config), work, deploy)
    assert e.kv_pool_tokens == pytest.approx(printed_tokens, rel=0.005)
    assert e.memory.device_used_bytes > e.memory.total_bytes


def test_vllm_takes_smaller_batches_on_smaller_cards():
    """EngineArgs.get_batch_defaults, vLLM 0.19: 8 192 tokens and 1 024 sequences from 70 GiB on."""
    settings = {
        gpu: of(deploy=Deployment(gpu=gpu, runtime="vllm")).setting
        for gpu in ("h100-80gb", "a100-80gb", "rtx-4090")
    }
    assert (settings["h100-80gb"].max_batched_tokens, settings["h100-80gb"].max_sequences) == (
        8192,
        1024,
    )
    for gpu in ("a100-80gb", "rtx-4090"):
        assert (settings[gpu].max_batched_tokens, settings[gpu].max_sequences) == (2048, 256)


def test_more_sequences_than_vllm_runs_at_once_do_not_fit():
    deploy = Deployment(gpu="h200", runtime="vllm", max_sequences=4)
    assert of(deploy=deploy, batch=4).fits
    e = of(deploy=deploy, batch=5)
    assert not e.fits
    assert "max_sequences=4 at once" in e.verdict


def test_what_vllm_is_set_to_is_held_to():
    with pytest.raises(ConfigError, match="1001 is more than max_model_tokens=1000"):
        of(deploy=Deployment(gpu="h200", runtime="vllm", max_model_tokens=1000), prompt_tokens=1000)
    contradiction = Deployment(
        gpu="h200",
        runtime="vllm",
        block_tokens=32,
        cache=CacheSpec(kind="paged", block_tokens=64),
    )
    with pytest.raises(ConfigError, match="block_tokens=64 contradicts block_tokens=32"):
        of(deploy=contradiction)


def test_a_pool_without_room_says_what_is_missing():
    e = of("llama-3.1-70b", Deployment(gpu="t4", runtime="vllm"))
    assert e.kv_pool_bytes == 0
    assert e.headroom_bytes < -(100 * 2**30)


def test_a_llama_with_a_window_does_not_run_in_transformers():
    model = planner.read_config({**TINY["llama"], "sliding_window": 16})
    work = Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match="sliding_window=16 of a llama does not run"):
        planner.estimate(model, work, H200)


def test_decode_time_is_at_least_the_time_to_read_the_weights():
    """3.13 ms: 15.0 GB of weights and head at 4.8 TB/s, the floor for Llama-3.1-8B on an H200."""
    latency = of(prompt_tokens=128, output_tokens=32).latency
    assert latency.tpot_s is not None
    assert latency.tpot_s >= 3.13e-3
    assert latency.basis == "ops measured on h200"


def test_importing_planner_loads_neither_torch_nor_pandas_nor_streamlit():
    code = (
        "import sys, planner; planner.load_model('llama-3.1-8b');"
        "print(sorted({'torch', 'pandas', 'streamlit', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pool_has_no_scales_and_says_so():
    deploy = Deployment(
        gpu="h200", runtime="vllm", cache=CacheSpec(kind="paged", scales="token-head")
    )
    with pytest.raises(ConfigError, match=r"cache\.scales='token-head' is not in runtime=vllm"):
        of("llama-3.1-8b", deploy)
