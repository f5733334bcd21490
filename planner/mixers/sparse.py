"""Attention to a window and to compressed entries (transformers 5.23, models/deepseek_v4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import ConfigError, check_size
from planner.layers import Indexer
from planner.mixers.base import Mixer
from planner.tensors import Parameter, State, linear, tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed(Mixer):
    """DeepSeek-V4's attention: one head is key and value, the output is projected in groups.

    A query sees the last `sliding_window` positions and, with a `compress_rate` m, one entry for
    every m positions: all of them (HCA), or those that the indexer picks (CSA). CSA's entries
    overlap: each is made of two windows, from projections twice as wide.

    State: the window, once where key and value are the same tensor; the entries; keys, values and
    gates of the positions that no entry holds yet; CSA's half of the last window.
    """

    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_rate: int | None = None
    indexer: Indexer | None = None

    def __post_init__(self) -> None:
        for field in ("num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank"):
            check_size(field, getattr(self, field))
        check_size("sliding_window", self.sliding_window)
        if self.compress_rate is not None:
            check_size("compress_rate", self.compress_rate)
        if self.num_attention_heads * self.head_dim % self.o_groups:
            raise ConfigError(
                f"num_attention_heads · head_dim = {self.num_attention_heads * self.head_dim} is "
                f"not a multiple of o_groups={self.o_groups}"
            )

    @property
    def kind(self) -> str:
        """What people call it."""
        if self.compress_rate is None:
            return f"sliding window {self.sliding_window}, keys are values"
        word = "heavily compressed" if self.indexer is None else "compressed sparse"
        return f"{word} attention (1/{self.compress_rate})"

    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """Norms on the latent of the query and on the key; a sink for each head."""
        h, H, D = hidden_size, self.num_attention_heads, self.head_dim
        d_q, g, d_o = self.q_lora_rank, self.o_groups, self.o_lora_rank
        for name, out, into in (
            ("q_a_proj", d_q, h),
            ("q_b_proj", H * D, d_q),
            ("kv_proj", D, h),
            ("o_a_proj", g * d_o, H * D // g),
            ("o_b_proj", h, g * d_o),
        ):
            yield from linear(f"self_attn.{name}", "attention", out=out, into=into, bias=False)
        yield tensor("self_attn.q_a_norm.weight", d_q, group="norm")
        yield tensor("self_attn.kv_norm.weight", D, group="norm")
        yield tensor("self_attn.sinks", H)
        if self.compress_rate is None:
            return
        compressor, series = "self_attn.compressor", 1 if self.indexer is None else 2
        yield from _compressor(compressor, h, D, series, self.compress_rate)
        if self.indexer is not None:
            H_i, D_i = self.indexer.index_n_heads, self.indexer.index_head_dim
            name = f"{compressor}.indexer"
            yield from _compressor(name, h, D_i, series, self.compress_rate)
            yield from linear(f"{name}.q_b_proj", "attention", out=H_i * D_i, into=d_q, bias=False)
            scorer = f"{name}.scorer.weights_proj"
            yield from linear(scorer, "attention", out=H_i, into=h, bias=False)

    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """What a DynamicCache keeps; its class runs with no StaticCache."""
        if static:
            raise ConfigError("cache.kind='static' is not allowed: deepseek_v4 runs with dynamic")
        S, D, W, m = tokens, self.head_dim, self.sliding_window, self.compress_rate
        kept = min(S, W - 1) if W > 1 else S
        window = (("d_h", D), ("S_w", kept))
        if m is None:
            return (_state("window", 2 * D * kept, "2 · d_h · S_w", window),)
        entries, rest = divmod(S, m)
        widths, names, series = {"d_h": D}, "d_h", 1
        if self.indexer is not None:
            widths["d_index"] = self.indexer.index_head_dim
            names, series = "(d_h + d_index)", 2
        each, numbers = sum(widths.values()), tuple(widths.items())
        states = [
            _state("window", D * kept, "d_h · S_w", window),
            _state("entries", each * entries, f"{names} · ⌊S/m⌋", (*numbers, ("S", S), ("m", m))),
            _state(
                "positions without an entry",
                2 * series * each * rest,
                f"2 · {series} · {names} · (S mod m)",
                (*numbers, ("S", S), ("m", m)),
            ),
        ]
        if self.indexer is not None and entries:
            overlap = _state("overlap", 2 * each * m, f"2 · {names} · m", (*numbers, ("m", m)))
            states.append(overlap)
        return tuple(states)


def _state(name: str, elements: int, formula: str, values: tuple[tuple[str, int], ...]) -> State:
    return State(name=name, elements=elements, formula=formula, values=values)


def _compressor(name: str, h: int, width: int, series: int, rate: int) -> Iterator[Parameter]:
    for projection in ("kv_proj", "gate_proj"):
        yield from linear(
            f"{name}.{projection}", "attention", out=series * width, into=h, bias=False
        )
    yield tensor(f"{name}.position_bias", rate, series * width)
    yield tensor(f"{name}.kv_norm.weight", width, group="norm")
