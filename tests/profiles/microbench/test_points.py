"""The list of points: unique, split by shape, and useful however early a run is cut short."""

import subprocess
import sys
from collections import defaultdict

import pytest

from planner import ConfigError
from profiles.microbench.points import REPEATED, points

WEIGHTS = ("n", "k")
HEADS = ("heads", "kv_heads", "head_dim")


def shapes_by_split(device, families, names):
    found = defaultdict(set)
    for point in points(device, families):
        if set(names) <= point.shape.keys() and not point.op.startswith("bmm"):
            found[point.split].add(tuple(point.shape[name] for name in names))
    return found


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("families", "names"),
    [(("gemm", "backward"), WEIGHTS), (("prefill", "decode", "backward"), HEADS)],
)
def test_no_shape_is_in_both_splits(device, families, names):
    found = shapes_by_split(device, families, names)
    assert found["calibration"]
    assert found["held-out"]
    assert not found["calibration"] & found["held-out"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_point_is_listed_twice(device):
    keys = [point.key for point in points(device)]
    assert len(keys) == len(set(keys))


def test_a_quarter_of_the_list_has_a_quarter_of_every_large_family():
    everything = [point for point in points("cuda") if not point.repeat]
    leading = sum(point.family in ("ceiling", "graph", "host") for point in everything)
    spread = [point for point in everything[leading:] if point.family != "sustained"]
    quarter = spread[: len(spread) // 4]
    for family in ("gemm", "prefill", "decode", "bandwidth"):
        of_all = sum(point.family == family for point in spread)
        of_quarter = sum(point.family == family for point in quarter)
        assert of_quarter == pytest.approx(of_all / 4, rel=0.1, abs=1.5)


def test_an_eighth_of_the_list_spans_the_sizes_of_a_product():
    products = [point for point in points("cuda") if point.family == "gemm"]
    prefix = products[: len(products) // 8]
    rows = {point.shape["m"] for point in prefix}
    assert min(rows) <= 2
    assert max(rows) >= 8192
    assert {point.split for point in prefix} == {"calibration", "held-out"}


def test_some_points_are_measured_again_at_the_end():
    listed = points("cuda")
    assert [point.repeat for point in listed[-REPEATED - 1 :]] == [0, *[1] * REPEATED]
    assert {p.key.removesuffix("/repeat1") for p in listed[-REPEATED:]} < {p.key for p in listed}


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="family"):
        points("cpu", ["gemv"])


def test_the_list_and_the_records_are_read_without_torch():
    code = (
        "import sys, profiles.microbench.points, profiles.microbench.op_record, "
        "profiles.microbench.costs, profiles.microbench.table; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
