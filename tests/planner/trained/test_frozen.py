"""Steps with frozen parts: peaks to the byte against the real classes, over random small models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import planner
from planner.trained.optimizer_parts import is_hidden
from planner.workload import FROZEN_PARTS
from profiles.meters import LiveTensorMeter, module_bytes, storage_bytes
from tests.planner.runtimes.test_transformers_master import check_exact as check_master
from tests.planner.small_decoders import (
    CHECKPOINTING,
    DTYPES,
    EAGER_ONLY,
    built,
    checkpoint,
    decoders,
    described,
    padding,
    takes_padding,
    words,
)
from tests.planner.small_encoders import berts, step_meter
from tests.planner.small_encoders import built as built_encoder
from tests.planner.trained.test_optimizers import EVERY_WAY, real
from tests.properties import examples

BEFORE_LAYERS = ("wpe", "embed_positions", "word_embeddings_layernorm", "project_in")
"""What stands with a table before the first layer, by the last words of its modules' names."""
FROZEN = st.lists(st.sampled_from(FROZEN_PARTS), unique=True).map(tuple)


def layers_of(live):
    inside = live.base_model
    inside = getattr(inside, "decoder", inside)
    return next(m for m in inside.children() if isinstance(m, torch.nn.ModuleList))


def freeze(live, parts, layers):
    """As one does by hand: requires_grad_(False) on modules."""
    if "embeddings" in parts:
        live.get_input_embeddings().requires_grad_(False)
        for name, module in live.named_modules():
            if name.endswith(BEFORE_LAYERS):
                module.requires_grad_(False)
    if "head" in parts:
        live.get_output_embeddings().requires_grad_(False)
    for layer in layers_of(live)[:layers]:
        layer.requires_grad_(False)


def trained(live):
    return [(name, p) for name, p in live.named_parameters() if p.requires_grad]


def inside(name):
    return ".layers." in name or ".h." in name


def step(live, ids, mask, optimizer, work):
    autocast = work.precision == "autocast"
    for last in range(work.accumulation_steps - 1, -1, -1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = live(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        if last:
            del loss
    if optimizer is not None:
        optimizer.step()
        live.zero_grad()


def check_exact(live, work, dtype, attention):
    """The second step, and what lives beside it."""
    ids = words(live.config, work.batch, work.sequence_tokens)
    mask = padding(work.batch, work.sequence_tokens) if work.padded else None
    with LiveTensorMeter() as meter:
        optimizer, kept = None, []
        if work.optimizer is not None:
            optimizer = real(work.optimizer, work.optimizer_impl, live)
            step(live, ids, mask, optimizer, work)  # makes the states
            kept = [value for state in optimizer.state.values() for value in state.values()]
        states = storage_bytes(t for t in kept if isinstance(t, torch.Tensor))
        del kept
        before = meter.live_bytes
        meter.reset_peak()
        step(live, ids, mask, optimizer, work)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    assert memory.optimizer_bytes == states
    assert memory.gradients_bytes == sum(p.nbytes for _, p in trained(live))
    held = module_bytes(live) + states
    assert memory.peak_live_bytes - held == meter.peak_bytes - before


@examples(40, fuzz=60, deadline=None)
@given(
    config=decoders(),
    parts=FROZEN,
    layers=st.integers(0, 4),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    eager=st.booleans(),
    how=CHECKPOINTING,
    padded=st.booleans(),
    way=st.sampled_from(((None, "foreach"), *EVERY_WAY)),
    times=st.integers(1, 2),
    autocast=st.booleans(),
)
def test_a_step_with_frozen_parts_is_exact(
    config, parts, layers, dtype, batch, tokens, eager, how, padded, way, times, autocast
):
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp32" if autocast else dtype, attention).train()
    layers = min(layers, len(layers_of(live)))
    freeze(live, parts, layers)
    assume(trained(live))  # else refused
    checkpoint(live, how)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=way[0],
        optimizer_impl=way[1],
        accumulation_steps=times if way[0] else 1,
        checkpointing=how[0],
        checkpoint_every=how[1],
        padded=padded and takes_padding(config),
        precision="autocast" if autocast else "pure",
        frozen=parts,
        frozen_layers=layers,
    )
    check_exact(live, work, "bf16" if autocast else dtype, attention)


@examples(15, fuzz=30, deadline=None)
@given(
    config=decoders(),
    parts=FROZEN,
    layers=st.integers(0, 4),
    dtype=st.sampled_from(("bf16", "fp16")),
    tokens=st.integers(1, 20),
    how=CHECKPOINTING,
    way=st.sampled_from(EVERY_WAY),
    times=st.integers(1, 2),
)
def test_what_is_frozen_has_no_master_copy(config, parts, layers, dtype, tokens, how, way, times):
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).train()
    layers = min(layers, len(layers_of(live)))
    freeze(live, parts, layers)
    left = {is_hidden(p.shape, 0 if inside(n) else None) for n, p in trained(live)}
    assume(left)  # else refused
    assume(way[0] != "muon" or len(left) == 2)  # torch makes no optimizer of nothing
    checkpoint(live, how)
    work = planner.Training(
        batch=2,
        sequence_tokens=tokens,
        optimizer=way[0],
        optimizer_impl=way[1],
        precision="master",
        checkpointing=how[0],
        checkpoint_every=how[1],
        accumulation_steps=times,
        frozen=parts,
        frozen_layers=layers,
    )
    check_master(live, planner.read_config(live.config.to_dict()), work, dtype, attention)


@examples(15, fuzz=30, deadline=None)
@given(
    config=berts(headed=True),
    parts=st.sampled_from(((), ("embeddings",))),
    layers=st.integers(0, 4),
    dtype=st.sampled_from(tuple(DTYPES)),
    attention=st.sampled_from(("eager", "sdpa")),
    tokens=st.integers(1, 40),
    how=CHECKPOINTING,
)
def test_a_step_of_a_bert_with_frozen_parts_is_exact(
    config, parts, layers, dtype, attention, tokens, how
):
    live = built_encoder(described(config), dtype, attention).train()
    live.bert.embeddings.requires_grad_(not parts)
    layers = min(layers, config["num_hidden_layers"])
    live.bert.encoder.layer[:layers].requires_grad_(False)
    checkpoint(live, how)
    adamw = torch.optim.AdamW(live.parameters(), foreach=True)
    step_meter(live, 2, tokens, tokens, adamw)  # makes the states
    meter = step_meter(live, 2, tokens, tokens, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(
        batch=2,
        sequence_tokens=tokens,
        checkpointing=how[0],
        checkpoint_every=how[1],
        frozen=parts,
        frozen_layers=layers,
    )
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    memory = planner.estimate(planner.load_model(config), work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


def plan(model, **what):
    deploy = {"gpu": "cpu"} | {k: what.pop(k) for k in tuple(what) if k in ("gpu", "runtime")}
    work = planner.Training(batch=1, sequence_tokens=64, **what)
    return planner.estimate(planner.load_model(model), work, planner.Deployment(**deploy))


def test_a_tied_head_is_frozen_with_its_table():
    one, other = (plan("gpt2", frozen=(part,)).memory for part in ("embeddings", "head"))
    positions = 1024 * 768 * 4
    assert other.gradients_bytes - one.gradients_bytes == positions


def test_an_answer_says_what_is_frozen():
    said = plan("gpt2", frozen=("embeddings",), frozen_layers=6)
    assert "embeddings and the first 6 layers frozen" in said.explain()
    assert said.to_dict()["workload"]["frozen_layers"] == 6


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"frozen": ("norms",)}, "frozen='norms' is not allowed: one of embeddings, head"),
        ({"frozen": "head"}, "frozen='head' is not allowed: a tuple of embeddings, head"),
        ({"frozen": ("head", "head")}, "each name once"),
        ({"frozen_layers": -1}, "frozen_layers=-1"),
        ({"frozen_layers": 13}, "frozen_layers=13 is not allowed: 0 to 12, the layers of gpt2"),
        ({"frozen_layers": 1, "method": "lora"}, "none for method='lora'"),
        ({"frozen_layers": 1, "runtime": "attnlab"}, "is not planned for runtime=attnlab"),
    ],
)
def test_what_is_no_part_is_refused(what, named):
    with pytest.raises(planner.ConfigError, match=named):
        plan("gpt2", **what)


def test_a_model_of_which_nothing_is_trained_is_refused():
    everything = {"frozen": ("embeddings", "head"), "frozen_layers": 32}
    with pytest.raises(planner.ConfigError, match="leaves nothing of olmo to train"):
        plan({"model_type": "olmo"}, **everything)  # its norms have no weights


def test_parts_of_t5_and_sharded_ones_are_refused():
    with pytest.raises(planner.ConfigError, match="causal language models and bert"):
        plan(
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            frozen=("embeddings",),
        )
    work = planner.Training(batch=1, sequence_tokens=8, frozen_layers=1)
    deploy = planner.Deployment(gpu="h200", data_parallel_shards=2, weight_dtype="fp32")
    with pytest.raises(planner.ConfigError, match="frozen_layers=1: none"):
        planner.estimate(planner.load_model("gpt2"), work, deploy)
