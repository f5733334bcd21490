"""In which order a step's tensors are made: of the live classes, recorded on this CPU."""

import pytest
import torch

import planner
from planner.allocator import Alloc, DeviceAllocator
from planner.allocator.simulate import Replay
from planner.reserved import AllocatorPlan, weight_events
from planner.training_events import training_events
from profiles.bench import random_ids
from profiles.recording import AllocationRecorder
from profiles.training_bench import TrainingRun
from profiles.workloads import build

SMALL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BYTES = 4096
"""Allocations that matter: what is smaller stands in pools of its own."""


def planned_and_recorded(runtime="transformers", config=SMALL, **fields):
    work = planner.Training(batch=1, sequence_tokens=128, **fields)
    model = planner.read_config(config)
    deploy = planner.Deployment(gpu="cpu", runtime=runtime, dtype="bf16")
    e = planner.estimate(model, work, deploy)
    plan = AllocatorPlan(
        model=e.share.model,
        work=work,
        setting=e.setting,
        runtime=runtime,
        workspace_bytes=0,
        capacity_bytes=2**40,
    )
    device = torch.device("cpu")
    live = build(model, runtime=runtime, attention=None, dtype="bf16", device=device)
    with AllocationRecorder() as recorder:
        run = TrainingRun(live, work, random_ids(4096, 1, 128).clone(), dtype="bf16")
        for _ in range(2):
            run.step()
    ours = training_events(e.share.model, work, e.setting, runtime, workspace_bytes=0)
    return plan, list(ours), list(recorder.trace)


def made(events):
    return [e.size_bytes for e in events if isinstance(e, Alloc) and e.size_bytes > BYTES]


@pytest.mark.parametrize("fields", [{"precision": "master"}, {"optimizer": "muon"}])
def test_states_are_made_when_the_optimizer_makes_them(fields):
    """Behind the gradients of master copies; Muon's before those of its AdamW."""
    _, ours, theirs = planned_and_recorded(**fields)
    assert made(ours) == made(theirs)


def test_attnlab_steps_its_norm_and_head_before_its_layers():
    """Named so late as they are used, made before: a root of the head's size comes second."""
    untied = {**SMALL, "tie_word_embeddings": False}
    _, ours, theirs = planned_and_recorded("attnlab", untied)
    assert made(ours) == made(theirs)


def test_gradients_that_add_up_are_made_by_the_first_batch():
    plan, *both = planned_and_recorded(accumulation_steps=2)
    peaks = []
    for events in both:
        replay = Replay(DeviceAllocator())
        replay.feed(weight_events(plan))
        replay.feed(events)
        peaks.append(replay.stats())
    ours, theirs = peaks
    assert ours.peak_allocated_bytes == theirs.peak_allocated_bytes
    assert ours.peak_reserved_bytes == theirs.peak_reserved_bytes
