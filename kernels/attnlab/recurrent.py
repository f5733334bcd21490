"""Recurrent layers: projections, a short causal convolution, a recurrence, a gated output.

Each stands in a block where attention would. `forward(x, states, real)`: `states` are the cache's
tensors of the layer, zeros before a sequence's first token, read and overwritten in place, so that
a pass may continue where the last one ended and a step is the same to the last address; None: no
cache. `real` [B, T]: the tokens that are no padding behind a shorter sequence (None: all); padding
leaves the states as they were. The recurrences are in recurrences.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid, silu, softplus

from attnlab import recurrences
from attnlab.feed_forward import ACTIVATIONS
from attnlab.linear import Linear
from attnlab.norms import build_norm
from planner.errors import ConfigError
from planner.layers import Norm
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import ShortConv

# Shapes.  B batch · T new tokens · h hidden size · H heads · G groups · P channels of a head
#          N state size · K, V widths of a key and a value · C channels of the convolution

States = tuple[Tensor, ...]
CHANNEL_CHUNK = 16
"""Tokens of a chunk where each channel decays by itself: their decays are Q · Q · K numbers."""


class CausalConv(nn.Conv1d):
    """Depthwise over the last `width` tokens, and an activation on what comes out."""

    def __init__(
        self, channels: int, width: int, dtype: torch.dtype, *, bias: bool, activation: str | None
    ) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias, dtype=dtype)
        self.act = None if activation is None else ACTIVATIONS[activation]

    def forward(self, x_BTC: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, C] → [B, T, C]; the inputs before them are the first of the states."""
        state = None if states is None else states[0]
        out = recurrences.causal_conv(x_BTC, self.weight, self.bias, state, real)
        return out if self.act is None else self.act(out)


class GatedNorm(nn.Module):
    """RMSNorm with a gate: on what is normed, group by group (Mamba-2), or on what comes out."""

    def __init__(
        self,
        width: int,
        eps: float,
        dtype: torch.dtype,
        *,
        groups: int = 1,
        gate_first: bool = False,
        gate: Callable[[Tensor], Tensor] = silu,
    ) -> None:
        super().__init__()
        self.eps, self.groups, self.gate_first, self.gate = eps, groups, gate_first, gate
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """[..., width] → the same in the gate's dtype."""
        opened = self.gate(gate.float())
        wide = x.float() * opened if self.gate_first else x.float()
        parts = wide.unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)
        wide = parts.flatten(-2) * self.weight.float()
        return (wide if self.gate_first else wide * opened).to(gate.dtype)


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
        self.A_log = nn.Parameter(_rates(H, dtype))
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
        mixed = self.in_proj(_zeroed(x_BTh, real))
        gate, xBC, dt = mixed.split([H * P, mixer.conv_dim, H], dim=-1)
        xBC = self.conv1d(xBC, states, real)
        x, B, C = xBC.split([H * P, G * N, G * N], dim=-1)
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        dt = softplus(dt.float() + self.dt_bias.float()).clamp(*mixer.time_step_limit)
        A = -self.A_log.float().exp()
        forms = partial(recurrences.ssd_step, A), partial(recurrences.ssd_scan, A)
        y = _run(forms, states, (H, P, N), x, _zeroed(dt, real), B, C)
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
        self.A_log = nn.Parameter(_rates(N, dtype).repeat(inner, 1))
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
        x, gate = self.in_proj(_zeroed(x_BTh, real)).chunk(2, dim=-1)
        x = self.conv1d(x, states, real)
        dt, B, C = self.x_proj(x).split([mixer.time_step_rank, N, N], dim=-1)
        dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt = softplus(self.dt_proj(dt).float())
        A = -self.A_log.float().exp()
        forms = partial(recurrences.selective_step, A), partial(recurrences.selective_scan, A)
        y = _run(forms, states, tuple(A.shape), x, _zeroed(dt, real), B, C)
        y = (y + self.D.float() * x.float()) * silu(gate.float())
        return self.out_proj(y.to(gate.dtype))


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
        self.A_log = nn.Parameter(_rates(H, dtype))
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
        qkv, gate, b, a = self._project(_zeroed(x_BTh, real))
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
        self.A_log = nn.Parameter(_rates(heads, dtype).view(1, 1, heads, 1))

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
        H, D, x = self.mixer.linear_num_heads, self.mixer.linear_head_dim, _zeroed(x_BTh, real)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv = self.conv1d(qkv, states, real)
        beta = self.b_proj(x).float().sigmoid()
        out = _delta_rule(qkv, self.forget_gate(x), beta, (H, H, D, D), states, real)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (H, D))
        return self.o_proj(self.o_norm(out, gate).flatten(-2))


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
        B, C, x = self.in_proj(_zeroed(x_BTh, real)).chunk(3, dim=-1)
        return self.out_proj(C * self.conv(B * x, states, real))


MIXERS: dict[type[Mixer], tuple[str, Callable[..., nn.Module]]] = {
    Mamba: ("mamba", MambaMixer),
    Mamba2: ("mamba", Mamba2Mixer),
    GatedDeltaNet: ("linear_attn", GatedDeltaMixer),
    KimiDelta: ("self_attn", KimiDeltaMixer),
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


Form = Callable[..., tuple[Tensor, Tensor]]


def _run(
    forms: tuple[Form, Form], states: States | None, sizes: tuple[int, ...], *inputs_BT: Tensor
) -> Tensor:
    """The recurrence, float32: its step for one token, its scan for several.

    It starts from the last of `states`, or from zeros [B, *sizes], and overwrites it.
    """
    step, scan = forms
    B, T = inputs_BT[0].shape[:2]
    state = None if states is None else states[-1]
    if state is None:
        state = torch.zeros(B, *sizes, dtype=torch.float32, device=inputs_BT[0].device)
    if T == 1:
        out, new = step(*(t[:, 0] for t in inputs_BT), state)
        out = out[:, None]
    else:
        out, new = scan(*inputs_BT, state)
    if states is not None:
        state.copy_(new.detach())
    return out


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
    return _run(forms, states, (H, K, V), q, k, v, _zeroed(g_BTHK, real), _zeroed(beta_BTH, real))


def _zeroed(x_BT: Tensor, real: Tensor | None) -> Tensor:
    """Zeros where tokens are padding: no step, no decay, and no NaN to keep."""
    if real is None:
        return x_BT
    return x_BT.masked_fill(~real.view(*real.shape, *(1,) * (x_BT.dim() - 2)), 0)


def _rates(count: int, dtype: torch.dtype) -> Tensor:
    """Logarithms of decay rates 1, 2, ..., count, as Mamba starts."""
    return torch.arange(1, count + 1, dtype=torch.float32).log().to(dtype)
