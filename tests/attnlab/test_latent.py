"""Latent attention: both ways of attending, over the latents that a cache keeps."""

import pytest
import torch

import planner
from attnlab.backend import backend_name
from attnlab.caches import build_cache
from attnlab.latent import LatentAttention
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner import CacheSpec, ConfigError
from planner.layers import MLA
from tests.attnlab.families import V
from tests.attnlab.test_families import twin
from tests.attnlab.test_training import shifted

CLOSE = dict(rtol=1e-4, atol=2e-5)
LATENT = ["deepseek_v2", "deepseek_v3", "deepseek_v3, halves", "deepseek_v3, yarn"]
KINDS = ["static", "dynamic", "ring", "paged"]


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_absorbed_equals_expanded_and_transformers(pairs, family, attention, ids):
    theirs, ours = pairs(family)
    expanded, absorbed = (
        twin(ours, attention=attention, latent=latent)(ids) for latent in ("expanded", "absorbed")
    )
    torch.testing.assert_close(absorbed, expanded, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(absorbed, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("latent", ["expanded", "absorbed"])
@pytest.mark.parametrize("kind", KINDS)
def test_either_way_over_a_cache_equals_one_pass_without(pairs, kind, latent):
    ours = twin(pairs("deepseek_v3")[1], latent=latent)
    ids = torch.randint(V, (2, 23), generator=torch.Generator().manual_seed(0))
    cache = build_cache(
        ours.model, CacheSpec(kind=kind), batch=2, tokens=23, dtype=torch.float32, device="cpu"
    )
    parts = [ours(part, cache=cache) for part in ids.split([7, 1, 1, 9, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(ids), **CLOSE)


def test_a_single_token_is_absorbed_and_several_are_expanded(pairs, monkeypatch):
    ways = []
    for way in ("_absorbed", "_expanded"):
        kept = getattr(LatentAttention, way)
        monkeypatch.setattr(
            LatentAttention, way, lambda *a, way=way, kept=kept: ways.append(way) or kept(*a)
        )
    ours = pairs("deepseek_v3")[1]
    for tokens in (3, 1):
        ours(torch.zeros(1, tokens, dtype=torch.long))
    assert ways == ["_expanded"] * 2 + ["_absorbed"] * 2


@pytest.mark.parametrize(("latent", "tokens"), [(None, 1), ("absorbed", 7), ("expanded", 7)])
def test_the_backend_is_named_for_either_way(pairs, latent, tokens):
    """No fused kernel of the CPU takes values of another width than keys."""
    ours = twin(pairs("deepseek_v3")[1], latent=latent)
    assert backend_name(ours, batch=2, tokens=tokens, context_tokens=9) == "sdpa:math"


def test_a_token_of_deepseek_v3_takes_70_272_bytes_in_every_cache():
    """Insights into DeepSeek-V3, arXiv:2505.09343, Table 1 (BF16)."""
    model = planner.load_model("deepseek-v3")
    assert isinstance(model.layers[0].attention, MLA)
    for kind in KINDS:
        spec = CacheSpec(kind=kind, block_tokens=1 if kind == "paged" else None)
        cache = build_cache(model, spec, batch=1, tokens=1, dtype=torch.bfloat16, device="meta")
        if kind == "dynamic":
            for index in range(len(model.layers)):
                cache.append(index, torch.empty(1, 1, 1, 576, device="meta"))
        assert cache.nbytes == 70_272


def test_gradients_are_those_of_either_way(pairs, ids):
    gradients = []
    for latent in ("expanded", "absorbed"):
        ours = twin(pairs("deepseek_v3")[1], attention="naive", latent=latent).requires_grad_()
        training_step(ours, ids, shifted(ids))
        gradients.append([p.grad for p in ours.parameters()])
    for expanded, absorbed in zip(*gradients, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-3, atol=1e-5)


def test_another_way_is_refused(pairs):
    with pytest.raises(ConfigError, match="latent='folded' is not allowed: one of expanded, absor"):
        Transformer(
            pairs("deepseek_v3")[1].model, latent="folded", dtype=torch.float32, device="meta"
        )
