"""Ledger rows of what requests hold in vLLM's pool: blocks, and what of them nobody needs."""

from __future__ import annotations

from collections.abc import Iterator

from planner.ledger import Row
from planner.runtimes.vllm_groups import Kind, Layout

VERSION = "0.19"  # read from 0.19.1, whose logs of 0.19.0 agree


def held_rows(
    pool: Layout, *, batch: int, context_tokens: int, encoder_tokens: int, note: str = ""
) -> Iterator[Row]:
    """Blocks of `batch` requests, each after the step that made `context_tokens` tokens.

    A row for each kind of layer: count · B · blocks · page. Apart from them, where they come:
    pages of the layers that groups are short of, and what pads a state to the common page.
    """
    for kind in pool.kinds:
        block = kind.block_tokens or 1
        held = kind.spec.held_blocks(context_tokens, block, encoder_tokens=encoder_tokens)
        per_group = kind.layers if pool.one_group else pool.group_layers
        parts = [
            (_title(kind), kind.layers, kind.own_bytes),
            (
                f"{kind.spec.kind}, padding of short groups",
                kind.groups * per_group - kind.layers,
                kind.page_bytes,
            ),
            (
                f"{kind.spec.kind}, padding of unified pages",
                kind.layers,
                kind.page_bytes - kind.own_bytes,
            ),
        ]
        groups = f"{kind.groups} group(s) of {per_group} layers for {kind.layers}; vLLM {VERSION}"
        for item, layers, page in parts:
            if layers and page:
                yield Row(
                    component="kv_cache",
                    item=item,
                    count=layers,
                    formula="B · blocks · page",
                    values=(("B", batch), ("blocks", held), ("page", page)),
                    size_bytes=layers * batch * held * page,
                    note="; ".join(part for part in (groups, note) if part),
                )


def _title(kind: Kind) -> str:
    if kind.block_tokens is None:
        return f"{kind.spec.kind}, one state a request"
    return f"{kind.spec.kind}, blocks of {kind.block_tokens}"
