"""Griffin's real-gated linear recurrent unit (RG-LRU, arXiv:2402.19427): one number a channel.

h ← a·h + √(1 − a²)·(i·x): what decays makes room for what comes, so that h keeps its size. Nothing
is there to decay at a sequence's first token, whose input is taken whole; it is known by its state,
which is zeros.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid, softplus

from attnlab.feed_forward import ACTIVATIONS
from attnlab.linear import Linear
from attnlab.recurrences import linear_scan
from attnlab.recurrent import CausalConv, States, zeroed
from planner.layers import Norm
from planner.mixers.recurrent import RGLRU

# Shapes.  B batch · T new tokens · h hidden size · w channels, in H blocks of b

SHARPNESS = 8.0
"""c of the paper: how far a gate can close."""


class RGLRUMixer(nn.Module):
    """Two branches of w channels, one through a convolution and the recurrence, multiplied."""

    def __init__(self, mixer: RGLRU, hidden_size: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        w, linear = mixer.lru_width, partial(Linear, bias=True, dtype=dtype)
        self.act = ACTIVATIONS[mixer.activation]
        self.linear_y, self.linear_x = linear(hidden_size, w), linear(hidden_size, w)
        self.linear_out = linear(w, hidden_size)
        self.conv_1d = CausalConv(w, mixer.conv1d_width, dtype, bias=True, activation=None)
        self.rg_lru = RecurrentUnit(w, mixer.num_attention_heads, dtype)

    def forward(self, x_BTh: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        x = zeroed(x_BTh, real)
        y = self.act(self.linear_y(x))
        return self.linear_out(
            self.rg_lru(self.conv_1d(self.linear_x(x), states, real), states, real) * y
        )


class RecurrentUnit(nn.Module):
    """The recurrence and its gates, whose matrices are H blocks on a diagonal."""

    def __init__(self, width: int, blocks: int, dtype: torch.dtype) -> None:
        super().__init__()
        b = width // blocks
        self.recurrent_param = nn.Parameter(torch.full((width,), -4.0, dtype=dtype))
        self.input_gate_weight, self.recurrent_gate_weight = (
            nn.Parameter(nn.init.normal_(torch.empty(blocks, b, b, dtype=dtype), std=0.02))
            for _ in range(2)
        )
        self.input_gate_bias, self.recurrent_gate_bias = (
            nn.Parameter(torch.zeros(blocks, b, dtype=dtype)) for _ in range(2)
        )

    def forward(self, x_BTw: Tensor, states: States | None, real: Tensor | None) -> Tensor:
        """[B, T, w] → [B, T, w]; h is float32."""
        opened = self._gate(x_BTw, self.input_gate_weight, self.input_gate_bias)
        decays = self._gate(x_BTw, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log = -SHARPNESS * decays.float() * softplus(self.recurrent_param.float())
        state = torch.zeros_like(log[:, 0]) if states is None else states[-1]
        first = (state == 0).all(dim=-1, keepdim=True)  # [B, 1]
        room = (-torch.expm1(2 * log)).clamp(min=1e-12).sqrt()  # its slope stays finite
        room = torch.cat((room[:, :1].masked_fill(first[:, None], 1.0), room[:, 1:]), dim=1)
        added = (x_BTw * opened).float() * room
        h = linear_scan(zeroed(log, real).exp(), zeroed(added, real), state)
        if states is not None:
            state.copy_(h[:, -1].detach())
        return h.to(x_BTw.dtype)

    def _gate(self, x_BTw: Tensor, weight_Hbb: Tensor, bias_Hb: Tensor) -> Tensor:
        blocks = x_BTw.unflatten(-1, bias_Hb.shape)
        return sigmoid(torch.einsum("bthi,hij->bthj", blocks, weight_Hbb) + bias_Hb).flatten(-2)
