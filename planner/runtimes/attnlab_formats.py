"""The format that a cache of attnlab keeps keys and values in: its KV dtype and CacheSpec say it.

Caches of any kind but "quantised" keep codes, quantised as they are appended, and a float32 scale
for each token and head (`q_group_size` channels of it). int8 and int4 always do; fp8 does with
scales="token-head" and is a plain cast without. A "quantised" one is KIVI's (arXiv:2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.dtypes import COMPUTE_DTYPES, ELEMENT_BYTES
from planner.errors import ConfigError, shown
from planner.kv_cache import Kept, mixer_kind
from planner.kv_format_names import both, kivi
from planner.kv_formats import KvFormat, Scales, TensorFormat
from planner.layers import GQA, MLA
from planner.ledger import Row
from planner.model import Model
from planner.runtimes.base import check_kv_dtype
from planner.runtimes.quantised_rows import tensor_rows
from planner.workload import CacheSpec

PLAIN_DTYPES = (*COMPUTE_DTYPES, "fp8")
CODE_BITS = {"int8": 8, "int4": 4, "fp8": 8}
KIVI_BITS = {"int8": 8, "int4": 4, "int2": 2}
KIVI_GROUP_SIZE, KIVI_RESIDUAL_TOKENS = 32, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor that a cache keeps of every token: [heads, width], `itemsize` bytes an element."""

    name: str
    heads: int
    width: int
    itemsize: int


def kv_format(cache: CacheSpec | None, dtype: str) -> KvFormat | None:
    """The format; None: cast to `dtype`, without scales. ConfigError for what attnlab lacks."""
    kind, scales = ("static", None) if cache is None else (cache.kind, cache.scales)
    if cache is not None and kind == "quantised":
        return _kivi(cache, dtype)
    if scales is None and dtype in PLAIN_DTYPES:
        return None
    check_kv_dtype("attnlab", dtype, tuple(CODE_BITS), why=f" in cache.kind={kind!r} with scales")
    g = None if cache is None else cache.q_group_size
    of = "" if g is None else f" of {g}"
    return both(
        f"{dtype}_per_token_head{of}",
        TensorFormat(
            bits=CODE_BITS[dtype],
            scales=Scales(per="token-head", group_size=g),
            floating=dtype == "fp8",
        ),
    )


def _kivi(cache: CacheSpec, dtype: str) -> KvFormat:
    check_kv_dtype("attnlab", dtype, tuple(KIVI_BITS), why=" in cache.kind='quantised'")
    for field in ("backend", "axis_key", "axis_value", "capacity_tokens", "block_tokens"):
        if getattr(cache, field) is not None:
            raise ConfigError(
                f"cache.{field}={shown(getattr(cache, field))} is not allowed in runtime=attnlab: "
                "None for cache.kind='quantised' (KIVI, which grows)"
            )
    residual, g = cache.residual_tokens, cache.q_group_size or KIVI_GROUP_SIZE
    if residual == 0:
        raise ConfigError(
            f"cache.residual_tokens=0 is not allowed: groups of {g} tokens have to come together"
        )
    return kivi(KIVI_BITS[dtype], group_size=g, residual_tokens=residual or KIVI_RESIDUAL_TOKENS)


def parts(form: KvFormat, attention: GQA | MLA) -> tuple[tuple[str, int, int, TensorFormat], ...]:
    """(name, heads, width, format) of what is quantised by itself in one layer."""
    match attention:
        case GQA(num_key_value_heads=G, head_dim=D):
            return ("keys", G, D, form.keys), ("values", G, D, form.values)
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            return ("latents", 1, d_c, form.keys), ("rotary keys", 1, d_rope, form.values)


def stored_streams(form: KvFormat, attention: GQA | MLA) -> tuple[Stored, ...]:
    """Codes and scales of each part, in the order in which attnlab keeps them; not KIVI's."""
    out = []
    for name, heads, width, tensor in parts(form, attention):
        g = check_groups(tensor, width)
        one = tensor.stored(batch=1, heads=1, tokens=1, width=width, computed="fp32")
        out += [
            Stored(name=f"{name}, codes", heads=heads, width=one.elements_bytes, itemsize=1),
            Stored(
                name=f"{name}, scales",
                heads=heads,
                width=width // g,
                itemsize=ELEMENT_BYTES["fp32"],
            ),
        ]
    return tuple(out)


def check_groups(tensor: TensorFormat, width: int) -> int:
    """Elements of a row that share a scale; ConfigError where rows do not come out even."""
    assert tensor.scales is not None
    g = tensor.scales.group_size or width
    if width % g:
        raise ConfigError(f"cache.q_group_size={g} does not divide a row of {width} elements")
    return g


def check_quantisable(form: KvFormat, model: Model) -> None:
    """ConfigError for a latent under a format that groups tokens."""
    if form.residual_tokens and any(isinstance(x.attention, MLA) for x in model.layer_kinds()):
        raise ConfigError(
            f"cache.kind='quantised' does not take latent attention (MLA) of {model.model_type} in "
            "attnlab: static, dynamic or paged with int8, int4 or fp8"
        )


def format_rows(
    form: KvFormat, attention: GQA | MLA, kept: Kept, *, batch: int, computed: str
) -> list[Row]:
    """Codes and scales of one layer, a row each; keys and values together where they are alike."""
    made = parts(form, attention)
    kind = mixer_kind(attention)
    if made[0][1:] == made[1][1:]:
        return _part_rows(form.name, kind, 2, made[0][1:], kept, batch, computed)
    rows = []
    for part in made:
        rows += _part_rows(form.name, f"{kind}, {part[0]}", 1, part[1:], kept, batch, computed)
    return rows


def _part_rows(
    name: str,
    item: str,
    copies: int,
    of: tuple[int, int, TensorFormat],
    kept: Kept,
    batch: int,
    computed: str,
) -> list[Row]:
    (H, d, tensor), (tokens, text, numbers) = of, kept
    g, bits = check_groups(tensor, d), tensor.bits
    if tensor.residual is not None:
        note = {"remainder": "newest, no whole group", "window": "newest"}[tensor.residual.rule]
        return tensor_rows(
            name, item, tensor, (1, copies), (batch, H, tokens, d), 0, computed, note=note
        )
    heads = ("B", batch), ("H", H)
    codes = "d" if bits == 8 else "-(-d · bits // 8)"
    scales = "4" if g == d else "d // g · 4"
    row_bytes = {codes: -(-d * bits // 8), scales: d // g * 4}
    used = {codes: ("d", "bits") if bits != 8 else ("d",), scales: ("d", "g") if g != d else ()}
    values = {"d": d, "bits": bits, "g": g}
    return [
        Row(
            component="kv_cache",
            item=f"{item}, {part}",
            count=1,
            formula=f"B · {copies} · H · {width} · {text}",
            values=(*heads, *((letter, values[letter]) for letter in used[width]), *numbers),
            size_bytes=batch * copies * H * row_bytes[width] * tokens,
        )
        for part, width in ((f"{name} codes", codes), ("scales", scales))
    ]
