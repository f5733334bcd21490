"""State-space mixers as transformers 5.23 builds them: models/mamba, jamba, mamba2, bamba, ….

Both keep the last `conv_kernel` inputs of their convolution in the model's dtype and a recurrent
state in float32, whatever the context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import check_size
from planner.mixers.base import Mixer
from planner.tensors import Parameter, State, conv1d, linear, tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba(Mixer):
    """Mamba (arXiv:2312.00752): a state of `state_size` for each channel.

    `inner_norms`: RMSNorms on the time step, B and C (jamba); `unscaled_norm_eps`: such without a
    weight (falcon_mamba). `activation`: the convolution's.
    """

    intermediate_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    use_bias: bool
    use_conv_bias: bool
    inner_norms: bool = False
    unscaled_norm_eps: float | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        for field in ("intermediate_size", "state_size", "conv_kernel", "time_step_rank"):
            check_size(field, getattr(self, field))

    @property
    def kind(self) -> str:
        """What people call it."""
        return "Mamba"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """in_proj makes x and its gate; x_proj the time step, B and C of every token."""
        i, N, r, h = self.intermediate_size, self.state_size, self.time_step_rank, hidden_size
        yield tensor("mamba.A_log", i, N)
        yield tensor("mamba.D", i)
        yield from conv1d(
            "mamba.conv1d", channels=i, width=self.conv_kernel, bias=self.use_conv_bias
        )
        yield from linear("mamba.in_proj", "attention", out=2 * i, into=h, bias=self.use_bias)
        yield from linear("mamba.x_proj", "attention", out=r + 2 * N, into=i, bias=False)
        yield from linear("mamba.dt_proj", "attention", out=i, into=r, bias=True)
        yield from linear("mamba.out_proj", "attention", out=h, into=i, bias=self.use_bias)
        if self.inner_norms:
            for name, width in (("dt", r), ("b", N), ("c", N)):
                yield tensor(f"mamba.{name}_layernorm.weight", width, group="norm")

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        i, N = self.intermediate_size, self.state_size
        return (
            conv_state(channels=i, width=self.conv_kernel),
            State(
                name="recurrent state",
                elements=i * N,
                formula="I · N",
                values=(("I", i), ("N", N)),
                dtype="fp32",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2(Mixer):
    """Mamba-2 (arXiv:2405.21060): heads with a state of head_dim · state_size each.

    `out_bias` is out_proj's, `use_bias` in_proj's. `norm`: a gated RMSNorm before out_proj.
    `path`: its module in the block (zamba2 wraps it). `activation`: the convolution's.
    `time_step_limit` bounds the time step. A prompt is scanned in chunks of `chunk_size` tokens.
    """

    num_heads: int
    head_dim: int
    n_groups: int
    state_size: int
    conv_kernel: int
    use_conv_bias: bool
    use_bias: bool
    out_bias: bool
    norm: bool = True
    path: str = "mamba"
    activation: str = "silu"
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int = 256

    def __post_init__(self) -> None:
        for field in (
            "num_heads",
            "head_dim",
            "n_groups",
            "state_size",
            "conv_kernel",
            "chunk_size",
        ):
            check_size(field, getattr(self, field))

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
        """in_proj makes the gate, x, B, C and a time step for each head."""
        i, H, h = self.intermediate_size, self.num_heads, hidden_size
        for name in ("dt_bias", "A_log", "D"):
            yield tensor(f"{self.path}.{name}", H)
        yield from conv1d(
            f"{self.path}.conv1d",
            channels=self.conv_dim,
            width=self.conv_kernel,
            bias=self.use_conv_bias,
        )
        out = i + self.conv_dim + H
        yield from linear(f"{self.path}.in_proj", "attention", out=out, into=h, bias=self.use_bias)
        if self.norm:
            yield tensor(f"{self.path}.gated_norm.weight", i, group="norm")
        yield from linear(f"{self.path}.out_proj", "attention", out=h, into=i, bias=self.out_bias)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Convolution and recurrent state; neither grows with the context."""
        H, D, N = self.num_heads, self.head_dim, self.state_size
        return (
            conv_state(channels=self.conv_dim, width=self.conv_kernel),
            State(
                name="recurrent state",
                elements=H * D * N,
                formula="H · d · N",
                values=(("H", H), ("d", D), ("N", N)),
                dtype="fp32",
            ),
        )


def conv_state(*, channels: int, width: int) -> State:
    """The last `width` inputs of a causal convolution, in the model's dtype."""
    return State(
        name="convolution state",
        elements=channels * width,
        formula="channels · K",
        values=(("channels", channels), ("K", width)),
    )
