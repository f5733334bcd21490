"""Small models really measured on the CPU, and what becomes of everything that goes wrong."""

import pytest
import torch

import planner
from planner import ConfigError
from profiles import environment, records, runner
from profiles.bench import status_of
from profiles.compare import compare
from profiles.meters import LiveTensorMeter
from profiles.points import GENERATIVE
from profiles.runner import profile
from profiles.workloads import AttnlabWorkload, attention_name, build

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 1000,
    "n_positions": 128,
    "dtype": "float32",
}
WORK = {"batch": 2, "prompt_tokens": 16, "output_tokens": 5}
RUNTIMES = ("attnlab", "transformers")


@pytest.fixture(scope="module")
def llama():
    return planner.read_config(LLAMA)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("measured") / "records.jsonl"


@pytest.fixture(scope="module", params=RUNTIMES)
def measured(request, llama, store):
    """The three phases of a tiny llama in one runtime, by phase."""
    made = profile(
        llama, **WORK, runtime=request.param, device="cpu", repeats=3, warmup=1, out=store
    )
    return {record.phase: record for record in made}


def test_weights_and_cache_bytes_are_what_the_planner_says(measured, llama):
    for record in measured.values():
        assert record.status == "ok"
        estimate = planner.estimate(
            llama,
            planner.Inference(batch=2, prompt_tokens=16, output_tokens=record.output_tokens),
            planner.Deployment(gpu="cpu", runtime=record.runtime),
        )
        assert record.weights_bytes == estimate.memory.weights_bytes
        assert record.kv_cache_bytes == estimate.memory.kv_cache_bytes


def test_the_live_peak_is_what_the_planner_says_to_the_byte(measured):
    """Two ways that share no code: liveness over the planner's ops, storages seen by the meter."""
    rows = compare([measured["prefill"], measured["generation"]])
    peaks = [(r.predicted, r.measured) for r in rows if r.quantity == "peak_live_bytes"]
    assert len(peaks) == 2
    assert all(predicted == seen for predicted, seen in peaks)


def test_weights_and_cache_bytes_are_what_the_shapes_say(measured):
    """Embedding and head 2·1000·64; q and o 2·64·64, k and v 2·32·64, three 64·128, norms 5·64."""
    elements = 2 * 1000 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 5 * 64
    for record in measured.values():
        buffers = 8 * 4 * (2 if record.runtime == "transformers" else 1)  # inv_freq, float32
        assert record.weights_bytes == elements * 2 + buffers
        assert record.kv_cache_bytes == 2 * 2 * 2 * 2 * 16 * 2 * (15 + record.output_tokens)


def test_every_timed_step_is_kept(measured):
    assert len(measured["prefill"].step_s) == 3
    assert len(measured["decode"].step_s) == 4  # one pass of four steps is enough for 3 repeats
    assert len(measured["generation"].ttft_s) == 3
    assert len(measured["generation"].step_s) == 3 * 4
    assert all(s > 0 for record in measured.values() for s in record.step_s)


def test_the_hosts_speed_is_told_before_every_timed_step(measured):
    for record in measured.values():
        assert len(record.host_add_s) == len((*record.ttft_s, *record.step_s))
        assert all(0 < s < 1e-2 for s in record.host_add_s)


def test_a_record_says_what_ran(measured):
    prefill, decode, generation = (measured[phase] for phase in GENERATIVE)
    assert (prefill.output_tokens, prefill.context_tokens) == (1, None)
    assert (decode.output_tokens, decode.context_tokens) == (5, 20)
    assert generation.environment.device == generation.environment.gpu == "cpu"
    assert generation.environment.torch == torch.__version__
    assert generation.attention == "sdpa:flash_cpu"
    assert (generation.dtype, generation.kv_dtype, generation.logits) == ("bf16", "bf16", "last")
    assert generation.peak_allocated_bytes is None
    assert generation.device_used_peak_bytes is None


def test_the_peak_holds_weights_cache_and_more_and_is_not_claimed_for_decode(measured):
    for phase in ("prefill", "generation"):
        record = measured[phase]
        assert record.peak_live_bytes > record.weights_bytes + record.kv_cache_bytes
    assert measured["decode"].peak_live_bytes is None


def test_what_profile_returns_is_what_was_stored(measured, store):
    stored, problems = records.load([store])
    assert problems == []
    assert set(measured.values()) <= set(stored)


def test_a_mixture_of_ours_is_measured_as_it_is_planned_and_says_what_multiplies(tmp_path):
    mixtral = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    made = profile(
        planner.read_config(mixtral),
        **WORK,
        runtime="attnlab",
        device="cpu",
        phases=["prefill", "generation"],
        repeats=1,
        warmup=0,
        out=tmp_path / "r.jsonl",
    )
    assert {record.experts for record in made} == {"grouped:loop"}
    rows = compare(made)
    peaks = [(r.predicted, r.measured) for r in rows if r.quantity == "peak_live_bytes"]
    assert len(peaks) == 2
    assert all(predicted == seen for predicted, seen in peaks)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_gpt2_with_its_tied_head_is_counted_once(runtime, tmp_path):
    model = planner.read_config(GPT2)
    (record,) = profile(
        model,
        batch=1,
        prompt_tokens=8,
        output_tokens=1,
        runtime=runtime,
        device="cpu",
        phases=["prefill"],
        repeats=1,
        warmup=0,
        out=tmp_path / "r.jsonl",
    )
    assert record.status == "ok"
    assert record.weights_bytes == 4 * model.parameter_count
    assert record.dtype == "fp32"


def test_full_logits_are_in_the_peak(llama, tmp_path):
    made = {}
    for logits in ("last", "all"):
        options = {"logits": logits, "repeats": 1, "warmup": 0, "out": tmp_path / "r.jsonl"}
        work = {"batch": 4, "prompt_tokens": 100, "output_tokens": 1}
        (made[logits],) = profile(llama, **work, device="cpu", phases=["prefill"], **options)
        assert made[logits].logits == logits
    full = made["all"]
    logits_bytes = 4 * 100 * 1000 * 2
    assert full.peak_live_bytes >= full.weights_bytes + full.kv_cache_bytes + logits_bytes
    assert made["last"].peak_live_bytes < full.peak_live_bytes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_runs_the_attention_that_was_asked_for(llama, attention):
    workload = build(
        llama, runtime="transformers", attention=attention, dtype="fp32", device=torch.device("cpu")
    )
    assert workload.attention == attention
    assert {p.dtype for p in workload.module.parameters()} == {torch.float32}


def test_attention_kernels_are_named_by_the_ops_that_ran():
    flash = {"mm", "_scaled_dot_product_flash_attention"}
    cpu = {"_scaled_dot_product_flash_attention_for_cpu"}
    assert attention_name("naive", [flash]) == "naive"
    assert attention_name("sdpa", [flash, {"mm"}]) == "sdpa:flash+math"
    assert attention_name("sdpa", [cpu]) == "sdpa:flash_cpu"
    assert attention_name("sdpa", [{"_scaled_dot_product_cudnn_attention"}]) == "sdpa:cudnn"


def test_a_decode_without_steps_is_left_out(llama, tmp_path):
    made = profile(
        llama,
        batch=1,
        prompt_tokens=4,
        output_tokens=1,
        device="cpu",
        repeats=1,
        warmup=0,
        out=tmp_path / "r.jsonl",
    )
    assert [record.phase for record in made] == ["prefill", "generation"]


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "build", lambda *a, **k: pytest.fail("it was built"))
    huge = planner.read_config(LLAMA | {"hidden_size": 65536, "num_hidden_layers": 100})
    with pytest.raises(ConfigError, match=r"llama .* needs [\d.,]+ GiB, [\d.]+ GiB available"):
        profile(huge, **WORK, device="cpu", out=tmp_path / "r.jsonl")
    monkeypatch.setattr(environment, "free_bytes", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"needs [\d.]+ KiB, 97\.66 KiB available"):
        profile(llama, **WORK, device="cpu", out=tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_a_type_that_is_trained_alone_is_refused_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "build", lambda *a, **k: pytest.fail("it was built"))
    t5 = planner.load_model("profiles/configs/flan-t5-xl.json")
    with pytest.raises(ConfigError, match="inference of model_type='t5' is not measured"):
        profile(t5, **WORK, device="cpu", runtime="transformers", out=tmp_path / "r.jsonl")


def test_an_error_becomes_a_record_and_the_next_phase_still_runs(llama, tmp_path, monkeypatch):
    forward = AttnlabWorkload.forward

    def fails_on_one_token(self, ids, logits):
        if ids.shape[1] == 1:
            raise RuntimeError("no kernel for\none token")
        return forward(self, ids, logits)

    monkeypatch.setattr(AttnlabWorkload, "forward", fails_on_one_token)
    out = tmp_path / "r.jsonl"
    order = ("decode", "prefill")
    made = profile(llama, **WORK, device="cpu", phases=order, repeats=1, warmup=0, out=out)
    assert [r.status for r in made] == ["error: RuntimeError: no kernel for", "ok"]
    assert made[0].step_s == ()
    assert records.load([out]) == (made, [])


def test_running_out_of_memory_becomes_a_record_by_that_name(llama, tmp_path, monkeypatch):
    """The allocator's own words: 2⁶⁰ bytes are really asked for."""
    monkeypatch.setattr(
        AttnlabWorkload, "forward", lambda *a: torch.empty(2**60, dtype=torch.uint8)
    )
    out = tmp_path / "r.jsonl"
    made = profile(llama, **WORK, device="cpu", phases=["prefill"], out=out)
    assert [r.status for r in made] == ["oom"]
    assert status_of(torch.OutOfMemoryError("CUDA out of memory.")) == "oom"


def test_a_model_that_cannot_be_built_is_a_record_for_each_phase(llama, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise TypeError("unbuildable")

    monkeypatch.setattr(runner, "build", fails)
    made = profile(llama, **WORK, device="cpu", out=tmp_path / "r.jsonl")
    assert [(r.phase, r.status) for r in made] == [
        (phase, "error: TypeError: unbuildable") for phase in GENERATIVE
    ]


def test_an_interrupt_loses_only_the_phase_that_was_running(llama, tmp_path, monkeypatch):
    forward = AttnlabWorkload.forward

    def interrupted(self, ids, logits):
        if ids.shape[1] == 1:
            raise KeyboardInterrupt
        return forward(self, ids, logits)

    monkeypatch.setattr(AttnlabWorkload, "forward", interrupted)
    out = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        profile(llama, **WORK, device="cpu", repeats=1, warmup=0, out=out)
    stored, problems = records.load([out])
    assert [r.phase for r in stored] == ["prefill"]
    assert problems == []


def test_progress_counts_from_nothing_to_all(llama, tmp_path):
    seen = []
    profile(
        llama,
        **WORK,
        device="cpu",
        phases=["prefill"],
        repeats=1,
        warmup=0,
        out=tmp_path / "r.jsonl",
        on_progress=lambda *step: seen.append(step),
    )
    assert seen == [(0, 2, "build llama"), (1, 2, "prefill"), (2, 2, "done")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch=0"),
        ({"prompt_tokens": -1}, "prompt_tokens=-1"),
        ({"output_tokens": 1.5}, "output_tokens=1.5"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"runtime": "vllm"}, "runtime='vllm'"),
        ({"phases": ["training"]}, "phases='training'"),
        ({"phases": ["decode"], "output_tokens": 1}, "output_tokens of 2 or more"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"logits": "first"}, "logits='first'"),
        ({"split": "test"}, "split='test'"),
        ({"attention": "flash_attention_2"}, "attention"),
        ({"prompt_tokens": 600}, "max_position_embeddings=512"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused_by_name(llama, tmp_path, change, said):
    out = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match=said):
        profile(llama, **({"device": "cpu", "out": out} | WORK | change))
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused_in_one_line(llama, tmp_path):
    with pytest.raises(ConfigError, match="device=cuda is not here") as error:
        profile(llama, **WORK, device="cuda", out=tmp_path / "r.jsonl")
    assert "\n" not in str(error.value)


def test_free_memory_is_what_the_control_group_leaves(tmp_path):
    for name, content in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 600\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert environment._cgroup_left_bytes(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert environment._cgroup_left_bytes(tmp_path) > 2**60


def test_the_meters_peak_of_a_generation_is_reproducible(llama):
    workload = build(
        llama, runtime="attnlab", attention=None, dtype="fp32", device=torch.device("cpu")
    )
    ids = torch.zeros((1, 7), dtype=torch.int64)
    peaks = set()
    for _ in range(2):
        with torch.no_grad(), LiveTensorMeter() as meter:
            workload.begin(batch=1, capacity_tokens=9)
            assert len(list(workload.tokens(ids, output_tokens=3, logits="last"))) == 3
            workload.end()
        peaks.add(meter.peak_bytes)
        assert meter.live_bytes == 0
    assert len(peaks) == 1
