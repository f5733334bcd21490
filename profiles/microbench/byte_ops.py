"""Ops that move bytes and compute next to nothing, written as transformers writes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import Buffers
from profiles.microbench.point import OpPoint

Call = Callable[[], object]
Maker = Callable[[OpPoint, Buffers], Call]

EPSILON = 1e-5
TABLE_ROWS = 32768


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm of transformers: in fp32, six kernels."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(variance + EPSILON)
    return weight * wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """The two halves of the last dimension exchanged, one negated."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of transformers."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def _rows(point: OpPoint, buffers: Buffers) -> Tensor:
    return buffers.take(point.dtype, point.shape["rows"], point.shape["width"])


def _width(point: OpPoint, buffers: Buffers) -> Tensor:
    return buffers.take(point.dtype, point.shape["width"])


def _copy(point: OpPoint, buffers: Buffers) -> Call:
    x = _rows(point, buffers)
    return lambda: x.clone()


def _sum(point: OpPoint, buffers: Buffers) -> Call:
    x = _rows(point, buffers)
    return lambda: x.sum(dtype=torch.float32)


def _add(point: OpPoint, buffers: Buffers) -> Call:
    x, y = _rows(point, buffers), _rows(point, buffers)
    return lambda: x + y


def _silu_mul(point: OpPoint, buffers: Buffers) -> Call:
    gate, up = _rows(point, buffers), _rows(point, buffers)
    return lambda: nn.functional.silu(gate) * up


def _gelu_tanh(point: OpPoint, buffers: Buffers) -> Call:
    x = _rows(point, buffers)
    return lambda: nn.functional.gelu(x, approximate="tanh")


def _gelu(point: OpPoint, buffers: Buffers) -> Call:
    x = _rows(point, buffers)
    return lambda: nn.functional.gelu(x)


def _gelu_new(point: OpPoint, buffers: Buffers) -> Call:
    """NewGELUActivation of transformers, kernel by kernel."""
    x, root = _rows(point, buffers), math.sqrt(2.0 / math.pi)
    return lambda: 0.5 * x * (1.0 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3.0))))


def _rmsnorm(point: OpPoint, buffers: Buffers) -> Call:
    x, weight = _rows(point, buffers), _width(point, buffers)
    return lambda: llama_rms_norm(x, weight)


def _fused_rms_norm(point: OpPoint, buffers: Buffers) -> Call:
    x, weight = _rows(point, buffers), _width(point, buffers)
    return lambda: nn.functional.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def _layer_norm(point: OpPoint, buffers: Buffers) -> Call:
    x, weight, bias = _rows(point, buffers), _width(point, buffers), _width(point, buffers)
    return lambda: nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, EPSILON)


def _softmax(point: OpPoint, buffers: Buffers) -> Call:
    """Of attention scores in eager attention: in fp32, then back."""
    x = _rows(point, buffers)
    return lambda: nn.functional.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def _rope(point: OpPoint, buffers: Buffers) -> Call:
    s = point.shape
    T, D = s["tokens"], s["head_dim"]
    q = buffers.take(point.dtype, 1, T, s["heads"], D).transpose(1, 2)
    k = buffers.take(point.dtype, 1, T, s["kv_heads"], D).transpose(1, 2)
    cos, sin = (buffers.take(point.dtype, 1, T, D) for _ in range(2))
    return lambda: apply_rope(q, k, cos, sin)


def _rope_partial(point: OpPoint, buffers: Buffers) -> Call:
    """The first `rotary` numbers of each head are rotated, the others joined to them again."""
    s = point.shape
    B, T, D, rotary = s["batch"], s["tokens"], s["head_dim"], s["rotary"]
    q = buffers.take(point.dtype, B, T, s["heads"], D).transpose(1, 2)
    k = buffers.take(point.dtype, B, T, s["kv_heads"], D).transpose(1, 2)
    cos, sin = (buffers.take(point.dtype, 1, T, rotary) for _ in range(2))

    def rotate() -> tuple[Tensor, Tensor]:
        turned = apply_rope(q[..., :rotary], k[..., :rotary], cos, sin)
        return (
            torch.cat((turned[0], q[..., rotary:]), dim=-1),
            torch.cat((turned[1], k[..., rotary:]), dim=-1),
        )

    return rotate


def _cat(point: OpPoint, buffers: Buffers) -> Call:
    s = point.shape
    old = buffers.take(point.dtype, s["batch"], s["kv_heads"], s["context"], s["head_dim"])
    new = buffers.take(point.dtype, s["batch"], s["kv_heads"], 1, s["head_dim"])
    return lambda: torch.cat((old, new), dim=-2)


def _cat_heads(point: OpPoint, buffers: Buffers) -> Call:
    """[B, H, T, D] as heads are turned, T × H in memory: what a cache keeps first, alone behind an
    empty tensor; or two parts of each head, the second cut from a wider one.
    """
    s = point.shape
    B, T, H, first = s["batch"], s["tokens"], s["heads"], s["first"]
    whole = buffers.take(point.dtype, B, T, H, first + s["second"]).transpose(1, 2)
    if not first:
        empty = whole.new_empty(0)
        return lambda: torch.cat((empty, whole), dim=-2)
    left = buffers.take(point.dtype, B, T, H, first).transpose(1, 2)
    right = whole[..., : s["second"]]
    return lambda: torch.cat((left, right), dim=-1)


def _embedding(point: OpPoint, buffers: Buffers) -> Call:
    """Rows of a table that is far larger than the cache on a GPU."""
    rows = TABLE_ROWS if buffers.device.type == "cuda" else TABLE_ROWS // 16
    table = buffers.take(point.dtype, rows, point.shape["width"])
    ids = buffers.indices(rows, point.shape["rows"])
    return lambda: nn.functional.embedding(ids, table)


def _cross_entropy(point: OpPoint, buffers: Buffers) -> Call:
    logits = _rows(point, buffers)
    labels = buffers.indices(point.shape["width"], point.shape["rows"])
    return lambda: nn.functional.cross_entropy(logits, labels)


def _upcast(point: OpPoint, buffers: Buffers) -> Call:
    logits = _rows(point, buffers)
    return lambda: logits.float()


def _argmax(point: OpPoint, buffers: Buffers) -> Call:
    logits = _rows(point, buffers)
    return lambda: logits.argmax(dim=-1)


def _mul_row(point: OpPoint, buffers: Buffers) -> Call:
    """A norm's weight: one row for all."""
    x, weight = _rows(point, buffers), _width(point, buffers)
    return lambda: x * weight


def _mul_mixed(point: OpPoint, buffers: Buffers) -> Call:
    """What an expert put out by its float32 weight, one a row."""
    x, column = _rows(point, buffers), buffers.take("fp32", point.shape["rows"], 1)
    return lambda: x * column


def _silu_half(point: OpPoint, buffers: Buffers) -> Call:
    """The first half of [rows, 2 · width], which lies apart row by row."""
    both = buffers.take(point.dtype, point.shape["rows"], 2 * point.shape["width"])
    gate = both[:, : point.shape["width"]]
    return lambda: nn.functional.silu(gate)


def _sum_picks(point: OpPoint, buffers: Buffers) -> Call:
    """Of each token what its experts put out, added up."""
    s = point.shape
    x = buffers.take(point.dtype, s["rows"], s["top_k"], s["width"])
    return lambda: x.sum(dim=1)


def _topk(point: OpPoint, buffers: Buffers) -> Call:
    scores = _rows(point, buffers)
    return lambda: torch.topk(scores, point.shape["top_k"], dim=-1)


def _picks(point: OpPoint, buffers: Buffers) -> Tensor:
    """The expert of each pick of each token, in the tokens' order."""
    return buffers.indices(point.shape["width"], point.shape["rows"] * point.shape["top_k"])


def _sort(point: OpPoint, buffers: Buffers) -> Call:
    picks = _picks(point, buffers)
    return lambda: torch.sort(picks)


def _histc(point: OpPoint, buffers: Buffers) -> Call:
    picks, experts = _picks(point, buffers).sort()[0].int(), point.shape["width"]
    if picks.device.type == "cpu":
        picks = picks.float()
    return lambda: torch.histc(picks, bins=experts, min=0, max=experts - 1)


BYTE_OPS: dict[str, Maker] = {
    "copy": _copy,
    "sum": _sum,
    "add": _add,
    "silu_mul": _silu_mul,
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "gelu_new": _gelu_new,
    "rmsnorm": _rmsnorm,
    "rms_norm": _fused_rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "rope": _rope,
    "rope_partial": _rope_partial,
    "cat": _cat,
    "cat_heads": _cat_heads,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "upcast": _upcast,
    "argmax": _argmax,
    "mul_row": _mul_row,
    "mul_mixed": _mul_mixed,
    "silu_half": _silu_half,
    "sum_picks": _sum_picks,
    "topk": _topk,
    "sort": _sort,
    "histc": _histc,
}
