"""Ops that move bytes: by how their kernels read, with fits of today and of before."""

from dataclasses import replace

import numpy as np
import pytest

from planner.catalog.gpus import gpu_named
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import load
from planner.timing.clock import Speed
from planner.timing.op_families import BMM, FAMILIES
from planner.timing.op_times import Fit, Roof

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
