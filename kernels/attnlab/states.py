"""The states of recurrent layers: what a cache keeps of all tokens so far, whatever their number.

The last inputs of a causal convolution in the cache's dtype, and what is summed up in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.errors import ConfigError
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import RGLRU, ShortConv


def new_states(
    mixer: Mixer | None, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Zeros, batch first, for a layer's mixer; nothing where there is none."""
    match mixer:
        case None:
            return ()
        case Mamba(intermediate_size=C, state_size=N, conv_kernel=K):
            shapes = (C, K), (C, N)
        case Mamba2(num_heads=H, head_dim=D, state_size=N, conv_kernel=K):
            shapes = (mixer.conv_dim, K), (H, D, N)
        case GatedDeltaNet(linear_num_value_heads=H, linear_conv_kernel_dim=K):
            d_k, d_v = mixer.linear_key_head_dim, mixer.linear_value_head_dim
            shapes = (2 * mixer.linear_num_key_heads * d_k + H * d_v, K), (H, d_k, d_v)
        case KimiDelta(linear_num_heads=H, linear_head_dim=D, linear_conv_kernel_dim=K):
            shapes = (3 * H * D, K), (H, D, D)
        case RGLRU(lru_width=w, conv1d_width=K):
            shapes = (w, K - 1), (w,)
        case ShortConv(hidden_size=h, conv_kernel=K):
            shapes = ((h, K),)
        case _:
            raise ConfigError(f"attention={type(mixer).__name__} does not run in attnlab")
    return tuple(
        torch.zeros((batch, *shape), dtype=kept, device=device)
        for shape, kept in zip(shapes, (dtype, torch.float32), strict=False)
    )
