"""A workload's passes as a trace: against real forwards, another simulator, and themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import planner
from attnlab.kv_cache import KVCache
from attnlab.transformer import Transformer
from planner import CacheSpec, Deployment, Inference, reserved
from planner.allocator import AllocatorSettings, DeviceAllocator
from planner.allocator.simulate import Replay
from profiles import workloads
from profiles.meters import LiveTensorMeter
from profiles.recording import AllocationRecorder
from tests.planner.configs import TINY, build

MIB = 2**20
EXPANDABLE = AllocatorSettings(expandable_segments=True)
ATTNLAB = [name for name in TINY if name not in ("mixtral", "deepseek_v3")]


def plan_of(model, work, **deploy):
    estimate = planner.estimate(model, work, Deployment(**{"gpu": "h200", **deploy}))
    return estimate.memory.torch


def on_the_cpu(model, work, runtime, attention, **deploy):
    """The plan of a GPU with the kernels of a CPU, no workspace: what a real forward here does."""
    how = dict(runtime=runtime, attention=attention, dtype="bf16", **deploy)
    plan = plan_of(model, work, **how)
    setting = replace(plan.setting, device="cpu")
    return replace(plan, setting=setting, workspace_bytes=0)


def weights_bytes(plan):
    return sum(event.size_bytes for event in reserved.weight_events(plan))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 24), (2, 90)])
def test_a_greedy_generation_in_transformers_needs_what_the_trace_asks_for(name, batch, tokens):
    live = build(TINY[name], device="cpu", dtype=torch.bfloat16, attention="eager")
    ids = torch.randint(1, 99, (batch, tokens))
    with torch.no_grad(), LiveTensorMeter() as meter:
        cache, step = None, ids
        for _ in range(4):
            out = live(step, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            del out
            step = token
    work = Inference(batch=batch, prompt_tokens=tokens, output_tokens=4)
    plan = on_the_cpu(planner.read_config(TINY[name]), work, "transformers", "eager")
    stats = reserved.reserved(plan).stats
    prompt = 8 * batch * tokens
    assert stats.peak_requested_bytes - weights_bytes(plan) - prompt == meter.peak_bytes


@pytest.mark.parametrize("name", ATTNLAB)
def test_a_greedy_generation_in_attnlab_needs_what_the_trace_asks_for(name):
    model = planner.read_config(TINY[name])
    live = Transformer(model, attention="naive", dtype=torch.bfloat16, device="cpu")
    step = torch.randint(1, 99, (2, 90))
    with torch.no_grad(), LiveTensorMeter() as meter:
        cache = KVCache(model, batch=2, capacity_tokens=93, dtype=torch.bfloat16, device="cpu")
        for _ in range(4):
            step = live(step, cache=cache, logits="all")[:, -1:].argmax(-1)
    work = Inference(batch=2, prompt_tokens=90, output_tokens=4)
    plan = on_the_cpu(model, work, "attnlab", "naive")
    stats = reserved.reserved(plan).stats
    assert stats.peak_requested_bytes - weights_bytes(plan) - 8 * 2 * 90 == meter.peak_bytes


def test_llama_8b_is_what_an_independent_simulator_says():
    """Traced by others on fake tensors, without a workspace: prefill of 1 × 2 048, last logits.

    15 805.5 MiB allocated, 15 914 MiB reserved.
    """
    model = planner.load_model("llama-3.1-8b")
    plan = plan_of(model, Inference(batch=1, prompt_tokens=2048, logits="last"))
    bare = replace(plan, workspace_bytes=0)
    assert round(bare.peak_allocated_bytes / MIB, 1) == 15_805.5
    assert bare.peak_reserved_bytes == 15_914 * MIB
    assert plan.peak_allocated_bytes == bare.peak_allocated_bytes + 32 * MIB


CASES = [
    ("llama-3.1-8b", "transformers", Inference(batch=4, prompt_tokens=1000, output_tokens=40)),
    ("llama-3.1-8b", "attnlab", Inference(batch=2, prompt_tokens=2000, output_tokens=150)),
    ("mistral-7b-v0.1", "transformers", Inference(batch=1, prompt_tokens=4080, output_tokens=40)),
    ("gpt2", "transformers", Inference(batch=2, prompt_tokens=20, output_tokens=120)),
]


@pytest.mark.parametrize(("name", "runtime", "work"), CASES)
@pytest.mark.parametrize("settings", [AllocatorSettings(), EXPANDABLE])
def test_steps_that_only_repeat_change_nothing(monkeypatch, name, runtime, work, settings):
    plan = plan_of(planner.load_model(name), work, runtime=runtime)
    short = reserved.reserved(plan, settings=settings, max_events=10**9)
    monkeypatch.setattr(reserved._Rest, "rests", lambda self, requests: False)
    every = reserved.reserved(plan, settings=settings, max_events=10**9 + 1)  # not cached
    assert short.steps_played == short.steps == every.steps_played
    assert short.stats.peak_reserved_bytes == every.stats.peak_reserved_bytes
    assert short.stats.peak_allocated_bytes == every.stats.peak_allocated_bytes
    assert short.stats.end == every.stats.end
    assert name == "gpt2" or short.stats.events < every.stats.events


def test_steps_left_out_are_said_and_change_little():
    work = Inference(batch=1, prompt_tokens=100, output_tokens=200, logits="last")
    plan = plan_of(planner.load_model("llama-3.1-8b"), work)
    some = reserved.reserved(plan, max_events=60_000)
    every = reserved.reserved(plan, max_events=10**9)
    assert some.steps_played < some.steps == every.steps_played
    assert some.note == (f"simulated; {some.steps_played} of 199 decode steps played")
    assert some.stats.peak_reserved_bytes == pytest.approx(
        every.stats.peak_reserved_bytes, rel=2e-3
    )


def test_a_cache_that_grows_by_concatenation_fragments_and_expandable_segments_help():
    work = Inference(batch=8, prompt_tokens=8192, output_tokens=200, logits="last")
    e = planner.estimate(planner.load_model("llama-3.1-8b"), work, Deployment(gpu="h200"))
    plain, expandable = e.allocator(), e.allocator(EXPANDABLE)
    assert expandable.stats.peak_reserved_bytes < plain.stats.peak_reserved_bytes
    assert expandable.stats.peak_requested_bytes == plain.stats.peak_requested_bytes
    assert plain.stats.peak_reserved_bytes == e.memory.peak_reserved_bytes


def test_an_estimate_plays_nothing_until_it_is_asked(monkeypatch):
    monkeypatch.setattr(reserved, "_play", None)
    reserved.reserved.cache_clear()
    work = Inference(batch=3, prompt_tokens=77, output_tokens=5)
    e = planner.estimate(planner.load_model("gpt2"), work, Deployment(gpu="h200"))
    assert e.fits
    assert e.memory.total_bytes > 0
    with pytest.raises(TypeError, match="not callable"):
        _ = e.memory.peak_reserved_bytes


@pytest.mark.parametrize("deploy", [Deployment(gpu="cpu"), Deployment(gpu="h200", runtime="vllm")])
def test_cpus_and_pools_have_no_reserved_bytes(deploy):
    work = Inference(batch=1, prompt_tokens=77)
    e = planner.estimate(planner.load_model("gpt2"), work, deploy)
    assert e.memory.peak_reserved_bytes is None
    assert e.allocator() is None
    assert e.reserved_note == ""
    assert e.to_dict()["memory"]["peak_reserved_bytes"] is None


def test_the_device_holds_the_context_and_what_torch_reserves():
    work = Inference(batch=1, prompt_tokens=512)
    memory = planner.estimate(planner.load_model("gpt2"), work, Deployment(gpu="h200")).memory
    assert memory.peak_allocated_bytes >= memory.peak_live_bytes + 8 * 512 + 32 * MIB
    assert memory.peak_reserved_bytes > memory.peak_allocated_bytes
    outside = memory.device_used_bytes - memory.peak_reserved_bytes
    assert (
        outside == 720_175_104
    )  # an H200: profiles/data/overheads, float32 has no cuDNN attention


def test_what_runs_out_of_memory_says_at_what_and_what_it_would_need():
    work = Inference(batch=1, prompt_tokens=512)
    e = planner.estimate(planner.load_model("llama-3.1-8b"), work, Deployment(gpu="t4"))
    played = e.allocator()
    assert played.oom is not None
    assert "out of memory at a request of" in e.reserved_note
    assert e.memory.peak_reserved_bytes > e.gpu.memory_bytes
    assert "out of memory" in e.explain()


def test_torch_empties_its_cache_before_it_gives_up():
    """A card that the blocks fit, and the segments do not."""
    work = Inference(batch=8, prompt_tokens=500, output_tokens=300, logits="last")
    plan = plan_of(planner.load_model("olmo2-7b"), work)
    room = plan.peak_reserved_bytes - plan.peak_allocated_bytes
    tight = replace(plan, capacity_bytes=plan.peak_allocated_bytes + 7 * room // 10)
    played = reserved.reserved(tight)
    assert played.oom is None
    assert played.stats.retries > 0
    assert played.stats.peak_reserved_bytes <= tight.capacity_bytes < plan.peak_reserved_bytes
    assert "torch has to empty its cache" in played.note


def test_every_stored_tensor_of_quantised_weights_is_allocated():
    model = planner.load_model("llama-3.1-8b")
    work = Inference(batch=1, prompt_tokens=8)
    e = planner.estimate(model, work, Deployment(gpu="h200", weight_dtype="nf4"))
    assert weights_bytes(e.memory.torch) == e.memory.weights_bytes


def test_of_caches_that_quantise_anew_only_the_prefill_is_played():
    model = planner.load_model("llama-3.1-8b")
    deploy = Deployment(gpu="h200", kv_dtype="int4")
    prefill = planner.estimate(model, Inference(batch=1, prompt_tokens=400), deploy)
    assert prefill.memory.peak_reserved_bytes > prefill.memory.peak_live_bytes
    whole = Inference(batch=1, prompt_tokens=400, output_tokens=9)
    memory = planner.estimate(model, whole, deploy).memory
    assert memory.peak_reserved_bytes is None
    assert memory.peak_allocated_bytes > memory.peak_live_bytes


STEPS_ALIKE = [
    ("transformers", "fp8", None),
    ("transformers", None, CacheSpec(kind="static")),
    ("attnlab", "int8", None),
    ("attnlab", None, CacheSpec(kind="paged")),
    ("attnlab", None, CacheSpec(kind="dynamic")),
    ("attnlab", "int4", CacheSpec(kind="quantised", residual_tokens=64)),
]


@pytest.mark.parametrize(("runtime", "kv_dtype", "cache"), STEPS_ALIKE)
def test_other_caches_take_the_segments_that_their_real_steps_take(runtime, kv_dtype, cache):
    """Every storage of a generation on a CPU, through the same allocator; KIVI: ± 2 MiB of small
    blocks."""
    model, cpu = planner.load_model("llama-50m"), torch.device("cpu")
    how = {"runtime": runtime, "kv_dtype": kv_dtype, "cache": cache}
    work = Inference(batch=4, prompt_tokens=500, output_tokens=16, logits="last")
    plan = on_the_cpu(model, work, attention=None, **how)
    workload = workloads.build(model, attention=None, dtype="bf16", device=cpu, **how)
    with AllocationRecorder() as recorder:
        ids = torch.ones(4, 500, dtype=torch.long)
        workload.begin(batch=4, capacity_tokens=515)
        for _ in workload.tokens(ids, output_tokens=16, logits="last"):
            pass
    real = Replay(DeviceAllocator())
    real.feed(reserved.weight_events(plan))
    real.feed(recorder.trace)
    assert plan.peak_allocated_bytes == real.stats().peak_allocated_bytes
    slack = 2 * MIB if cache is not None and cache.kind == "quantised" else 0
    assert abs(plan.peak_reserved_bytes - real.stats().peak_reserved_bytes) <= slack
