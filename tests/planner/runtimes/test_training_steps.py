"""The program of a training step against every storage that the real step makes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import planner
from attnlab.implementations import choose
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner.activations import peak, peak_bytes
from planner.program import Dims, evaluate
from profiles.meters import module_bytes
from tests.attnlab.drawn import models
from tests.planner.configs import TINY
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step
from tests.properties import examples


@examples(60)
@given(
    model=models() | models(trained=True),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    naive=st.booleans(),
    checkpointing=st.sampled_from(("none", "full")),
)
def test_every_allocation_of_a_step_is_predicted_in_order_and_to_the_byte(
    model, dtype, batch, tokens, naive, checkpointing
):
    attention = "naive" if naive else choose(None, model.layers)
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    how = {"checkpointing": checkpointing}
    meter, dims = watched_step(live, batch, tokens, **how), square(batch, tokens)
    program = program_of(model, dims, attention=attention, dtype=dtype, **how)

    assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2 sliding from layer 1"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (2, 40)])  # optimizer or backward wins
def test_a_step_of_adamw_is_exact_and_leaves_the_weights_and_its_states(name, impl, batch, tokens):
    model = planner.read_config(TINY[name])
    live = Transformer(model, dtype=torch.bfloat16, device="cpu")
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW(live.parameters(), **ways)
    watched_step(live, batch, tokens, adamw)  # makes the states
    meter, dims = watched_step(live, batch, tokens, adamw), square(batch, tokens)
    what = {"attention": live.attention, "dtype": "bf16"}
    program = program_of(model, dims, optimizer="adamw", optimizer_impl=impl, **what)

    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == 0

    deploy = planner.Deployment(gpu="cpu", runtime="attnlab", dtype="bf16")
    work = planner.Training(batch=batch, sequence_tokens=tokens, optimizer_impl=impl)
    memory = planner.estimate(model, work, deploy).memory
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    assert memory.optimizer_bytes == states
    assert memory.gradients_bytes == sum(p.nbytes for p in live.parameters())
    assert memory.peak_live_bytes == module_bytes(live) + states + meter.peak_bytes
    assert memory.total_bytes == memory.peak_live_bytes


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
def test_sgd_works_in_place_and_keeps_nothing(impl):
    model = planner.read_config(TINY["llama"])
    live = Transformer(model, dtype=torch.float32, device="cpu")
    sgd = torch.optim.SGD(live.parameters(), foreach=impl == "foreach", fused=impl == "fused")
    watched_step(live, 1, 3, sgd)
    meter, dims = watched_step(live, 1, 3, sgd), square(1, 3)
    what = {"attention": "sdpa", "dtype": "fp32", "optimizer": "sgd", "optimizer_impl": impl}
    assert peak(program_of(model, dims, **what), dims).live_bytes == meter.peak_bytes
    assert not any(sgd.state.values())


@pytest.mark.parametrize("name", ["llama with biases, tied", "gemma2", "phi3", "gpt2"])
def test_products_compute_what_torch_counts(name):
    """torch.utils.flop_counter sees each mm and bmm of the real step, the masked pairs included."""
    model = planner.read_config(TINY[name])
    live = Transformer(model, attention="naive", dtype=torch.float32, device="cpu")
    ids = torch.zeros(2, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        training_step(live, ids, ids)
    dims = square(2, 20)
    program = program_of(model, dims, attention="naive", dtype="fp32")
    flops = sum(
        segment.count * evaluate(op.flops, dims)
        for segment in program.segments
        for op in segment.ops
        if op.flops
    )
    assert flops == counter.get_total_flops()


def test_equal_layers_are_written_once():
    config = TINY["gemma2"]
    small, large = (
        planner.read_config({**config, "num_hidden_layers": n, "layer_types": None})
        for n in (4, 64)
    )
    dims, what = square(2, 20), {"attention": "naive", "dtype": "bf16"}
    written = [
        {id(segment.ops) for segment in program_of(model, dims, **what).segments}
        for model in (small, large)
    ]
    assert len(written[0]) == len(written[1])


def test_a_grid_gives_what_single_points_give():
    model = planner.read_config(TINY["gemma2"])
    batches, tokens = np.meshgrid([2.0, 5.0], [17.0, 40.0, 300.0])
    grid = Dims(batch=batches, tokens=tokens, context=tokens)
    what = {"attention": "naive", "dtype": "bf16", "optimizer": "adamw"}
    program = program_of(model, square(2, 17), **what)  # all cells are in one regime
    for b, t, value in zip(batches.flat, tokens.flat, peak_bytes(program, grid).flat, strict=True):
        point = square(int(b), int(t))
        assert peak_bytes(program_of(model, point, **what), point) == value


def test_the_layer_of_the_peak_is_the_last_one_that_runs_forward():
    dims = square(2, 40)
    model = planner.read_config({**TINY["llama"], "num_hidden_layers": 5})
    highest = peak(program_of(model, dims, attention="naive", dtype="fp32"), dims)
    assert (highest.phase, highest.layer, highest.op) == ("backward", 4, "gate · up backward")
