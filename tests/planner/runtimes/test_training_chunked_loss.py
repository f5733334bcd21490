"""Training steps whose loss is made some tokens at a time: exact to the byte, chunk by chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import planner
from attnlab.implementations import choose
from attnlab.lora import add_adapters
from attnlab.training import loss_of, training_step
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.activations import peak
from planner.autograd import reductions
from planner.ledger import total_bytes
from planner.program import evaluate
from planner.runtimes.attnlab_training.step import step_program
from planner.training import PLANNED
from profiles.module_trace import fake_ids, trace_module
from tests.attnlab.drawn import models
from tests.attnlab.families import FAMILIES
from tests.pairs import every_pair
from tests.planner.configs import TINY
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step
from tests.planner.test_training_reserved import WIDE, plan_of
from tests.properties import examples

HEADS = (
    *("llama", "gemma", "gemma2", "gpt2", "phi", "gptj, tied", "opt-350m", "cohere", "granite"),
    "mixtral",
)
"""Tied or not, with a scale, a soft cap, a bias, a narrower embedding; experts before it."""
LLAMA = planner.load_model("llama-3.1-8b")


def check_exact(live, dtype, batch, tokens, how, **what):
    """Every allocation of a step in order, its peak and the gradients that it leaves."""
    meter, dims = watched_step(live, batch, tokens, **how), square(batch, tokens)
    what |= {name: value for name, value in how.items() if name != "precision"}
    what["autocast"] = "bf16" if how.get("precision") == "autocast" else None
    program = program_of(live.model, dims, attention=live.attention, dtype=dtype, **what)
    assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters() if p.grad is not None)
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients


@examples(40)
@given(
    model=models() | models(trained=True),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    chunk=st.integers(1, 150),
    checkpointing=st.sampled_from(("none", "full")),
)
def test_every_allocation_is_predicted_in_order_and_to_the_byte(
    model, dtype, batch, tokens, chunk, checkpointing
):
    attention = choose(None, model.layers)
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    how = {"checkpointing": checkpointing, "loss_chunk_tokens": chunk}
    check_exact(live, dtype, batch, tokens, how)


CHUNKS = (1, 5, 17, 34, 99)
"""Of 34 tokens: each alone, a shorter last one, halves, all, more than there are."""


HOW = {
    "bf16": ("bf16", {}),
    "fp32, checkpointed": ("fp32", {"checkpointing": "full"}),
    "autocast": ("fp32", {"precision": "autocast"}),
    "bf16, selective": ("bf16", {"checkpointing": "selective"}),
}


@every_pair(name=HEADS, chunk=CHUNKS, how=HOW)
def test_every_head_is_exact(name, chunk, how):
    dtype, how = HOW[how]
    model = planner.read_config(FAMILIES[name]().to_dict())
    live = Transformer(model, dtype=DTYPES[dtype], device="cpu")
    check_exact(live, dtype, 2, 17, how | {"loss_chunk_tokens": chunk})


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("bf16", {}),
        ("fp32", {}),
        ("bf16", {"precision": "autocast", "checkpointing": "full"}),
    ],
)
def test_a_head_that_is_not_trained_takes_no_gradient(name, dtype, how):
    model = planner.read_config(FAMILIES[name]().to_dict())
    lora = planner.LoRA(rank=3, targets=("o_proj",) if name == "mixtral" else "all-linear")
    live = Transformer(model, dtype=DTYPES[dtype], device="cpu")
    add_adapters(live, lora)
    check_exact(live, dtype, 2, 17, how | {"loss_chunk_tokens": 5}, lora=lora)


@pytest.mark.parametrize("chunk", [5, 99])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_products_compute_what_torch_counts(name, chunk):
    """Under autocast: FlopCounterMode has no count for addmm_, which adds to a float32 gradient."""
    model = planner.read_config(TINY[name])
    live = Transformer(model, attention="naive", dtype=torch.float32, device="cpu")
    ids = torch.zeros(2, 17, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        training_step(live, ids, ids, loss_chunk_tokens=chunk, precision="autocast")
    dims, how = square(2, 17), {"attention": "naive", "loss_chunk_tokens": chunk}
    for autocast in ("bf16", None):
        program = program_of(model, dims, dtype="fp32", autocast=autocast, **how)
        flops = sum(
            segment.count * evaluate(op.flops, dims)
            for segment in program.segments
            for op in segment.ops
            if op.flops
        )
        assert flops == counter.get_total_flops()


def test_many_chunks_are_written_once():
    model, how = planner.read_config(TINY["llama"]), {"attention": "sdpa", "loss_chunk_tokens": 5}
    few, many = (
        program_of(model, square(batch, 17), dtype="bf16", **how).segments for batch in (2, 202)
    )
    assert len(few) == len(many)
    assert {id(segment.ops) for segment in few} == {id(segment.ops) for segment in many}


class WithLabels(torch.nn.Module):
    """attnlab.training.training_step up to the loss."""

    def __init__(self, live, chunk):
        super().__init__()
        self.live, self.chunk = live, chunk

    def forward(self, ids, labels):
        return loss_of(self.live, ids, labels, loss_chunk_tokens=self.chunk)


@every_pair(
    sizes=[(64, 64), (64, 300), (700, 64), (700, 300)],
    optimizer=("adamw", "sgd"),
    tied=(False, True),
)
def test_reserved_of_two_steps_equals_the_trace(sizes, optimizer, tied, monkeypatch):
    tokens, chunk = sizes
    # a trace does not see what a kernel allocates inside itself
    monkeypatch.setattr(reductions, "softmax_scratch", lambda shape, itemsize: [])
    step_program.cache_clear()
    model = planner.read_config({**TINY["llama"], **WIDE, "tie_word_embeddings": tied})
    plan = plan_of(model, tokens, optimizer=optimizer, loss_chunk_tokens=chunk)
    live = Transformer(model, attention="naive", dtype=torch.bfloat16, device="meta")
    ids = (fake_ids(2, tokens), fake_ids(2, tokens))
    stats = trace_module(
        WithLabels(live, chunk), ids, train=True, optimizer=optimizer, loss=lambda loss: loss
    ).allocator()
    assert plan.peak_reserved_bytes == stats.peak_reserved_bytes


def on_h200(**work):
    deploy = planner.Deployment(gpu="h200", runtime="attnlab")
    return planner.estimate(LLAMA, planner.Training(**work), deploy)


def test_an_estimate_is_without_the_logits_of_all_tokens():
    """No log-probabilities of them and no gradient of these; those of adapters are small."""
    work = dict(batch=4, sequence_tokens=4096, checkpointing="full", method="lora")
    whole, chunked = on_h200(**work), on_h200(**work, loss_chunk_tokens=1000)
    logits = 4 * 4096 * LLAMA.vocab_size * 4
    saved = whole.memory.activations_bytes - chunked.memory.activations_bytes
    assert 2 * logits < saved < 3 * logits
    assert whole.memory.peak_reserved_bytes - chunked.memory.peak_reserved_bytes > saved
    assert chunked.latency.step_s == pytest.approx(whole.latency.step_s, rel=0.1)


@pytest.mark.parametrize("chunk", [256, 1000])
def test_the_rows_explain_a_peak_inside_of_a_chunk(chunk):
    """Float32 logits of a chunk beside those of the head: of 256 tokens, or of the last 512."""
    work = dict(batch=1, sequence_tokens=512, checkpointing="full", optimizer=None)
    estimate = on_h200(**work, method="lora", loss_chunk_tokens=chunk)
    assert total_bytes(estimate.rows) == estimate.memory.total_bytes
    rows = {row.item: row for row in estimate.rows if row.component == "activations"}
    tokens = min(chunk, 512)
    assert rows["logits"].size_bytes == tokens * LLAMA.vocab_size * 2
    assert rows["float32 logits"].size_bytes == tokens * LLAMA.vocab_size * 4
    for row in (rows["logits"], rows["float32 logits"]):
        assert eval(row.substituted.replace("·", "*")) == row.size_bytes


def test_the_largest_batch_in_chunks_just_fits():
    deploy = planner.Deployment(gpu="h200", runtime="attnlab")
    work = dict(sequence_tokens=1024, loss_chunk_tokens=1000, checkpointing="full", optimizer="sgd")
    largest = planner.max_batch(LLAMA, planner.Training(batch=1, **work), deploy)
    assert on_h200(batch=largest, **work).fits
    assert not on_h200(batch=largest + 1, **work).fits


def test_transformers_has_no_such_loss_and_the_refusal_names_who_has():
    work = planner.Training(batch=1, sequence_tokens=64, loss_chunk_tokens=8)
    deploy = planner.Deployment(gpu="h200", runtime="transformers")
    with pytest.raises(ConfigError, match=r"loss_chunk_tokens=8 .*: None, or attnlab, torchtune"):
        planner.estimate(LLAMA, work, deploy)


@pytest.mark.parametrize(("device", "tensors"), [("cpu", 3), ("cuda", 2)])
def test_a_tied_table_adds_up_its_gradients_in_place_where_no_meter_watches(device, tensors):
    """The head's waits for the embedding's; under a dispatch mode the sum is a third one."""
    model = planner.read_config({**TINY["llama"], **WIDE, "tie_word_embeddings": True})
    plan = plan_of(model, 64, loss_chunk_tokens=32)
    setting = replace(plan.setting, device=device)
    program = PLANNED["attnlab"](model, plan.work, setting).program
    ops = (op for segment in program.segments for op in segment.ops)
    made = [buffer.name for op in ops for buffer in op.allocates]
    assert made.count("gradient of embed_tokens") == tensors
