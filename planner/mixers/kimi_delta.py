"""Kimi delta attention (transformers 5.23, models/glm5_next: Glm5NextTextLinearAttention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import check_size
from planner.mixers.base import Mixer
from planner.tensors import Parameter, State, conv1d, linear, tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KimiDelta(Mixer):
    """Delta rule with a decay for each channel (Kimi Linear, arXiv:2510.26692).

    State: the last `conv_kernel` inputs of the one convolution over q, k and v, in the model's
    dtype; heads · head_dim · head_dim in float32.
    """

    num_heads: int
    head_dim: int
    conv_kernel: int

    def __post_init__(self) -> None:
        for field in ("num_heads", "head_dim", "conv_kernel"):
            check_size(f"linear_{field}", getattr(self, field))

    @property
    def kind(self) -> str:
        """What people call it."""
        return "Kimi delta attention"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """Decay and output gate go through a bottleneck as wide as a head."""
        h, H, D = hidden_size, self.num_heads, self.head_dim
        for name, out, into in (
            ("q_proj", H * D, h),
            ("k_proj", H * D, h),
            ("v_proj", H * D, h),
            ("forget_gate.f_a_proj", D, h),
            ("forget_gate.f_b_proj", H * D, D),
            ("b_proj", H, h),
            ("g_a_proj", D, h),
            ("g_b_proj", H * D, D),
            ("o_proj", h, H * D),
        ):
            yield from linear(f"self_attn.{name}", "attention", out=out, into=into, bias=False)
        yield from conv1d(
            "self_attn.conv1d", channels=3 * H * D, width=self.conv_kernel, bias=False
        )
        yield tensor("self_attn.forget_gate.dt_bias", H * D)
        yield tensor("self_attn.forget_gate.A_log", H)
        yield tensor("self_attn.o_norm.weight", D, group="norm")

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        H, D, K = self.num_heads, self.head_dim, self.conv_kernel
        return (
            State(
                name="convolution state",
                elements=3 * H * D * K,
                formula="3 · H · d · K",
                values=(("H", H), ("d", D), ("K", K)),
            ),
            State(
                name="recurrent state",
                elements=H * D * D,
                formula="H · d · d",
                values=(("H", H), ("d", D)),
                dtype="fp32",
            ),
        )
