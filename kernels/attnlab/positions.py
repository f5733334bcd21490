"""Rotary positions: tables made once a forward, shared by all layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import ConfigError, check_choice, shown
from planner.layers import RoPE

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(rope: RoPE) -> Tensor:
    """θ^(−2i/R) for i < R/2, stretched as `rope_type` says: float32 [R/2] on the CPU.

    Raises ConfigError for a rope_type that attnlab does not run and for scaling it cannot use.
    """
    check_choice("rope_type", rope.rope_type, ROPE_TYPES)
    if rope.interleaved:
        raise ConfigError("interleaved rotary positions do not run in attnlab: halves")
    R = rope.rotary_dim
    if R % 2:
        raise ConfigError(f"rotary_dim={R} is not allowed: an even number")
    exponents = torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R
    inv_freq = 1.0 / rope.rope_theta**exponents
    match rope.rope_type:
        case "linear":
            return inv_freq / _scaling(rope, "factor")
        case "llama3":
            return _llama3(inv_freq, rope)
    return inv_freq


def _llama3(inv_freq: Tensor, rope: RoPE) -> Tensor:
    """Llama 3.1: fast dimensions stay, slow ones are divided by `factor`, between is a blend."""
    factor, low = _scaling(rope, "factor"), _scaling(rope, "low_freq_factor")
    high = _scaling(rope, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"high_freq_factor={high} is not above low_freq_factor={low}")
    turns = _scaling(rope, "original_max_position_embeddings") * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def _scaling(rope: RoPE, name: str) -> float:
    value: Any = dict(rope.scaling).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(
            f"{name}={shown(value)} is not allowed for rope_type={rope.rope_type}: a number above 0"
        )
    return float(value)


class RotaryTables(nn.Module):
    """cos and sin of positions times frequencies. `inv_freq` is the model's one buffer."""

    def __init__(self, rope: RoPE, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(inverse_frequencies(rope).to(device), persistent=False)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, R], computed in float32 and rounded to `dtype`."""
        freqs = positions_T[:, None].float() * self.inv_freq  # [T, R/2]
        angles = torch.cat((freqs, freqs), dim=-1)[:, None]  # [T, 1, R]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of every head, x·cos + (−x₂, x₁)·sin; the others pass."""
    R = cos.shape[-1]
    x = x_BTHD[..., :R]
    x1, x2 = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-x2, x1), dim=-1) * sin
    return turned if x_BTHD.shape[-1] == R else torch.cat((turned, x_BTHD[..., R:]), dim=-1)
