"""Attention over codes and scales as they lie: nothing is dequantised first.

A scale is the same for all channels of a group, so it comes out of the sum over them. Of one group:

    q · k̂ = (q · codes) · s_k                scores take the keys' scale
    Σ p · v̂ = Σ (p · s_v) · codes            probabilities take the values'

A decode step then reads codes and scales once, S · (2 · D · b + 2 · s) bytes a kv head, and small
products of whole numbers are exact in bf16. This is the specification of such a kernel, in float32;
it equals decoding and attending but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.quantize import whole_numbers
from planner.errors import ConfigError
from planner.kv_formats import KvFormat, TensorFormat

# Shapes.  B batch · H query heads · G kv heads · T queries · S keys · D head dim · n groups of g


def attention_over_codes(
    q_BHTD: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    form: KvFormat,
    *,
    scaling: float,
    visible: Tensor | None = None,
) -> Tensor:
    """[B, H, T, D] of codes and scales as `quantize.encode` makes them, per token and head.

    `visible`: bool, broadcast to [B, G, H/G, T, S]; None: all keys.
    """
    D = q_BHTD.shape[-1]
    k, k_scales = _whole(keys, form.keys, D)  # [B, G, S, n, g], [B, G, S, n]
    v, v_scales = _whole(values, form.values, D)
    q = q_BHTD.float().unflatten(1, (k.shape[1], -1)).unflatten(-1, (-1, k.shape[-1]))
    products = torch.einsum("bghtnd,bgsnd->bghtsn", q, k)
    scores = (products * k_scales[:, :, None, None]).sum(-1) * scaling
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    p = torch.softmax(scores, dim=-1)  # [B, G, H/G, T, S]
    weights = p[..., None] * v_scales[:, :, None, None]
    out = torch.einsum("bghtsn,bgsnd->bghtnd", weights, v)
    return out.flatten(-2).flatten(1, 2).to(q_BHTD.dtype)


def _whole(stored: tuple[Tensor, ...], form: TensorFormat, width: int) -> tuple[Tensor, Tensor]:
    """Codes one by one, group by group, in float32; their scales."""
    if form.scales is None or form.scales.per != "token-head" or form.scales.zero_dtype is not None:
        raise ConfigError("attention over codes takes scales per token-head, without zero points")
    codes, scales = stored
    whole = whole_numbers(codes, form, groups=scales.shape[-1], width=width).float()
    if form.bits < 8:
        whole -= 2 ** (form.bits - 1)
    return whole.unflatten(-1, (scales.shape[-1], -1)), scales.float()
