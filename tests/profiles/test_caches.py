"""Caches that are not the runtime's own, and padding: measured, and planned from the record."""

import json
import re
from dataclasses import replace

import pytest
import torch

import planner
from planner import CacheSpec, ConfigError
from profiles import records
from profiles.bench import left_padding
from profiles.compare import compare, estimate_of
from profiles.points import Point, SuitePoint, cache_fields, cache_words, kept_words
from profiles.suite_run import needed
from profiles.suites import suite_points
from profiles.traced_record import traced
from profiles.worker import measure
from profiles.workloads import build
from tests.profiles.made import CONFIG, measured

LLAMA = {**CONFIG, "vocab_size": 200}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 12}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}
KIVI = CacheSpec(kind="quantised", q_group_size=8, residual_tokens=8)
SCALED = CacheSpec(kind="static", scales="token-head")
ROOMY = CacheSpec(kind="static", capacity_tokens=40)


def of_kind(kind):
    return CacheSpec(kind=kind)


RUN = Point(phase="generation", batch=2, prompt_tokens=21, output_tokens=6, repeats=1, warmup=0)
KINDS = [
    *((config, "attnlab", d, None) for config in (LLAMA, MISTRAL) for d in ("int8", "int4", "fp8")),
    *((MISTRAL, "attnlab", d, of_kind("ring")) for d in (None, "int8")),
    *((LLAMA, "attnlab", d, of_kind("paged")) for d in (None, "int8")),
    (LLAMA, "attnlab", None, of_kind("dynamic")),
    (LLAMA, "attnlab", "fp8", SCALED),
    (LLAMA, "attnlab", None, KIVI),
    (LLAMA, "attnlab", "int2", KIVI),
    *((config, "transformers", None, of_kind("static")) for config in (LLAMA, MISTRAL, GEMMA3)),
    (LLAMA, "transformers", None, ROOMY),
    (LLAMA, "transformers", "fp8", None),
]


@pytest.fixture
def written(tmp_path):
    """A config on disk: the model's name."""

    def write(config):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


def record_of(point):
    """Its record, written and read again."""
    record = measure(point, suite="test", device="cpu")
    assert record.status == "ok"
    return records.from_json(records.to_json(record))


def assert_planned_to_the_byte(record):
    rows = [row for row in compare([record]) if row.quantity.endswith("_bytes")]
    assert {row.quantity for row in rows} == {"weights_bytes", "kv_cache_bytes", "peak_live_bytes"}
    assert [row.predicted for row in rows] == [row.measured for row in rows]


@pytest.mark.parametrize(("config", "runtime", "kv_dtype", "cache"), KINDS)
def test_a_record_of_every_cache_is_planned_to_the_byte(written, config, runtime, kv_dtype, cache):
    point = SuitePoint(
        model=written(config),
        run=RUN,
        split="held-out",
        runtime=runtime,
        kv_dtype=kv_dtype,
        cache=cache,
    )
    record = record_of(point)
    assert not record.is_plain
    assert_planned_to_the_byte(record)
    asked, planned = needed(point, "cpu"), estimate_of(record)
    assert (planned.deploy.cache, planned.setting.kv_dtype) == (cache, asked.setting.kv_dtype)
    assert planned.memory.peak_live_bytes == asked.memory.peak_live_bytes


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, GEMMA3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_prompts_are_planned_to_the_byte(written, config, attention):
    point = SuitePoint(
        model=written(config),
        run=replace(RUN, padded=True, batch=3),
        split="held-out",
        attention=attention,
    )
    assert point.name.endswith("generation 3 × 21 + 6, padded")
    record = record_of(point)
    assert record.padded
    assert_planned_to_the_byte(record)


def test_padding_stands_on_the_left_of_every_prompt():
    mask = left_padding(3, 12, 14)
    assert mask.tolist() == [[0] * n + [1] * (14 - n) for n in (6, 4, 2)]


def test_a_mask_of_padding_counts_as_an_input():
    work = planner.Inference(batch=4, prompt_tokens=100, output_tokens=9)
    plain, padded = (replace(work, padded=p).inputs_bytes for p in (False, True))
    assert padded - plain == 4 * 108 * 8


def test_padding_needs_a_runtime_that_hides_it():
    with pytest.raises(ConfigError, match="padded=True is not measured in runtime=attnlab"):
        SuitePoint(model="gpt2", run=replace(RUN, padded=True), split="held-out", runtime="attnlab")


@pytest.mark.parametrize(
    ("runtime", "kv_dtype", "cache", "said"),
    [
        ("transformers", "int4", None, "kv_dtype=int4 is not measured in transformers: fp8"),
        ("transformers", "int8", of_kind("static"), "'int8' is not kept by cache.kind='static'"),
        ("transformers", None, of_kind("paged"), "cache.kind='paged' is not in runtime"),
    ],
)
def test_what_is_not_measured_is_refused_before_anything_is_built(runtime, kv_dtype, cache, said):
    how = dict(runtime=runtime, attention=None, dtype="bf16", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        build(planner.read_config(LLAMA), kv_dtype=kv_dtype, cache=cache, **how)


def test_steps_that_are_replayed_twice_need_room_in_a_static_cache():
    run = replace(RUN, phase="decode", mode="graph")
    with pytest.raises(ConfigError, match=r"cache\.capacity_tokens=26 is not allowed .* 31 or"):
        SuitePoint(
            model="gpt2",
            run=run,
            split="held-out",
            cache=CacheSpec(kind="static", capacity_tokens=26),
        )


def test_a_static_cache_keeps_its_room_from_pass_to_pass():
    how = dict(runtime="transformers", attention=None, dtype="bf16", device=torch.device("cpu"))
    workload = build(planner.read_config(LLAMA), cache=of_kind("static"), **how)
    ids = torch.zeros(1, 7, dtype=torch.long)
    workload.begin(batch=1, capacity_tokens=9)
    first = [t.clone() for t in workload.tokens(ids, output_tokens=3, logits="last")]
    places = {layer.keys.data_ptr() for layer in workload._cache.layers}
    workload.reset()
    again = list(workload.tokens(ids, output_tokens=3, logits="last"))
    assert {layer.keys.data_ptr() for layer in workload._cache.layers} == places
    assert torch.equal(torch.cat(first), torch.cat(again))


def test_the_suite_has_every_kind_of_cache_once_and_fits_no_constant():
    points = suite_points("caches")
    kinds = {p.cache.kind for p in points if p.cache is not None}
    assert kinds == {"static", "ring", "paged", "dynamic", "quantised"}
    assert {p.kv_dtype for p in points} == {None, "int8", "int4", "int2", "fp8"}
    assert {p.split for p in points} == {"held-out"}
    assert any(p.run.padded for p in points)


@pytest.mark.parametrize("point", suite_points("caches"), ids=lambda point: point.name)
def test_every_point_of_the_suite_is_planned_on_a_gpu(point):
    estimate = needed(point, "h200")
    assert estimate.fits
    assert estimate.memory.peak_allocated_bytes > estimate.memory.peak_live_bytes


def test_a_cache_is_named_by_all_that_is_set():
    assert cache_words(None) == ""
    assert cache_words(cache_fields(ROOMY)) == "static cache capacity_tokens=40"
    assert cache_words({"kind": "ring"}) == "ring cache"
    assert kept_words(measured()) == ""
    odd = measured(kv_dtype="int8", cache={"kind": "ring"}, padded=True)
    assert kept_words(odd) == "int8 KV, ring cache, padded"


def test_a_record_of_an_older_schema_has_the_runtimes_own_cache():
    content = json.loads(records.to_json(measured()))
    old = {k: v for k, v in content.items() if k not in ("cache", "padded")} | {"schema": 2}
    record = records.from_json(json.dumps(old))
    assert (record.cache, record.padded, record.is_plain) == (None, False, True)


def test_a_field_of_a_later_cache_is_refused():
    with pytest.raises(ConfigError, match=r"cache\.pages is not known"):
        estimate_of(measured(cache={"kind": "paged", "pages": 3}))


def test_a_record_over_another_cache_is_traced_over_it():
    int8 = measured(kv_dtype="int8", output_tokens=2)
    assert traced(int8)["kv_cache_bytes"] == 2 * 2 * 2 * 2 * 17 * (16 + 4)
    with pytest.raises(ConfigError, match="padded=True is not traced"):
        traced(measured(runtime="transformers", padded=True))
