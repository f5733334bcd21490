"""The ledger of a QuantizedCache: codes, scales and residual apart, each with its formula."""

from __future__ import annotations

from planner.dtypes import ELEMENT_BYTES
from planner.kv_cache import mixer_kind
from planner.kv_formats import KvFormat, TensorFormat, cached_tensors
from planner.layers import GQA, MLA
from planner.ledger import Row
from planner.model import Model


def quantised_rows(
    form: KvFormat,
    model: Model,
    *,
    batch: int,
    context_tokens: int,
    decoded_tokens: int,
    computed: str,
) -> list[Row]:
    """Codes, scales and residual of each kind of layer, a row each; keys and values together where
    they are stored alike."""
    rows = []
    for layer, count in model.layer_kinds().items() if context_tokens else ():
        attention = layer.attention
        assert isinstance(attention, GQA | MLA)
        (heads, width), (_, width_v) = cached_tensors(attention)
        kind = mixer_kind(attention)
        if (form.keys, width) == (form.values, width_v):
            parts = [(kind, 2, width, form.keys)]
        else:
            names = ("keys", "values") if isinstance(attention, GQA) else ("latents", "rotary keys")
            parts = [
                (f"{kind}, {names[0]}", 1, width, form.keys),
                (f"{kind}, {names[1]}", 1, width_v, form.values),
            ]
        for item, copies, d, tensor in parts:
            rows += tensor_rows(
                form.name,
                item,
                tensor,
                (count, copies),
                (batch, heads, context_tokens, d),
                decoded_tokens,
                computed,
            )
    return rows


def tensor_rows(
    name: str,
    item: str,
    tensor: TensorFormat,
    times: tuple[int, int],
    shape: tuple[int, int, int, int],
    decoded_tokens: int,
    computed: str,
    *,
    note: str = "decoded one at a time",
) -> list[Row]:
    """Codes, scales and residual of one tensor [B, H, S, d], `times` (layers, copies in each)."""
    (count, copies), (B, H, S, d) = times, shape
    stored = tensor.stored(
        batch=B, heads=H, tokens=S, width=d, computed=computed, decoded_tokens=decoded_tokens
    )
    r = 0 if tensor.residual is None else tensor.residual.of(S, decoded_tokens=decoded_tokens)
    b, scales = ELEMENT_BYTES[computed], tensor.scales
    assert scales is not None
    shown = {"B": B, "H": H, "S": S - r, "d": d, "b": b}
    numbers = f"{copies} · B · H · S · d"
    if scales.group_size is None:
        codes, beside = numbers, f"{copies} · {scales.bytes_of_one(computed)}"
    else:
        g, c, w = scales.group_size, tensor.codes_per_word, tensor.word_bytes
        shown["g"] = g
        groups = "B · H · S · d / g"
        lone = scales.lone_per_element and B * H * (S - r) * d == g
        beside = f"{copies} · {'g' if lone else groups} · 2 · b"
        inner = (
            f"ceil(g / {c}) · {groups}" if tensor.packed == "group" else f"ceil({groups} / {c}) · g"
        )
        codes = f"{copies} · {inner}" + (f" · {w}" if w > 1 else "")
    parts = [
        (f"{name} codes", codes, stored.elements_bytes),
        (
            "scales" if scales.zero_dtype is None else "scales and zero points",
            beside,
            stored.scales_bytes,
        ),
    ]
    rows = [_row(item, part, count, text, shown, copies * size) for part, text, size in parts]
    if tensor.residual is not None:
        residual = f"{copies} · B · H · r · d · b"
        rows.append(
            _row(
                item,
                "residual",
                count,
                residual,
                {"B": B, "H": H, "r": r, "d": d, "b": b},
                copies * stored.residual_bytes,
                note=f"up to {tensor.residual.tokens} tokens {note}, in {computed}",
            )
        )
    return rows


def _row(
    item: str,
    part: str,
    count: int,
    formula: str,
    values: dict[str, int],
    size_bytes: int,
    note: str = "",
) -> Row:
    return Row(
        component="kv_cache",
        item=f"{item}, {part}",
        count=count,
        formula=formula,
        values=tuple(values.items()),
        size_bytes=count * size_bytes,
        note=note,
    )
