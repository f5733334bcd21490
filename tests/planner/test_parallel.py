"""Shares of a model: against vLLM's own partition and pools, and what must hold of any share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, Deployment, Inference
from planner.runtimes.vllm_groups import stage_layout
from planner.runtimes.vllm_ranks import rank, shares, stage_runs
from tests.planner.configs import TINY
from tests.properties import examples

DATA = Path(__file__).parent / "data"
CONFIGS = json.loads((DATA / "vllm_0_19_cache.json").read_text())["configs"]
STAGES = json.loads((DATA / "vllm_0_19_stages.json").read_text())
WORK = Inference(batch=1, prompt_tokens=100, output_tokens=3)
NAMES = ["llama-3.1-8b", "gemma-2-9b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt2", "olmo2-7b"]


def of(name, work=WORK, gpu="h100-80gb", **fields):
    deploy = Deployment(**{"gpu": gpu, "runtime": "vllm", **fields})
    return planner.estimate(planner.load_model(name), work, deploy)


@pytest.mark.parametrize("case", STAGES["partitions"].items(), ids=lambda case: case[0])
def test_layers_go_to_stages_as_get_pp_indices_has_it(case):
    """distributed/utils.py, vLLM 0.19.1, run as it is."""
    name, runs = case
    layers, stages = (int(word.split()[0]) for word in name.split(", "))
    assert stage_runs(layers, stages) == tuple(map(tuple, runs))


@pytest.mark.parametrize(
    "case", STAGES["cases"], ids=lambda case: f"{case['model']}-{case['pipeline_parallel']}"
)
def test_a_stage_has_the_blocks_that_vllm_cuts_for_it(case):
    model = planner.read_config(CONFIGS[case["model"]])
    whole = rank(model, case["tensor_parallel"])
    runs = stage_runs(len(model.layers), case["pipeline_parallel"])
    pools = [
        stage_layout(whole, run, block=16, kv_dtype="bf16", compute_dtype="bf16") for run in runs
    ]
    blocks = [40 * 2**30 // pool.block_bytes for pool in pools]
    assert blocks == case["stage_blocks"]
    longest = pools[0].longest_blocks(8192, batched_tokens=2048)
    assert min(blocks) / longest == pytest.approx(case["concurrency"], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_gpu_is_the_model_itself(name):
    """Embedding and head apart, which are padded to a multiple of 64."""
    model = planner.load_model(name)
    (only,) = shares(model, 1, 1)
    assert replace(only.model, embedding_rows=None) == model
    assert only.in_words == ""


@given(
    name=st.sampled_from(NAMES[:4]),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.integers(1, 5),
)
@examples(40)
def test_shares_hold_the_whole_model_and_little_twice(name, tensor, pipeline):
    model = planner.load_model(name)
    parts = shares(model, tensor, pipeline)
    held = tensor * sum(part.model.parameter_count for part in parts)
    assert held >= model.parameter_count
    layers = [layer for part in parts for layer in range(*part.blocks)]
    assert layers == list(range(len(model.layers)))
    outer = model.parameter_groups()["embedding"][1] * 2 + 64 * model.hidden_size
    norms = sum(
        elements
        for group, (_, elements) in model.parameter_groups().items()
        if group in ("norm", "router")
    )
    replicated = (tensor - 1) * (norms + len(model.layers) * 600 * model.hidden_size)
    assert held - model.parameter_count <= outer * pipeline + replicated


def test_embedding_comes_first_and_the_head_last():
    """LlamaModel and LlamaForCausalLM: PPMissingLayer elsewhere; tied weights are on both."""
    first, middle, last = (s.model for s in shares(planner.load_model("llama-3.1-8b"), 1, 3))
    assert [p.name for p in first.parameters() if p.layer is None] == ["embed_tokens.weight"]
    assert [p.name for p in middle.parameters() if p.layer is None] == []
    assert [p.name for p in last.parameters() if p.layer is None] == [
        "norm.weight",
        "lm_head.weight",
    ]
    first, last = (s.model for s in shares(planner.load_model("llama-3.2-1b"), 1, 2))
    assert "embed_tokens.weight" in {p.name for p in first.parameters()}
    assert "embed_tokens.weight" in {p.name for p in last.parameters()}
    assert next(p.name for p in last.parameters() if p.layer is not None).startswith("layers.8.")


def test_classes_without_missing_layers_hold_both_on_every_stage():
    """Gemma2Model and MixtralModel (model_executor/models/, 0.19.1) build the embedding anyhow."""
    for name in ("gemma-2-9b", "mixtral-8x7b"):
        for part in shares(planner.load_model(name), 1, 3):
            assert "embed_tokens.weight" in {p.name for p in part.model.parameters()}


@pytest.mark.parametrize(
    ("kv_heads", "tensor", "expected"), [(8, 2, 4), (8, 8, 1), (8, 32, 1), (2, 4, 1)]
)
def test_key_and_value_heads_are_copied_when_there_are_too_few(kv_heads, tensor, expected):
    """max(1, total_num_kv_heads // tensor_parallel_size): ModelConfig.get_num_kv_heads."""
    config = {**TINY["llama"], "num_attention_heads": 32, "num_key_value_heads": kv_heads}
    config |= {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048}
    (part,) = shares(planner.read_config(config), tensor, 1)
    assert part.model.layers[0].attention.num_key_value_heads == expected
    shapes = {p.name: p.shape for p in part.model.parameters()}
    assert shapes["layers.0.self_attn.k_proj.weight"] == (expected * 8, 256)
    assert shapes["layers.0.self_attn.o_proj.weight"] == (256, 32 // tensor * 8)
    assert shapes["embed_tokens.weight"] == (2048 // tensor, 256)


def test_a_latent_stays_whole_and_its_heads_go():
    (part,) = shares(planner.load_model("deepseek-v3"), 8, 1)
    shapes = {p.name: p.shape for p in part.model.parameters() if p.layer == 5}
    assert shapes["layers.5.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["layers.5.self_attn.q_a_proj.weight"] == (1536, 7168)
    assert shapes["layers.5.self_attn.q_b_proj.weight"] == (16 * 192, 1536)
    assert shapes["layers.5.self_attn.kv_b_proj.weight"] == (16 * 256, 512)
    assert shapes["layers.5.mlp.gate.weight"] == (256, 7168)
    assert shapes["layers.5.mlp.experts.down_proj"] == (256, 7168, 256)
    one, eight = (
        planner.kv_cache_bytes(
            planner.load_model("deepseek-v3"),
            batch=1, context_tokens=100, runtime="vllm", tensor_parallel=gpus,
        )
        for gpus in (1, 8)
    )  # fmt: skip
    assert one == eight


def test_a_norm_over_all_heads_is_whole_on_each_gpu():
    """Olmo2Attention: RMSNorm(total_num_kv_heads * head_dim), heads gathered before it."""
    (part,) = shares(planner.load_model("olmo2-7b"), 4, 1)
    shapes = {p.name: p.shape for p in part.model.parameters() if p.layer == 0}
    assert shapes["layers.0.self_attn.q_norm.weight"] == (4096,)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (1024, 4096)


def test_packed_weights_are_cut_with_their_groups():
    config = planner.load_model("llama-3.1-8b").config
    for method in (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "gptq", "bits": 4},
    ):
        (part,) = shares(planner.load_model({**config, "quantization_config": method}), 4, 1)
        stored = {s.name: s.shape for _, s in part.model.stored_tensors()}
        down = "model.layers.0.mlp.down_proj"
        assert stored[f"{down}.scales"] == (14336 // 4 // 128, 4096)
        assert stored["model.layers.0.mlp.up_proj.scales"] == (32, 14336 // 4)


def test_blocks_of_fp8_are_not_cut_through():
    """validate_fp8_block_shape: "is not divisible by weight quantization block_n"."""
    config = planner.load_model("qwen3-30b-a3b").config
    config = {
        **config,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    model = planner.load_model(config)
    assert shares(model, 2, 1)
    with pytest.raises(ConfigError, match=r"192 outputs of .*experts.* not a multiple of the 128"):
        shares(model, 4, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 3}, "num_attention_heads=32 is not a multiple of tensor_parallel=3"),
        ({"pipeline_parallel": 33}, "pipeline_parallel=33 is not allowed: at most the 32 layers"),
        ({"tensor_parallel": 2, "gpus": 4}, "gpus=4 is not planned yet: .* = 2, no copies"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 is not allowed"),
        ({"tensor_parallel": 2, "runtime": "transformers"}, "not planned yet for runtime=transf"),
        ({"pipeline_parallel": 2, "runtime": "attnlab"}, "not planned yet for runtime=attnlab"),
        ({"pipeline_parallel": 2, "runtime": "llama.cpp"}, "not planned yet for runtime=llama.cpp"),
    ],
)
def test_layouts_that_do_not_run_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        of("llama-3.1-8b", **fields)


@given(name=st.sampled_from(NAMES[:4]), tensor=st.sampled_from([1, 2, 4]), stages=st.integers(1, 3))
@examples(30)
def test_rows_add_up_and_more_gpus_hold_less_each(name, tensor, stages):
    e = of(name, tensor_parallel=tensor, pipeline_parallel=stages)
    assert sum(row.size_bytes for row in e.rows) == e.memory.total_bytes
    assert e.memory.device_used_bytes <= e.gpu.memory_bytes * 1.05
    more = of(name, tensor_parallel=2 * tensor, pipeline_parallel=stages)
    assert more.memory.weights_bytes < e.memory.weights_bytes
    assert more.pool.tokens >= e.pool.tokens


@given(
    tensor=st.sampled_from([1, 2, 4]), stages=st.integers(1, 3),
    batch=st.integers(1, 40), tokens=st.integers(1, 4000),
)  # fmt: skip
@examples(30)
def test_blocks_grow_with_batch_and_context_on_each_gpu(tensor, stages, batch, tokens):
    def held(batch, tokens):
        work = Inference(batch=batch, prompt_tokens=tokens)
        fields = {"tensor_parallel": tensor, "pipeline_parallel": stages}
        return of("gemma-2-9b", work, **fields).memory.kv_cache_bytes

    here = held(batch, tokens)
    assert held(batch + 1, tokens) > here
    assert held(batch, tokens + 1) >= here


def test_the_estimate_is_of_the_gpu_with_the_fewest_blocks():
    """Llama-3.1-8B in 2 stages: the last has the sampler, and decides (67 207 blocks printed)."""
    e = of("llama-3.1-8b", pipeline_parallel=2, memory_utilization=0.95, max_model_tokens=8192)
    assert e.share.stage == 1
    assert e.pool.blocks == pytest.approx(67_207, rel=0.001)
    assert "counted is the fullest of 2 GPUs: stage 2 of 2, layers 16–31" in e.explain()
    notes = set(e.table().query("component == 'weights'")["note"])
    assert "stage 2 of 2, layers 16–31" in notes
    assert e.peak.layer is None  # the sampler's
    assert e.to_dict()["stage"] == 1


def test_eager_mode_captures_no_graphs_and_flushes_no_cache():
    graph, eager = (of("llama-2-7b", mode=mode) for mode in ("graph", "eager"))
    assert "CUDA graphs" in {row.item for row in graph.rows}
    assert "CUDA graphs" not in {row.item for row in eager.rows}
    assert eager.memory.activations_bytes < graph.memory.activations_bytes
    assert eager.memory.weights_bytes == graph.memory.weights_bytes


def test_pcie_cards_connect_no_nvlink_channels():
    """vllm-project/vllm#13061, two RTX 4090: "non_torch_memory takes 0.25GiB"."""
    e = of("qwen2.5-14b", gpu="rtx-4090", tensor_parallel=2)
    outside = next(row.size_bytes for row in e.rows if row.item == "outside torch")
    assert outside == pytest.approx(0.25 * 2**30, rel=1e-6)
    assert not [row for row in e.rows if row.item.startswith("NCCL")]


def test_sharing_heads_saves_less_time_than_its_share():
    """Weights go by half, all-reduces come on top."""
    one, two = of("llama-3.1-8b"), of("llama-3.1-8b", tensor_parallel=2)
    assert one.latency.tpot_s / 2 < two.latency.tpot_s < one.latency.tpot_s
    assert two.latency.basis == "ops measured on h100-80gb"


def test_stages_take_as_long_as_the_whole_and_what_they_hand_on():
    for name in ("llama-3.1-8b", "mixtral-8x7b"):  # its stages hold a head each, one computes
        whole, staged = of(name), of(name, pipeline_parallel=3)
        assert staged.latency.tpot_s == pytest.approx(whole.latency.tpot_s, rel=0.01)
