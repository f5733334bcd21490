"""Many unlike kernels in a row, as a layer runs them: what the sum of their times is held to.

No fit takes these: they say whether the parts, each timed among its like, add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import Buffers
from profiles.microbench.byte_ops import Call, Maker
from profiles.microbench.point import OpPoint

# Shapes.  B batch · C chunks · L tokens of a chunk · T = C · L · H heads · P numbers of a head ·
#          N of its state · E experts · k picks of a token · R rows = tokens · k


def segment_sums(x: Tensor) -> Tensor:
    """[…, L] → […, L, L]: x[s + 1] + … + x[l], −∞ where s comes after l."""
    L = x.shape[-1]
    later = torch.ones(L, L, dtype=torch.bool, device=x.device)
    steps = x[..., None].expand(*x.shape, L).masked_fill(~later.tril(-1), 0)
    return steps.cumsum(dim=-2).masked_fill(~later.tril(), -math.inf)


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """mamba2_chunk_scan of transformers (modeling_bamba.py), T a multiple of `chunk`.

    x [B, T, H, P], dt [B, T, H], A, D and bias [H], B and C [B, T, 1, N] → y and the last state.
    """
    batch, _, H, P = x.shape
    dt = nn.functional.softplus(dt + bias).clamp(min=0.0)
    x = x.float()
    B, C = (t.float().repeat_interleave(H, dim=2, output_size=H) for t in (B, C))
    skipped = D[..., None] * nn.functional.pad(x, (0, 0, 0, 0, 0, 0))
    x = x * dt[..., None].float()
    x, B, C = (
        nn.functional.pad(t, (0, 0, 0, 0, 0, 0)).reshape(batch, -1, chunk, H, t.shape[-1])
        for t in (x, B, C)
    )
    steps = nn.functional.pad(A.float() * dt.float(), (0, 0, 0, 0))
    steps = steps.reshape(batch, -1, chunk, H).permute(0, 3, 1, 2)  # [B, H, C, L]
    sums = steps.cumsum(dim=-1)
    decays = torch.exp(segment_sums(steps))
    scores = torch.einsum("bclhn,bcshn->bclsh", C, B) * decays.permute(0, 2, 3, 4, 1)
    within = torch.einsum("bclsh,bcshp->bclhp", scores, x)
    left = torch.exp(sums[..., -1:] - sums).permute(0, 2, 3, 1)[..., None]
    states = torch.einsum("bclhn,bclhp->bchpn", B * left, x)
    states = torch.cat((torch.zeros_like(states[:, :1]), states), dim=1)
    between = torch.exp(segment_sums(nn.functional.pad(sums[..., -1], (1, 0)))).transpose(1, 3)
    states = torch.einsum("bzch,bzhpn->bchpn", between, states)
    entering = torch.einsum("bclhn,bchpn->bclhp", C, states[:, :-1])
    before = entering * torch.exp(sums).permute(0, 2, 3, 1)[..., None]
    y = (within + before).contiguous().reshape(batch, -1, H, P)
    return y + skipped, states[:, -1]


def experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """The experts of a layer as attnlab runs them (mixture.py): [tokens, h] → [tokens, h]."""
    E = logits.shape[-1]
    scores = logits.softmax(dim=-1)
    picks = scores.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, picks).to(x.dtype)
    of_row, order = picks.flatten().sort(stable=True)
    each = torch.arange(E, device=x.device)
    ends = torch.searchsorted(of_row, each, right=True, out_int32=True)
    rows = x[order // top_k]
    gate, up = nn.functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = nn.functional.silu(gate) * up
    rows = nn.functional.grouped_mm(rows, down.transpose(1, 2), offs=ends)
    place = torch.arange(order.numel(), device=x.device)
    rows = rows[torch.empty_like(order).scatter_(0, order, place)]
    return (rows.view(len(x), top_k, -1) * weights[..., None]).sum(dim=1)


def _chunk_scan(point: OpPoint, buffers: Buffers) -> Call:
    s, dtype = point.shape, point.dtype
    batch, L, H, P, N = s["batch"], s["chunk"], s["heads"], s["head_dim"], s["state"]
    T = s["chunks"] * L
    left = buffers.take(dtype, batch, H * P + 2 * N, T).transpose(1, 2)  # by a convolution
    x, B, C = torch.split(left, [H * P, N, N], dim=-1)
    x, B, C = x.view(batch, T, H, P), B[:, :, None], C[:, :, None]
    dt = buffers.take(dtype, batch, T, H)
    D, bias = (buffers.take(dtype, H) for _ in range(2))
    A = -buffers.take("fp32", H).exp()
    return lambda: chunk_scan(x, dt, A, B, C, D, bias, L)


def _experts(point: OpPoint, buffers: Buffers) -> Call:
    s, dtype = point.shape, point.dtype
    E, h, width, k = s["experts"], s["hidden"], s["width"], s["top_k"]
    x = buffers.take(dtype, s["rows"], h)
    logits = buffers.take("fp32", s["rows"], E)
    gate_up = buffers.take(dtype, E, 2 * width, h)
    down = buffers.take(dtype, E, h, width)
    return lambda: experts(x, logits, gate_up, down, k)


COMPOSITE_OPS: dict[str, Maker] = {"chunk_scan": _chunk_scan, "experts": _experts}
