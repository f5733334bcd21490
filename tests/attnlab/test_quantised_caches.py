"""int8, int4, fp8 and KIVI under every cache: equal codes, near logits, the planner's bytes."""

import pytest
import torch

import planner
from attnlab.caches import build_cache
from attnlab.generate import generate
from attnlab.kivi import KiviCache
from attnlab.kv_cache import FixedShapeCache
from attnlab.quantize import decode, encode
from planner import CacheSpec, ConfigError
from planner.kv_format_names import KV_FORMATS, kivi, kv_format_bytes
from planner.runtimes.attnlab_formats import kv_format
from tests.attnlab.encoder_decoders import inputs_of, pair_of
from tests.attnlab.families import V
from tests.attnlab.test_caches import CHUNKS, LENGTH
from tests.pairs import every_pair

KINDS = ("static", "dynamic", "ring", "paged")
NEAR = {"int8": 0.03, "fp8": 0.12, "int4": 0.4}
"""How far the largest logit may move, of the largest."""
SAME = dict(rtol=1e-4, atol=2e-5)


def spec_of(kind, dtype, group=None):
    scales = "token-head" if dtype == "fp8" or group is not None else None
    block = 5 if kind == "paged" else None
    return CacheSpec(kind=kind, block_tokens=block, scales=scales, q_group_size=group)


def quantised(model, kind, dtype, *, batch=2, tokens=LENGTH, group=None, compute=torch.float32):
    spec = spec_of(kind, dtype, group)
    return build_cache(
        model, spec, batch=batch, tokens=tokens, dtype=compute, device="cpu", kv_dtype=dtype
    )


def fed(ours, cache, ids, chunks):
    return torch.cat([ours(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)


@pytest.fixture
def long_ids():
    return torch.randint(V, (2, LENGTH), generator=torch.Generator().manual_seed(4))


@every_pair(
    *(
        dict(family=group, kind=KINDS, chunks=CHUNKS, dtype=NEAR)
        for group in (("mistral", "gemma3"), ("llama", "falcon-40b", "deepseek_v3, yarn"))
    )
)
def test_any_chunking_over_any_cache_equals_one_pass_over_the_static_one(
    pairs, family, kind, chunks, dtype, long_ids
):
    """Tokens are quantised each for itself, so a chunk's end changes no code.

    What two layers compute of equal codes differs in the last bits of float32, and such a bit may
    turn a code: a whole step of its scale, in one element.
    """
    ours = pairs(family)[1]
    want = fed(ours, quantised(ours.model, "static", dtype), long_ids, [LENGTH])
    got = fed(ours, quantised(ours.model, kind, dtype), long_ids, CHUNKS[chunks])
    worst, largest = (got - want).abs().max(), want.abs().max()
    assert worst < (1e-4 + NEAR[dtype] / 8) * largest
    assert ((got - want).abs() < 1e-4 * largest).float().mean() > 0.8


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_any_chunking_are_equal(pairs, kind, dtype):
    """The very codes and scales, of the same keys and values."""
    model = pairs("llama")[1].model
    k, v = torch.randn(2, 2, 2, LENGTH, 16, generator=torch.Generator().manual_seed(1))
    held, read = [], []
    for chunks in ([LENGTH], [4, 5, 1, 1, 7, 2, 3]):
        cache = quantised(model, kind, dtype)
        start = 0
        for T in chunks:
            cache.begin(T, batch=2)
            read.append(cache.append(0, k[:, :, start : start + T], v[:, :, start : start + T]))
            start += T
            cache.advance()
        held.append(cache.layers[0])
    for one, other in zip(*held, strict=True) if kind != "paged" else ():  # blocks lie anywhere
        assert torch.equal(one, other)
    form = KV_FORMATS[f"{dtype}_per_token_head"].keys
    for all_at_once, chunked, x in zip(read[0], read[-1], (k, v), strict=True):
        assert torch.equal(all_at_once, chunked)
        assert torch.equal(chunked, decode(encode(x, form), form, width=16, dtype=x.dtype))


@pytest.mark.parametrize(("dtype", "near"), NEAR.items())
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_the_plain_ones(pairs, kind, dtype, near, long_ids):
    ours = pairs("llama")[1]
    plain = ours(long_ids)
    got = fed(ours, quantised(ours.model, kind, dtype), long_ids, CHUNKS["chunks"])
    error = float((got - plain).abs().max() / plain.abs().max())
    print(kind, dtype, f"{error:.2e}")
    assert 0 < error < near


@pytest.mark.parametrize("group", [4, 8])
def test_smaller_groups_lose_less(llama_pair, long_ids, group):
    ours = llama_pair[1]
    plain = ours(long_ids)
    whole, grouped = (
        fed(ours, quantised(ours.model, "static", "int4", group=g), long_ids, [LENGTH])
        for g in (None, group)
    )
    assert (grouped - plain).norm() < (whole - plain).norm()


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_passes_equal_each_sequence_alone(pairs, kind, dtype, long_ids):
    ours = pairs("mistral")[1]
    cache, seen, at = quantised(ours.model, kind, dtype), [[], []], [0, 0]
    for T, real in [(6, [6, 2]), (4, [1, 4]), (1, [1, 1]), (7, [7, 0]), (3, [2, 3])]:
        ids = torch.randint(V, (2, T))
        for b, n in enumerate(real):
            ids[b, :n] = long_ids[b, at[b] : at[b] + n]
        out = ours(ids, cache=cache, tokens=real)
        for b, n in enumerate(real):
            seen[b].append(out[b, :n])
            at[b] += n
    for b in range(2):
        alone = quantised(ours.model, "static", dtype, batch=1)
        want = ours(long_ids[b : b + 1, : at[b]], cache=alone)
        got = torch.cat(seen[b])[None]
        assert (got - want).abs().max() < (1e-4 + NEAR[dtype] / 8) * want.abs().max()


@pytest.mark.parametrize("dtype", NEAR)
def test_fixed_shapes_hold_the_same_codes(llama_pair, dtype, ids):
    ours = llama_pair[1]
    static = quantised(ours.model, "static", dtype, tokens=13)
    form = kv_format(spec_of("static", dtype), dtype)
    fixed = FixedShapeCache(
        ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu", form=form
    )
    want, got = fed(ours, static, ids, [9, 1, 1, 1, 1]), fed(ours, fixed, ids, [9, 1, 1, 1, 1])
    torch.testing.assert_close(got, want, rtol=0, atol=NEAR[dtype])
    assert (got - want).abs().median() < 1e-4


@every_pair(
    *(
        dict(
            family=group,
            kind=KINDS,
            dtype=NEAR,
            group=(None, 4),
            tokens=(3, 23),
            compute=(torch.float32, torch.bfloat16),
        )
        for group in (("mistral", "gemma3"), ("llama", "deepseek_v3, yarn"))
    )
)
def test_nbytes_are_those_the_planner_counts(pairs, family, kind, group, dtype, tokens, compute):
    model = pairs(family)[1].model
    spec = spec_of(kind, dtype, group)
    cache = quantised(model, kind, dtype, batch=3, tokens=tokens, group=group, compute=compute)
    cache.begin(tokens, batch=3)
    for index in range(len(cache.layers)):
        shapes = [(3, s[0], tokens, s[1]) for s in plain_streams(model, index)]
        cache.append(index, *(torch.zeros(shape, dtype=compute) for shape in shapes))
    assert cache.nbytes == planner.kv_cache_bytes(
        model, batch=3, context_tokens=tokens, dtype=dtype, runtime="attnlab", cache=spec
    )
    held = [t for layer in cache.layers for t in layer]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert cache.nbytes == sum(storages.values())
    if kind == "dynamic" and group is None and family == "llama":
        assert (
            cache.nbytes
            == kv_format_bytes(
                model, format=f"{dtype}_per_token_head", batch=3, context_tokens=tokens
            ).total_bytes
        )


def plain_streams(model, index):
    cache = build_cache(model, None, batch=1, tokens=1, dtype=torch.float32, device="meta")
    return cache.streams[index]


def test_codes_and_scales_are_rows_of_their_own(llama_pair):
    model = planner.load_model("llama-3.1-8b")
    deploy = planner.Deployment(gpu="h200", runtime="attnlab", kv_dtype="int4")
    work = planner.Inference(batch=2, prompt_tokens=1000, output_tokens=25, logits="last")
    rows = {
        r.item: r for r in planner.estimate(model, work, deploy).rows if r.component == "kv_cache"
    }
    codes, scales = 2 * 2 * 8 * 64 * 1024 * 32, 2 * 2 * 8 * 4 * 1024 * 32
    assert rows["full attention, int4_per_token_head codes"].size_bytes == codes
    assert rows["full attention, scales"].size_bytes == scales
    for row in rows.values():
        assert row.count * eval(row.substituted.replace("·", "*")) == row.size_bytes


def test_fp8_without_scales_stays_a_cast(llama_pair):
    model = llama_pair[1].model
    sizes = dict(batch=2, context_tokens=9, dtype="fp8", runtime="attnlab")
    cast = planner.kv_cache_bytes(model, **sizes)
    scaled = planner.kv_cache_bytes(model, **sizes, cache=spec_of("static", "fp8"))
    attention = model.layers[0].attention
    pairs = 2 * len(model.layers) * attention.num_key_value_heads * 2 * 9
    assert (cast, scaled - cast) == (pairs * attention.head_dim, pairs * 4)
    cache = build_cache(
        model, None, batch=2, tokens=9, dtype=torch.bfloat16, device="cpu", kv_dtype="fp8"
    )
    assert cache.layers[0][0].dtype == torch.float8_e4m3fn
    assert cache.nbytes == cast


def kivi_spec(group=4, residual=8):
    return CacheSpec(kind="quantised", q_group_size=group, residual_tokens=residual)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_kivis_bytes_are_the_planners_at_every_length(llama_pair, dtype):
    """Growing token by token, whatever came before."""
    model = llama_pair[1].model
    spec = CacheSpec(kind="quantised", q_group_size=16, residual_tokens=32)
    cache = build_cache(
        model, spec, batch=1, tokens=1, dtype=torch.bfloat16, device="cpu", kv_dtype=dtype
    )
    G, D = model.layers[0].attention.num_key_value_heads, model.layers[0].attention.head_dim
    form = kivi(int(dtype.removeprefix("int")), group_size=16, residual_tokens=32)
    for length in range(1, 301):
        cache.begin(1, batch=1)
        for index in range(len(model.layers)):
            cache.append(index, *torch.zeros(2, 1, G, 1, D, dtype=torch.bfloat16))
        cache.advance()
        counted = planner.kv_cache_bytes(
            model,
            batch=1,
            context_tokens=length,
            dtype=dtype,
            runtime="attnlab",
            cache=spec,
            compute_dtype="bf16",
        )
        published = kv_format_bytes(
            model, format=form, batch=1, context_tokens=length, compute_dtype="bf16"
        )
        assert cache.nbytes == counted == published.total_bytes, length
        held = [t for layer in cache.layers for t in layer]
        assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in held)


def test_kivi_keeps_the_same_of_any_chunking():
    one_layer = planner.read_config({**TINY, "num_hidden_layers": 1})
    k, v = torch.randn(2, 2, 2, 61, 16, generator=torch.Generator().manual_seed(1))
    held = []
    for chunks in ([61], [1] * 61, [5, 17, 1, 8, 30]):
        cache = build_cache(
            one_layer, kivi_spec(), batch=2, tokens=61, dtype=torch.float32, device="cpu"
        )
        start = 0
        for T in chunks:
            cache.begin(T, batch=2)
            read = cache.append(0, k[:, :, start : start + T], v[:, :, start : start + T])
            start += T
            cache.advance()
        assert read[0].shape == k.shape
        assert torch.equal(read[0][:, :, start - T :], k[:, :, start - T :])
        held.append(cache.layers[0])
    for stored in zip(*held, strict=True):
        assert torch.equal(stored[0], stored[1])
        assert torch.equal(stored[0], stored[2])


TINY = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(("dtype", "near"), [("int8", 0.04), ("int4", 0.5)])
def test_kivis_logits_are_near_the_plain_ones(pairs, family, chunks, dtype, near, long_ids):
    ours = pairs(family)[1]
    plain = ours(long_ids)
    cache = build_cache(
        ours.model, kivi_spec(), batch=2, tokens=LENGTH, dtype=torch.float32, device="cpu",
        kv_dtype=dtype,
    )  # fmt: skip
    assert isinstance(cache, KiviCache)
    got = fed(ours, cache, long_ids, chunks)
    assert (got - plain).abs().max() < near * plain.abs().max()
    if chunks == [LENGTH]:
        assert torch.equal(got, fed(ours, None, long_ids, chunks))
    cache.reset()
    torch.testing.assert_close(fed(ours, cache, long_ids, chunks), got, rtol=0, atol=0)


def test_what_is_not_there_is_refused(pairs):
    model = pairs("llama")[1].model
    sizes = dict(batch=1, tokens=4, dtype=torch.float32, device="cpu")
    latent = pairs("deepseek_v3, yarn")[1].model
    for make, message in [
        (lambda: CacheSpec(kind="quantised", scales="token-head"), "cache.scales='token-head' is"),
        (lambda: CacheSpec(kind="static", q_group_size=8), "cache.q_group_size=8 is not allowed"),
        (lambda: build_cache(model, None, **sizes, kv_dtype="int2"), "kv_dtype='int2' is not kept"),
        (
            lambda: build_cache(model, spec_of("static", "fp8"), **sizes),
            "kv_dtype='fp32' is not kept by .* with scales: one of int8, int4, fp8",
        ),
        (
            lambda: build_cache(model, CacheSpec(kind="quantised"), **sizes, kv_dtype="fp8"),
            "kv_dtype='fp8' is not kept by .* in cache.kind='quantised': one of int8, int4, int2",
        ),
        (
            lambda: build_cache(model, spec_of("ring", "int8", 7), **sizes, kv_dtype="int8"),
            "group_size=7 does not divide a row of 16 elements",
        ),
        (
            lambda: build_cache(latent, CacheSpec(kind="quantised"), **sizes),
            r"cache.kind='quantised' does not take latent attention \(MLA\) of deepseek_v3",
        ),
        (
            lambda: build_cache(model, CacheSpec(kind="quantised", residual_tokens=0), **sizes),
            "cache.residual_tokens=0 is not allowed",
        ),
        (
            lambda: build_cache(model, CacheSpec(kind="quantised", backend="hqq"), **sizes),
            "cache.backend='hqq' is not allowed in runtime=attnlab",
        ),
        (
            lambda: planner.kv_cache_bytes(
                model,
                batch=1,
                context_tokens=1,
                cache=CacheSpec(kind="static", scales="token-head"),
            ),
            "cache.scales='token-head' is not in runtime=transformers",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            make()
    cache = build_cache(model, kivi_spec(), batch=2, tokens=9, dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match=r"tokens=\[3, 4\] are not allowed in a quantised cache"):
        cache.begin(4, batch=2, tokens=[3, 4])


@pytest.mark.parametrize("kind", [*KINDS, "quantised"])
@pytest.mark.parametrize("family", ["bamba", "jamba", "qwen3_next", "kimi_linear"])
def test_states_beside_codes_stay_as_they_are(pairs, family, kind, long_ids):
    """Of hybrids only keys and values are quantised; any chunking is near the plain logits."""
    ours = pairs(family)[1]
    spec, sizes = spec_of(kind, "int8"), dict(tokens=LENGTH, dtype=torch.float32, device="cpu")
    if kind == "quantised":
        spec = kivi_spec()
    if kind == "quantised" and family == "kimi_linear":
        with pytest.raises(ConfigError, match="does not take latent attention"):
            build_cache(ours.model, spec, batch=2, **sizes, kv_dtype="int8")
        return
    cache = build_cache(ours.model, spec, batch=2, **sizes, kv_dtype="int8")
    plain, got = ours(long_ids), fed(ours, cache, long_ids, CHUNKS["chunks"])
    assert 0 < (got - plain).abs().max() < NEAR["int8"] * plain.abs().max()
    assert cache.nbytes == planner.kv_cache_bytes(
        ours.model,
        batch=2,
        context_tokens=LENGTH,
        dtype="int8",
        runtime="attnlab",
        cache=spec,
        compute_dtype="fp32",
    )


def test_an_encoders_keys_and_values_stay_as_they_are():
    ours = pair_of("bart")[1]
    inputs, ids = inputs_of(ours.model), torch.zeros(2, 7, dtype=torch.long)
    cache = quantised(ours.model, "static", "int8", tokens=7)
    got = ours(ids, encoder_inputs=inputs, cache=cache)
    plain = ours(ids, encoder_inputs=inputs)
    assert 0 < (got - plain).abs().max() < NEAR["int8"] * plain.abs().max()
    assert cache.nbytes == planner.kv_cache_bytes(
        ours.model,
        batch=2,
        context_tokens=7,
        dtype="int8",
        runtime="attnlab",
        encoder_tokens=9,
        compute_dtype="fp32",
    )


def test_a_generation_over_codes_is_the_same_in_any_cache(llama_pair, ids):
    ours = llama_pair[1]
    out = [
        generate(ours, ids, output_tokens=9, cache=quantised(ours.model, kind, "int8", tokens=21))
        for kind in KINDS
    ]
    assert out[0].shape == (2, 9)
    assert all(torch.equal(out[0], other) for other in out[1:])


def test_a_cache_takes_no_codes_of_another_format(llama_pair):
    model = llama_pair[1].model
    fixed = FixedShapeCache(
        model, batch=2, capacity_tokens=9, dtype=torch.float32, device="cpu",
        form=KV_FORMATS["int8_per_token_head"],
    )  # fmt: skip
    fixed.take(quantised(model, "static", "int8", tokens=9))
    with pytest.raises(ConfigError, match="a cache of one KV format does not fit one of another"):
        fixed.take(quantised(model, "static", "fp8", tokens=9))
