"""Training steps of transformers' classes: peaks to the byte, over random small configs."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from planner.runtimes.transformers_training import EXACT_STEPS
from profiles.meters import LiveTensorMeter, module_bytes
from tests.attnlab.families import FAMILIES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EAGER_ONLY = ("gemma2",)


def built(config, dtype, attention):
    """The class in train mode without dropout, tied as its config says."""
    live = hf.AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[dtype], attn_implementation=attention
    ).train()
    for part in live.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return live


def measured(live, batch, tokens, optimizer=None):
    """The meter after a step of which only the loss was kept."""
    ids = torch.randint(1, live.config.vocab_size, (batch, tokens))
    with LiveTensorMeter() as meter:
        loss = live(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter


def predicted(model, batch, tokens, **what):
    dims = Dims(batch=batch, tokens=tokens, context=tokens)
    step = Pass(kind="training", device="cpu", **what)
    return peak(pass_program(model, step, Regime.of(model, dims)), dims)


@st.composite
def configs(draw):
    """Small decoders of every type whose steps are planned."""
    kind = draw(st.sampled_from(sorted(EXACT_STEPS)))
    groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 8))
    config = {
        "model_type": kind,
        "vocab_size": draw(st.integers(3, 120)),
        "hidden_size": groups * shared * head_dim,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": groups * shared,
        "num_key_value_heads": groups,
        "intermediate_size": draw(st.integers(1, 90)),
        "max_position_embeddings": 128,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind not in ("phi3", "starcoder2", "olmo2", "qwen2"):
        config["head_dim"] = head_dim
    if kind in ("mistral", "phi3", "starcoder2"):
        config["sliding_window"] = draw(st.none() | st.integers(2, 40))
    if kind in ("gemma2", "gemma3_text"):
        config["sliding_window"] = draw(st.integers(2, 40))
        config["query_pre_attn_scalar"] = 16
    if kind == "llama":
        config["attention_bias"], config["mlp_bias"] = draw(st.booleans()), draw(st.booleans())
    return config


@settings(max_examples=60, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    eager=st.booleans(),
)
def test_the_peak_of_a_step_is_exact(config, dtype, batch, tokens, eager):
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    kind = dict(config)
    described = hf.AutoConfig.for_model(kind.pop("model_type"), **kind)
    live = built(described, dtype, attention)
    meter = measured(live, batch, tokens)
    model = planner.read_config(described.to_dict())
    highest = predicted(model, batch, tokens, attention=attention, dtype=dtype)
    assert highest.live_bytes == meter.peak_bytes


def test_every_planned_type_is_among_the_families_that_are_tried():
    kinds = {planner.read_config(FAMILIES[n]().to_dict()).text_type for n in FAMILIES}
    assert kinds >= EXACT_STEPS


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_a_step_with_adamw_adds_up(name, impl):
    config = FAMILIES[name]()
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    live = built(config, "bf16", attention)
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW(live.parameters(), **ways)
    measured(live, 2, 30, adamw)  # makes the states
    meter = measured(live, 2, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    model = planner.read_config(config.to_dict())
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention=attention)
    work = planner.Training(batch=2, sequence_tokens=30, optimizer_impl=impl)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


LLAMA = hf.LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


@pytest.mark.parametrize(
    ("dtype", "attention", "peak_bytes"),
    [
        ("fp32", "eager", 29_926_408),
        ("fp32", "sdpa", 24_192_008),
        ("bf16", "eager", 21_914_632),
        ("bf16", "sdpa", 14_869_512),
    ],
)
def test_peaks_equal_those_that_others_measured(dtype, attention, peak_bytes):
    """Storages of a step 2 × 128 on a CPU, measured apart from this project with its own meter."""
    model = planner.read_config(LLAMA.to_dict())
    found = predicted(model, 2, 128, attention=attention, dtype=dtype).live_bytes
    assert found == pytest.approx(peak_bytes, rel=0.002)


def test_an_8b_step_holds_what_an_independent_trace_says():
    """Two AdamW steps 1 × 4 096 in bf16, sdpa, traced by others: 77 197 MiB live at the peak."""
    work = planner.Training(batch=1, sequence_tokens=4096)
    deploy = planner.Deployment(gpu="h200", runtime="transformers")
    memory = planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy).memory
    assert round(memory.peak_live_bytes / 2**20) == 77_197
