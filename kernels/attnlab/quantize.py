"""Quantising keys and values: codes of few bits, and a scale for all elements of a group.

A group x becomes codes q and a scale s, and is read again as x̂ = s · q. Of b bits:

whole numbers   s = max|x| / (2^(b−1) − 1), q = round(x / s): x̂ is within s / 2 of x
fp8 (e4m3)      s = max|x| / 448, q = x / s in e4m3: within 2⁻⁴ · |x|, near zero within 2⁻¹⁰ · s
with a zero     z = min x, s = (max x − z) / (2^b − 1), q = round((x − z) / s), x̂ = s · q + z:
                nothing is spent on what no element is; within s / 2 (8 bits under a scale in
                bf16, which rounds 255 · s by up to s: within s)

Halves are rounded to even, and s to the dtype that it is kept in before it divides. Everything is
computed in float32. x̂ is rounded to the dtype that is asked for once, of s · q, or s · q + z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from planner.errors import ConfigError
from planner.kv_formats import TensorFormat

# Shapes.  B batch · G kv heads · S tokens · D head dim · n groups of g elements · W bytes of codes

E4M3 = torch.float8_e4m3fn
SCALE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_format(form: TensorFormat, *, width: int) -> None:
    """ConfigError for a format, of rows of `width` elements, that is not computed here."""
    scales = form.scales
    if scales is None or scales.per not in ("token-head", "channel"):
        per = "none" if scales is None else scales.per
        raise ConfigError(f"scales per {per} are not run by attnlab: token-head or channel")
    if form.bits not in (8, 4, 2) or (form.floating and form.bits != 8):
        kind = "floating" if form.floating else "whole"
        raise ConfigError(
            f"bits={form.bits} ({kind}) are not run by attnlab: 8, 4 or 2, floating 8"
        )
    if form.floating and scales.zero_dtype is not None:
        raise ConfigError(f"zero_dtype={scales.zero_dtype!r} is not run with fp8 codes: None")
    if "fp8" in (scales.dtype, scales.zero_dtype) or form.packed == "groups":
        raise ConfigError("scales in fp8 and words of several groups are not run by attnlab")
    if scales.per == "channel" and (scales.group_size is None or form.packed != "group"):
        raise ConfigError("scales per channel are run in groups of tokens, packed 'group'")
    g = scales.group_size
    if scales.per == "token-head" and g is not None and width % g:
        raise ConfigError(f"group_size={g} does not divide a row of {width} elements")


def stored_widths(form: TensorFormat, width: int) -> list[tuple[int, torch.dtype | None]]:
    """(elements a token and head, dtype) of codes, scales and, if any, zero points of a row.

    A dtype None is that of the computation. For scales per token and head.
    """
    assert form.scales is not None
    check_format(form, width=width)
    g, word = form.scales.group_size or width, 8 * form.word_bytes
    n = width // g
    if form.packed == "group":
        codes = n * -(-g // form.codes_per_word) * form.word_bytes
    else:
        codes = -(-width * form.bits // word) * form.word_bytes
    dtypes = [_dtype(form.scales.dtype)]
    if form.scales.zero_dtype is not None:
        zero = form.scales.zero_dtype
        dtypes.append(dtypes[0] if zero == "scale" else _dtype(zero))
    return [(codes, _code_dtype(form)), *((n, dtype) for dtype in dtypes)]


def encode(x_BGSD: Tensor, form: TensorFormat) -> tuple[Tensor, ...]:
    """Codes, scales and, where the format has them, zero points.

    Per token and head [B, G, S, W], [B, G, S, n]; per channel, whose groups are of tokens,
    [B, G, D, W], [B, G, D, n]. fp8 codes are bytes too: not every op takes its dtype.
    """
    assert form.scales is not None
    groups, bits = _grouped(x_BGSD, form), form.bits  # [B, G, S, n, g]
    kept = _dtype(form.scales.dtype) or x_BGSD.dtype
    if form.scales.zero_dtype is not None:
        zero, highest = torch.aminmax(groups, dim=-1, keepdim=True)
        if form.scales.zero_dtype != "scale":
            zero = zero.to(_dtype(form.scales.zero_dtype))
        else:
            zero = zero.to(kept)
        least, most = 0, 2**bits - 1
        scales = _scales(highest.float() - zero.float(), most, kept)
        codes = groups - zero.float()
        codes /= scales.float()
        beside = (scales.squeeze(-1), zero.squeeze(-1))
    else:
        most = 448 if form.floating else 2 ** (bits - 1) - 1
        least = -most
        largest = torch.linalg.vector_norm(
            groups, math.inf, dim=-1, keepdim=True, dtype=torch.float32
        )
        scales = _scales(largest, most, kept)
        codes = groups / scales.float()
        beside = (scales.squeeze(-1),)
    if form.floating:
        return codes.clamp_(least, most).to(E4M3).view(torch.uint8).flatten(-2), *beside
    codes.round_().clamp_(least, most)
    if bits < 8 and least:
        codes += most + 1  # from 1 to 2^b − 1
    codes = codes.to(_code_dtype(form), memory_format=torch.contiguous_format)
    if form.packed == "group":
        return _pack(codes, form).flatten(-2), *beside
    return _pack(codes.flatten(-2), form), *beside


def decode(
    stored: tuple[Tensor, ...], form: TensorFormat, *, width: int, dtype: torch.dtype
) -> Tensor:
    """[B, G, S, D] of what `encode` made of rows of `width` elements; contiguous, if per token."""
    codes, scales, *zeros = stored
    x = whole_numbers(codes, form, groups=scales.shape[-1], width=width)
    x = x.to(dtype, memory_format=torch.contiguous_format)  # exact
    x = x.unflatten(-1, (scales.shape[-1], -1))
    if form.bits < 8 and not zeros:
        x -= 2 ** (form.bits - 1)
    if zeros:
        torch.addcmul(zeros[0].unsqueeze(-1), x, scales.unsqueeze(-1), out=x)
    else:
        x *= scales.unsqueeze(-1)
    return _ungrouped(x, form)


def whole_numbers(codes: Tensor, form: TensorFormat, *, groups: int, width: int) -> Tensor:
    """Codes one by one [..., n · g]; symmetric ones of less than 8 bits are above by 2^(b−1)."""
    if form.floating:
        return codes.view(E4M3)
    whole = form.packed == "group"
    each = _unpack(codes.unflatten(-1, (groups, -1)) if whole else codes, form)
    if not whole:
        return each[..., :width]
    assert form.scales is not None
    return each[..., : form.scales.group_size].flatten(-2)


def _grouped(x_BGSD: Tensor, form: TensorFormat) -> Tensor:
    """Elements that share a scale side by side: [B, G, S, n, g], or per channel [B, G, D, n, g]."""
    assert form.scales is not None
    x = x_BGSD.detach()
    x = x.transpose(-1, -2) if form.scales.per == "channel" else x
    return x.unflatten(-1, (-1, form.scales.group_size or x.shape[-1]))


def _ungrouped(x: Tensor, form: TensorFormat) -> Tensor:
    assert form.scales is not None
    x = x.flatten(-2)
    return x.transpose(-1, -2) if form.scales.per == "channel" else x


def _scales(span: Tensor, most: int, kept: torch.dtype) -> Tensor:
    """span / most in the dtype that is kept, in place in float32; never zero, never infinite."""
    limits = torch.finfo(kept)
    return span.div_(most).clamp_(limits.tiny, limits.max).to(kept)


def _pack(codes: Tensor, form: TensorFormat) -> Tensor:
    """Codes [..., g] → bytes [..., W], the first in the lowest bits; whole words."""
    short = -codes.shape[-1] % form.codes_per_word
    if short:
        codes = pad(codes, (0, short))
    if form.bits == 8:
        return codes
    each = codes.unflatten(-1, (-1, 8 // form.bits))
    for place in range(1, each.shape[-1]):
        each.select(-1, place).bitwise_left_shift_(place * form.bits)
    return each.sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, form: TensorFormat) -> Tensor:
    """Bytes [..., W] → codes [..., W · 8 / b], from 0 to 2^b − 1."""
    if form.bits == 8:
        return packed
    shape = (*packed.shape, 8 // form.bits)
    each = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for place in range(shape[-1]):
        torch.bitwise_right_shift(packed, place * form.bits, out=each.select(-1, place))
    return each.bitwise_and_(2**form.bits - 1).flatten(-2)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else SCALE_DTYPES[name]


def _code_dtype(form: TensorFormat) -> torch.dtype:
    assert form.scales is not None
    signed = form.bits == 8 and not form.floating and form.scales.zero_dtype is None
    return torch.int8 if signed else torch.uint8
