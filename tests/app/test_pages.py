"""Each page as a visitor has it, run by streamlit's own test driver."""

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import planner
from app import controls, measurements
from planner.format import gib, seconds
from profiles import records
from profiles.compare import estimate_of
from profiles.records import Environment
from tests.profiles.made import CONFIG as TINY
from tests.profiles.made import measured

pytestmark = pytest.mark.usefixtures("store")

ROOT = Path(__file__).parents[2]

CONFIG = TINY | {"architectures": ["LlamaForCausalLM"]}

ENVIRONMENT = Environment(
    device="cpu",
    device_name="some processor",
    gpu="cpu",
    platform="Linux",
    python="3.12.1",
    torch="2.11.0",
    total_memory_bytes=16 * 2**30,
)


def made(**changes):
    """A record of a small model on a CPU; bytes as predicted, times as given."""
    values = {
        "config": CONFIG,
        "attention": "sdpa:math",
        "environment": ENVIRONMENT,
        "ttft_s": (0.1, 0.2, 0.3),
        "step_s": (0.01, 0.01, 0.01),
    }
    values |= changes
    memory = estimate_of(measured(**values)).memory
    values |= {
        "weights_bytes": memory.weights_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "peak_live_bytes": memory.peak_live_bytes * 2,
    }
    return measured(**values)


def opened(page=None, **query):
    """The app at a link."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=30)
    app.query_params.update(query)
    app.run()
    if page is not None:
        app.switch_page(f"views/{page}.py").run()
    assert not app.exception
    return app


def metrics(app):
    return {metric.label: metric.value for metric in app.metric}


def captions(app):
    return " ".join(caption.value for caption in app.caption)


@pytest.mark.parametrize(
    ("model", "runtime"),
    [
        ("llama-3.1-8b", "attnlab"),
        ("gemma-2-9b", "vllm"),
        ("deepseek-v3", "transformers"),
        ("phi-3-mini-4k", "vllm"),
    ],
)
def test_a_link_opens_the_plan_that_the_planner_computes(model, runtime):
    app = opened(model=model, runtime=runtime, gpu="h200", batch="2", prompt="300")
    expected = planner.estimate(
        planner.load_model(model),
        planner.Inference(batch=2, prompt_tokens=300, output_tokens=256, logits="last"),
        planner.Deployment(gpu="h200", runtime=runtime),
    )
    assert app.header[0].value == f"{model} on NVIDIA H200 SXM"
    ledger = app.dataframe[-1].value
    assert ledger["bytes"].sum() == expected.memory.total_bytes
    verdicts = app.success if expected.fits else app.error
    assert len(verdicts) == 1
    assert ("KV pool tokens" in metrics(app)) == (runtime == "vllm")
    assert "ops measured on h200" in captions(app)
    assert "nothing was measured on NVIDIA H200 SXM yet" in captions(app)


def test_a_mixture_s_link_says_how_tokens_pick_experts():
    app = opened(model="qwen3-30b-a3b", runtime="vllm", gpu="h200", routing="zipf:1", output="9")
    expected = planner.estimate(
        planner.load_model("qwen3-30b-a3b"),
        planner.Inference(
            batch=8,
            prompt_tokens=2048,
            output_tokens=9,
            logits="last",
            routing=planner.Routing(distribution="zipf", skew=1.0),
        ),
        planner.Deployment(gpu="h200", runtime="vllm"),
    )
    assert metrics(app)["TPOT"].split(" ±")[0] == seconds(expected.latency.tpot_s)
    dense = opened(model="gpt2")
    assert "routing" not in {widget.key for widget in dense.sidebar.selectbox}


def test_limits_are_the_planners():
    app = opened(model="gpt2", runtime="vllm", gpu="t4", prompt="700", output="100")
    plan = (
        planner.load_model("gpt2"),
        planner.Inference(batch=8, prompt_tokens=700, output_tokens=100, logits="last"),
        planner.Deployment(gpu="t4", runtime="vllm"),
    )
    assert metrics(app)["Longest context"] == f"{planner.max_context_tokens(*plan):,}"
    assert metrics(app)["Largest batch"] == f"{planner.max_batch(*plan):,}"
    assert "dtype=float32" in captions(app)  # config.json is silent on it


def test_what_torch_reserves_is_shown_as_simulated():
    app = opened(model="gpt2", gpu="h200", batch="2", prompt="100", output="20")
    work = planner.Inference(batch=2, prompt_tokens=100, output_tokens=20, logits="last")
    e = planner.estimate(planner.load_model("gpt2"), work, planner.Deployment(gpu="h200"))
    assert metrics(app)["Reserved by torch"] == gib(e.memory.peak_reserved_bytes)
    assert "Reserved by torch: simulated." in [text.value for text in app.caption]


def test_fragments_that_do_not_fit_are_a_warning():
    """The parts of a plan close to the limit add up to less than the memory, segments do not."""
    app = opened(model="llama-3.1-8b", gpu="rtx-4090", batch="22", prompt="1500", output="60")
    assert len(app.success) == 1
    (warning,) = app.warning
    assert "torch's segments may not" in warning.value
    assert "out of memory at a request of" in warning.value


def test_choosing_by_widget_changes_the_plan_and_the_link():
    app = opened(runtime="vllm")
    app.get_by_key("model").select("qwen2.5-7b")
    app.get_by_key("batch").set_value(3).run()
    assert not app.exception
    assert app.header[0].value.startswith("qwen2.5-7b")
    assert "batch 3" in captions(app)


def test_a_context_beyond_the_positions_is_said_in_the_planners_words():
    app = opened(model="gpt2", runtime="vllm", prompt="1025")
    assert len(app.error) == 1
    assert "max_position_embeddings=1024" in app.error[0].value
    assert len(app.metric) == 0
    assert len(app.number_input) == 3


def test_a_model_that_the_runtime_does_not_run_is_said_so():
    assert "bamba" in opened(model="bamba-9b", runtime="attnlab").error[0].value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{nope", "mine.json is not JSON"),
        (b"[1]", "a JSON object is needed"),
        (b"[" * 100_000, "mine.json is not JSON"),
        (json.dumps(CONFIG | {"num_key_value_heads": 3}).encode(), "num_key_value_heads=3"),
        (b"{}", "model_type"),
    ],
)
def test_an_upload_that_is_no_model_gets_one_line_and_keeps_the_controls(content, said):
    app = opened(runtime="vllm")
    app.file_uploader[0].set_value(("mine.json", content, "application/json")).run()
    assert not app.exception
    assert len(app.error) == 1
    assert said in app.error[0].value
    assert "\n" not in app.error[0].value
    assert len(app.number_input) == 3


def test_an_uploaded_config_takes_the_place_of_the_catalogue():
    app = opened(runtime="vllm", prompt="100")
    content = json.dumps(CONFIG).encode()
    app.file_uploader[0].set_value(("mine.json", content, "application/json")).run()
    assert not app.exception
    assert app.header[0].value.startswith("mine on")


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("model", "<script>", "llama-3.1-8b"),
        ("gpu", "H200", "h200"),
        ("runtime", "", "vllm"),
        ("dtype", "int2", "as the model"),
        ("batch", "-3", 8),
        ("batch", "nan", 8),
        ("batch", "2.5", 2),
        ("prompt", "9" * 30, 2048),
    ],
)
def test_a_wrong_value_in_the_link_is_named_with_what_is_taken(key, value, taken):
    app = opened(**({"runtime": "vllm"} | {key: value}))
    assert len(app.warning) == 1
    assert f"{key}={value!r}" in app.warning[0].value
    if key != "runtime":
        assert app.get_by_key(key).value == taken


def test_a_quantised_cache_is_set_by_widgets_and_links():
    app = opened(runtime="transformers", kv_dtype="int4", kv_backend="hqq", kv_group="32")
    spec = planner.CacheSpec(kind="quantised", backend="hqq", q_group_size=32, residual_tokens=128)
    expected = planner.estimate(
        planner.load_model("llama-3.1-8b"),
        planner.Inference(batch=8, prompt_tokens=2048, output_tokens=256, logits="last"),
        planner.Deployment(gpu="h200", kv_dtype="int4", cache=spec),
    )
    assert app.dataframe[-1].value["bytes"].sum() == expected.memory.total_bytes
    assert app.get_by_key("kv_backend").options == ["quanto", "hqq"]
    app.get_by_key("kv_dtype").select("int8").run()
    assert not app.exception
    assert app.get_by_key("kv_backend").options == ["hqq"]
    items = list(app.dataframe[-1].value["item"])
    for part in ("hqq int8 codes", "scales and zero points", "residual"):
        assert f"full attention, {part}" in items


def test_the_kv_dtypes_are_what_the_runtime_keeps():
    app = opened(runtime="transformers", kv_dtype="int4")
    app.get_by_key("runtime").set_value("vllm").run()
    assert not app.exception
    assert len(app.error) == 0
    assert "int4" not in app.get_by_key("kv_dtype").options
    linked = opened(runtime="vllm", kv_dtype="int4")
    assert "kv_dtype='int4' in the link is not one of as the model" in linked.warning[0].value
    assert linked.get_by_key("kv_dtype").value == "as the model"
    other = opened(runtime="transformers", kv_dtype="int8", kv_backend="quanto")
    assert "kv_backend='quanto' in the link is not one of hqq" in other.warning[0].value


@pytest.mark.parametrize(
    ("model", "query", "said"),
    [
        ("mistral-7b-v0.1", {}, "QuantizedCache has full attention layers only"),
        ("llama-3.1-8b", {"kv_group": "96"}, "cache.q_group_size=96 does not divide"),
    ],
)
def test_what_a_quantised_cache_does_not_take_is_one_line(model, query, said):
    app = opened(runtime="transformers", model=model, kv_dtype="int4", **query)
    assert len(app.error) == 1
    assert said in app.error[0].value


def test_limits_below_which_groups_do_not_come_out_even_are_none():
    app = opened(runtime="transformers", kv_dtype="int4", prompt="300", output="8")
    content = json.dumps(CONFIG).encode()  # 2 heads of 16: every second prompt makes groups of 64
    app.file_uploader[0].set_value(("mine.json", content, "application/json")).run()
    assert not app.exception
    assert metrics(app)["Longest context"] == "none"


@pytest.mark.parametrize("value", ["inf", "9" * 400])
def test_an_infinite_number_in_the_link_is_no_traceback_and_leaves_a_working_widget(value):
    app = opened(runtime="vllm", batch=value)
    assert len(app.warning) == 1
    assert "batch 8" in captions(app)
    app.number_input[0].set_value(5).run()
    assert not app.exception
    assert "batch 5" in captions(app)


def test_a_right_link_has_no_warning():
    asked = {"model": "gpt2", "gpu": "t4", "batch": "1", "prompt": str(2**31 - 1), "other": "x"}
    assert controls.link_problems(asked, taken={}) == []


def test_a_training_step_is_planned():
    app = opened(runtime="attnlab", workload="training", sequence="4096", batch="2")
    assert not app.exception
    work = planner.Training(batch=2, sequence_tokens=4096)
    deploy = planner.Deployment(gpu="h200", runtime="attnlab")
    memory = planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy).memory
    shown = {card.label: card.value for card in app.metric}
    assert shown["Total"] == gib(memory.total_bytes)
    assert shown["Reserved by torch"] == gib(memory.peak_reserved_bytes)
    assert {"Step", "Trained tokens/s", "Longest sequence", "Largest batch"} <= set(shown)
    assert not {"TTFT", "KV cache"} & set(shown)
    app.get_by_key("checkpointing").set_value("full").run()
    assert not app.exception
    assert {card.label: card.value for card in app.metric}["Total"] != shown["Total"]


@pytest.mark.parametrize("precision", ["autocast", "master"])
def test_every_way_to_train_in_transformers_is_planned(precision):
    how = {"optimizer": "muon", "checkpointing": "full", "checkpoint_every": "2"}
    app = opened(workload="training", sequence="2048", batch="1", precision=precision, **how)
    assert not app.exception
    work = planner.Training(
        batch=1,
        sequence_tokens=2048,
        optimizer="muon",
        checkpointing="full",
        checkpoint_every=2,
        precision=precision,
    )
    model = planner.load_model("llama-3.1-8b")
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    shown = {card.label: card.value for card in app.metric}
    assert shown["Total"] == gib(memory.total_bytes)


@pytest.mark.parametrize(("method", "kept"), [("lora", None), ("qlora", "nf4-double")])
def test_adapters_are_planned_beside_weights_of_any_kind(method, kept):
    how = {"checkpointing": "full", "rank": "4", "precision": "autocast"}
    frozen = {} if kept is None else {"frozen_in": kept}
    app = opened(workload="training", batch="2", method=method, adapters="DoRA", **how, **frozen)
    assert not app.exception
    assert not app.sidebar.warning
    work = planner.Training(
        batch=2,
        sequence_tokens=2048,
        method=method,
        lora=planner.LoRA(rank=4, dora=True),
        checkpointing="full",
        precision="autocast",
    )
    deploy = planner.Deployment(gpu="h200", weight_dtype=kept)
    model = planner.load_model("llama-3.1-8b")
    assert metrics(app)["Total"] == gib(planner.estimate(model, work, deploy).memory.total_bytes)
    assert metrics(app)["Largest batch"] == str(planner.max_batch(model, work, deploy))


def test_sharded_training_is_planned():
    link = {"model": "smollm2-135m", "gpu": "h100-80gb", "workload": "training", "shards": "8"}
    app = opened(**link, shards_in="fp32", reduced_in="bf16", resharded="none")
    assert not app.exception
    deploy = planner.Deployment(
        gpu="h100-80gb",
        weight_dtype="fp32",
        data_parallel_shards=8,
        reshard_after_forward="none",
        reduce_dtype="bf16",
        mode="eager",
    )
    work = planner.Training(batch=8, sequence_tokens=2048)
    with_eight = planner.estimate(planner.load_model("smollm2-135m"), work, deploy)
    assert metrics(app)["Total"] == gib(with_eight.memory.total_bytes)
    assert metrics(app)["Step"] == seconds(with_eight.latency.step_s)


def test_runtimes_are_those_that_plan_the_workload():
    app = opened(runtime="vllm", workload="training")
    assert "runtime='vllm' in the link is not one of transformers" in app.warning[0].value
    assert app.get_by_key("runtime").options == ["transformers", "attnlab", "litgpt", "torchtune"]
    assert "vllm" in opened(runtime="vllm").get_by_key("runtime").options
    assert "litgpt" not in opened().get_by_key("runtime").options


def test_weights_are_quantised_as_the_runtime_can():
    app = opened(model="llama-3.1-70b", gpu="h100-80gb", runtime="vllm", tp="2", weights="fp8")
    deploy = planner.Deployment(
        gpu="h100-80gb", runtime="vllm", tensor_parallel=2, weight_dtype="fp8"
    )
    work = planner.Inference(batch=8, prompt_tokens=2048, output_tokens=256, logits="last")
    e = planner.estimate(planner.load_model("llama-3.1-70b"), work, deploy)
    assert metrics(app)["At full length"] == f"{e.max_concurrency:,.1f}"
    assert app.get_by_key("weights").options == ["as the model", "fp8"]


def test_steps_are_launched_as_the_runtime_does_unless_it_is_said():
    shown = {
        mode: metrics(opened(model="gpt2", prompt="99", **({"mode": mode} if mode else {})))["TPOT"]
        for mode in ("", "eager", "graph")
    }
    assert shown[""] == shown["eager"] != shown["graph"]


def test_what_makes_a_plan_fit_is_taken_by_a_button():
    link = {"model": "llama-3.1-70b", "gpu": "h100-80gb", "runtime": "vllm", "tp": "2"}
    app = opened(**link, prompt="32768", batch="4")
    assert "lacks" in app.error[0].value
    (button,) = [b for b in app.button if b.label.startswith("fp8 weights")]
    button.click().run()
    assert not app.exception
    assert app.get_by_key("weights").value == "fp8"
    assert app.success
    assert app.success[0].value.split()[1] in button.label


def test_a_pasted_config_takes_the_place_of_the_catalogue():
    app = opened(runtime="vllm", prompt="100")
    app.get_by_key("pasted config").set_value(json.dumps(CONFIG)).run()
    assert not app.exception
    assert app.header[0].value.startswith("pasted on")
    app.get_by_key("pasted config").set_value('{"model_type": "llama", "hidden_size": NaN}').run()
    assert "hidden_size" in app.error[0].value


def test_limits_are_those_of_the_model_that_was_asked_for():
    link = {"model": "pythia-1.4b", "runtime": "litgpt", "workload": "training", "batch": "1"}
    app = opened(gpu="a100-40gb", sequence="512", method="lora", **link)
    assert not app.exception
    assert metrics(app)["Longest sequence"] == "2,048"


def test_the_plan_names_its_nearest_measurement(store):
    records.append(store, made())
    app = opened(model="llama-50m", gpu="cpu", runtime="attnlab", prompt="64", output="8")
    assert "Off by: Peak, live -50.00%, the other memory to the byte, TTFT" in captions(app)
    app = opened(model="llama-50m", gpu="cpu", runtime="vllm", prompt="64", output="8")
    assert "nothing was measured in vllm on CPU" in captions(app)


def test_the_nearest_record_is_of_the_same_model_then_of_the_closest_sizes(store):
    for changes in (
        {"model": "llama-50m", "prompt_tokens": 4},
        {"model": "llama-50m", "prompt_tokens": 300},
        {"model": "other", "prompt_tokens": 100},
        {"model": "llama-50m", "prompt_tokens": 100, "runtime": "transformers"},
    ):
        records.append(store, made(attention="sdpa", **changes))
    found = measurements.loaded()
    work = planner.Inference(batch=2, prompt_tokens=100, output_tokens=4)
    model = planner.load_model("llama-50m")
    deploy = planner.Deployment(gpu="cpu", runtime="attnlab")
    near = measurements.nearest(found, model, work, deploy)
    assert near is not None
    assert (near.model, near.prompt_tokens) == ("llama-50m", 300)
    assert len(found) == 4
    records.append(store, made(model="llama-50m", prompt_tokens=101, kv_dtype="int8"))
    found = measurements.loaded()
    assert measurements.nearest(found, model, work, deploy) == near, "over another cache"
    int8 = planner.Deployment(gpu="cpu", runtime="attnlab", kv_dtype="int8")
    assert measurements.nearest(found, model, work, int8).prompt_tokens == 101
    elsewhere = planner.Deployment(gpu="t4", runtime="attnlab")
    assert measurements.nearest(found, model, work, elsewhere) is None


def test_of_runs_of_one_size_the_nearest_is_the_one_that_tells_most(store):
    sizes = {"model": "llama-50m", "prompt_tokens": 100, "output_tokens": 4, "phase": "generation"}
    told = {"ttft_s": (0.1,), "step_s": (0.1,) * 3, "host_add_s": (1e-6,) * 4}
    for changes in ({}, {**told, "peak_live_bytes": None}, told, {}):
        records.append(store, made(attention="sdpa", **sizes | changes))
    work = planner.Inference(batch=2, prompt_tokens=100, output_tokens=4)
    deploy = planner.Deployment(gpu="cpu", runtime="attnlab")
    model = planner.load_model("llama-50m")
    near = measurements.nearest(measurements.loaded(), model, work, deploy)
    assert near.host_add_s
    assert near.peak_live_bytes is not None
