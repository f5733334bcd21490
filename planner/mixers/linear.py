"""Linear attention with a delta rule or a decay: a matrix of fixed size for each head.

As transformers 5.23 builds it: models/qwen3_next, qwen3_5, olmo_hybrid, kimi_linear, minimax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.errors import ConfigError, check_size
from planner.mixers.base import Mixer
from planner.mixers.mamba import conv_state
from planner.tensors import Parameter, State, conv1d, linear, tensor


def matrix_state(H: int, d_k: int, d_v: int, dtype: str | None) -> State:
    """One matrix [d_k, d_v] for each head."""
    return State(
        name="recurrent state",
        elements=H * d_k * d_v,
        formula="H · d_k · d_v",
        values=(("H", H), ("d_k", d_k), ("d_v", d_v)),
        dtype=dtype,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaNet(Mixer):
    """Gated DeltaNet (arXiv:2412.06464): float32 matrices, and the convolution of q, k and v.

    `projections`: "fused" one for q, k, v and gate, one for both scalars of a head (qwen3_next);
    "split" q, k, v in one and the rest apart (qwen3_5); "separate" all apart (olmo_hybrid).
    `activation`: the convolution's. `allow_neg_eigval`: β from 0 to 2 and not to 1. `norm_eps`: of
    the norm on the heads' outputs; None: the block's.
    """

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    projections: Literal["fused", "split", "separate"]
    activation: str = "silu"
    allow_neg_eigval: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for field in (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ):
            check_size(field, getattr(self, field))
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConfigError(
                f"linear_num_value_heads={self.linear_num_value_heads} is not a multiple of "
                f"linear_num_key_heads={self.linear_num_key_heads}"
            )

    @property
    def kind(self) -> str:
        """What people call it."""
        return "Gated DeltaNet"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """Projections of q, k, v, the output gate, and two scalars for each value head."""
        H, h = self.linear_num_value_heads, hidden_size
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = H * self.linear_value_head_dim
        channels = 2 * keys + values
        outs = {
            "fused": {"in_proj_qkvz": channels + values, "in_proj_ba": 2 * H},
            "split": {
                "in_proj_qkv": channels,
                "in_proj_z": values,
                "in_proj_b": H,
                "in_proj_a": H,
            },
            "separate": {
                "q_proj": keys,
                "k_proj": keys,
                "v_proj": values,
                "a_proj": H,
                "b_proj": H,
                "g_proj": values,
            },
        }[self.projections]
        last = "o" if self.projections == "separate" else "out"
        norm = "o_norm" if self.projections == "separate" else "gated_norm"
        for name in ("dt_bias", "A_log"):
            yield tensor(f"linear_attn.{name}", H)
        width = self.linear_conv_kernel_dim
        yield from conv1d("linear_attn.conv1d", channels=channels, width=width, bias=False)
        for name, out in outs.items():
            yield from linear(f"linear_attn.{name}", "attention", out=out, into=h, bias=False)
        yield tensor(f"linear_attn.{norm}.weight", self.linear_value_head_dim, group="norm")
        yield from linear(f"linear_attn.{last}_proj", "attention", out=h, into=values, bias=False)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        H, d_k, d_v = (
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
        )
        channels = 2 * self.linear_num_key_heads * d_k + H * d_v
        return (
            conv_state(channels=channels, width=self.linear_conv_kernel_dim),
            matrix_state(H, d_k, d_v, "fp32"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class KimiDelta(Mixer):
    """Kimi Delta Attention (arXiv:2510.26692): a decay for each channel, through low ranks.

    `flat_decay`: A_log is [H] (glm5_next), not [1, 1, H, 1] (kimi_linear). `activation`: the
    convolution's.
    """

    linear_num_heads: int
    linear_head_dim: int
    linear_conv_kernel_dim: int
    flat_decay: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        for field in ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"):
            check_size(field, getattr(self, field))

    @property
    def kind(self) -> str:
        """What people call it."""
        return "Kimi Delta Attention"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """q, k, v; a decay and an output gate of rank head_dim; one scalar for each head."""
        H, D, h = self.linear_num_heads, self.linear_head_dim, hidden_size
        width = H * D
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from linear(f"self_attn.{name}", "attention", out=width, into=h, bias=False)
        yield from conv1d(
            "self_attn.conv1d", channels=3 * width, width=self.linear_conv_kernel_dim, bias=False
        )
        yield tensor("self_attn.forget_gate.dt_bias", width)
        yield tensor("self_attn.forget_gate.A_log", *((H,) if self.flat_decay else (1, 1, H, 1)))
        for name, out, into in (
            ("forget_gate.f_a_proj", D, h),
            ("forget_gate.f_b_proj", width, D),
            ("b_proj", H, h),
            ("g_a_proj", D, h),
            ("g_b_proj", width, D),
            ("o_proj", h, width),
        ):
            yield from linear(f"self_attn.{name}", "attention", out=out, into=into, bias=False)
        yield tensor("self_attn.o_norm.weight", D, group="norm")

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        H, D = self.linear_num_heads, self.linear_head_dim
        return (
            conv_state(channels=3 * H * D, width=self.linear_conv_kernel_dim),
            matrix_state(H, D, D, "fp32"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LightningAttention(Mixer):
    """Lightning attention (arXiv:2501.08313): a decaying sum of k·vᵀ in the model's dtype."""

    num_attention_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        """What people call it."""
        return "lightning attention"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """q, k and v in one matrix, an output gate as wide as the heads."""
        width, h = self.num_attention_heads * self.head_dim, hidden_size
        yield tensor("self_attn.inner_norm.weight", width, group="norm")
        for name, out, into in (
            ("qkv_proj", 3 * width, h),
            ("out_proj", h, width),
            ("output_gate", width, h),
        ):
            yield from linear(f"self_attn.{name}", "attention", out=out, into=into, bias=False)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """One matrix a head, whatever the context."""
        return (matrix_state(self.num_attention_heads, self.head_dim, self.head_dim, None),)
