"""Training under torch's fully_shard: what one rank holds, to the byte, over random small configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.training import training_phase
from tests.attnlab.families import FAMILIES
from tests.planner.sharded import fake_ranks, shard, shard_bytes, sharded_meter, state_bytes
from tests.planner.small_decoders import (
    CHECKPOINTING,
    EAGER_ONLY,
    built,
    checkpoint,
    decoders,
    described,
    takes_padding,
)
from tests.planner.steps import curve, events
from tests.properties import examples


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with fake_ranks():
        yield


DTYPES = st.sampled_from(("fp32", "bf16"))
DEPLOYMENTS = st.builds(
    planner.Deployment,
    gpu=st.just("cpu"),
    dtype=DTYPES,
    weight_dtype=DTYPES,
    reduce_dtype=DTYPES,
    data_parallel_shards=st.integers(2, 16),
    reshard_after_forward=st.booleans(),
)


def layers_of(live):
    return next(m for m in live.modules() if isinstance(m, torch.nn.ModuleList))


def live_of(config, deploy, how=("none", 1)):
    """The class, sharded; and the deployment with its attention."""
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    deploy = replace(deploy, attention=attention)
    live = built(described(config), deploy.weight_dtype, attention).train()
    checkpoint(live, how)
    shard(live, layers_of(live), deploy)
    return live, deploy


@examples(60, deadline=None)
@given(
    config=decoders(),
    deploy=DEPLOYMENTS,
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    how=CHECKPOINTING,
    padded=st.booleans(),
)
def test_the_peak_of_a_sharded_step_is_exact(config, deploy, batch, tokens, how, padded):
    padded = padded and takes_padding(config)
    live, deploy = live_of(config, deploy, how)
    meter = sharded_meter(live, batch, tokens, padded=padded)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        checkpointing=how[0],
        checkpoint_every=how[1],
        padded=padded,
    )
    memory = planner.estimate(planner.read_config(live.config.to_dict()), work, deploy).memory
    assert memory.weights_bytes == shard_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes
