"""Gated recurrences and short convolutions: models/recurrent_gemma, rwkv, lfm2, zamba2 of
transformers 5.23."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import ConfigError, check_size
from planner.mixers.base import Mixer
from planner.mixers.mamba import conv_state
from planner.tensors import Parameter, State, conv1d, linear, tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortConv(Mixer):
    """LFM2's gated convolution over the last `conv_kernel` tokens."""

    hidden_size: int
    conv_kernel: int  # conv_L_cache in config.json
    conv_bias: bool

    @property
    def kind(self) -> str:
        """What people call it."""
        return "short convolution"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """in_proj makes both gates and the input."""
        h, bias = hidden_size, self.conv_bias
        yield from conv1d("conv.conv", channels=h, width=self.conv_kernel, bias=bias)
        yield from linear("conv.in_proj", "attention", out=3 * h, into=h, bias=bias)
        yield from linear("conv.out_proj", "attention", out=h, into=h, bias=bias)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """The convolution's last inputs."""
        return (conv_state(channels=self.hidden_size, width=self.conv_kernel),)


@dataclass(frozen=True, kw_only=True, slots=True)
class RGLRU(Mixer):
    """Griffin's real-gated linear recurrence (arXiv:2402.19427), its gates block by block.

    `activation`: of the branch beside the recurrence.
    """

    lru_width: int
    num_attention_heads: int
    conv1d_width: int
    activation: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        check_size("conv1d_width", self.conv1d_width)
        if self.lru_width % self.num_attention_heads:
            raise ConfigError(
                f"lru_width={self.lru_width} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def kind(self) -> str:
        """What people call it."""
        return "RG-LRU"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """Two branches in, one out, all with biases."""
        w, H, h = self.lru_width, self.num_attention_heads, hidden_size
        for name, out, into in (("linear_y", w, h), ("linear_x", w, h), ("linear_out", h, w)):
            yield from linear(f"self_attn.{name}", "attention", out=out, into=into, bias=True)
        yield from conv1d("self_attn.conv_1d", channels=w, width=self.conv1d_width, bias=True)
        yield tensor("self_attn.rg_lru.recurrent_param", w)
        for gate in ("input_gate", "recurrent_gate"):
            yield tensor(f"self_attn.rg_lru.{gate}_weight", H, w // H, w // H)
            yield tensor(f"self_attn.rg_lru.{gate}_bias", H, w // H)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """One input less than the convolution is wide, and a float32 number for each channel."""
        w = self.lru_width
        recurrent = State(
            name="recurrent state", elements=w, formula="w", values=(("w", w),), dtype="fp32"
        )
        return (conv_state(channels=w, width=self.conv1d_width - 1), recurrent)


@dataclass(frozen=True, kw_only=True, slots=True)
class RWKV(Mixer):
    """RWKV-4 (arXiv:2305.13048): time mixing and channel mixing, which both look one token back."""

    attention_hidden_size: int
    intermediate_size: int

    @property
    def kind(self) -> str:
        """What people call it."""
        return "RWKV"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """The whole block: its channel mixing takes the place of a feed-forward."""
        a, i, h = self.attention_hidden_size, self.intermediate_size, hidden_size
        yield tensor("attention.time_decay", a)
        yield tensor("attention.time_first", a)
        for name in ("key", "value", "receptance"):
            yield tensor(f"attention.time_mix_{name}", 1, 1, h)
            yield from linear(f"attention.{name}", "attention", out=a, into=h, bias=False)
        yield from linear("attention.output", "attention", out=h, into=a, bias=False)
        for name in ("key", "receptance"):
            yield tensor(f"feed_forward.time_mix_{name}", 1, 1, h, group="feed_forward")
        for name, out, into in (("key", i, h), ("receptance", h, h), ("value", h, i)):
            yield from linear(
                f"feed_forward.{name}", "feed_forward", out=out, into=into, bias=False
            )

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """The token before, twice, in the model's dtype; numerator, denominator and maximum."""
        a = self.attention_hidden_size
        last = State(name="last token", elements=2 * a, formula="2 · A", values=(("A", a),))
        sums = State(
            name="recurrent state",
            elements=3 * a,
            formula="3 · A",
            values=(("A", a),),
            dtype="fp32",
        )
        return (last, sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedAttention(Mixer):
    """Attention with the weights of another block (zamba2): a cache of its own, no parameters."""

    num_key_value_heads: int
    head_dim: int

    @property
    def kind(self) -> str:
        """What people call it."""
        return "full attention, weights shared"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """None: they stand in the block that owns them."""
        yield from ()

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """Keys and values of every token."""
        G, D = self.num_key_value_heads, self.head_dim
        return (
            State(
                name="keys and values",
                elements=2 * G * D * tokens,
                formula="2 · H_kv · d_h · S",
                values=(("H_kv", G), ("d_h", D), ("S", tokens)),
            ),
        )
