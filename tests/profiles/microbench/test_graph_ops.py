"""Graphs of unlike kernels: as many as asked for, in turn."""

import torch

from profiles.microbench.graph_ops import UNLIKE, UNLIKE_PRODUCTS, kinds_of, unlike_calls
from profiles.microbench.other_points import GRAPH_KINDS, unlike_graph_points
from profiles.microbench.point import OpPoint


def test_kernels_take_turns_and_each_makes_a_row_or_a_number():
    point = OpPoint(family="graph", op="unlike", shape={"kernels": 7, "width": 8})
    calls = unlike_calls(point, torch.device("cpu"))
    assert [call().shape[-1] for call in calls] == [8, 1, 8, 8, 8, 8, 1]
    assert calls[0] is calls[5]


def test_every_kind_that_takes_a_turn_is_timed_alone():
    assert {*UNLIKE, *UNLIKE_PRODUCTS} == set(GRAPH_KINDS)
    assert kinds_of("alike_linear") == ("linear",)
    alone = {(p.op, p.shape["width"]) for p in unlike_graph_points() if p.op.startswith("alike_")}
    for point in unlike_graph_points():
        for kind in kinds_of(point.op):
            assert (f"alike_{kind}", point.shape["width"]) in alone
