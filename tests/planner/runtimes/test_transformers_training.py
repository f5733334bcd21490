"""Training steps of transformers' classes: peaks to the byte, over random small configs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import planner
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.transformers_code import kernels
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from profiles.meters import LiveTensorMeter, module_bytes
from tests.attnlab.families import FAMILIES
from tests.planner.small_decoders import (
    CHECKPOINTING,
    DTYPES,
    EAGER_ONLY,
    KINDS,
    built,
    checkpoint,
    decoders,
    described,
    keep_every,
    takes_padding,
    training_meter,
    words,
)
from tests.properties import examples


def predicted(model, batch, tokens, **what):
    dims = Dims(batch=batch, tokens=tokens, context=tokens)
    step = Pass(kind="training", device="cpu", **what)
    return peak(pass_program(model, step, Regime.of(model, dims)), dims)


def written(how):
    which, every = how
    return {"checkpointed": 0 if which == "none" else every, "selective": which == "selective"}


@pytest.mark.parametrize("kind", KINDS)
@examples(3, fuzz=5)
@given(
    data=st.data(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    eager=st.booleans(),
    how=CHECKPOINTING,
    padded=st.booleans(),
)
def test_the_peak_of_a_step_is_exact(kind, data, dtype, batch, tokens, eager, how, padded):
    config = data.draw(decoders((kind,)))
    padded = padded and takes_padding(config)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).train()
    checkpoint(live, how)
    meter = training_meter(live, batch, tokens, padded=padded)
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": dtype, "padded": padded, **written(how)}
    assert predicted(model, batch, tokens, **what).live_bytes == meter.peak_bytes


@examples(20, fuzz=30)
@given(
    config=decoders(("llama", "qwen2", "qwen3", "granite", "olmo2")),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    how=CHECKPOINTING,
)
def test_grouped_heads_in_fp32_have_no_fused_kernel_on_a_gpu(config, batch, tokens, how):
    """What torch does there instead is the same on a CPU, where it is asked for."""
    live = built(described(config), "fp32", "sdpa").train()
    checkpoint(live, how)
    model = planner.read_config(live.config.to_dict())
    assume(model.layers[0].attention.num_key_value_heads < live.config.num_attention_heads)
    with sdpa_kernel(SDPBackend.MATH):
        meter = training_meter(live, batch, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fused_kernel", lambda *device: "efficient")
        program = pass_program.__wrapped__
        patch.setitem(predicted.__globals__, "pass_program", program)
        found = predicted(model, batch, tokens, attention="sdpa", dtype="fp32", **written(how))
    assert found.live_bytes == meter.peak_bytes


@examples(20, fuzz=30)
@given(
    config=decoders(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    eager=st.booleans(),
    how=CHECKPOINTING,
    impl=st.sampled_from((None, "foreach", "fused")),
)
def test_gradients_of_several_batches_add_up(config, dtype, batch, tokens, eager, how, impl):
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).train()
    checkpoint(live, how)
    adamw = None
    if impl is not None:
        ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
        adamw = torch.optim.AdamW(live.parameters(), **ways)
        training_meter(live, batch, tokens, adamw)  # makes the states
    ids = words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        for last in (False, False, True):
            loss = live(ids, labels=ids, use_cache=False).loss
            loss.backward()
            if not last:
                del loss
        if adamw is not None:
            adamw.step()
            adamw.zero_grad()
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        accumulation_steps=3,
        optimizer=None if impl is None else "adamw",
        optimizer_impl=impl or "foreach",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    found = memory.peak_live_bytes - memory.weights_bytes - memory.optimizer_bytes
    assert found == meter.peak_bytes


@examples(20, deadline=None)
@given(
    config=decoders(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 30),
    every=st.integers(2, 4),
)
def test_selective_checkpointing_may_keep_one_product_in_several(
    config, dtype, batch, tokens, every
):
    assume(config.get("clip_qkv") is None)  # refused
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).train()
    keep_every(live, every)
    meter = training_meter(live, batch, tokens)
    model = planner.read_config(live.config.to_dict())
    how = {"checkpointed": 1, "selective": True, "keeps_every": every}
    what = {"attention": attention, "dtype": dtype, **how}
    assert predicted(model, batch, tokens, **what).live_bytes == meter.peak_bytes


def test_accumulation_is_refused_by_attnlab():
    work = planner.Training(batch=1, sequence_tokens=8, accumulation_steps=2)
    with pytest.raises(planner.ConfigError, match="accumulation_steps=2 is not planned"):
        planner.estimate(
            planner.load_model("gpt2"), work, planner.Deployment(gpu="cpu", runtime="attnlab")
        )


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gemma2", "olmoe"])
def test_a_step_with_adamw_adds_up(name, impl):
    more = {"olmoe": lambda: hf.OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2)}
    config = (more.get(name) or FAMILIES[name])()
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    live = built(described(config.to_dict()), "bf16", attention).train()
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW(live.parameters(), **ways)
    training_meter(live, 2, 30, adamw)  # makes the states
    meter = training_meter(live, 2, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    model = planner.read_config(config.to_dict())
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention=attention)
    work = planner.Training(batch=2, sequence_tokens=30, optimizer_impl=impl)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": None,
}
LLAMA = hf.LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
MIXTRAL = hf.MixtralConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
    num_local_experts=8,
    num_experts_per_tok=2,
)
GPT2 = hf.GPT2Config(n_embd=256, n_layer=4, n_head=8, n_positions=512, vocab_size=1024)


@pytest.mark.parametrize(
    ("config", "dtype", "attention", "checkpointed", "peak_bytes"),
    [
        (LLAMA, "fp32", "eager", False, 29_926_408),
        (LLAMA, "fp32", "sdpa", False, 24_192_008),
        (LLAMA, "bf16", "eager", False, 21_914_632),
        (LLAMA, "bf16", "sdpa", False, 14_869_512),
        (LLAMA, "fp32", "eager", True, 18_393_096),
        (LLAMA, "bf16", "sdpa", True, 8_813_064),
        (MIXTRAL, "fp32", "eager", False, 60_516_392),
        (MIXTRAL, "bf16", "sdpa", False, 29_821_480),
        (GPT2, "fp32", "eager", False, 38_031_368),
        (GPT2, "bf16", "sdpa", False, 18_130_952),
    ],
)
def test_peaks_equal_those_that_others_measured(config, dtype, attention, checkpointed, peak_bytes):
    """Storages of a step 2 × 128 on a CPU, measured apart from this project with its own meter."""
    model = planner.read_config(config.to_dict())
    what = {"attention": attention, "dtype": dtype, "checkpointed": checkpointed}
    found = predicted(model, 2, 128, **what).live_bytes
    assert found == pytest.approx(peak_bytes, rel=0.001)


def test_an_8b_step_holds_what_an_independent_trace_says():
    """Two AdamW steps 1 × 4 096 in bf16, sdpa, traced by others: 77 197 MiB live at the peak."""
    work = planner.Training(batch=1, sequence_tokens=4096)
    deploy = planner.Deployment(gpu="h200", runtime="transformers")
    memory = planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy).memory
    assert round(memory.peak_live_bytes / 2**20) == 77_197
