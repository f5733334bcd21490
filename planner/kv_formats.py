"""How keys and values are stored: elements, the scales beside them, tokens left unquantised.

A layer caches two tensors of shape [B, H, S, d]: sequences, heads, tokens, width. With GQA they are
keys and values, H the kv heads; with MLA the latent (d_c) and the rotary key (d_rope), H = 1. A
format says of each tensor how many bits an element has, which elements share a scale and how codes
are packed, and how many tokens stay as they were computed. Bytes are counted apart: elements,
scales (zero points included), residual, padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from planner.dtypes import ELEMENT_BYTES
from planner.errors import ConfigError, check_choice, check_size, shown
from planner.layers import GQA, MLA
from planner.program import Number

Sharing = Literal["tensor", "head", "token-head", "channel", "flat"]
Packing = Literal["row", "group", "groups"]
ResidualRule = Literal["decoded", "remainder", "window"]

SCALE_DTYPES = ("fp32", "bf16", "fp16", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """One scale, and maybe one zero point, for every group of elements that share it.

    `per` names the groups of a tensor [B, H, S, d]:

        tensor      all of it                                            1
        head        a head, whatever the sequence                        H
        token-head  `group_size` channels of one token and head          B · H · S · ⌈d / g⌉
        channel     `group_size` tokens of one channel                   B · H · d · ⌈S / g⌉
        flat        `group_size` elements of the tensor laid out flat    B · H · S · d / g

    `group_size` None: the whole row (token-head) or column (channel); flat needs one, tensor and
    head have none. `dtype` None: that of the computation; `zero_dtype` None: no zero point, else
    its dtype ("scale": the scale's). `lone_per_element`: a tensor that is one single group gets a
    scale for each element (what optimum-quanto 0.2.7 makes of it).
    """

    per: Sharing
    group_size: int | None = None
    dtype: str | None = "fp32"
    zero_dtype: str | None = None
    lone_per_element: bool = False

    def __post_init__(self) -> None:
        check_choice("scales.per", self.per, get_args(Sharing))
        grouped = self.per in ("token-head", "channel", "flat")
        if self.group_size is None and self.per == "flat":
            raise ConfigError("scales.group_size=None is not allowed: flat groups have a size")
        if self.group_size is not None:
            if not grouped:
                raise ConfigError(
                    f"scales.group_size={shown(self.group_size)} is not allowed: None for scales "
                    f"per {self.per}"
                )
            check_size("scales.group_size", self.group_size)
        if self.dtype is not None:
            check_choice("scales.dtype", self.dtype, SCALE_DTYPES)
        if self.zero_dtype is not None:
            check_choice("scales.zero_dtype", self.zero_dtype, ("scale", *SCALE_DTYPES))

    def groups(self, *, batch: int, heads: int, tokens: int, width: int) -> int:
        """Groups of a tensor [B, H, S, d]; ConfigError where flat groups do not come out even."""
        B, H, S, d, g = batch, heads, tokens, width, self.group_size
        if not S:
            return 0
        match self.per:
            case "tensor":
                return 1
            case "head":
                return H
            case "token-head":
                return B * H * S * -(-d // (g or d))
            case "channel":
                return B * H * d * -(-S // (g or S))
            case "flat":
                assert g is not None
                if B * H * S * d % g:
                    raise ConfigError(
                        f"group_size={g} does not divide a tensor of {B} · {H} · {S} · {d} elements"
                    )
                return B * H * S * d // g

    def count(self, groups: Number) -> Number:
        """Scales of so many groups: one each."""
        if self.lone_per_element and self.group_size is not None:
            return groups + (groups == 1) * (self.group_size - 1)
        return groups

    def bytes_of_one(self, computed: str) -> int:
        """Bytes of a scale and its zero point; `computed`: the dtype of the computation."""
        scale = ELEMENT_BYTES[self.dtype or computed]
        match self.zero_dtype:
            case None:
                return scale
            case "scale":
                return 2 * scale
            case zero:
                return scale + ELEMENT_BYTES[zero]


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """The newest tokens, kept in the dtype of the computation.

    decoded    tokens decoded one at a time since the prefill, all quantised anew with everything
               else when `tokens` are reached (transformers' QuantizedCache)
    remainder  S mod `tokens` (KIVI's keys)
    window     min(S, `tokens`) (KIVI's values)
    """

    tokens: int
    rule: ResidualRule

    def __post_init__(self) -> None:
        check_size("residual.tokens", self.tokens, minimum=0)
        check_choice("residual.rule", self.rule, get_args(ResidualRule))

    def of(self, tokens: int, *, decoded_tokens: int = 0) -> int:
        """The unquantised among `tokens`, of which the last `decoded_tokens` came one at a time."""
        match self.rule:
            case "decoded":
                return decoded_tokens % max(1, self.tokens)
            case "remainder":
                return tokens % max(1, self.tokens)
            case "window":
                return min(tokens, self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBytes:
    """What a format keeps: codes, scales with zero points, unquantised tokens, padding."""

    elements_bytes: int = 0
    scales_bytes: int = 0
    residual_bytes: int = 0
    padding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All four parts."""
        return self.elements_bytes + self.scales_bytes + self.residual_bytes + self.padding_bytes

    def __add__(self, other: StoredBytes) -> StoredBytes:
        return StoredBytes(
            elements_bytes=self.elements_bytes + other.elements_bytes,
            scales_bytes=self.scales_bytes + other.scales_bytes,
            residual_bytes=self.residual_bytes + other.residual_bytes,
            padding_bytes=self.padding_bytes + other.padding_bytes,
        )

    def __mul__(self, count: int) -> StoredBytes:
        return StoredBytes(
            elements_bytes=self.elements_bytes * count,
            scales_bytes=self.scales_bytes * count,
            residual_bytes=self.residual_bytes * count,
            padding_bytes=self.padding_bytes * count,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFormat:
    """How one cached tensor is stored.

    `bits` of an element; `packed` says how codes lie in words of `word_bytes`:

        row     the row of one token and head as a stream of bits: ⌈d · bits / word⌉ words
        group   members of a group, whole codes: groups · ⌈g / codes⌉ words
        groups  the same place of several groups, whole codes: ⌈groups / codes⌉ · g words

    with codes = ⌊word / bits⌋ of them in a word. `scales` None: plain elements. `floating`: codes
    are floating-point numbers (8 bits: e4m3), not whole ones.
    """

    bits: int
    scales: Scales | None = None
    packed: Packing = "row"
    word_bytes: int = 1
    residual: Residual | None = None
    floating: bool = False

    def __post_init__(self) -> None:
        check_size("bits", self.bits, maximum=32)
        check_choice("packed", self.packed, get_args(Packing))
        check_size("word_bytes", self.word_bytes, maximum=8)
        if self.packed == "row":
            return
        if self.scales is None or self.scales.group_size is None:
            raise ConfigError(f"packed={self.packed!r} is not allowed: row for elements ungrouped")
        if self.bits > self._word_bits:
            raise ConfigError(f"bits={self.bits} do not fit into word_bytes={self.word_bytes}")

    def stored(
        self,
        *,
        batch: int,
        heads: int,
        tokens: int,
        width: int,
        computed: str,
        decoded_tokens: int = 0,
    ) -> StoredBytes:
        """Bytes of a tensor [B, H, S, d]; `computed`: the dtype that it was computed in."""
        r = 0
        if self.residual is not None:
            r = self.residual.of(tokens, decoded_tokens=decoded_tokens)
        B, H, S, d = batch, heads, tokens - r, width
        groups = scales_bytes = 0
        if self.scales is not None:
            groups = self.scales.groups(batch=B, heads=H, tokens=S, width=d)
            scales_bytes = self.scales.count(groups) * self.scales.bytes_of_one(computed)
        if self.packed == "row":
            elements_bytes = B * H * S * self.word_bytes * -(-d * self.bits // self._word_bits)
        else:
            elements_bytes = self.packed_bytes(groups)
        return StoredBytes(
            elements_bytes=elements_bytes,
            scales_bytes=scales_bytes,
            residual_bytes=B * H * r * d * ELEMENT_BYTES[computed],
        )

    @property
    def codes_per_word(self) -> int:
        """Whole codes that a word takes."""
        return self._word_bits // self.bits

    def packed_bytes(self, groups: Number) -> Number:
        """Bytes of so many groups that are not packed row by row."""
        assert self.scales is not None
        assert self.scales.group_size is not None
        g, codes = self.scales.group_size, self.codes_per_word
        if self.packed == "group":
            return groups * -(-g // codes) * self.word_bytes
        return -(-groups // codes) * g * self.word_bytes

    @property
    def _word_bits(self) -> int:
        return 8 * self.word_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class KvFormat:
    """How keys and values are stored (MLA: the latent and the rotary key).

    `slot_multiple_bytes`: what one token and head takes of keys and values together is filled up to
    a multiple of it (vLLM's TurboQuant: 2).
    """

    name: str
    keys: TensorFormat
    values: TensorFormat
    slot_multiple_bytes: int = 1

    def __post_init__(self) -> None:
        check_size("slot_multiple_bytes", self.slot_multiple_bytes)

    @property
    def residual_tokens(self) -> int:
        """The most tokens that stay unquantised."""
        return max(t.residual.tokens if t.residual else 0 for t in (self.keys, self.values))


def cached_tensors(attention: GQA | MLA) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, width) of what stands for keys and for values in one layer's cache."""
    match attention:
        case GQA(num_key_value_heads=H, head_dim=d, cache_heads=cached):
            return (cached or H, d), (cached or H, d)
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            return (1, d_c), (1, d_rope)


def attention_bytes(
    form: KvFormat,
    attention: GQA | MLA,
    *,
    batch: int,
    tokens: int,
    computed: str,
    decoded_tokens: int = 0,
) -> StoredBytes:
    """Bytes of one layer's cache of `batch` sequences of `tokens` tokens, the parts apart.

    `computed`: the dtype that keys and values are computed in; `decoded_tokens`: how many of the
    tokens came one at a time after the prefill (residuals of transformers depend on it).
    """
    total = StoredBytes()
    for tensor, (heads, width) in zip(
        (form.keys, form.values), cached_tensors(attention), strict=True
    ):
        total += tensor.stored(
            batch=batch,
            heads=heads,
            tokens=tokens,
            width=width,
            computed=computed,
            decoded_tokens=decoded_tokens,
        )
    slots = batch * tokens * cached_tensors(attention)[0][0]
    if form.slot_multiple_bytes > 1 and slots:
        each = -(-total.total_bytes // slots)
        padded = -(-each // form.slot_multiple_bytes) * form.slot_multiple_bytes * slots
        total += StoredBytes(padding_bytes=padded - total.total_bytes)
    return total
