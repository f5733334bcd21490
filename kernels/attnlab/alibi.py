"""ALiBi (arXiv:2108.12409): each head loses slope · distance on its scores; nothing else is needed.

It reaches past the trained length by itself: a farther key only scores less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(heads: int) -> list[float]:
    """2^(−8i/n) for i = 1 … n where n heads are a power of two.

    Otherwise those of the next lower power, then every other slope of twice as many heads.
    """
    n = 2 ** math.floor(math.log2(heads))
    steep = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    return steep + [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]


def bias(slopes_H: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """slope · (key − query), [H, T, S] or [B, H, T, S], in the dtype of the slopes.

    Distances, not positions, are rounded to that dtype: near tokens keep their differences.
    """
    distance = key_positions[..., None, :] - query_positions[..., :, None]  # [T, S]
    return slopes_H[:, None, None] * distance.to(slopes_H.dtype).unsqueeze(-3)


def slope_tensor(heads: int, dtype: torch.dtype, device: torch.device, *, scale: float) -> Tensor:
    """The slopes [H], multiplied by `scale`."""
    return torch.tensor(slopes(heads), dtype=dtype, device=device) * scale
