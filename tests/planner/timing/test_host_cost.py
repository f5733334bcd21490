"""What the host needs for a pass: no more kernels than the classes run, and what lies between."""

from dataclasses import replace

import pytest

import planner
from planner.program import Dims
from planner.runtimes import runtime_named
from planner.timing import clock
from planner.timing.calibration import load
from planner.timing.host_calls import counted, trained
from planner.timing.host_cost import (
    HOOKED,
    UNPACKED,
    Engine,
    _issued,
    _name,
    between_seconds,
    forward_runs,
    host_seconds,
    python_ops,
    waiting_seconds,
)
from planner.timing.latency import latency
from planner.timing.op_kinds import Product, moved_bytes, timed_ops
from planner.timing.passes import by_phase, by_tower, layers_run_again
from planner.training import training_phase
from tools import checkpoint_cost
from tools.host_calls import TYPES, caches, config

HOST = load("h200").host
LLAMA = Engine(runtime="transformers", model_type="llama", attention="sdpa")
LAYERS = 12
ROUTED = ("deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
INEXACT = (*ROUTED, "bloom", "falcon", "gemma2")
"""Types whose routing, bias or mask is written down in a few ops more or less."""


def of(model, work, **deployment):
    deploy = planner.Deployment(gpu="h200", mode="eager", dtype="bf16", **deployment)
    return planner.estimate(model, work, deploy)


def decode_program(kind, attention=None):
    work = planner.Inference(batch=2, prompt_tokens=4, output_tokens=2, logits="last")
    e = of(planner.read_config(config(kind, LAYERS)), work, attention=attention)
    rules = runtime_named("transformers")
    return e.setting.attention, rules.decode(e.share.model, work, e.setting)


def trained_phases(**fields):
    work = planner.Training(batch=1, sequence_tokens=64, **fields)
    e = of(planner.read_config(config("llama", LAYERS)), work)
    return by_phase(training_phase(e.share.model, work, e.deploy, e.setting).program)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in INEXACT])
def test_a_decode_step_lists_every_kernel_that_the_class_runs_and_none_twice(kind):
    """The class itself is the oracle: tools/host_calls.py counted what it dispatches."""
    attention, program = decode_program(kind)
    layer, whole = counted("transformers", kind, attention)
    listed = sum(timed.count for timed in timed_ops(program))
    assert listed == pytest.approx(LAYERS * layer.kernels + whole.kernels, abs=0.1)


@pytest.mark.parametrize("kind", INEXACT)
def test_others_are_near(kind):
    attention, program = decode_program(kind)
    layer, whole = counted("transformers", kind, attention)
    listed = sum(timed.count for timed in timed_ops(program))
    assert listed == pytest.approx(LAYERS * layer.kernels + whole.kernels, rel=0.1)


CACHES = [(runtime, name) for runtime, named in caches().items() for name in named]


@pytest.mark.parametrize(("runtime", "name"), CACHES)
def test_a_decode_step_over_other_caches_lists_what_they_run(runtime, name):
    """Within three ops a layer: sdpa turns a mask into numbers, a small cast or index is none."""
    cache = caches()[runtime][name]
    kind = "mistral" if "window" in cache else "llama"
    window = {"sliding_window": cache["window"]} if "window" in cache else {}
    work = planner.Inference(
        batch=2, prompt_tokens=5, output_tokens=2, logits="last", padded=cache.get("padded", False)
    )
    e = of(
        planner.read_config(config(kind, LAYERS) | window),
        work,
        runtime=runtime,
        kv_dtype=cache.get("kv_dtype"),
        cache=cache.get("cache"),
    )
    program = runtime_named(runtime).decode(e.share.model, work, e.setting)
    dims = Dims(batch=2, tokens=1, context=6)
    listed = sum(
        timed.count
        for timed in timed_ops(program)
        if not timed.op.sometimes or moved_bytes(timed.op, dims) > 0
    )
    layer, whole = counted(runtime, kind, "sdpa", name)
    assert listed == pytest.approx(LAYERS * layer.kernels + whole.kernels, abs=3.1 * LAYERS)


def test_what_a_pass_finds_is_not_run():
    _, program = decode_program("llama")
    names = [timed.op.name for timed in timed_ops(program)]
    assert "cached keys" in names
    kept = sum(t.count for t in timed_ops(program) if t.op.name == "cached keys")
    assert kept == 2 * LAYERS  # the cat of keys, and its equal, that of values


def test_statistics_of_a_norm_are_no_kernels_of_their_own():
    _, program = decode_program("gpt_neox")
    assert not [t for t in timed_ops(program) if "statistics" in t.op.name]


def test_views_and_python_calls_are_part_of_the_time():
    _, program = decode_program("llama")
    layer, whole = counted("transformers", "llama", "sdpa")
    between = between_seconds(program, HOST, LLAMA)
    views = (LAYERS * layer.views + whole.views) * HOST.op_s["transpose_reshape"] / 2
    calls = (LAYERS * layer.calls + whole.calls) * HOST.op_s["identity_module"] / 3
    assert between == pytest.approx(views + calls)
    assert host_seconds(program, HOST, LLAMA) > HOST.scale["transformers"] * between


def test_an_engine_without_python_issues_its_kernels_alone():
    _, program = decode_program("llama")
    assert between_seconds(program, HOST, Engine(runtime="vllm")) == 0.0


def test_a_type_that_nobody_counted_asks_for_as_much_as_llama():
    assert counted("transformers", "unheard_of", "sdpa") == counted("transformers", "llama", "sdpa")
    assert trained("unheard_of") == trained("llama")


def test_checkpointed_layers_run_again_and_call_more():
    plain, full = (trained_phases(checkpointing=name) for name in ("none", "full"))
    assert layers_run_again(plain) == 0
    assert layers_run_again(full) == LAYERS
    more = trained("llama")
    for phase, wanted in ((0, more.forward), (1, more.backward)):
        bare, called = (
            between_seconds(full[phase], HOST, LLAMA, checkpointed=n) for n in (0, LAYERS)
        )
        own = counted("transformers", "llama", "sdpa")[0].calls if phase else 0.0
        gone = LAYERS * (wanted - own) * HOST.op_s["identity_module"] / 3
        assert called - bare == pytest.approx(HOOKED * gone)


def test_a_call_of_checkpointings_takes_longer_than_a_modules():
    """On this CPU, in the live classes; who shares it makes the ratio larger, not smaller."""
    assert min(checkpoint_cost.ratios("llama", "full", steps=8)) > HOOKED / 2


def test_selective_layers_run_again_and_show_python_every_op():
    full, selective = (trained_phases(checkpointing=name) for name in ("full", "selective"))
    assert layers_run_again(selective) == LAYERS
    asked = replace(LLAMA, selective=True)
    for phase in (0, 1):
        of_full = between_seconds(full[phase], HOST, LLAMA, checkpointed=LAYERS)
        assert between_seconds(selective[phase], HOST, asked, checkpointed=LAYERS) > of_full


def test_dora_calls_more():
    runs = forward_runs(
        trained_phases(method="lora", lora=planner.LoRA(dora=True), checkpointing="none")[0]
    )
    assert runs.dora
    assert trained("llama", dora=True).adapted > 2 * trained("llama").adapted


@pytest.mark.parametrize(("optimizer", "waits"), [("adamw-8bit", 1), ("adafactor", 2)])
def test_an_optimizer_that_waits_for_each_parameter_keeps_the_gpu_waiting(optimizer, waits):
    parameters = len(list(planner.read_config(config("llama", LAYERS)).parameters()))
    seconds = waiting_seconds(trained_phases(optimizer=optimizer)[-1], HOST, LLAMA)
    assert seconds > parameters * waits * HOST.op_s["launch_and_wait"]
    assert waiting_seconds(trained_phases(optimizer="adamw")[-1], HOST, LLAMA) == 0.0


def test_a_weight_of_four_bits_is_made_by_python():
    model = planner.load_model("llama-3.2-1b")
    work = planner.Training(batch=1, sequence_tokens=2048, method="qlora")
    steps = []
    for weight_dtype in ("nf4", "nf4-double"):
        e = of(model, work, weight_dtype=weight_dtype)
        program = training_phase(e.share.model, work, e.deploy, e.setting).program
        steps.append(python_ops(program))
    made = 2 * 7 * len(model.layers) - 3  # forward and back, but to what is not trained
    assert steps == [made * UNPACKED["dequantize_4bit"], made * sum(UNPACKED.values())]


def test_two_towers_wait_for_the_host_apart():
    """T5's decoder waits for its host, its encoder for its kernels."""
    work = planner.Training(batch=4, sequence_tokens=256, encoder_tokens=1024)
    e = of(planner.read_config(config("t5", LAYERS)), work)
    program = training_phase(e.share.model, work, e.deploy, e.setting).program
    phases = by_phase(program)
    assert [len(by_tower(phase)) for phase in phases] == [2, 2, 1]


def test_adapted_layers_are_counted():
    phases = trained_phases(method="lora", checkpointing="none")
    runs = forward_runs(phases[0])
    assert runs.layers == LAYERS
    assert runs.adapted % LAYERS == 0
    assert runs.adapted >= 2 * LAYERS


def test_the_optimizer_runs_no_layer():
    assert forward_runs(trained_phases(optimizer="adamw")[-1]).layers == 0


def test_a_host_that_adds_in_half_the_time_issues_a_step_in_half_the_time():
    model = planner.load_model("llama-3.1-8b")
    work = planner.Inference(batch=1, prompt_tokens=128, output_tokens=8, logits="last")
    known = HOST.op_s["add"]
    slow, same, fast = (
        of(model, work, host_add_s=add_s).latency.tpot_s for add_s in (2 * known, None, known / 2)
    )
    assert slow == pytest.approx(2 * same)
    assert fast == pytest.approx(same / 2)


@pytest.mark.parametrize("add_s", [0.0, -1e-6, 2.0])
def test_an_addition_that_takes_no_time_is_refused(add_s):
    with pytest.raises(planner.ConfigError, match="host_add_s="):
        planner.Deployment(gpu="h200", host_add_s=add_s)


def test_a_cpu_computes_nothing_while_python_runs(monkeypatch):
    """Its op times hold what issuing them costs; what lies between them is added."""
    model = planner.read_config(config("llama", LAYERS))
    work = planner.Inference(batch=2, prompt_tokens=4, output_tokens=2, logits="last")
    measured = load("h200")
    times = []
    for host in (None, HOST):
        known = replace(measured, host=host)
        monkeypatch.setattr(clock, "calibration_of", lambda gpu, known=known: known)
        latency.cache_clear()
        e = planner.estimate(model, work, planner.Deployment(gpu="cpu", dtype="bf16"))
        times.append(e.latency.tpot_s)
    latency.cache_clear()
    program = runtime_named("transformers").decode(model, work, e.setting)
    assert times[1] - times[0] == pytest.approx(between_seconds(program, HOST, LLAMA))


def test_attention_in_fp32_over_grouped_heads_is_written_out():
    """An H200 ran llama-50m's in torch's math kernel (profiles/data/h200.jsonl, smoke)."""
    model = planner.read_config(config("llama", LAYERS))
    work = planner.Inference(batch=2, prompt_tokens=4, output_tokens=2, logits="last")
    seconds = []
    for dtype in ("fp32", "bf16"):
        deploy = planner.Deployment(gpu="h200", runtime="attnlab", mode="eager", dtype=dtype)
        e = planner.estimate(model, work, deploy)
        program = runtime_named("attnlab").decode(e.share.model, work, e.setting)
        engine = replace(LLAMA, runtime="attnlab")
        seconds.append(host_seconds(program, HOST, engine) / HOST.scale["attnlab"])
    ops = HOST.op_s
    more = 2 * ops["linear"] + 5 * ops["add"] - ops["sdpa"]
    cast = 4 * LAYERS + 4  # of norms and tables, counted in bf16: float32 runs something else
    less = cast * (ops["cast"] - ops["add"])
    assert seconds[0] - seconds[1] == pytest.approx(LAYERS * more - less)


def test_ops_of_a_mixture_cost_what_was_timed_of_them():
    """attnlab's, whose programs name what deals tokens out."""
    work = planner.Inference(batch=2, prompt_tokens=4, output_tokens=2, logits="last")
    e = of(planner.load_model("qwen1.5-moe-a2.7b"), work, runtime="attnlab")
    program = runtime_named("attnlab").decode(e.share.model, work, e.setting)
    found = {_name(timed): 0 for timed in timed_ops(program)}
    for timed in timed_ops(program):
        found[_name(timed)] += timed.count
    layers = 24
    for op in ("softmax", "topk", "gather", "sort", "searchsorted", "floor_divide", "scatter"):
        assert found[op] == layers
    assert (found["arange"], found["index"], found["grouped_mm"]) == (48, 48, 48)
    assert found["linear_bias"] == 3 * layers  # queries, keys, values


def test_a_product_of_sequences_folds_them_where_rows_alone_were_timed():
    _, program = decode_program("llama")
    products = sum(t.count for t in timed_ops(program) if isinstance(t.kind, Product))
    free = replace(HOST, op_s={**HOST.op_s, "transpose_reshape": 0.0})
    with_views, without = (_issued(program, host)[0] for host in (HOST, free))
    assert with_views - without == pytest.approx(products * HOST.op_s["transpose_reshape"])
