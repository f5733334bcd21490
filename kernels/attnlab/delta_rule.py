"""Delta-rule layers: a matrix a head that maps keys to values, corrected and not only added to.

Each token looks up what its key yields, Sᵀk, and moves it towards its value by β; before that, all
of S decays, by one factor a head (Gated DeltaNet) or one for each channel of the key (Kimi).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid, softplus

from attnlab import recurrences
from attnlab.linear import Linear
from attnlab.recurrent import CausalConv, GatedNorm, States, rates, run, zeroed
from planner.layers import Norm
from planner.mixers.linear import GatedDeltaNet, KimiDelta

# Shapes.  B batch · T new tokens · h hidden size · G key heads · H value heads, H / G of each
#          K, V widths of a key and a value · C = 2·G·K + H·V channels of the convolution

CHANNEL_CHUNK = 16
"""Tokens of a chunk where each channel decays by itself: their decays are Q · Q · K numbers."""


class GatedDeltaMixer(nn.Module):
    """Gated DeltaNet (arXiv:2412.06464): keys are unit vectors, corrected by the delta rule."""

    def __init__(
        self, mixer: GatedDeltaNet, hidden_size: int, norm: Norm, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.mixer = mixer
        G, H = mixer.linear_num_key_heads, mixer.linear_num_value_heads
        K, V = mixer.linear_key_head_dim, mixer.linear_value_head_dim
        linear = partial(Linear, hidden_size, bias=False, dtype=dtype)
        match mixer.projections:
            case "fused":
                self.in_proj_qkvz = linear(2 * G * K + 2 * H * V)
                self.in_proj_ba = linear(2 * H)
            case "split":
                self.in_proj_qkv = linear(2 * G * K + H * V)
                self.in_proj_z = linear(H * V)
                self.in_proj_b, self.in_proj_a = linear(H), linear(H)
            case "separate":
                self.q_proj, self.k_proj, self.v_proj = linear(G * K), linear(G * K), linear(H * V)
                self.a_proj, self.b_proj, self.g_proj = linear(H), linear(H), linear(H * V)
        self.conv1d = CausalConv(
            2 * G * K + H * V,
            mixer.linear_conv_kernel_dim,
            dtype,
            bias=False,
            activation=mixer.activation,
        )
        self.dt_bias = nn.Parameter(torch.ones(H, dtype=dtype))
        self.A_log = nn.Parameter(rates(H, dtype))
        eps = norm.eps if mixer.norm_eps is None else mixer.norm_eps
        gated, out = GatedNorm(V, eps, dtype), Linear(H * V, hidden_size, bias=False, dtype=dtype)
        if mixer.projections == "separate":
            self.o_norm, self.o_proj = gated, out
        else:
            self.gated_norm, self.out_proj = gated, out

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        mixer, H = self.mixer, self.mixer.linear_num_value_heads
        V = mixer.linear_value_head_dim
        qkv, gate, b, a = self._project(zeroed(x_BTh, real))
        qkv = self.conv1d(qkv, states, real)
        g = -self.A_log.float().exp() * softplus(a.float() + self.dt_bias.float())
        beta = b.float().sigmoid() * (2.0 if mixer.allow_neg_eigval else 1.0)
        sizes = (mixer.linear_num_key_heads, H, mixer.linear_key_head_dim, V)
        out = _delta_rule(qkv, g[..., None], beta, sizes, states, real)
        separate = mixer.projections == "separate"
        normed = (self.o_norm if separate else self.gated_norm)(out, gate.unflatten(-1, (H, V)))
        return (self.o_proj if separate else self.out_proj)(normed.flatten(-2))

    def _project(self, x_BTh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v side by side; the output's gate; β and the decay before their functions."""
        mixer = self.mixer
        match mixer.projections:
            case "fused":  # key head by key head: its q, k, and what its value heads share
                G, K = mixer.linear_num_key_heads, mixer.linear_key_head_dim
                shared = mixer.linear_num_value_heads // G
                wide = shared * mixer.linear_value_head_dim
                qkvz = self.in_proj_qkvz(x_BTh).unflatten(-1, (G, -1)).split([K, K, wide, wide], -1)
                q, k, v, z = (part.flatten(-2) for part in qkvz)
                b, a = self.in_proj_ba(x_BTh).unflatten(-1, (G, -1)).split(shared, dim=-1)
                return torch.cat((q, k, v), dim=-1), z, b.flatten(-2), a.flatten(-2)
            case "split":
                qkv, z = self.in_proj_qkv(x_BTh), self.in_proj_z(x_BTh)
                return qkv, z, self.in_proj_b(x_BTh), self.in_proj_a(x_BTh)
            case _:
                qkv = torch.cat((self.q_proj(x_BTh), self.k_proj(x_BTh), self.v_proj(x_BTh)), -1)
                return qkv, self.g_proj(x_BTh), self.b_proj(x_BTh), self.a_proj(x_BTh)


class ForgetGate(nn.Module):
    """The logarithm of each channel's decay, through a low rank (arXiv:2510.26692)."""

    def __init__(self, heads: int, width: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.f_a_proj = Linear(hidden_size, width, bias=False, dtype=dtype)
        self.f_b_proj = Linear(width, heads * width, bias=False, dtype=dtype)
        self.dt_bias = nn.Parameter(torch.ones(heads * width, dtype=dtype))
        self.A_log = nn.Parameter(rates(heads, dtype).view(1, 1, heads, 1))

    def forward(self, x_BTh: Tensor) -> Tensor:
        """[B, T, h] → [B, T, H, K], float32."""
        raw = self.f_b_proj(self.f_a_proj(x_BTh)).float() + self.dt_bias.float()
        return -self.A_log.float().exp() * softplus(raw).unflatten(-1, (self.A_log.shape[2], -1))


class KimiDeltaMixer(nn.Module):
    """Kimi Delta Attention (arXiv:2510.26692): the gated delta rule, a decay for each channel."""

    def __init__(self, mixer: KimiDelta, hidden_size: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.mixer = mixer
        H, D = mixer.linear_num_heads, mixer.linear_head_dim
        linear = partial(Linear, bias=False, dtype=dtype)
        self.q_proj, self.k_proj, self.v_proj = (linear(hidden_size, H * D) for _ in range(3))
        self.conv1d = CausalConv(
            3 * H * D,
            mixer.linear_conv_kernel_dim,
            dtype,
            bias=False,
            activation=mixer.activation,
        )
        self.forget_gate = ForgetGate(H, D, hidden_size, dtype)
        self.b_proj = linear(hidden_size, H)
        self.g_a_proj, self.g_b_proj = linear(hidden_size, D), linear(D, H * D)
        self.o_norm = GatedNorm(D, norm.eps, dtype, gate=sigmoid)
        self.o_proj = linear(H * D, hidden_size)

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        H, D, x = self.mixer.linear_num_heads, self.mixer.linear_head_dim, zeroed(x_BTh, real)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv = self.conv1d(qkv, states, real)
        beta = self.b_proj(x).float().sigmoid()
        out = _delta_rule(qkv, self.forget_gate(x), beta, (H, H, D, D), states, real)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (H, D))
        return self.o_proj(self.o_norm(out, gate).flatten(-2))


def _delta_rule(
    qkv_BTC: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    sizes: tuple[int, int, int, int],
    states: States | None,
    real: Tensor | None,
) -> Tensor:
    """o [B, T, H, V] of q, k, v side by side, q and k made unit vectors. `sizes`: G, H, K, V."""
    G, H, K, V = sizes
    q, k, v = qkv_BTC.split([G * K, G * K, H * V], dim=-1)
    q, k = (t.float().unflatten(-1, (G, K)) for t in (q, k))
    q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(H // G, dim=2) for t in (q * K**-0.5, k))
    scan = recurrences.gated_delta_scan
    if g_BTHK.shape[-1] > 1:
        scan = partial(scan, chunk=CHANNEL_CHUNK)
    forms, v = (recurrences.gated_delta_step, scan), v.unflatten(-1, (H, V))
    return run(forms, states, (H, K, V), q, k, v, zeroed(g_BTHK, real), zeroed(beta_BTH, real))
