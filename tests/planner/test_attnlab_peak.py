"""attnlab's closed-form peaks against storages watched while the real passes run on the CPU."""

from functools import cache

import pytest
import torch

import planner
from attnlab.caches import build_cache
from attnlab.transformer import Transformer
from planner import CacheSpec
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.attnlab_program import Pass, forward_program
from profiles.meters import LiveTensorMeter
from tests.attnlab.families import FAMILIES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("static", "dynamic", "ring", "paged")
PROMPT = 29
PASSES = {
    "whole prompt and steps": [PROMPT, 1, 1],
    "chunks and a step": [7, 9, 4, 9, 1],
}


@cache
def model_of(family):
    return planner.read_config(FAMILIES[family]().to_dict())


def live_peaks(model, attention, dtype, kv_dtype, kind, batch, passes, logits):
    """(tokens, context, highest bytes of live storages) of each pass."""
    transformer = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    transformer.requires_grad_(False)
    seen = []
    with LiveTensorMeter() as meter:
        held = build_cache(
            model,
            CacheSpec(kind=kind, block_tokens=8 if kind == "paged" else None),
            batch=batch,
            tokens=sum(passes),
            dtype=DTYPES[kv_dtype],
            device="cpu",
        )
        for tokens in passes:
            ids = torch.zeros(batch, tokens, dtype=torch.long)
            meter.reset_peak()
            out = transformer(ids, cache=held, logits=logits)
            seen.append((tokens, held.length, meter.peak_bytes - ids.nbytes))
            del out, ids
    return seen


def predicted(model, attention, dtype, kv_dtype, kind, batch, tokens, context, capacity, logits):
    program = forward_program(
        model,
        Pass(
            kind="prefill" if tokens == context else "decode",
            attention=attention,
            dtype=dtype,
            kv_dtype=kv_dtype,
            logits=logits,
            cache=kind,
            block_tokens=8,
        ),
    )
    dims = Dims(batch=batch, tokens=tokens, context=context, capacity=capacity)
    return peak(program, dims).live_bytes


def assert_exact(family, attention, dtype, kind, *, batch, passes, logits="all", kv_dtype=None):
    model = model_of(family)
    settings = (model, attention, dtype, kv_dtype or dtype, kind, batch)
    seen = live_peaks(*settings, passes, logits)
    ours = [predicted(*settings, t, s, sum(passes), logits) for t, s, _ in seen]
    assert ours == [measured for _, _, measured in seen]


def attentions(family):
    return ("naive",) if family == "gemma2" else ("sdpa", "naive")


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in FAMILIES for a in attentions(f)]
)
def test_the_peak_of_every_family_is_exact(family, attention, batch, dtype, passes):
    assert_exact(family, attention, dtype, "static", batch=batch, passes=passes)
