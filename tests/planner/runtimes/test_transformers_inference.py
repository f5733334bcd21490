"""Inference of transformers' classes: peaks to the byte, over random small configs."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import planner
from planner.activations import peak
from planner.program import Dims
from planner.runtimes import runtime_named
from planner.runtimes.transformers import EXACT_PEAKS, STATIC
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from tests.planner.small_decoders import (
    DTYPES,
    EAGER_ONLY,
    KINDS,
    LATENT,
    SCANNED,
    built,
    decoders,
    described,
    inference_peaks,
    takes_padding,
)
from tests.planner.small_encoders import HEADS
from tests.properties import examples


def predicted(model, batch, tokens, step, **what):
    dims = Dims(batch=batch, tokens=1 if step else tokens, context=tokens + step)
    kind = "decode" if step else "prefill"
    done = Pass(kind=kind, device="cpu", held_whole=step == 1, **what)
    return peak(pass_program(model, done, Regime.of(model, dims)), dims).live_bytes


@examples(100, fuzz=150)
@given(
    config=decoders((*KINDS, *LATENT)),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    eager=st.booleans(),
    logits=st.sampled_from(("all", "last")),
    padded=st.booleans(),
)
def test_prefill_and_decode_steps_are_exact(config, dtype, batch, tokens, eager, logits, padded):
    padded = padded and tokens > 1 and takes_padding(config)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).eval()
    seen = inference_peaks(live, batch, tokens, steps=3, last=logits == "last", padded=padded)
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": dtype, "logits": logits, "padded": padded}
    assert [predicted(model, batch, tokens, step, **what) for step in range(4)] == seen


@examples(30, fuzz=60)
@given(
    config=decoders(SCANNED),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    attention=st.sampled_from(("sdpa", "eager")),
    logits=st.sampled_from(("all", "last")),
)
def test_scans_without_fused_kernels_are_exact(config, dtype, batch, tokens, attention, logits):
    """modeling_bamba.py's own PyTorch code, as it runs where mamba_ssm is not installed."""
    live = built(described(config), dtype, attention).eval()
    seen = inference_peaks(live, batch, tokens, steps=3, last=logits == "last")
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": dtype, "logits": logits}
    assert [predicted(model, batch, tokens, step, **what) for step in range(4)] == seen


TINY_BAMBA = {
    "model_type": "bamba", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "attn_layer_indices": [1], "mamba_chunk_size": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 12, "mamba_d_conv": 4, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 7, 8, 9, 16, 17])
def test_prompts_about_the_ends_of_chunks_and_convolutions_are_exact(tokens):
    live = built(described(TINY_BAMBA), "bf16", "sdpa").eval()
    model = planner.read_config(live.config.to_dict())
    what = {"attention": "sdpa", "dtype": "bf16"}
    seen = inference_peaks(live, 2, tokens, steps=1)
    assert [predicted(model, 2, tokens, step, **what) for step in range(2)] == seen


def test_one_grid_of_prompts_is_many_estimates():
    """Cells on both sides of a chunk's end are different programs."""
    model = planner.load_model("bamba-9b")
    table = planner.sweep(
        [model],
        gpus=["h200"],
        batch=[1, 2],
        context_tokens=[2, 256, 257, 700],
        runtime=["transformers"],
    )
    deploy = planner.Deployment(gpu="h200", runtime="transformers")
    for row in table.itertuples():
        work = planner.Inference(batch=row.batch, prompt_tokens=row.context_tokens)
        assert row.total_bytes == planner.estimate(model, work, deploy).memory.total_bytes


def test_a_bamba_that_never_attends_is_refused_as_its_class_fails():
    model = planner.read_config({"model_type": "bamba", "attn_layer_indices": []})
    live = built(described({**TINY_BAMBA, "attn_layer_indices": []}), "bf16", "sdpa")
    with pytest.raises(ValueError, match="Attention layers"):
        inference_peaks(live, 1, 4, steps=0)
    work = planner.Inference(batch=1, prompt_tokens=8)
    with pytest.raises(planner.ConfigError, match="attn_layer_indices="):
        planner.estimate(model, work, planner.Deployment(gpu="cpu", runtime="transformers"))


@pytest.mark.parametrize(
    ("work", "cache", "said"),
    [
        (planner.Training(batch=1, sequence_tokens=8), None, "training of model_type=bamba"),
        (planner.Inference(batch=2, prompt_tokens=8, padded=True), None, "padded=True of"),
        (planner.Inference(batch=2, prompt_tokens=8), "static", "'static' of model_type=bamba"),
    ],
)
def test_what_is_not_planned_of_mamba2_is_refused(work, cache, said):
    spec = None if cache is None else planner.CacheSpec(kind=cache)
    deploy = planner.Deployment(gpu="h200", runtime="transformers", cache=spec)
    with pytest.raises(planner.ConfigError, match=said):
        planner.estimate(planner.load_model("bamba-9b"), work, deploy)


@examples(20, fuzz=30)
@given(
    config=decoders(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    logits=st.sampled_from(("all", "last")),
)
def test_logits_that_are_cast_as_old_versions_do_are_exact(config, dtype, batch, tokens, logits):
    """modeling_llama.py before 4.46: logits = self.lm_head(hidden_states).float()."""
    assume("logit_scale" not in config)
    assume(not described(config).to_dict().get("final_logit_softcapping"))
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).eval()
    live.get_output_embeddings().register_forward_hook(lambda module, given, out: out.float())
    seen = inference_peaks(live, batch, tokens, steps=2, last=logits == "last")
    model = planner.read_config(live.config.to_dict())
    assume(model.logit_scale is None)
    what = {"attention": attention, "dtype": dtype, "logits": logits, "float32_logits": True}
    assert [predicted(model, batch, tokens, step, **what) for step in range(3)] == seen


@pytest.mark.parametrize(
    ("kind", "runtime"), [("llama", "vllm"), ("llama", "attnlab"), ("t5", "transformers")]
)
def test_logits_that_nothing_casts_are_refused(kind, runtime):
    work = planner.Inference(batch=2, prompt_tokens=8, float32_logits=True)
    deploy = planner.Deployment(gpu="h200", runtime=runtime)
    with pytest.raises(planner.ConfigError, match="float32_logits=True is not"):
        planner.estimate(planner.read_config({"model_type": kind}), work, deploy)


@examples(50, fuzz=100)
@given(
    config=decoders(tuple(kind for kind in KINDS if kind in STATIC)),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    steps=st.integers(0, 4),
    more=st.integers(0, 9),
    eager=st.booleans(),
    logits=st.sampled_from(("all", "last")),
)
def test_passes_over_a_static_cache_are_exact(
    config, dtype, batch, tokens, steps, more, eager, logits
):
    assume(not config.get("alibi"))
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    capacity = tokens + steps + more
    live = built(described(config), dtype, attention).eval()
    seen = inference_peaks(
        live, batch, tokens, steps=steps, last=logits == "last", capacity=capacity
    )
    model = planner.read_config(live.config.to_dict())
    work = planner.Inference(
        batch=batch, prompt_tokens=tokens, output_tokens=1 + steps, logits=logits
    )
    spec = planner.CacheSpec(kind="static", capacity_tokens=capacity)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention, cache=spec)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.peak_live_bytes - memory.weights_bytes == max(seen)
    phases = runtime_named("transformers").memory_phases(
        model, work, planner.estimate(model, work, deploy).setting
    )
    found = [peak(phase.program, phase.dims).live_bytes for phase in phases]
    assert found[0] == seen[0]
    assert max(found[1:], default=0) == max(seen[1:], default=0)


@pytest.mark.parametrize("kind", ["bloom", "opt", "gpt_bigcode"])
def test_static_caches_of_other_types_are_refused(kind):
    model = planner.read_config({"model_type": kind})
    deploy = planner.Deployment(gpu="cpu", cache=planner.CacheSpec(kind="static"))
    with pytest.raises(planner.ConfigError, match=f"'static' of model_type={kind} is not planned"):
        planner.estimate(model, planner.Inference(batch=1, prompt_tokens=8), deploy)


@pytest.mark.parametrize("config", [TINY_BAMBA, {"model_type": "t5"}])
def test_padding_of_other_types_is_refused(config):
    model, kind = planner.read_config(config), config["model_type"]
    work = planner.Inference(batch=2, prompt_tokens=8, padded=True)
    with pytest.raises(planner.ConfigError, match=f"padded=True of model_type={kind} is not"):
        planner.estimate(model, work, planner.Deployment(gpu="cpu"))


def test_padding_is_refused_by_other_runtimes_and_caches():
    model = planner.load_model("llama-3.1-8b")
    work = planner.Inference(batch=2, prompt_tokens=8, padded=True)
    for change in ({"runtime": "vllm"}, {"cache": planner.CacheSpec(kind="static")}):
        with pytest.raises(planner.ConfigError, match="padded=True is not planned"):
            planner.estimate(model, work, planner.Deployment(gpu="h200", **change))


def test_every_type_that_is_called_exact_is_drawn():
    assert {*KINDS, *HEADS} == HELD
    assert {*LATENT, *SCANNED} == EXACT_PEAKS - HELD


@pytest.mark.parametrize(
    ("config", "dtype", "attention", "without_cache", "with_cache"),
    [
        ("llama", "fp32", "eager", 4_375_552, 4_899_840),
        ("llama", "bf16", "sdpa", 1_598_464, 1_860_608),
        ("mixtral", "fp32", "sdpa", 5_827_648, 6_351_936),
        ("gpt2", "bf16", "eager", 3_408_896, 4_457_472),
    ],
)
def test_a_prefill_holds_what_others_measured(config, dtype, attention, without_cache, with_cache):
    """Prefills 2 × 128 on a CPU, measured apart from this project, beside its own cache bytes."""
    from tests.planner.runtimes import test_transformers_training as training

    described = {"llama": training.LLAMA, "mixtral": training.MIXTRAL, "gpt2": training.GPT2}
    model = planner.read_config(described[config].to_dict())
    found = predicted(model, 2, 128, 0, attention=attention, dtype=dtype)
    assert found == pytest.approx(with_cache, rel=0.002)
    assert with_cache > without_cache
