"""Ops that move bytes: by how their kernels read, with fits of today and of before."""

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.catalog.gpus import gpu_named
from planner.runtimes import runtime_named
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import load
from planner.timing.clock import Speed
from planner.timing.op_families import BMM, FAMILIES
from planner.timing.op_kinds import Bytes, timed_ops
from planner.timing.op_times import Fit, Roof
from planner.timing.power import flop_joules

H200 = gpu_named("h200")
COUNT = 2.0**24
NEW = ("offsets", "offsets cast", "across", "far", "joined", "cumsum", "cumsum down", "convolution")


def speed(*without, **more):
    """An H200 without some fits, with others."""
    known = load("h200")
    fits = {name: fit for name, fit in known.fits.items() if name not in without}
    return Speed(gpu=H200, dtype="bf16", calibration=replace(known, fits={**fits, **more}))


def of(kind, at=None, *, moved=8 * COUNT, count=COUNT, second=None):
    return float(byte_seconds(kind, moved, count, at or speed(), second))


def test_what_is_read_across_takes_longer_and_longest_where_sectors_are_left_to_others():
    assert of("elementwise") < of("strided") < of("across") < of("far")
    assert of("far") == pytest.approx(7.3e-12 * COUNT, rel=0.1)  # add_turned, clone_across


def test_wider_elements_take_an_offset_each_and_their_bytes():
    half, wide = of("strided", moved=4 * COUNT), of("strided")
    assert half < wide < 2 * half


def test_one_part_is_joined_by_half_of_the_blocks():
    """Shape.cu, getCatGrid: two blocks a multiprocessor for each part, one of them empty."""
    one, two = (of("joined", moved=4 * COUNT, second=part) for part in (COUNT, COUNT / 2))
    assert 1.3 < one / two < 1.6


def test_a_sum_down_columns_takes_its_steps():
    few, many = (of("cumsum down", moved=2.0**25, second=steps) for steps in (64.0, 256.0))
    assert many > 2 * few


def test_a_small_convolution_takes_its_launches():
    assert of("convolution", moved=3e5) < 6e-6


@pytest.mark.parametrize("kind", NEW)
def test_a_file_of_before_has_fits_for_every_kind(kind):
    """Strided ones by their elements, sums as reductions, convolutions as plain ones."""
    strided = Fit(
        family=FAMILIES["strided"],
        dtype="",
        roof=Roof(
            floor_s=1e-6, compute=1, bandwidth=0.3, extra_flops=0, extra_bytes=1e6, power=2.5
        ),
        peak_flops_per_s=1e15,
        bandwidth_bytes_per_s=4.8e12,
        points=np.array([[10.0], [30.0]]),
        weights=np.zeros(2),
        held_out=None,
        source="records",
    )
    before = speed(*NEW, strided=strided)
    asked = {"offsets": "strided", "offsets cast": "strided cast"}.get(kind, kind)
    assert 0 < of(asked, before) < 1e-2
    if asked in ("strided", "across", "far", "joined"):
        assert of(asked, before) == pytest.approx(float(strided.seconds((4 * COUNT,))), rel=1e-6)


def test_a_residual_without_a_table_is_the_same():
    fit = load("h200").fits["bmm:fp32"]
    assert fit.family is BMM
    points = (512.0, 256.0, 64.0, 128.0), (64.0, 256.0, 256.0, 128.0)
    both = fit.seconds_at(tuple(np.array(sizes) for sizes in zip(*points, strict=True)))
    for sizes, made in zip(points, both, strict=True):
        assert float(fit.seconds(sizes)) == pytest.approx(float(made), rel=0.01)


def kinds_of_a_scan(tokens):
    """Of Bamba's ops that move bytes in a prompt of so many tokens."""
    model = planner.load_model("bamba-9b")
    work = planner.Inference(batch=1, prompt_tokens=tokens, output_tokens=1, logits="last")
    deploy = planner.Deployment(gpu="h200", runtime="transformers", mode="eager")
    e = planner.estimate(model, work, deploy)
    program = runtime_named("transformers").prefill(e.model, e.work, e.setting)
    return [
        (t.op.kernel, t.kind.kind)
        for t in timed_ops(program)
        if isinstance(t.kind, Bytes) and t.op.name == "scan"
    ]


def test_a_scan_s_last_sum_reads_far_where_the_prompt_fills_its_chunks():
    """pad_tensor_by_size: what is not padded is cloned as a convolution left it."""
    assert ("add.Tensor", "far") in kinds_of_a_scan(2048)
    assert ("add.Tensor", "far") not in kinds_of_a_scan(2000)


def test_joules_of_a_flop_are_those_of_products_in_its_dtype():
    """An H200 draws 676 W for 50 TFLOP/s in float32, 698 W for 646 in fp16."""
    cost = load("h200").energy
    assert 12 < flop_joules(cost, "fp32") / flop_joules(cost, "bf16") < 14
    assert flop_joules(cost, "fp16") == pytest.approx(7.9e-13, rel=0.02)
    assert flop_joules(replace(cost, others={}), "fp32") == flop_joules(cost, "bf16")


def test_fp16_computes_longer_and_streams_as_fast():
    ratios = []
    for rows in (1, 4096):
        work = planner.Inference(batch=1, prompt_tokens=rows, output_tokens=1, logits="last")
        taken = []
        for dtype in ("fp16", "bf16"):
            deploy = planner.Deployment(gpu="h200", runtime="transformers", dtype=dtype)
            e = planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy)
            taken.append(e.op_times("prefill").set_index("op").seconds["gate_proj"])
        ratios.append(taken[0] / taken[1])
    assert ratios[0] == pytest.approx(1.0, abs=0.005)
    assert 1.02 < ratios[1] < 1.06
