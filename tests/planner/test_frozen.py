"""Steps with frozen parts: peaks to the byte against the real classes, over random small decoders."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import planner
from planner.workload import FROZEN_PARTS
from profiles.meters import LiveTensorMeter, module_bytes
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


def step(live, ids, mask, adamw, *, autocast=False):
    region = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    with LiveTensorMeter() as meter:
        with region:
            loss = live(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        if adamw is not None:
            adamw.step()
            adamw.zero_grad()
    return meter


def check_exact(live, work, dtype, attention):
    """The second step, and what lives beside it."""
    ids = words(live.config, work.batch, work.sequence_tokens)
    mask = padding(work.batch, work.sequence_tokens) if work.padded else None
    adamw, states = None, 0
    autocast = work.precision == "autocast"
    if work.optimizer is not None:
        ways = {
            "foreach": work.optimizer_impl == "foreach",
            "fused": work.optimizer_impl == "fused",
        }
        adamw = torch.optim.AdamW(live.parameters(), **ways)
        step(live, ids, mask, adamw, autocast=autocast)  # makes the states
        states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    meter = step(live, ids, mask, adamw, autocast=autocast)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    assert memory.optimizer_bytes == states
    trained = sum(p.nbytes for p in live.parameters() if p.requires_grad)
    assert memory.gradients_bytes == trained
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes


@examples(60, deadline=None)
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
    impl=st.sampled_from((None, "foreach", "fused", "for-loop")),
    autocast=st.booleans(),
)
def test_a_step_with_frozen_parts_is_exact(
    config, parts, layers, dtype, batch, tokens, eager, how, padded, impl, autocast
):
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp32" if autocast else dtype, attention).train()
    layers = min(layers, len(layers_of(live)))
    freeze(live, parts, layers)
    assume(any(p.requires_grad for p in live.parameters()))  # else refused
    checkpoint(live, how)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None if impl is None else "adamw",
        optimizer_impl=impl or "foreach",
        checkpointing=how[0],
        checkpoint_every=how[1],
        padded=padded and takes_padding(config),
        precision="autocast" if autocast else "pure",
        frozen=parts,
        frozen_layers=layers,
    )
    check_exact(live, work, "bf16" if autocast else dtype, attention)
