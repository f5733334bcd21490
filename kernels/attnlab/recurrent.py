"""What recurrent layers are made of: a short causal convolution, a state in place, a gated norm.

Such a layer stands in a block where attention would, as `forward(x, states, real)`. `states` are
the cache's tensors of the layer, zeros before a sequence's first token, read and overwritten in
place: a pass goes on where the last one ended, and a step is the same to the last address. None: no
cache. `real` [B, T]: the tokens that are no padding behind a shorter sequence (None: all of them);
padding leaves the states as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnlab.feed_forward import ACTIVATIONS
from attnlab.recurrences import causal_conv

# Shapes.  B batch · T new tokens · C channels of the convolution

States = tuple[Tensor, ...]
Form = Callable[..., tuple[Tensor, Tensor]]


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
        out = causal_conv(x_BTC, self.weight, self.bias, state, real)
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


def run(
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


def zeroed(x_BT: Tensor, real: Tensor | None) -> Tensor:
    """Zeros where tokens are padding: no step, no decay, and no NaN to keep."""
    if real is None:
        return x_BT
    return x_BT.masked_fill(~real.view(*real.shape, *(1,) * (x_BT.dim() - 2)), 0)


def rates(count: int, dtype: torch.dtype) -> Tensor:
    """Logarithms of decay rates 1, 2, ..., count, as Mamba starts."""
    return torch.arange(1, count + 1, dtype=torch.float32).log().to(dtype)
