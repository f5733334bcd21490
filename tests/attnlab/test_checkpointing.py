"""Checkpointing: the same gradients to the bit, and less kept."""

from collections import Counter

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from attnlab.block import Block
from attnlab.checkpointing import KEPT
from planner import ConfigError
from profiles.meters import LiveTensorMeter
from tests.attnlab.encoder_decoders import inputs_of
from tests.attnlab.trained import FEW, gradients, step, theirs_of, trainable

POLICIES = [("full", 1), ("full", 2), ("selective", 1)]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(("policy", "every"), POLICIES)
def test_no_gradient_changes(family, policy, every, ids):
    ours = trainable(family)
    expected, wanted = step(ours, ids), gradients(ours)
    loss = step(ours, ids, checkpointing=policy, checkpoint_every=every)
    assert torch.equal(loss, expected)
    for name, made in gradients(ours).items():
        assert (made is None) is (wanted[name] is None), name
        assert made is None or torch.equal(made, wanted[name]), name


def held_bytes(ours, ids, **how):
    """What is alive when the forward is done, logits included."""
    if ours.reads_encoder:
        how["encoder_inputs"] = inputs_of(ours.model)
    with LiveTensorMeter() as meter:
        logits = ours(ids, **how)
        held = meter.live_bytes
        del logits
    return held


@pytest.mark.parametrize("family", FEW)
def test_each_policy_keeps_less(family, ids):
    ours = trainable(family)
    kept = {
        (policy, every): held_bytes(ours, ids, checkpointing=policy, checkpoint_every=every)
        for policy, every in [("none", 1), *POLICIES]
    }
    assert kept["full", 1] < kept["full", 2] < kept["none", 1]
    assert kept["full", 1] < kept["selective", 1] < kept["none", 1]


def test_full_keeps_the_inputs_of_blocks_alone(ids):
    """What two blocks more keep is two of [B, T, h]."""
    ours = trainable("llama")
    (B, T), h = ids.shape, ours.model.hidden_size
    blocks = torch.nn.ModuleList([*ours.layers] * 4)
    kept = []
    for n in (2, 4, 6):
        ours.layers = blocks[:n]
        kept.append(held_bytes(ours, ids, checkpointing="full"))
    assert kept[1] - kept[0] == kept[2] - kept[1] == 2 * B * T * h * 4


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("family", FEW)
def test_the_blocks_that_run_again_are_those_of_transformers(family, every, ids, monkeypatch):
    theirs, ours, runs = theirs_of(family), trainable(family), Counter()
    theirs.activation_checkpointing_enable(every_n_layers=every)
    layers = [m for m in theirs.modules() if isinstance(m, GradientCheckpointingLayer)]
    forward = Block.forward

    def counted(block, *args):
        runs[block] += 1
        return forward(block, *args)

    monkeypatch.setattr(Block, "forward", counted)
    step(ours, ids, checkpointing="full", checkpoint_every=every)
    blocks = [*ours.encoder.layers, *ours.layers] if ours.reads_encoder else [*ours.layers]
    assert [runs[block] for block in blocks] == [
        1 + layer.gradient_checkpointing for layer in layers
    ]


def test_selective_computes_no_product_twice(ids):
    ours = trainable("llama")
    counts = []
    for policy in ("none", "selective", "full"):
        with LiveTensorMeter(log=True) as meter:
            step(ours, ids, checkpointing=policy)
        made = [op for op, change in meter.events if change > 0]
        names = [op.name().removeprefix("aten::").removesuffix(".default") for op in KEPT]
        counts.append((sum(made.count(n) for n in names), made.count("rsqrt")))
        gradients(ours)
    (plain, norms), (selective, norms_again), (full, _) = counts
    assert plain == selective < full
    assert norms < norms_again


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(checkpointing="some"), "checkpointing='some' is not allowed: one of none, full, sel"),
        (
            dict(checkpoint_every=2),
            "checkpoint_every=2 is not allowed: 1 for checkpointing='none', any for 'full'",
        ),
        (dict(checkpointing="selective", checkpoint_every=2), "1 for checkpointing='selective'"),
        (dict(checkpointing="full", checkpoint_every=0), "checkpoint_every=0 is not allowed"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_not_allowed_is_refused(family, how, message, ids):
    with pytest.raises(ConfigError, match=message):
        step(trainable(family), ids, **how)
