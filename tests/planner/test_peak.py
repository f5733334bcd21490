"""Closed-form live peaks against storages watched while the real forward runs on the CPU."""

from __future__ import annotations

import pytest
import torch

import planner
from attnlab.kv_cache import KVCache
from attnlab.transformer import Transformer
from planner import activations
from planner.activations import peak, peak_bytes
from planner.program import Dims
from planner.runtimes import attnlab_program
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from profiles.meters import LiveTensorMeter
from tests.pairs import every_pair
from tests.planner.configs import TINY, build

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# few tokens: the feed-forward wins the peak; many: attention does
SHAPES = {"batch": (1, 2), "tokens": (24, 200)}
EAGER_ONLY = ("gemma2", "gemma2 without sliding layers")
ATTNLAB = [name for name in TINY if name not in ("mixtral", "deepseek_v3")]


def cases(names, fast, slow):
    return [
        (name, attention)
        for name in names
        for attention in (fast, slow)
        if attention == slow or name not in EAGER_ONLY
    ]


@every_pair(subject=cases(TINY, "sdpa", "eager"), dtype=DTYPES, **SHAPES)
def test_transformers_peak_is_exact_at_prefill_and_over_decode_steps(subject, dtype, batch, tokens):
    name, attention = subject
    live = build(TINY[name], device="cpu", dtype=DTYPES[dtype], attention=attention)
    ids = torch.randint(1, 99, (batch, tokens))
    seen = []
    with torch.no_grad(), LiveTensorMeter() as meter:
        cache, step = None, ids
        for _ in range(4):
            meter.reset_peak()
            out = live(step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, ids[:, :1]
            seen.append(meter.peak_bytes)
            del out
    model = planner.read_config(TINY[name])
    for position, measured in enumerate(seen):
        decode = position > 0
        what = Pass(
            kind="decode" if decode else "prefill",
            attention=attention,
            dtype=dtype,
            device="cpu",
            held_whole=position == 1,
        )
        dims = Dims(batch=batch, tokens=1 if decode else tokens, context=tokens + position)
        program = pass_program(model, what, Regime.of(model, dims))
        assert peak(program, dims).live_bytes == measured, position


@every_pair(subject=cases(ATTNLAB, "sdpa", "naive"), dtype=DTYPES, logits=("all", "last"), **SHAPES)
def test_attnlab_peak_is_exact_at_prefill_and_decode(subject, dtype, logits, batch, tokens):
    name, attention = subject
    model = planner.read_config(TINY[name])
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    ids = torch.randint(1, 99, (batch, tokens))
    capacity = tokens + 5
    seen = []
    with torch.no_grad(), LiveTensorMeter() as meter:
        cache = KVCache(
            model, batch=batch, capacity_tokens=capacity, dtype=DTYPES[dtype], device="cpu"
        )
        for step in (ids, ids[:, :1], ids[:, :1]):
            meter.reset_peak()
            out = live(step, cache=cache, logits=logits)
            seen.append(meter.peak_bytes)
            del out
    for position, measured in enumerate(seen):
        program = attnlab_program.forward_program(
            model,
            attnlab_program.Pass(
                kind="decode" if position else "prefill",
                attention=attention,
                dtype=dtype,
                kv_dtype=dtype,
                logits=logits,
            ),
        )
        dims = Dims(
            batch=batch,
            tokens=1 if position else tokens,
            context=tokens + position,
            capacity=capacity,
        )
        assert peak(program, dims).live_bytes == measured, position


@pytest.mark.parametrize(("logits", "published_mib"), [("all", 1034), ("last", 466)])
def test_llama_8b_prefill_matches_an_independent_trace(logits, published_mib):
    """Traced by others on fake tensors: batch 1, 4 096 tokens, sdpa, without the KV cache."""
    work = planner.Inference(batch=1, prompt_tokens=4096, logits=logits)
    model = planner.load_model("llama-3.1-8b")
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    assert round(memory.activations_bytes / 2**20) == published_mib


def test_the_winner_of_the_peak_is_named():
    def winner(name, **work):
        estimate = planner.estimate(
            planner.load_model(name),
            planner.Inference(**work),
            planner.Deployment(gpu="h200", attention=None),
        )
        return estimate.peak.op

    assert winner("llama-3.1-8b", batch=1, prompt_tokens=4096) == "logits"
    assert winner("llama-3.1-8b", batch=1, prompt_tokens=4096, logits="last") == "gate · up"
    assert winner("gemma-2-9b", batch=1, prompt_tokens=4096, logits="last") == "attention weights"


@pytest.mark.parametrize("chunk", [8192, 4])
def test_a_grid_gives_what_single_points_give(monkeypatch, chunk):
    import numpy as np

    monkeypatch.setattr(activations, "CHUNK_CELLS", chunk)
    model = planner.read_config(TINY["gemma2"])
    what = Pass(kind="prefill", attention="eager", dtype="bf16", device="cuda", logits="last")
    batches, tokens = np.meshgrid([2.0, 3.0, 5.0], [16.0, 17.0, 300.0])
    sizes = Dims(batch=batches, tokens=tokens, context=tokens)
    program = pass_program(model, what, Regime.of(model, sizes))
    grid = peak_bytes(program, sizes)
    assert grid.shape == batches.shape
    for b, t, value in zip(batches.flat, tokens.flat, grid.flat, strict=True):
        point = Dims(batch=int(b), tokens=int(t), context=int(t))
        assert peak_bytes(program, point) == value
