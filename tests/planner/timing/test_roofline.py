"""Times of ops: floors that nothing undercuts, fits that hold on shapes they never saw."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import planner
from planner.catalog.gpus import gpu_named, gpus
from planner.prepared import prepare
from planner.program import Dims, visible_pairs
from planner.runtimes import runtime_named
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import calibration_of, load
from planner.timing.clock import Speed
from planner.timing.op_kinds import Attention, Bytes, Grouped, Product, timed_ops
from planner.timing.op_times import Roof
from planner.timing.passes import passes_of, prompt_passes
from planner.timing.power import capped_clock
from planner.timing.roofline import op_times
from planner.timing.speed import speed_for
from profiles.microbench.op_record import load as records

LLAMA = planner.load_model("llama-3.1-8b")
OP_RECORDS = Path(__file__).parents[3] / "profiles" / "data" / "microbench" / "h200.jsonl"
CALIBRATED = sorted(
    p.name.removesuffix(".json")
    for p in files("planner.catalog").joinpath("calibration").iterdir()
    if p.name.endswith(".json")
)


def of(model="llama-3.1-8b", gpu="h200", runtime="vllm", mode="graph", tp=1, dtype=None, **work):
    sizes = {"batch": 1, "prompt_tokens": 128, "output_tokens": 32, **work}
    return planner.estimate(
        planner.load_model(model),
        planner.Inference(logits="last", **sizes),
        planner.Deployment(gpu=gpu, runtime=runtime, mode=mode, tensor_parallel=tp, dtype=dtype),
    )


@pytest.mark.parametrize("runtime", ["vllm", "attnlab", "transformers"])
def test_a_token_takes_at_least_the_time_to_read_the_weights(runtime):
    """3.13 ms: 15.0 GB of weights and head at 4.8 TB/s, the floor for Llama-3.1-8B on an H200."""
    assert 3.13e-3 < of(runtime=runtime).latency.tpot_s < 2.5 * 3.13e-3


def test_llama_on_an_h200_lies_between_the_floors_and_the_tables_own_sum():
    """reference figures at 1 × 128: aiconfigurator (vLLM) 4.80 ms, plain rooflines 2.9–3.1 ms."""
    assert of().latency.tpot_s == pytest.approx(4.8e-3, rel=0.05)


@pytest.mark.parametrize("gpu", ["h200", "t4", "rtx-4090", "b200", "mi300x"])
@pytest.mark.parametrize(("tokens", "context"), [(2048, 2048), (1, 4096)])
def test_no_op_is_faster_than_its_ceilings(gpu, tokens, context):
    deploy = planner.Deployment(gpu=gpu, runtime="vllm")
    ready = prepare(LLAMA, deploy)
    passes = passes_of(ready.model, ready.setting, "vllm", ready.gpu)
    work = planner.Inference(batch=4, prompt_tokens=2048, output_tokens=2048)
    program = ready.runtime.decode(LLAMA, work, ready.setting)
    dims = Dims(batch=4, tokens=tokens, context=context)
    for made in op_times(program, dims, passes.speed):
        assert made.seconds >= made.flops / ready.gpu.flops_per_s("bf16")
        if made.moved_bytes > (ready.gpu.l2_bytes or 0):
            assert made.seconds >= made.moved_bytes / ready.gpu.memory_bandwidth_bytes_per_s


@pytest.mark.parametrize("gpu", CALIBRATED)
def test_each_fit_names_a_source_with_version_and_licence(gpu):
    text = files("planner.catalog").joinpath("calibration", f"{gpu}.json").read_text()
    content = json.loads(text)
    assert len(text.encode()) <= 200_000
    assert content["gpu"] == gpu in gpus()
    for source in content["sources"].values():
        assert source["licence"] == "Apache-2.0"
        assert source["version"]
        assert source["url"]
        assert source["what"]
    for part in (*content["fits"].values(), *map(content.get, ("graph", "host", "pages"))):
        assert part is None or part["source"] in content["sources"]


@pytest.mark.parametrize(
    ("gpu", "fit", "median", "p90"),
    [
        ("h200", "gemm:bf16", 0.045, 0.12),
        ("h200", "gemm:bf16:vllm", 0.045, 0.12),
        ("h100-80gb", "gemm:bf16", 0.045, 0.12),
        ("h200", "decode:bf16:vllm", 0.04, 0.15),
        ("h100-80gb", "decode:bf16:vllm", 0.04, 0.15),
        ("h200", "latent_decode:bf16", 0.04, 0.15),
        ("h100-80gb", "latent_decode:bf16", 0.04, 0.15),
    ],
)
def test_fits_hold_on_shapes_that_they_never_saw(gpu, fit, median, p90):
    held_out = load(gpu).fits[fit].held_out
    assert held_out.count >= 96
    assert held_out.median <= median
    assert held_out.p90 <= p90


def test_a_vocabulary_of_an_odd_size_that_no_fit_saw_is_timed_by_other_odd_ones():
    """50 257, GPT-2's: far slower than its padded size."""
    held_out = load("h200").fits["gemm_odd:bf16"].held_out
    assert held_out.count == 11
    assert held_out.median <= 0.12
    assert held_out.p90 <= 0.15
    odd, padded = (seconds_of_head(V) for V in (50257, 50304))
    assert odd > 4 * padded


def test_attention_behind_a_mask_takes_what_was_measured_of_it():
    """An H200 needs 3.42 ms for all pairs of 8 192 tokens and 32 heads; half of them are causal.

    transformers makes a mask where a window is no longer than the prompt (masking_utils.py,
    _ignore_causal_mask_sdpa): Mistral's is 4 096 long.
    """
    measured = {
        r.shape["tokens"]: r.median_s
        for r in records(OP_RECORDS).ops
        if (r.family, r.op, r.backend) == ("prefill", "sdpa_masked", "default")
        and (r.shape["heads"], r.shape["batch"]) == (32, 1)
    }
    found = {
        tokens: prefill_attention_s("mistral-7b-v0.1", tokens) for tokens in (4095, 4096, 8192)
    }
    for tokens in (4096, 8192):
        assert found[tokens] == pytest.approx(measured[tokens], rel=0.02)
    assert found[4095] < 0.65 * measured[4096]


def prefill_ops(model, tokens, batch=1):
    """The ops of a prompt in transformers, as bursts of each were timed."""
    e = of(model, runtime="transformers", mode="eager", prompt_tokens=tokens, batch=batch)
    program = runtime_named("transformers").prefill(e.model, e.work, e.setting)
    dims = Dims(batch=batch, tokens=tokens, context=tokens)
    speed = passes_of(e.model, e.setting, "transformers", e.gpu).speed
    return list(op_times(program, dims, speed))


def prefill_attention_s(model, tokens):
    return next(o.seconds for o in prefill_ops(model, tokens) if o.family == "prefill")


def test_the_way_back_behind_a_mask_computes_every_pair():
    """A mask cannot be skipped by tiles: all of 4 096² pairs, where 4 095 tokens have half.

    An H200 needs 2.36 ms for 32 heads over as many; Mistral's keys and values are of 8.
    """
    times = []
    for tokens in (4095, 4096):
        work = planner.Training(batch=1, sequence_tokens=tokens, optimizer=None)
        deploy = planner.Deployment(gpu="h200", runtime="transformers")
        table = planner.estimate(planner.load_model("mistral-7b-v0.1"), work, deploy).op_times()
        times.append(table.set_index("family").seconds["attention_backward"])
    assert 2.0 < times[1] / times[0] < 3.2
    assert times[1] == pytest.approx(2.36e-3, rel=0.12)


def test_a_norm_takes_what_was_measured_of_it_kernel_by_kernel():
    """Rows whose width no fit saw, and those that gave the mean and the strided products."""
    speed = Speed(gpu=gpu_named("h200"), dtype="bf16", calibration=load("h200"))
    off = []
    for r in records(OP_RECORDS).ops:
        if (r.family, r.op, r.cache) != ("bandwidth", "rmsnorm", "cold"):
            continue
        n, rows = r.shape["rows"] * r.shape["width"], r.shape["rows"]
        kernels = [("cast", 6 * n, n), ("mean", 4 * n, n), ("strided", 8 * n, n)]
        kernels += [("strided", 4 * n, n), ("elementwise", 8 * n, n), ("elementwise", 6 * n, n)]
        kernels += 2 * [("elementwise", 8 * rows, rows)]
        seconds = sum(byte_seconds(kind, size, count, speed) for kind, size, count in kernels)
        off.append(abs(float(seconds) / r.median_s - 1))
    assert len(off) == 14
    assert np.mean(off) < 0.03
    assert max(off) < 0.08


def test_products_of_a_repeated_operand_and_conversions_are_told_from_whole_ones():
    """CUDALoops.cuh: OLMo-2 multiplies float32 by a row of bf16, Llama bf16 by a row of bf16."""
    kinds = {
        (o.timed.op.name, o.timed.op.kernel): o.timed.kind.kind
        for model in ("olmo2-7b", "llama-3.1-8b")
        for o in prefill_ops(model, 64, batch=2)
        if isinstance(o.timed.kind, Bytes)
    }
    assert kinds["q norm, scaled", "mul.Tensor"] == "strided cast"
    assert kinds["attention norm", "mul.Tensor"] == "strided"
    assert kinds["attention norm, squares", "pow.Tensor_Scalar"] == "elementwise"
    assert kinds["attention norm, float32", "_to_copy"] == "cast"
    assert kinds["attention norm, normalised", "_to_copy"] == "elementwise"  # rounding
    assert kinds["residual", "add.Tensor"] == "elementwise"
    assert kinds["cached keys", "cat"] == "joined"  # [B, T, G, D] seen as [B, G, T, D]


def test_a_block_of_the_efficient_kernel_computes_64_queries_for_one():
    """GPT-2 in float32, whose attention takes neither flash nor cuDNN: 128 sequences a step."""
    e = of("gpt2", runtime="transformers", mode="eager", dtype="fp32", batch=128)
    step = e.op_times("decode").set_index("family").seconds["decode"]
    prefill = e.op_times("prefill").set_index("family").seconds["prefill"]
    pairs = 64 * e.work.context_tokens / (128 * 129 / 2)  # of the step's by the prompt's
    assert step == pytest.approx(pairs * prefill, rel=0.1)


def test_a_window_over_a_cache_that_is_kept_whole_is_read_whole():
    """attnlab keeps all of Mistral's keys: a step reads 8 192, whatever the window lets through."""
    step = {}
    for model, batch in (("mistral-7b-v0.1", 4), ("llama-3.1-8b", 4)):
        e = of(model, runtime="attnlab", mode="captured", batch=batch, prompt_tokens=8192)
        step[model] = e.op_times("decode").set_index("family").seconds["decode"]
    assert step["mistral-7b-v0.1"] == pytest.approx(step["llama-3.1-8b"], rel=0.01)


def test_experts_whose_rows_fill_no_tile_take_as_long_as_if_they_did():
    """GroupMM.cu: 256 rows at a time. Rows that fill all tiles were timed: 64 experts, 512 each."""
    timed = {
        (r.shape["experts"], r.shape["m"]): r.median_s
        for r in records(OP_RECORDS).ops
        if r.family == "moe" and (r.shape["n"], r.shape["k"]) == (2816, 2048)
    }
    ops = prefill_ops("qwen1.5-moe-a2.7b", 2048, batch=4)  # 60 experts, 546 rows each
    up = next(o for o in ops if o.timed.op.name == "experts gate_up_proj")
    assert timed[64, 32768] < float(up.seconds) < 768 / 512 * timed[64, 32768]


def test_a_product_that_goes_on_takes_what_was_measured_at_the_power_cap():
    """1.37 ms in a burst, 1.62 ms when it goes on for a second."""
    square = [r for r in records(OP_RECORDS).ops if r.shape == {"m": 8192, "n": 8192, "k": 8192}]
    known = {r.family: r for r in square if (r.op, r.dtype) == ("linear", "bf16")}
    burst_s, sustained_s = known["ceiling"].median_s, known["sustained"].median_s
    gpu, cost = gpu_named("h200"), load("h200").energy
    flops, moved = 2.0 * 8192**3, 6.0 * 8192**2
    clock = capped_clock(lambda f: burst_s / f, flops, moved, cost, gpu.tdp_w, "bf16")
    assert burst_s / clock == pytest.approx(sustained_s, rel=0.01)


def test_a_pass_that_streams_leaves_watts_to_its_products():
    cost, tdp_w = load("h200").energy, gpu_named("h200").tdp_w
    clocks = [
        capped_clock(lambda f, s=streamed: s + 1e-3 / f, 8e11, 1e8, cost, tdp_w, "bf16")
        for streamed in (0.0, 2e-4, 1e-2)
    ]
    assert clocks[0] < clocks[1] < clocks[2] == 1.0


def test_a_card_of_the_same_chip_and_power_has_the_same_joules():
    energies = {name: calibration_of(gpu_named(name)).energy for name in ("h100-80gb", "h100-nvl")}
    assert energies == {"h100-80gb": load("h200").energy, "h100-nvl": None}


def test_what_multiplies_in_fp8_is_told_by_its_rates():
    """AMD's capabilities are names: gfx942 has fp8, gfx90a has none."""
    dtypes = {}
    for gpu in ("mi300x", "mi250x", "h100-80gb", "a100-80gb"):
        deploy = planner.Deployment(gpu=gpu, runtime="vllm", weight_dtype="fp8")
        ready = prepare(LLAMA, deploy)
        speed = speed_for(ready.model, ready.setting, "vllm", gpu_named(gpu))
        dtypes[gpu] = speed.product_dtype
    assert dtypes == {"mi300x": "fp8", "mi250x": "bf16", "h100-80gb": "fp8", "a100-80gb": "bf16"}


def seconds_of_head(vocab_size):
    model = planner.read_config({**planner.load_model("gpt2").config, "vocab_size": vocab_size})
    work = planner.Inference(batch=8, prompt_tokens=1024, logits="all")
    deploy = planner.Deployment(gpu="h200", runtime="transformers", dtype="bf16", mode="eager")
    e = planner.estimate(model, work, deploy)
    program = runtime_named("transformers").prefill(model, work, e.setting)
    dims = Dims(batch=8, tokens=1024, context=1024)
    speed = speed_for(model, e.setting, "transformers", e.gpu)
    return sum(t.seconds for t in op_times(program, dims, speed) if t.timed.op.name == "logits")


def test_a_captured_step_has_all_kernels_of_an_eager_one_and_no_host():
    compiled, captured, eager = (
        of(runtime="attnlab", mode=mode).latency.tpot_s for mode in ("graph", "captured", "eager")
    )
    assert compiled < captured < eager
    same = [of(runtime="transformers", mode=mode).latency.tpot_s for mode in ("graph", "captured")]
    assert same[0] == same[1]


def test_a_roofline_is_a_smooth_maximum_over_a_floor():
    roof = Roof(
        floor_s=1e-6, compute=0.5, bandwidth=0.8, extra_flops=0.0, extra_bytes=0.0, power=2.0
    )
    assert roof.seconds(0.0, 0.0, 1e15, 1e12) == pytest.approx(1e-6)
    assert roof.seconds(1e12, 1.0, 1e15, 1e12) == pytest.approx(1e-6 + 2e-3)
    assert roof.seconds(1e3, 8e9, 1e15, 1e12) == pytest.approx(1e-6 + 1e-2)
    both = roof.seconds(1e12, 1.6e9, 1e15, 1e12) - 1e-6
    assert both == pytest.approx(2e-3 * 2**0.5)


def test_a_table_of_the_residual_gives_what_the_process_gives():
    fit = load("h200").fits["gemm:bf16"]
    for m in (1.0, 8.0, 512.0):
        sizes = (m, 4096.0, 4096.0)
        logs = np.log2(np.array([sizes]))
        alone = fit.roof_seconds(sizes) * np.exp(fit.residual(logs)[0])
        assert fit.seconds(sizes) == pytest.approx(alone, rel=0.01)


def test_a_gpu_that_nobody_measured_is_timed_by_its_kin_and_says_so():
    latency = of(gpu="h100-nvl").latency
    assert latency.confidence == "extrapolated"
    assert latency.basis == "ops measured on h100-80gb, by the ratio of ceilings"
    assert of(gpu="h100-80gb").latency.tpot_s < latency.tpot_s * 1.5
    assert calibration_of(gpu_named("rtx-5090")).transferred_from == "rtx-pro-6000"


def test_a_gpu_without_kin_is_a_roofline_with_a_wide_band():
    latency = of(gpu="mi300x").latency
    assert latency.confidence == "uncalibrated"
    low, high = latency.tpot_interval_s
    assert (high - low) / 2 > 0.15 * latency.tpot_s


def test_eager_decoding_is_bound_by_the_host_and_a_graph_is_not():
    eager, graph = of(runtime="transformers", mode="eager"), of(runtime="transformers")
    assert eager.latency.decode_bound_by == "host"
    assert graph.latency.decode_bound_by == "memory"
    assert eager.latency.tpot_s > 3 * graph.latency.tpot_s


def test_long_prompts_are_bound_by_compute_and_tokens_by_memory():
    latency = of(prompt_tokens=8192).latency
    assert latency.prefill_bound_by == "compute"
    assert latency.decode_bound_by == "memory"
    assert 0 < latency.mfu < 1
    assert 0 < latency.mbu < 1


def test_end_to_end_is_the_first_token_and_the_steps_after_it():
    latency = of(output_tokens=11).latency
    assert latency.end_to_end_s == pytest.approx(latency.ttft_s + 10 * latency.tpot_s)
    assert latency.output_tokens_per_s == pytest.approx(11 / latency.end_to_end_s)


def test_intervals_hold_the_time_between_them():
    latency = of().latency
    for time_s, (low, high) in (
        (latency.ttft_s, latency.ttft_interval_s),
        (latency.tpot_s, latency.tpot_interval_s),
    ):
        assert low < time_s < high


def test_energy_is_no_more_than_the_tdp_allows():
    estimate = of(batch=8, prompt_tokens=2048)
    assert 0 < estimate.latency.energy_j <= 700 * estimate.latency.end_to_end_s
    assert of(gpu="mi300x").latency.energy_j <= 750 * of(gpu="mi300x").latency.end_to_end_s


def test_op_times_add_up_to_the_step():
    estimate = of(output_tokens=2)
    table = estimate.op_times("decode")
    assert table.total_s.sum() == pytest.approx(estimate.latency.tpot_s, rel=0.01)
    assert set(table.bound_by) <= {"memory", "compute", "latency"}
    assert table.iloc[0].family == "gemm"


def test_quantised_weights_are_read_faster():
    plain, fp8 = (
        planner.estimate(
            LLAMA,
            planner.Inference(batch=1, prompt_tokens=128, output_tokens=8, logits="last"),
            planner.Deployment(gpu="h200", runtime="vllm", weight_dtype=dtype),
        ).latency
        for dtype in (None, "fp8")
    )
    assert 0.5 * plain.tpot_s < fp8.tpot_s < 0.85 * plain.tpot_s


def kinds(model, runtime, which="decode", *, fused=False):
    ready = prepare(planner.load_model(model), planner.Deployment(gpu="h200", runtime=runtime))
    work = planner.Inference(batch=2, prompt_tokens=64, output_tokens=4, logits="last")
    program = getattr(ready.runtime, which)(ready.model, work, ready.setting)
    return timed_ops(program, fused=fused)


@pytest.mark.parametrize("runtime", ["vllm", "attnlab", "transformers"])
def test_attention_is_recognised_with_its_heads(runtime):
    found = {t.kind for t in kinds("llama-3.1-8b", runtime) if isinstance(t.kind, Attention)}
    assert {(k.heads, k.kv_heads, k.head_dim, k.backward) for k in found} == {(32, 8, 128, False)}


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_experts_are_recognised_with_their_sizes(runtime):
    found = [t.kind for t in kinds("mixtral-8x7b", runtime) if isinstance(t.kind, Grouped)]
    assert {(k.n, k.k) for k in found} == {(28672, 4096), (4096, 14336)}


def test_products_have_the_sizes_of_their_layers():
    dims = Dims(batch=2, tokens=1, context=64)
    found = {
        t.op.name: t.kind.sizes(dims)
        for t in kinds("llama-3.1-8b", "vllm")
        if isinstance(t.kind, Product)
    }
    assert found["qkv_proj"] == (2, 6144, 4096)
    assert found["down_proj"] == (2, 4096, 14336)
    assert found["logits"] == (2, 128256, 4096)


def test_gradients_of_weights_are_products_over_the_rows():
    deploy = planner.Deployment(gpu="h200", runtime="transformers", mode="eager")
    model = planner.load_model("llama-3.2-1b")
    work = planner.Training(batch=2, sequence_tokens=256)
    estimate = planner.estimate(model, work, deploy)
    table = estimate.op_times()
    assert table[table.family == "gemm"].flops.mul(table["count"]).sum() == pytest.approx(
        3 * 2 * 512 * (model.parameter_count - 2048 * 4 * 16), rel=0.02
    )
    assert estimate.latency.step_interval_s[0] < estimate.latency.step_s


def test_a_compiler_streams_attention_of_one_query_in_three_kernels():
    """gpt-fast decodes without fused kernels: at short contexts theirs take the longer."""
    compiled, engine = (of(runtime=runtime, output_tokens=2) for runtime in ("attnlab", "vllm"))
    theirs, ours = (
        e.op_times("decode").set_index("family").seconds["decode"] for e in (engine, compiled)
    )
    known = load("h200").fits["elementwise"].seconds((512.0,))
    assert 3 * known < ours < theirs
    long = of(runtime="attnlab", prompt_tokens=100_000, output_tokens=2).op_times("decode")
    assert long.set_index("family").seconds["decode"] >= 2 * 2 * 8 * 128 * 100_000 / 4.8e12


def chunked(most_tokens, batch=1, prompt_tokens=16_384):
    work = planner.Inference(batch=batch, prompt_tokens=prompt_tokens, output_tokens=2)
    deploy = planner.Deployment(
        gpu="h200", runtime="vllm", max_batched_tokens=most_tokens, max_sequences=64
    )
    return planner.estimate(LLAMA, work, deploy)


def test_a_prompt_that_fits_is_one_pass():
    prompt = Dims(batch=2, tokens=100, context=100)
    several, one = prompt_passes(prompt, 200)
    assert several == 1
    assert (one.batch, one.tokens, one.context) == (2, 100, 100)


def test_a_chunked_prompt_has_as_many_tokens_and_pairs_as_a_whole_one():
    several, chunk = prompt_passes(Dims(batch=1, tokens=1000, context=1000), 250)
    pairs = visible_pairs(None)
    assert (several, chunk.tokens) == (4, 250)
    assert several * pairs.of(chunk) == pairs.of(Dims(batch=1, tokens=1000, context=1000))


def test_many_prompts_are_taken_some_at_a_time():
    several, some = prompt_passes(Dims(batch=30, tokens=100, context=100), 1000)
    assert (several, some.batch, some.tokens, some.context) == (3, 10, 100, 100)


def test_smaller_chunks_take_longer_and_compute_as_much():
    whole, large, small = (chunked(tokens) for tokens in (16_384, 2048, 512))
    times = [e.latency.ttft_s for e in (whole, large, small)]
    assert times[0] < 1.01 * times[1] < times[2]  # time is not monotone in a product's rows
    assert times[2] < 2 * times[0]
    assert small.latency.mfu < whole.latency.mfu


def test_the_mean_pass_of_a_prefill_adds_up_to_the_first_token():
    e = chunked(2048)
    assert 8 * e.op_times("prefill").total_s.sum() == pytest.approx(e.latency.ttft_s, rel=0.01)


def test_a_compiler_loads_rows_by_their_index_where_they_are_wanted():
    """torch/_inductor/lowering.py: index, gather, embedding; topk is a kernel, sort inside one."""
    fused, apart = (
        {t.op.kernel for t in kinds("mixtral-8x7b", "attnlab", fused=fused) if _gathers(t.kind)}
        for fused in (True, False)
    )
    assert fused == {"topk", "scatter"}
    assert apart == {*fused, "sort", "index", "gather", "searchsorted"}


def _gathers(kind):
    return isinstance(kind, Bytes) and kind.kind in ("gather", "sort", "topk")


@pytest.mark.parametrize(
    ("batch", "tokens", "us"), [(1, 4096, 205.9), (4, 2048, 210.7), (1, 8192, 632.8)]
)
def test_prompts_of_latents_take_what_their_opened_heads_do(batch, tokens, us):
    """aiconfigurator-core 0.12, h200_sxm, trtllm 1.3.0rc20, context_mla, 16 heads: never fitted."""
    made = planner.estimate(
        planner.load_model("deepseek-v3"),
        planner.Inference(batch=batch, prompt_tokens=tokens, output_tokens=1),
        planner.Deployment(
            gpu="h200",
            runtime="vllm",
            tensor_parallel=8,
            weight_dtype="fp8",
            max_batched_tokens=batch * tokens,
            max_sequences=batch,
        ),
    ).op_times("prefill")
    (attention,) = made[made.op == "attention"].itertuples()
    assert 1e6 * attention.seconds == pytest.approx(us, rel=0.15)


def test_queries_over_latents_take_as_long_as_a_block_of_them_until_a_wave_is_full():
    """DeepSeek-V2-Lite: 16 heads are a block, 132 of them run at once; measured, 94 µs for 8."""
    step = {}
    for batch in (8, 128, 140):
        e = of("deepseek-v2-lite", runtime="attnlab", mode="captured", batch=batch)
        times = e.op_times("decode").set_index("family").seconds
        step[batch] = float(times["decode"])
    assert step[8] == pytest.approx(step[128], rel=0.01)
    assert 1.5 * step[128] < step[140] < 2.5 * step[128]
