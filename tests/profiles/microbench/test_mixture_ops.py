"""What a mixture runs at few rows, and latent attention's queries over one head."""

import pytest
import torch

from profiles.microbench import costs
from profiles.microbench.buffers import Buffers
from profiles.microbench.mixture_points import (
    CALIBRATION,
    HELD_OUT,
    few_rows_points,
    reached,
)
from profiles.microbench.ops import Preparer
from profiles.microbench.point import OpPoint


def prepared(op, shape, *, family="bandwidth", dtype="bf16", backend="default"):
    buffers = Buffers(device=torch.device("cpu"), pool_bytes=2**20)
    point = OpPoint(family=family, op=op, shape=shape, dtype=dtype, backend=backend)
    return Preparer(buffers).prepare(point)


@pytest.mark.parametrize(("experts", "m", "used"), [(8, 16, 8), (8, 4, 4), (60, 16, 14), (7, 9, 5)])
def test_rows_go_to_as_many_experts_as_are_reached(experts, m, used, monkeypatch):
    """Each of those has one at least, and all rows are dealt out."""
    seen = {}
    monkeypatch.setattr(torch, "_grouped_mm", lambda x, w, *, offs: seen.update(offs=offs))
    shape = {"experts": experts, "m": m, "n": 8, "k": 8, "reached": used}
    prepared("grouped_mm", shape, family="moe")()
    rows = seen["offs"].diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert int((rows > 0).sum()) == used
    assert int(rows.sum()) == m
    assert int(rows.max()) - int(rows[rows > 0].min()) <= 1


def test_only_experts_that_are_reached_are_read():
    shape = {"experts": 64, "m": 48, "n": 16, "k": 8, "reached": 34}
    point = OpPoint(family="moe", op="grouped_mm", shape=shape)
    assert costs.floor_bytes(point) == 2 * (48 * 8 + 34 * 16 * 8 + 48 * 16) + 4 * 64


def test_picks_at_random_reach_fewer_experts_than_there_are_picks():
    assert reached(60, 4, 1) == 4
    assert reached(60, 4, 4) == 14
    assert reached(64, 6, 8) == 35
    assert reached(64, 8, 1000) == 64


def test_experts_of_models_that_are_held_out_are_in_no_calibration():
    calibration, held_out = (
        {(p.shape["n"], p.shape["k"]) for p in few_rows_points() if p.split == split}
        for split in ("calibration", "held-out")
    )
    assert not calibration & held_out
    assert not set(CALIBRATION) & set(HELD_OUT)


@pytest.mark.parametrize("op", ["scatter_places", "put_places"])
def test_the_way_back_undoes_the_order(op, monkeypatch):
    order = torch.tensor([2, 0, 3, 1, 5, 4])
    monkeypatch.setattr(torch, "randperm", lambda count, device: order)
    back = prepared(op, {"rows": 3, "width": 8, "top_k": 2}, dtype="int64")()
    assert torch.equal(order[back], torch.arange(6))


def test_ends_of_experts_are_where_their_rows_end(monkeypatch):
    picks = torch.tensor([3, 0, 3, 1])
    monkeypatch.setattr(Buffers, "indices", lambda self, below, *shape: picks)
    ends = prepared("searchsorted", {"rows": 2, "width": 5, "top_k": 2}, dtype="int64")()
    assert ends.tolist() == [1, 2, 2, 4, 4]


def test_matrices_are_copied_for_every_sequence_as_they_are_read():
    shape = {"batch": 3, "heads": 2, "rows": 4, "width": 8}
    for op in ("repeat_matrices", "repeat_matrices_t"):
        out = prepared(op, shape)()
        assert out.shape == (3, 2, 4, 8)
        assert out.is_contiguous()
        assert torch.equal(out[0], out[2])


def test_all_heads_of_a_latent_are_queries_of_one_head():
    shape = {"batch": 2, "heads": 4, "width": 24, "values": 16, "context": 6}
    point = OpPoint(family="decode", op="sdpa_latent", shape=shape)
    assert prepared("sdpa_latent", shape, family="decode")().shape == (2, 1, 4, 16)
    assert costs.flops(point) == 2 * 2 * 4 * 6 * (24 + 16)
    assert costs.floor_bytes(point) == 2 * 2 * (4 * (24 + 16) + 6 * 24)
