"""Bytes of a KV cache, layer kind by layer kind; what each runtime keeps is in `runtimes/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from planner.dtypes import element_bytes
from planner.layers import GQA, MLA
from planner.ledger import Row
from planner.mixers import Mixer
from planner.model import Model
from planner.tensors import State

Kept = tuple[int, str, tuple[tuple[str, int], ...]]
"""Tokens that a layer keeps, the formula for them and its numbers."""


def attention_cache_elements(attention: GQA | MLA, *, tokens: int) -> int:
    """Elements one sequence of `tokens` tokens keeps in one layer's cache.

    GQA:  2 · H_kv · d_h · S
    MLA:  (d_c + d_rope) · S       DeepSeek-V2, arXiv:2405.04434; + d_index · S with an indexer

    Block rounding of a paged cache, windows and scales are the callers' business.
    """
    S = tokens
    match attention:
        case GQA(num_key_value_heads=H_kv, head_dim=d_h):
            return 2 * H_kv * d_h * S  # K and V
        case MLA():  # no factor 2: V is rebuilt from the latent
            return sum(width for _, width in _latent_widths(attention)) * S
        case _:
            assert_never(attention)


def _latent_widths(attention: MLA) -> tuple[tuple[str, int], ...]:
    widths: list[tuple[str, int]] = []
    if not attention.shares_cache:
        widths += [("d_c", attention.kv_lora_rank), ("d_rope", attention.qk_rope_head_dim)]
    if attention.indexer is not None:
        widths.append(("d_index", attention.indexer.cached_width))
    return tuple(widths)


def layer_rows(
    model: Model,
    *,
    batch: int,
    dtype: str,
    kept: Callable[[GQA | MLA], Kept],
    context_tokens: int,
    encoder_tokens: int,
    static: bool = False,
    attention_rows: Callable[[GQA | MLA], list[Row]] | None = None,
) -> list[Row]:
    """A row for each cached tensor of each kind of layer: count · batch · elements · bytes.

    `kept` says how many tokens an attention layer keeps; cross-attention keeps `encoder_tokens`.
    `attention_rows`: those of one layer's keys and values, where they are not plain elements.
    """
    rows = []
    for layer, count in model.layer_kinds().items() if model.is_decoder else ():
        for mixer in (layer.attention, layer.beside):
            match mixer:
                case GQA(shares_cache=True) | MLA(shares_cache=True, indexer=None) | None:
                    pass
                case GQA() | MLA() if attention_rows is not None:
                    rows += [_times(row, count) for row in attention_rows(mixer)]
                case GQA() | MLA():
                    row = _attention_row(mixer, kept(mixer), batch=batch, dtype=dtype)
                    rows.append(_times(row, count))
                case Mixer():
                    for state in mixer.states(context_tokens, static=static):
                        row = _state_row(mixer.kind, state, batch=batch, dtype=dtype)
                        rows.append(_times(row, count))
                case _:
                    assert_never(mixer)
        if layer.cross_attention is not None:
            seen: Kept = (encoder_tokens, "S_enc", (("S_enc", encoder_tokens),))
            row = _attention_row(layer.cross_attention, seen, batch=batch, dtype=dtype)
            rows.append(_times(replace(row, item="cross-attention"), count))
    return rows


def _times(row: Row, count: int) -> Row:
    return replace(row, count=count, size_bytes=count * row.size_bytes)


def _attention_row(attention: GQA | MLA, kept: Kept, *, batch: int, dtype: str) -> Row:
    tokens, text, numbers = kept
    b = element_bytes(dtype)
    formula, values = _formula(attention, text)
    return Row(
        component="kv_cache",
        item=mixer_kind(attention),
        count=1,
        formula=formula,
        values=(("B", batch), *values, *numbers, ("b", b)),
        size_bytes=batch * attention_cache_elements(attention, tokens=tokens) * b,
        note="cast, without scales" if b == 1 else "",
    )


def _state_row(kind: str, state: State, *, batch: int, dtype: str) -> Row:
    b = element_bytes(state.dtype or dtype)
    return Row(
        component="kv_cache",
        item=f"{kind}, {state.name}",
        count=1,
        formula=f"B · {state.formula} · b",
        values=(("B", batch), *state.values, ("b", b)),
        size_bytes=batch * state.elements * b,
        note="" if state.dtype is None else f"kept in {state.dtype}",
    )


def _formula(attention: GQA | MLA, tokens: str) -> tuple[str, tuple[tuple[str, int], ...]]:
    match attention:
        case GQA(num_key_value_heads=H_kv, head_dim=d_h):
            return f"B · 2 · H_kv · d_h · {tokens} · b", (("H_kv", H_kv), ("d_h", d_h))
        case MLA():
            widths = _latent_widths(attention)
            return f"B · ({' + '.join(name for name, _ in widths)}) · {tokens} · b", widths
        case _:
            assert_never(attention)


def mixer_kind(mixer: GQA | MLA | Mixer) -> str:
    """What people call this kind of cache layer."""
    match mixer:
        case GQA(sliding_window=None):
            return "full attention"
        case GQA(sliding_window=window):
            return f"sliding window {window}"
        case MLA():
            return "latent (MLA)" if mixer.indexer is None else "sparse latent (MLA, indexer)"
        case Mixer():
            return mixer.kind
        case _:
            assert_never(mixer)
