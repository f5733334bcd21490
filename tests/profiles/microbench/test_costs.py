"""FLOPs and bytes of a point against torch's own count and the tensors that are really there."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from profiles.microbench import buffers, costs
from profiles.microbench.buffers import Buffers
from profiles.microbench.ops import Preparer
from profiles.microbench.points import points

MATRIX = ("linear", "linear_bias", "bmm", "sdpa", "chunk_scan")
GATHERED = (
    "embedding",
    "grouped_mm",
    "adamw",
    "histc",
    "silu_half",
    "silu_cut",
    "cat_heads",
    "gather_picks",
    "scatter_places",
    "put_places",
    "experts",
)
"""They read or write parts of their tensors, write in place, or read what was made of them."""


@pytest.fixture(autouse=True)
def _pools_at_once(monkeypatch):
    """Nothing is drawn on fake tensors: no need to do so part by part."""
    monkeypatch.setattr(buffers, "DRAWN_AT_ONCE", 2**40)


class Watched(Buffers):
    """Buffers that remember what was cut from them."""

    def take(self, dtype, *shape):
        return self._seen(super().take(dtype, *shape))

    def indices(self, below, *shape):
        return self._seen(super().indices(below, *shape))

    def _seen(self, tensor):
        self.__dict__.setdefault("taken", []).append(tensor)
        return tensor


def distinct(chosen, per_op=6):
    """A few points of each (family, op), spread over its sizes, with the default backend."""
    by_op = {}
    for point in chosen:
        by_op.setdefault((point.family, point.op), []).append(point)
    picked = [p for group in by_op.values() for p in group[:: max(1, len(group) // per_op)]]
    return [
        dataclasses.replace(p, backend="default", repeat=0) if p.op.startswith("sdpa") else p
        for p in picked
    ]


OWN_WAY = ("host", "graph", "allocator")
DEVICE_POINTS = [p for p in points("cuda") if p.shape and p.family not in OWN_WAY]


@pytest.mark.parametrize(
    "point", distinct(p for p in DEVICE_POINTS if p.op in MATRIX), ids=lambda p: p.key
)
def test_flops_are_those_torch_counts(point):
    """Counted in the math backend, which computes the full square of a causal mask, where (S + 1) /
    2S of it is needed, and keeps the scores that others compute again in the backward pass."""
    if point.op == "sdpa":
        point = dataclasses.replace(point, backend="math")
    with FakeTensorMode(), torch.no_grad():
        call = Preparer(Buffers(device=torch.device("cpu"), pool_bytes=14 * 2**30)).prepare(point)
        with FlopCounterMode(display=False) as counter:
            call()
    expected = counter.get_total_flops()
    if point.op == "sdpa" and point.shape["tokens"] > 1:
        S = point.shape["tokens"]
        expected = expected * (S + 1) // (2 * S)
        if point.family == "backward":
            expected = expected * 5 // 4
    assert costs.flops(point) == expected


@pytest.mark.parametrize(
    "point",
    distinct(p for p in DEVICE_POINTS if p.op not in GATHERED and p.family != "backward"),
    ids=lambda p: p.key,
)
def test_bytes_are_those_of_the_tensors_that_go_in_and_come_out(point):
    watched = Watched(device=torch.device("cpu"), pool_bytes=14 * 2**30)
    with FakeTensorMode(), torch.no_grad():
        results = tree_leaves(Preparer(watched).prepare(point)())
    s = point.shape
    beside = {"scaled_mm": 8, "sdpa_masked": s.get("tokens", 0) * s.get("context", 0)}
    beside |= {op: s.get("chunk", 0) ** 2 for op in ("mask_expanded", "mask_pairs")}
    beside |= {"searchsorted": 8 * s.get("width", 0)}
    tensors = [*watched.taken, *(leaf for leaf in results if isinstance(leaf, torch.Tensor))]
    seen_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert costs.floor_bytes(point) == seen_bytes + beside.get(point.op, 0)


def test_cuda_points_can_be_prepared_and_run_on_fake_tensors():
    with FakeTensorMode(), torch.no_grad():
        pools = Buffers(device=torch.device("cpu"), pool_bytes=12 * 2**30)
        for point in distinct(DEVICE_POINTS, per_op=25):
            Preparer(pools).prepare(point)()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_point_has_its_costs(device):
    for point in points(device):
        assert costs.flops(point) >= 0
        assert costs.floor_bytes(point) >= 0
        assert (costs.flops(point) > 0) <= (costs.floor_bytes(point) > 0)
