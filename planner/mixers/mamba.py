"""State-space mixers (transformers 5.23, models/mamba2, bamba, granitemoehybrid, …)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.mixers.base import Mixer
from planner.tensors import Parameter, State, conv1d, linear, tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2(Mixer):
    """Mamba-2 (arXiv:2405.21060): Mamba2Mixer, BambaMixer, GraniteMoeHybridMambaLayer.

    State: the last `conv_kernel` inputs of the convolution, whose channels are those of x, B and C,
    in the model's dtype; heads · head_dim · state_size in float32.
    """

    num_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    conv_kernel: int
    use_conv_bias: bool
    use_bias: bool
    norm: bool = True

    @property
    def kind(self) -> str:
        """What people call it."""
        return "Mamba-2"

    @property
    def intermediate_size(self) -> int:
        """Channels of x: heads · head_dim."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """in_proj makes gate, x, B, C and a time step for each head."""
        i, H = self.intermediate_size, self.num_heads
        yield tensor("mamba.dt_bias", H)
        yield tensor("mamba.A_log", H)
        yield tensor("mamba.D", H)
        yield from conv1d(
            "mamba.conv1d",
            channels=self.conv_dim,
            width=self.conv_kernel,
            bias=self.use_conv_bias,
        )
        yield from linear(
            "mamba.in_proj",
            "attention",
            out=i + self.conv_dim + H,
            into=hidden_size,
            bias=self.use_bias,
        )
        if self.norm:
            yield tensor("mamba.norm.weight", i, group="norm")
        yield from linear(
            "mamba.out_proj", "attention", out=hidden_size, into=i, bias=self.use_bias
        )

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        H, D, N, K = self.num_heads, self.head_dim, self.state_size, self.conv_kernel
        return (
            State(
                name="convolution state",
                elements=self.conv_dim * K,
                formula="conv_dim · K",
                values=(("conv_dim", self.conv_dim), ("K", K)),
            ),
            State(
                name="recurrent state",
                elements=H * D * N,
                formula="H · d · N",
                values=(("H", H), ("d", D), ("N", N)),
                dtype="fp32",
            ),
        )
