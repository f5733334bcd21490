"""State-space layers: Mamba-2, whose heads decay as one, and Mamba, whose channels do not.

What decays is a state of N numbers for each channel, from which each token reads with C and to
which it adds with B, both of its own making. One rate for a whole head makes it products of
matrices (recurrences.py); Mamba's rates for each channel and number do not.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from attnlab import recurrences
from attnlab.linear import Linear
from attnlab.norms import build_norm
from attnlab.recurrent import CausalConv, GatedNorm, States, rates, run, zeroed
from planner.layers import Norm
from planner.mixers.mamba import Mamba, Mamba2

# Shapes.  B batch · T new tokens · h hidden size · H heads of P channels · N state size
#          G groups of heads, each with one B and C


class Mamba2Mixer(nn.Module):
    """Mamba-2 (arXiv:2405.21060)."""

    def __init__(self, mixer: Mamba2, hidden_size: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.mixer = mixer
        H, inner = mixer.num_heads, mixer.intermediate_size
        width, linear = inner + mixer.conv_dim + H, partial(Linear, dtype=dtype)
        self.in_proj = linear(hidden_size, width, bias=mixer.use_bias)
        self.conv1d = CausalConv(
            mixer.conv_dim,
            mixer.conv_kernel,
            dtype,
            bias=mixer.use_conv_bias,
            activation=mixer.activation,
        )
        self.A_log = nn.Parameter(rates(H, dtype))
        self.dt_bias, self.D = (nn.Parameter(torch.ones(H, dtype=dtype)) for _ in range(2))
        if mixer.norm:
            self.gated_norm = GatedNorm(
                inner, norm.eps, dtype, groups=mixer.n_groups, gate_first=True
            )
        self.out_proj = linear(inner, hidden_size, bias=mixer.out_bias)

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        mixer, H, P = self.mixer, self.mixer.num_heads, self.mixer.head_dim
        G, N = mixer.n_groups, mixer.state_size
        mixed = self.in_proj(zeroed(x_BTh, real))
        gate, xBC, dt = mixed.split([H * P, mixer.conv_dim, H], dim=-1)
        xBC = self.conv1d(xBC, states, real)
        x, B, C = xBC.split([H * P, G * N, G * N], dim=-1)
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        dt = softplus(dt.float() + self.dt_bias.float()).clamp(*mixer.time_step_limit)
        A = -self.A_log.float().exp()
        forms = partial(recurrences.ssd_step, A), partial(recurrences.ssd_scan, A)
        y = run(forms, states, (H, P, N), x, zeroed(dt, real), B, C)
        y = (y + self.D.float()[:, None] * x.float()).flatten(-2)
        y = self.gated_norm(y, gate) if mixer.norm else (y * silu(gate.float())).to(gate.dtype)
        return self.out_proj(y)


class MambaMixer(nn.Module):
    """Mamba (arXiv:2312.00752); jamba norms the time step, B and C."""

    def __init__(self, mixer: Mamba, hidden_size: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.mixer = mixer
        inner, N, rank = mixer.intermediate_size, mixer.state_size, mixer.time_step_rank
        linear = partial(Linear, dtype=dtype)
        self.in_proj = linear(hidden_size, 2 * inner, bias=mixer.use_bias)
        self.conv1d = CausalConv(
            inner,
            mixer.conv_kernel,
            dtype,
            bias=mixer.use_conv_bias,
            activation=mixer.activation,
        )
        self.x_proj = linear(inner, rank + 2 * N, bias=False)
        self.dt_proj = linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(rates(N, dtype).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, dtype=dtype))
        self.out_proj = linear(inner, hidden_size, bias=mixer.use_bias)
        if mixer.unscaled_norm_eps is not None:
            norm = Norm(kind="rmsnorm", eps=mixer.unscaled_norm_eps, weight=False)
        normed = mixer.inner_norms or mixer.unscaled_norm_eps is not None
        self.dt_layernorm, self.b_layernorm, self.c_layernorm = (
            build_norm(norm, width, dtype) if normed else nn.Identity() for width in (rank, N, N)
        )

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        mixer, N = self.mixer, self.mixer.state_size
        x, gate = self.in_proj(zeroed(x_BTh, real)).chunk(2, dim=-1)
        x = self.conv1d(x, states, real)
        dt, B, C = self.x_proj(x).split([mixer.time_step_rank, N, N], dim=-1)
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt = softplus(self.dt_proj(dt).float())
        A = -self.A_log.float().exp()
        forms = partial(recurrences.selective_step, A), partial(recurrences.selective_scan, A)
        y = run(forms, states, tuple(A.shape), x, zeroed(dt, real), B, C)
        y = (y + self.D.float() * x.float()) * silu(gate.float())
        return self.out_proj(y.to(gate.dtype))
