"""Bytes of a KV cache, layer kind by layer kind; what each runtime keeps is in `runtimes/`."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, Layer
from planner.ledger import Row
from planner.model import Model

Kept = tuple[int, str, tuple[tuple[str, int], ...]]
"""Tokens that a layer keeps, the formula for them and its numbers."""


def attention_cache_elements(attention: GQA | MLA, *, tokens: int) -> int:
    """Elements one sequence of `tokens` tokens keeps in one layer's cache.

    GQA:  2 · H_kv · d_h · S
    MLA:  (d_c + d_rope) · S       DeepSeek-V2, arXiv:2405.04434

    Block rounding of a paged cache, windows and scales are the callers' business.
    """
    S = tokens
    match attention:
        case GQA(num_key_value_heads=H_kv, head_dim=d_h):
            return 2 * H_kv * d_h * S  # K and V
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            return (d_c + d_rope) * S  # no factor 2: V is rebuilt from the latent
        case _:
            assert_never(attention)


def layer_rows(model: Model, *, batch: int, dtype: str, kept: Callable[[Layer], Kept]) -> list[Row]:
    """A row for each kind of layer: batch · elements of the tokens that `kept` says · bytes."""
    b = element_bytes(dtype)
    # the plain caches of both torch runtimes keep the model's dtype
    note = "elements only: a quantised cache, its scales apart" if b == 1 else ""
    rows = []
    for layer, count in model.layer_kinds().items():
        tokens, text, numbers = kept(layer)
        each = batch * attention_cache_elements(layer.attention, tokens=tokens) * b
        formula, values = _formula(layer.attention, text)
        rows.append(
            Row(
                component="kv_cache",
                item=layer_kind(layer),
                count=count,
                formula=formula,
                values=(("B", batch), *values, *numbers, ("b", b)),
                size_bytes=count * each,
                note=note,
            )
        )
    return rows


def _formula(attention: GQA | MLA, tokens: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    match attention:
        case GQA(num_key_value_heads=H_kv, head_dim=d_h):
            return f"B · 2 · H_kv · d_h · {tokens} · b", (("H_kv", H_kv), ("d_h", d_h))
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            return f"B · (d_c + d_rope) · {tokens} · b", (("d_c", d_c), ("d_rope", d_rope))
        case _:
            assert_never(attention)


def layer_kind(layer: Layer) -> str:
    """What people call this kind of cache layer."""
    match layer.attention:
        case GQA(sliding_window=None):
            return "full attention"
        case GQA(sliding_window=window):
            return f"sliding window {window}"
        case MLA():
            return "latent (MLA)"
        case _:
            assert_never(layer.attention)
