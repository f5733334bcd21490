"""What peft allocates while it makes DoRA's magnitudes, against peft itself on this CPU."""

import pytest
import torch

import planner
from planner.allocator import Alloc, Free, simulate
from planner.reserved import AllocatorPlan, reserved
from planner.trained.magnitudes import magnitude_events
from profiles.recording import AllocationRecorder
from profiles.training_methods import prepared
from profiles.workloads import build
from tests.planner.test_training_order import SMALL

DORA = planner.LoRA(rank=2, dora=True)
MIB = 2**20
WORK = planner.Training(batch=1, sequence_tokens=8, method="lora", lora=DORA)


def made_before_the_steps(model, *, from_config):
    return list(
        magnitude_events(
            model,
            DORA,
            dtype="bf16",
            runtime="transformers",
            workspace_bytes=32 * MIB,
            from_config=from_config,
        )
    )


def test_every_product_and_sum_is_made_in_the_order_of_pefts():
    model = planner.read_config(SMALL)
    device = torch.device("cpu")
    live = build(model, runtime="transformers", attention=None, dtype="bf16", device=device)
    with AllocationRecorder() as recorder:
        prepared(live.module, WORK, dtype="bf16", weight_dtype=None)
    matrices = {2 * p.count for p in model.parameters() if p.layer is not None and p.linear}
    ours, theirs = (
        [
            (type(e), sizes[e.id])
            for e in events
            if isinstance(e, Alloc | Free) and sizes[e.id] in matrices
        ]
        for events in (made_before_the_steps(model, from_config=False), recorder.trace)
        for sizes in [{e.id: e.size_bytes for e in events if isinstance(e, Alloc)}]
    )
    assert ours == theirs


@pytest.mark.parametrize(("tied", "kept_bytes"), [(True, 64 * MIB), (False, 32 * MIB)])
def test_the_workspace_keeps_the_block_of_a_head_that_was_tied(tied, kept_bytes):
    wide = {**SMALL, "vocab_size": 2**17, "tie_word_embeddings": tied}
    stats = simulate(made_before_the_steps(planner.read_config(wide), from_config=True))
    assert (stats.end.allocated_bytes, stats.end.reserved_bytes) == (32 * MIB, kept_bytes)


def test_a_step_makes_no_second_workspace():
    deploy = planner.Deployment(gpu="h200", runtime="transformers", dtype="bf16")
    plan = planner.estimate(planner.read_config(SMALL), WORK, deploy).memory.torch
    assert isinstance(plan, AllocatorPlan)
    assert reserved(plan).stats.peak_allocated_bytes < 3 * plan.workspace_bytes
