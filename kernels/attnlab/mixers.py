"""Which module runs a mixer of the planner's; the plainest of them, LFM2's, is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from attnlab.delta_rule import GatedDeltaMixer, KimiDeltaMixer
from attnlab.linear import Linear
from attnlab.recurrent import CausalConv, States, zeroed
from attnlab.rg_lru import RGLRUMixer
from attnlab.state_space import Mamba2Mixer, MambaMixer
from planner.errors import ConfigError
from planner.layers import Norm
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import RGLRU, ShortConv


class ShortConvMixer(nn.Module):
    """LFM2's gated convolution: C · conv(B · x)."""

    def __init__(self, mixer: ShortConv, hidden_size: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        linear = partial(Linear, bias=mixer.conv_bias, dtype=dtype)
        self.conv = CausalConv(
            hidden_size, mixer.conv_kernel, dtype, bias=mixer.conv_bias, activation=None
        )
        self.in_proj = linear(hidden_size, 3 * hidden_size)
        self.out_proj = linear(hidden_size, hidden_size)

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        B, C, x = self.in_proj(zeroed(x_BTh, real)).chunk(3, dim=-1)
        return self.out_proj(C * self.conv(B * x, states, real))


MIXERS: dict[type[Mixer], tuple[str, Callable[..., nn.Module]]] = {
    Mamba: ("mamba", MambaMixer),
    Mamba2: ("mamba", Mamba2Mixer),
    GatedDeltaNet: ("linear_attn", GatedDeltaMixer),
    KimiDelta: ("self_attn", KimiDeltaMixer),
    RGLRU: ("self_attn", RGLRUMixer),
    ShortConv: ("conv", ShortConvMixer),
}
"""What runs a mixer, and the name of its module in a block."""


def build_mixer(
    mixer: Mixer, hidden_size: int, norm: Norm, dtype: torch.dtype
) -> tuple[str, nn.Module]:
    """A mixer's module by its name in the block; `norm` is the block's."""
    if type(mixer) not in MIXERS:
        raise ConfigError(f"attention={type(mixer).__name__} does not run in attnlab")
    name, made = MIXERS[type(mixer)]
    return name, made(mixer, hidden_size, norm, dtype)
