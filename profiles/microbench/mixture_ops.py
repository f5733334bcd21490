"""What a mixture's layer runs beside its products, at any number of rows, and latent attention's
copies of its matrices.

Shapes.  N tokens (`rows`) · k picks of each (`top_k`) · R = N · k rows dealt out · E experts
"""

from __future__ import annotations

import torch
from torch import Tensor

from profiles.microbench.buffers import Buffers
from profiles.microbench.byte_ops import Call, Maker
from profiles.microbench.point import OpPoint


def _order(point: OpPoint, buffers: Buffers) -> Tensor:
    """Places of the R rows, shuffled."""
    R = point.shape["rows"] * point.shape["top_k"]
    return torch.randperm(R, device=buffers.device)


def _gather_picks(point: OpPoint, buffers: Buffers) -> Call:
    """The scores of what was picked: [N, E] → [N, k]."""
    s = point.shape
    scores = buffers.take(point.dtype, s["rows"], s["width"])
    picks = buffers.indices(s["width"], s["rows"], s["top_k"])
    return lambda: scores.gather(-1, picks)


def _floor_divide(point: OpPoint, buffers: Buffers) -> Call:
    """The token of each row."""
    k = point.shape["top_k"]
    order = buffers.indices(point.shape["rows"] * k, point.shape["rows"] * k)
    return lambda: order // k


def _index_rows(point: OpPoint, buffers: Buffers) -> Call:
    """Each row's token: [N, width] → [R, width]."""
    s = point.shape
    x = buffers.take(point.dtype, s["rows"], s["width"])
    tokens = buffers.indices(s["rows"], s["rows"] * s["top_k"])
    return lambda: x[tokens]


def _searchsorted(point: OpPoint, buffers: Buffers) -> Call:
    """Where each expert's rows end."""
    s = point.shape
    experts = torch.arange(s["width"], device=buffers.device)
    of_row = buffers.indices(s["width"], s["rows"] * s["top_k"]).sort()[0]
    return lambda: torch.searchsorted(of_row, experts, right=True, out_int32=True)


def _scatter_places(point: OpPoint, buffers: Buffers) -> Call:
    """The way back to the tokens' order."""
    order = _order(point, buffers)
    place = torch.arange(order.numel(), device=buffers.device)
    return lambda: torch.empty_like(order).scatter_(0, order, place)


def _put_places(point: OpPoint, buffers: Buffers) -> Call:
    """The same by an assignment, as transformers writes it."""
    order = _order(point, buffers)
    place = torch.arange(order.numel(), device=buffers.device)

    def put() -> Tensor:
        back = torch.empty_like(order)
        back[order] = place
        return back

    return put


def _cumsum_counts(point: OpPoint, buffers: Buffers) -> Call:
    """Rows of each expert to where they end."""
    counts = buffers.take("fp32", point.shape["width"])
    return lambda: torch.cumsum(counts, dim=0, dtype=torch.int32)


def _repeat_matrices(point: OpPoint, buffers: Buffers) -> Call:
    """[heads, rows, width] for every sequence: what a broadcast product copies."""
    s = point.shape
    w = buffers.take(point.dtype, s["heads"], s["rows"], s["width"])
    return lambda: w.expand(s["batch"], *w.shape).contiguous()


def _repeat_matrices_t(point: OpPoint, buffers: Buffers) -> Call:
    """The same of matrices that lie transposed."""
    s = point.shape
    w = buffers.take(point.dtype, s["heads"], s["width"], s["rows"]).transpose(1, 2)
    return lambda: w.expand(s["batch"], *w.shape).contiguous()


MIXTURE_OPS: dict[str, Maker] = {
    "gather_picks": _gather_picks,
    "floor_divide": _floor_divide,
    "index_rows": _index_rows,
    "searchsorted": _searchsorted,
    "scatter_places": _scatter_places,
    "put_places": _put_places,
    "cumsum_counts": _cumsum_counts,
    "repeat_matrices": _repeat_matrices,
    "repeat_matrices_t": _repeat_matrices_t,
}
