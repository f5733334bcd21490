"""LoRA of peft in transformers' decoders: peaks to the byte, over random small configs."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.loading import load_config
from planner.trained.lora import adapted
from profiles.meters import LiveTensorMeter, module_bytes
from profiles.module_trace import fake_ids, trace_module
from profiles.trace import _built
from tests.attnlab.families import FAMILIES
from tests.planner.small_decoders import (
    CHECKPOINTING,
    DTYPES,
    EAGER_ONLY,
    KINDS,
    MIXTURES,
    NO_TOKENS,
    built,
    checkpoint,
    decoders,
    described,
    words,
)
from tests.properties import examples


def with_adapters(live, lora, task="CAUSAL_LM"):
    """The class with adapters beside its frozen weights."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, target_modules=targets, task_type=task, use_dora=lora.dora
    )
    keeps = lora.dtype is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft calls in transformers, and of Conv1D
        return peft.get_peft_model(live, config, autocast_adapter_dtype=not keeps).train()


def step_meter(live, batch, tokens, optimizer=None):
    ids = words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        loss = live(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter


BLOOM = {
    "model_type": "bloom",
    "vocab_size": 3,
    "tie_word_embeddings": False,
    **NO_TOKENS,
    "hidden_size": 8,
    "n_layer": 2,
    "n_head": 1,
}
"""Its loop keeps the weights of a first layer whose attention no gradient reaches."""


@st.composite
def adapted_decoders(draw):
    """A decoder, and adapters beside all or some of its linear layers, by its family's names."""
    config = draw(decoders(KINDS))
    model = planner.read_config(described(config).to_dict())
    mixture = config["model_type"] in MIXTURES
    if not mixture and draw(st.booleans()):
        targets = "all-linear"
    else:
        modules = ("o_proj",) if mixture else adapted(model, planner.LoRA())
        every = {m for layer in model.layer_kinds() for m in own_names(model, layer, modules)}
        targets = tuple(draw(st.lists(st.sampled_from(sorted(every)), min_size=1, unique=True)))
    dtype = draw(st.none() | st.just("bf16"))
    rank, dora = draw(st.integers(1, 9)), draw(st.booleans())
    return config, planner.LoRA(rank=rank, targets=targets, dtype=dtype, dora=dora)


def own_names(model, layer, modules):
    """The words that the live class calls these modules by."""
    from planner.parameters import layer_parameters

    wanted = {"q_proj", "k_proj", "v_proj", "qkv_proj", *modules}
    for p in layer_parameters(layer, model.hidden_size):
        if p.linear and p.name.split(".")[-2] in wanted:
            yield model.checkpoint_name(p.name).split(".")[-2]


@examples(60, fuzz=120)
@given(
    adapted=adapted_decoders(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    eager=st.booleans(),
    how=CHECKPOINTING,
)
@example(
    adapted=(BLOOM, planner.LoRA(rank=1, targets=("dense",), dora=True)),
    dtype="bf16",
    batch=1,
    tokens=1,
    eager=True,
    how=("none", 1),
)
def test_the_peak_of_a_step_is_exact(adapted, dtype, batch, tokens, eager, how):
    config, lora = adapted
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    if dtype == "fp32" and lora.dtype is not None:
        lora = replace(lora, dtype=None)  # adapters are the model's there
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention)
    checkpoint(live, how)
    live = with_adapters(live, lora)
    meter = step_meter(live, batch, tokens)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        method="lora",
        lora=lora,
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    model = planner.read_config(live.config.to_dict())
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@examples(20, fuzz=40)
@given(adapted=adapted_decoders(), checkpointed=st.booleans())
def test_what_layers_share_is_freed_once(adapted, checkpointed):
    """Also where the first layer is reached by no gradient from before."""
    config, lora = adapted
    work = planner.Training(
        batch=2,
        sequence_tokens=30,
        method="lora",
        lora=lora,
        checkpointing="full" if checkpointed else "none",
    )
    model = planner.read_config(described(config).to_dict())
    deploy = planner.Deployment(gpu="h200", dtype="bf16")
    assert planner.estimate(model, work, deploy).memory.peak_reserved_bytes


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_a_step_with_adamw_adds_up(name, impl):
    lora = planner.LoRA(rank=3)
    config = described(FAMILIES[name]().to_dict())
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    live = with_adapters(built(config, "bf16", attention), lora)
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    trained = [p for p in live.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, **ways)
    step_meter(live, 2, 30, adamw)  # makes the states
    meter = step_meter(live, 2, 30, adamw)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    model = planner.read_config(config.to_dict())
    deploy = planner.Deployment(gpu="cpu", dtype="bf16", attention=attention)
    work = planner.Training(
        batch=2, sequence_tokens=30, optimizer_impl=impl, method="lora", lora=lora
    )
    memory = planner.estimate(model, work, deploy).memory
    assert memory.optimizer_bytes == states
    assert memory.gradients_bytes == sum(p.nbytes for p in trained)
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


@pytest.mark.parametrize(
    ("name", "layers", "targets", "checkpointing"),
    [
        ("llama-3.1-8b", 3, ("q_proj", "k_proj", "v_proj", "o_proj"), "full"),
        ("llama-3.1-8b", 3, "all-linear", "none"),
        ("gemma-2-9b", 4, "all-linear", "full"),
        ("mixtral-8x7b", 3, ("q_proj", "v_proj"), "none"),
    ],
)
def test_a_step_of_real_size_equals_its_trace(name, layers, targets, checkpointing):
    """The trace lets go of the loss before the optimizer's step, and counts no steps."""
    config = dict(load_config(name)[1])
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    lora = planner.LoRA(rank=16, targets=targets)
    live = _built.__wrapped__(json.dumps(config), "bf16", False)
    if checkpointing == "full":
        live.activation_checkpointing_enable()
    with torch.device("meta"):
        live = with_adapters(live, lora)
    ids = fake_ids(1, 4096)
    seen = trace_module(
        live, {"input_ids": ids, "labels": ids, "use_cache": False}, train=True, optimizer="adamw"
    ).peak_live_bytes
    work = planner.Training(
        batch=1, sequence_tokens=4096, method="lora", lora=lora, checkpointing=checkpointing
    )
    deploy = planner.Deployment(gpu="cpu", dtype="bf16")
    found = planner.estimate(planner.load_model(config), work, deploy)
    counts = sum(row.size_bytes for row in found.rows if "step counts" in row.item)
    loss = 4 if found.peak_phase == "optimizer step" else 0
    assert found.memory.peak_live_bytes - counts - loss == seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "lora.rank=0 is not allowed"),
        ({"targets": "q_proj"}, "lora.targets='q_proj' is not allowed"),
        ({"targets": ()}, "lora.targets=\\(\\) is not allowed"),
        ({"dtype": "int8"}, "lora.dtype='int8' is not allowed"),
    ],
)
def test_adapters_that_cannot_be_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        planner.LoRA(**change)


def test_a_model_that_is_trained_whole_has_no_adapters():
    with pytest.raises(ConfigError, match="is not allowed: None for method='full'"):
        planner.Training(batch=1, sequence_tokens=8, lora=planner.LoRA())


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("gpt2", ("q_proj",), "'q_proj' is no linear layer of gpt2 .* c_attn"),
        ("mixtral-8x7b", "all-linear", "names of linear layers of its attention"),
        ("mixtral-8x7b", ("gate_up_proj",), "'gate_up_proj' is no linear layer of mixtral"),
    ],
)
def test_targets_that_are_not_there_are_named(name, targets, message):
    work = planner.Training(
        batch=1, sequence_tokens=8, method="lora", lora=planner.LoRA(targets=targets)
    )
    with pytest.raises(ConfigError, match=message):
        planner.estimate(planner.load_model(name), work, planner.Deployment(gpu="cpu"))


def test_dora_is_no_part_of_attnlab():
    work = planner.Training(batch=1, sequence_tokens=8, method="lora", lora=planner.LoRA(dora=True))
    deploy = planner.Deployment(gpu="cpu", runtime="attnlab")
    with pytest.raises(ConfigError, match="dora=True is not what runtime=attnlab has"):
        planner.estimate(planner.load_model("gpt2"), work, deploy)


def test_dora_takes_longer():
    deploy = planner.Deployment(gpu="h200")
    plain, dora = (
        planner.estimate(
            planner.load_model("llama-3.1-8b"),
            planner.Training(batch=1, sequence_tokens=64, method="lora", lora=lora),
            deploy,
        ).latency
        for lora in (planner.LoRA(), planner.LoRA(dora=True))
    )
    assert dora.step_s > 1.2 * plain.step_s
    assert dora.step_interval_s is not None
