"""vLLM's cache against vLLM's own code and logs: groups, pages, states, shares of a GPU."""

import json
from pathlib import Path

import pytest

import planner
from planner import CacheSpec, ConfigError, Deployment, Inference, kv_cache_bytes
from planner.runtimes.vllm import Vllm
from planner.runtimes.vllm_groups import default_block_tokens, layout
from planner.runtimes.vllm_ranks import rank
from tests.planner.configs import TINY

TRUTH = json.loads((Path(__file__).parents[1] / "data" / "vllm_0_19_cache.json").read_text())
SERVED = [case for case in TRUTH["cases"] if "error" not in case]
REFUSED = [case for case in TRUTH["cases"] if "error" in case]
POOL_BYTES, LONGEST_TOKENS = 20 * 2**30, 8_192  # what the truth was made with


def name_of(case):
    return ", ".join(
        str(case[key])
        for key in ("model", "tensor_parallel", "kv_dtype", "compute_dtype", "block_tokens")
        if key in case
    )


def pool_of(case):
    computed = case.get("compute_dtype", "bf16")
    model = planner.read_config(TRUTH["configs"][case["model"]])
    return layout(
        rank(model, case.get("tensor_parallel", 1)),
        block=case.get("block_tokens", default_block_tokens(model)),
        kv_dtype=case.get("kv_dtype", computed),
        compute_dtype=computed,
    )


@pytest.mark.parametrize("case", SERVED, ids=name_of)
def test_requests_hold_what_vllms_managers_allocate(case):
    model = planner.read_config(TRUTH["configs"][case["model"]])
    computed, block = case.get("compute_dtype", "bf16"), case.get("block_tokens")
    for tokens, held_bytes in case["held_bytes"].items():
        got = kv_cache_bytes(
            model,
            batch=2,
            context_tokens=int(tokens),
            dtype=case.get("kv_dtype", computed),
            compute_dtype=computed,
            runtime="vllm",
            cache=None if block is None else CacheSpec(kind="paged", block_tokens=block),
            tensor_parallel=case.get("tensor_parallel", 1),
        )
        assert got == 2 * held_bytes, tokens


@pytest.mark.parametrize("case", SERVED, ids=name_of)
def test_the_pool_is_cut_as_vllm_cuts_it(case):
    pool = pool_of(case)
    blocks = POOL_BYTES // pool.block_bytes
    assert blocks == case["blocks"]
    assert pool.tokens(blocks, longest_tokens=LONGEST_TOKENS) == case["printed_tokens"]
    assert pool.groups == sum(group[-1] for group in case["groups"])
    if not pool.one_group:
        blocks_and_pages = {
            (kind.block_tokens or LONGEST_TOKENS, kind.page_bytes) for kind in pool.kinds
        }
        assert blocks_and_pages == {(group[2], group[3]) for group in case["groups"]}
        slots = sum(kind.groups * pool.group_layers - kind.layers for kind in pool.kinds)
        layers = sum(group[1] * group[-1] for group in case["groups"])
        assert pool.groups * pool.group_layers - slots == layers


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_pages_that_vllm_cannot_unify_are_refused(case):
    assert case["error"] == "NotImplementedError"
    with pytest.raises(ConfigError, match="does not serve the layers of gemma4_text from one pool"):
        pool_of(case)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("gemma-2-2b", 2),
        ("gpt-oss-20b", 2),
        ("gemma-3-12b text", 6),
        ("gemma-3-4b-it", 7),
        ("gemma-3-27b text", 7),
        ("llama-4-scout-text", 4),
    ],
)
def test_hybrids_have_the_groups_that_start_up_logs_show(name, groups):
    """num_gpu_blocks · block / "GPU KV cache size": start-up logs of vLLM 0.19.0,
    llm-d-planner@d3121e059da8, accuracy/results/v0.19.0."""
    assert pool_of({"model": name}).groups == groups


@pytest.mark.parametrize(
    ("tensor_parallel", "available_gib", "printed_tokens"),
    [(1, 58.11, 476_016), (2, 63.76, 1_044_688), (4, 67.44, 2_209_792)],
)
def test_bytes_a_token_on_each_gpu_are_those_of_start_up_logs(
    tensor_parallel, available_gib, printed_tokens
):
    """Llama-3.1-8B-Instruct: "Available KV cache memory" (to 0.01 GiB) over "GPU KV cache size";
    vLLM 0.19.0, llm-d-planner@d3121e059da8, accuracy/results/v0.19.0."""
    model = planner.load_model("llama-3.1-8b")
    got = kv_cache_bytes(
        model,
        batch=1,
        context_tokens=printed_tokens,
        runtime="vllm",
        tensor_parallel=tensor_parallel,
    )
    assert got == pytest.approx(available_gib * 2**30, abs=0.006 * 2**30)


def test_a_row_says_what_nobody_needs():
    model = planner.read_config(TRUTH["configs"]["bamba-9b"])
    rows = Vllm().cache_rows(
        model,
        batch=1,
        context_tokens=100,
        dtype="bf16",
        cache=None,
        encoder_tokens=100,
        compute_dtype="bf16",
        decoded_tokens=0,
    )
    assert [(row.item, row.count, dict(row.values)["blocks"]) for row in rows] == [
        ("Mamba-2, one state a request", 29, 1),
        ("Mamba-2, padding of short groups", 1, 1),
        ("Mamba-2, padding of unified pages", 29, 1),
        ("full attention, blocks of 528", 3, 1),
    ]
    assert rows[0].note == "10 group(s) of 3 layers for 29; vLLM 0.19"
    assert sum(row.size_bytes for row in rows) == sum(
        row.count * dict(row.values)["page"] for row in rows
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runtime": "vllm", "tensor_parallel": 3}, "num_attention_heads=32 is not a multiple of"),
        ({"tensor_parallel": 2}, "tensor_parallel=2 is not planned for runtime=transformers"),
        ({"runtime": "vllm", "tensor_parallel": 0}, "tensor_parallel=0 is not allowed"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(arguments, message):
    model = planner.load_model("llama-3.1-8b")
    with pytest.raises(ConfigError, match=message):
        kv_cache_bytes(model, batch=1, context_tokens=9, **arguments)


def test_key_value_heads_that_do_not_divide_are_refused():
    config = {**TINY["llama"], "num_attention_heads": 12, "num_key_value_heads": 6}
    config |= {"hidden_size": 96}
    model = planner.read_config(config)
    with pytest.raises(ConfigError, match="num_key_value_heads=6 and tensor_parallel=4 do not"):
        kv_cache_bytes(model, batch=1, context_tokens=9, runtime="vllm", tensor_parallel=4)


def test_sparse_latents_come_in_blocks_of_64():
    model = planner.read_config(TRUTH["configs"]["deepseek_v32"])
    spec = CacheSpec(kind="paged", block_tokens=16)
    with pytest.raises(ConfigError, match="block_tokens=16 is not what vLLM"):
        kv_cache_bytes(model, batch=1, context_tokens=9, runtime="vllm", cache=spec)
    layer = 64 * (656 + 132)  # fp8_ds_mla, and 128 fp8 with a float32 scale of the indexer
    got = kv_cache_bytes(model, batch=1, context_tokens=9, runtime="vllm", dtype="fp8")
    assert got == 61 * layer


def test_windows_on_some_layers_alone_are_refused_as_qwen2s_class_does():
    model = planner.read_config(TINY["qwen2 sliding from layer 1"])
    with pytest.raises(ConfigError, match="does not serve windows on some layers alone"):
        kv_cache_bytes(model, batch=1, context_tokens=9, runtime="vllm")


def test_fp8_scales_are_scalars_of_each_layer_among_the_buffers():
    """set_default_quant_scales (layers/attention/attention.py, vLLM 0.19.1): seven float32
    tensors without a dimension, whatever the KV dtype."""
    model = planner.load_model("llama-3.1-8b")
    work = Inference(batch=1, prompt_tokens=9)
    for kv_dtype in (None, "fp8"):
        e = planner.estimate(model, work, Deployment(gpu="h200", runtime="vllm", kv_dtype=kv_dtype))
        rows = {row.item: row for row in e.rows}
        assert rows["attention scales (buffers)"].size_bytes == 32 * 7 * 4
        noted = "scales are among the weights' buffers" in rows["full attention, blocks of 16"].note
        assert noted == (kv_dtype == "fp8")


def test_an_estimate_still_refuses_programs_that_are_not_planned():
    model = planner.read_config(TRUTH["configs"]["jamba-v0.1"])
    deploy, work = Deployment(gpu="h200", runtime="vllm"), Inference(batch=1, prompt_tokens=9)
    with pytest.raises(ConfigError, match="runtime=vllm does not plan Mamba layers"):
        planner.estimate(model, work, deploy)
