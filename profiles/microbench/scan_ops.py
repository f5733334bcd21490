"""Ops of a state-space scan as torch runs it: what permutes, repeats, masks and sums in float32.

transformers' Mamba-2 (modeling_bamba.py: mamba2_chunk_scan) cuts a prompt into chunks of L tokens
and multiplies small matrices of every head; between the products lie copies of permuted views. What
a convolution leaves has its tokens innermost, what the others make has them outside its heads: many
a copy reads across the rows that it writes.

Shapes.  B batch · C chunks · L tokens of a chunk · H heads · D numbers of a head or of its state
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import Buffers
from profiles.microbench.byte_ops import Call, Maker
from profiles.microbench.point import OpPoint


def _heads(point: OpPoint, buffers: Buffers) -> Tensor:
    """[B, C, L, H, D], as a projection leaves it."""
    s = point.shape
    return buffers.take(point.dtype, s["batch"], s["chunks"], s["chunk"], s["heads"], s["head_dim"])


def _turned(point: OpPoint, buffers: Buffers) -> Tensor:
    """[B, C, L, H, D] as a convolution leaves it: tokens innermost."""
    s = point.shape
    B, C, L, H, D = s["batch"], s["chunks"], s["chunk"], s["heads"], s["head_dim"]
    x = buffers.take(point.dtype, B, H * D, C * L).transpose(1, 2)
    return x.view(B, C, L, H, D)


def _steps(point: OpPoint, buffers: Buffers) -> Tensor:
    """[B, C, L, H]: a number of each token and head."""
    s = point.shape
    return buffers.take(point.dtype, s["batch"], s["chunks"], s["chunk"], s["heads"])


def _decays(point: OpPoint, buffers: Buffers) -> Tensor:
    """[B, H, C, L]: a number of each head and token."""
    s = point.shape
    return buffers.take(point.dtype, s["batch"], s["heads"], s["chunks"], s["chunk"])


def _pairs(point: OpPoint, buffers: Buffers) -> Tensor:
    """[B, H, C, L, L]: a number of each head and pair of tokens."""
    s = point.shape
    L = s["chunk"]
    return buffers.take(point.dtype, s["batch"], s["heads"], s["chunks"], L, L)


def _hidden(point: OpPoint, buffers: Buffers) -> Tensor:
    """[L, L], true where a token comes after the other."""
    L = point.shape["chunk"]
    return torch.ones(L, L, dtype=torch.bool, device=buffers.device).triu()


def _clone_heads(point: OpPoint, buffers: Buffers) -> Call:
    """Heads before tokens, as a batched product wants its operands."""
    x = _heads(point, buffers).transpose(2, 3)
    return lambda: x.contiguous()


def _clone_turned(point: OpPoint, buffers: Buffers) -> Call:
    """The same of what a convolution left."""
    x = _turned(point, buffers).transpose(2, 3)
    return lambda: x.contiguous()


def _clone_across(point: OpPoint, buffers: Buffers) -> Call:
    """Heads first, tokens innermost: the other operand."""
    x = _heads(point, buffers).permute(0, 1, 3, 4, 2)
    return lambda: x.contiguous()


def _clone_t(point: OpPoint, buffers: Buffers) -> Call:
    """Small matrices, each transposed."""
    s = point.shape
    x = buffers.take(point.dtype, s["batch"], s["rows"], s["width"]).transpose(1, 2)
    return lambda: x.contiguous()


def _add_turned(point: OpPoint, buffers: Buffers) -> Call:
    """What a scan made and what a convolution left."""
    x, y = _heads(point, buffers), _turned(point, buffers)
    return lambda: x + y


def _mul_steps(point: OpPoint, buffers: Buffers) -> Call:
    """What a convolution left by a number of each token and head."""
    x, steps = _turned(point, buffers), _steps(point, buffers)[..., None]
    return lambda: x * steps


def _mul_heads(point: OpPoint, buffers: Buffers) -> Call:
    """What a convolution left by a number of each head, of two bytes."""
    x, weight = _turned(point, buffers), buffers.take("bf16", point.shape["heads"], 1)
    return lambda: weight * x


def _silu_cut(point: OpPoint, buffers: Buffers) -> Call:
    """All but the last tokens of each channel, which a causal convolution made too many."""
    s = point.shape
    more = s["tokens"] + s["kernel"] - 1
    x = buffers.take(point.dtype, s["batch"], s["channels"], more)[..., : s["tokens"]]
    return lambda: nn.functional.silu(x)


def _repeat_heads(point: OpPoint, buffers: Buffers) -> Call:
    """What one group has, for every head; its tokens are innermost."""
    s = point.shape
    H, T = s["heads"], s["chunks"] * s["chunk"]
    x = buffers.take(point.dtype, s["batch"], s["head_dim"], T).transpose(1, 2)[:, :, None]
    return lambda: x.repeat_interleave(H, dim=2, output_size=H)


def _pad_tokens(point: OpPoint, buffers: Buffers) -> Call:
    """`pad` tokens more; a pad of none is a copy."""
    s = point.shape
    pads = (0, 0, 0, 0, 0, s["pad"])
    x = buffers.take(point.dtype, s["batch"], s["tokens"], s["heads"], s["head_dim"])
    return lambda: nn.functional.pad(x, pads)


def _mask_expanded(point: OpPoint, buffers: Buffers) -> Call:
    """A row for each token, cut out below the diagonal: a copy and a kernel in place."""
    x, hidden = _steps(point, buffers).permute(0, 3, 1, 2), _hidden(point, buffers)
    L = point.shape["chunk"]
    return lambda: x[..., None].expand(*x.shape, L).masked_fill(hidden, 0)


def _mask_pairs(point: OpPoint, buffers: Buffers) -> Call:
    """The same of what lies there whole."""
    x, hidden = _pairs(point, buffers), _hidden(point, buffers)
    return lambda: x.masked_fill(hidden, -math.inf)


def _cumsum_pairs(point: OpPoint, buffers: Buffers) -> Call:
    """Sums down the columns."""
    x = _pairs(point, buffers)
    return lambda: x.cumsum(dim=-2)


def _cumsum_tokens(point: OpPoint, buffers: Buffers) -> Call:
    """[B, C, L, H] seen as [B, H, C, L], summed along the tokens."""
    x = _steps(point, buffers).permute(0, 3, 1, 2)
    return lambda: x.cumsum(dim=-1)


def _exp(point: OpPoint, buffers: Buffers) -> Call:
    x = buffers.take(point.dtype, point.shape["rows"], point.shape["width"])
    return lambda: torch.exp(x)


def _mul_pairs(point: OpPoint, buffers: Buffers) -> Call:
    """Scores, whose chunks lie before the heads, by decays, whose heads lie before the chunks."""
    s = point.shape
    L = s["chunk"]
    scores = buffers.take(point.dtype, s["batch"], s["chunks"], s["heads"], L, L)
    scores, decays = scores.permute(0, 1, 3, 4, 2), _pairs(point, buffers).permute(0, 2, 3, 4, 1)
    return lambda: scores * decays


def _mul_decays(point: OpPoint, buffers: Buffers) -> Call:
    """Each head's numbers of a token by its decay, which lies elsewhere."""
    x, decays = _heads(point, buffers), _decays(point, buffers).permute(0, 2, 3, 1)[..., None]
    return lambda: x * decays


def _mul_column(point: OpPoint, buffers: Buffers) -> Call:
    """One number for a row, of the same dtype."""
    s = point.shape
    x = buffers.take(point.dtype, s["rows"], s["width"])
    column = buffers.take(point.dtype, s["rows"], 1)
    return lambda: x * column


def _conv1d(point: OpPoint, buffers: Buffers) -> Call:
    """A causal convolution, each channel alone: [B, T, channels] seen as [B, channels, T]."""
    s = point.shape
    channels, kernel, T = s["channels"], s["kernel"], s["tokens"]
    x = buffers.take(point.dtype, s["batch"], T, channels).transpose(1, 2)
    weight = buffers.take(point.dtype, channels, 1, kernel)
    bias = buffers.take(point.dtype, channels)

    def convolve() -> Tensor:
        out = nn.functional.conv1d(x, weight, bias, padding=kernel - 1, groups=channels)
        return out[:, :, :T]

    return convolve


def _bmm(point: OpPoint, buffers: Buffers) -> Call:
    """y[b] = x[b] · w[b], each as it lies."""
    s = point.shape
    x = buffers.take(point.dtype, s["batch"], s["m"], s["k"])
    w = buffers.take(point.dtype, s["batch"], s["k"], s["n"])
    return lambda: torch.bmm(x, w)


SCAN_OPS: dict[str, Maker] = {
    "clone_heads": _clone_heads,
    "clone_turned": _clone_turned,
    "clone_across": _clone_across,
    "clone_t": _clone_t,
    "add_turned": _add_turned,
    "mul_steps": _mul_steps,
    "mul_heads": _mul_heads,
    "silu_cut": _silu_cut,
    "repeat_heads": _repeat_heads,
    "pad_tokens": _pad_tokens,
    "mask_expanded": _mask_expanded,
    "mask_pairs": _mask_pairs,
    "cumsum_pairs": _cumsum_pairs,
    "cumsum_tokens": _cumsum_tokens,
    "exp": _exp,
    "mul_pairs": _mul_pairs,
    "mul_decays": _mul_decays,
    "mul_column": _mul_column,
    "conv1d": _conv1d,
    "bmm": _bmm,
}
