"""Positions by rotation (RoPE, arXiv:2104.09864) and by sinusoids added to the embedding.

Dimension pair i of R turns by position · θ^(−2i/R). A model is run beyond its trained length by
stretching the slow pairs, which have not turned once in training: `rope_type` says how.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import ConfigError, check_choice, shown
from planner.layers import RoPE

# Shapes.  B batch · T tokens · H heads · D head dim · R rotary dimensions, the first of D

BY_LENGTH = ("dynamic", "longrope")
"""Types whose frequencies depend on how long the sequence is."""
ROPE_TYPES = ("default", "linear", "ntk", "yarn", "llama3", "su", *BY_LENGTH)


def frequencies(rope: RoPE, *, trained_tokens: int, tokens: int) -> tuple[Tensor, float]:
    """(θ^(−2i/R) for i < R/2, stretched as `rope_type` says, float32 on the CPU; attention factor).

    The factor multiplies cos and sin. `trained_tokens`: max_position_embeddings; `tokens`: how long
    the sequence is now. As transformers 5.23 does (modeling_rope_utils.py); "ntk" is the base that
    "dynamic" reaches, held fixed. Raises ConfigError for a type or scaling that cannot be used.
    """
    check_choice("rope_type", rope.rope_type, ROPE_TYPES)
    if rope.rotary_dim % 2:
        raise ConfigError(f"rotary_dim={rope.rotary_dim} is not allowed: an even number")
    plain = _powers(rope.rope_theta, rope.rotary_dim)
    match rope.rope_type:
        case "linear":
            return plain / _number(rope, "factor"), 1.0
        case "ntk":
            return _ntk(rope, _number(rope, "factor")), 1.0
        case "dynamic":
            factor, length = _number(rope, "factor"), max(tokens, trained_tokens)
            return _ntk(rope, factor * length / trained_tokens - (factor - 1)), 1.0
        case "yarn":
            return _yarn(rope, plain, trained_tokens)
        case "longrope" | "su":
            return _longrope(rope, plain, trained_tokens, tokens)
        case "llama3":
            return _llama3(rope, plain), 1.0
    return plain, 1.0


def _powers(base: float, R: int) -> Tensor:
    exponents = torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R
    return 1.0 / base**exponents


def _ntk(rope: RoPE, stretch: float) -> Tensor:
    """A larger base: fast pairs hardly change, the slowest is divided by `stretch`."""
    R = rope.rotary_dim
    return _powers(rope.rope_theta * stretch ** (R / (R - 2)), R) if R > 2 else _powers(1.0, R)


def _llama3(rope: RoPE, plain: Tensor) -> Tensor:
    """Llama 3.1: fast pairs stay, slow ones are divided by `factor`, between is a blend."""
    factor, low = _number(rope, "factor"), _number(rope, "low_freq_factor")
    high = _number(rope, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"high_freq_factor={high} is not above low_freq_factor={low}")
    turns = _number(rope, "original_max_position_embeddings") * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / factor + kept * plain


def _yarn(rope: RoPE, plain: Tensor, trained_tokens: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): a ramp from pairs that turn β_fast times to those of β_slow."""
    R, trained = rope.rotary_dim, _number(rope, "original_max_position_embeddings")
    factor = _number(rope, "factor", trained_tokens / trained)

    def pair(turns: float) -> float:  # which pair turns so often within the trained length
        return R * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(_number(rope, "beta_fast", 32)), pair(_number(rope, "beta_slow", 1))
    if dict(rope.scaling).get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    width = high - low or 0.001
    slow = ((torch.arange(R // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    stretched = plain / factor * slow + plain * (1 - slow)

    def scale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = dict(rope.scaling)
    weight, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if given.get("attention_factor") is not None:
        return stretched, _number(rope, "attention_factor")
    if weight and all_dim:
        return stretched, scale(_number(rope, "mscale")) / scale(_number(rope, "mscale_all_dim"))
    return stretched, scale()


def _longrope(rope: RoPE, plain: Tensor, trained_tokens: int, tokens: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv:2402.13753): a searched divisor for each pair, another beyond the length."""
    trained = _number(rope, "original_max_position_embeddings")
    name = "long_factor" if tokens > trained else "short_factor"
    divisors = dict(rope.scaling).get(name)
    if not isinstance(divisors, tuple) or len(divisors) != len(plain):
        raise ConfigError(f"{name}={shown(divisors)} is not allowed: {len(plain)} numbers")
    factor = _number(rope, "factor", trained_tokens / trained)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    stretched = plain / torch.tensor(divisors, dtype=torch.float32, device="cpu")
    return stretched, _number(rope, "attention_factor", default)


def _number(rope: RoPE, name: str, default: float | None = None) -> float:
    value: Any = dict(rope.scaling).get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(
            f"{name}={shown(value)} is not allowed for rope_type={rope.rope_type}: a number above 0"
        )
    return float(value)


class RotaryTables(nn.Module):
    """cos and sin of positions times frequencies; its buffer `inv_freq` is for short sequences."""

    def __init__(self, rope: RoPE, trained_tokens: int, device: torch.device) -> None:
        super().__init__()
        self.rope, self.trained_tokens = rope, trained_tokens
        inv_freq, self.attention_factor = frequencies(rope, trained_tokens=trained_tokens, tokens=1)
        self.inv_freq = nn.Buffer(inv_freq.to(device), persistent=False)

    def forward(self, positions: Tensor, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), [T, 1, R] or [B, T, 1, R], of positions [T] or [B, T] up to `tokens`.

        Computed in float32 and rounded to `dtype`.
        """
        inv_freq = self.inv_freq
        if self.rope.rope_type in BY_LENGTH:
            stretched, _ = frequencies(self.rope, trained_tokens=self.trained_tokens, tokens=tokens)
            inv_freq = stretched.to(inv_freq.device)
        freqs = positions[..., None].float() * inv_freq  # [T, R/2]
        if self.rope.interleaved:
            angles = freqs[..., None].expand(*freqs.shape, 2).flatten(-2)[..., None, :]
        else:
            angles = torch.cat((freqs, freqs), dim=-1)[..., None, :]  # [T, 1, R]
        return self._table(angles.cos(), dtype), self._table(angles.sin(), dtype)

    def _table(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self.attention_factor != 1.0:
            values = values * self.attention_factor
        return values.to(dtype)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first R dimensions of every head, x·cos + turned(x)·sin; the others pass.

    A pair is i and i + R/2, or two neighbours where `interleaved`; turned: (−second, first).
    """
    R = cos.shape[-1]
    x = x_BTHD[..., :R]
    if interleaved:
        turned = x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin
    else:
        x1, x2 = x.chunk(2, dim=-1)
        turned = x * cos + torch.cat((-x2, x1), dim=-1) * sin
    return turned if x_BTHD.shape[-1] == R else torch.cat((turned, x_BTHD[..., R:]), dim=-1)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[T] or [B, T] → [..., width]: sines of position / 10 000^(2i/width), then cosines.

    "Attention is all you need" (arXiv:1706.03762), in halves as in tensor2tensor.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[..., None].float() / 10_000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width].to(dtype)
