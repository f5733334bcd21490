"""Padding: rows without a key, padding that attends, padding on the left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnlab.probes.depth import stack_of
from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed, told
from attnlab.probes.watch import watch
from planner.checks.edges import found
from planner.findings import Finding

PADDED = 5


def mask_defects(probed: Probed) -> Iterator[Finding]:
    """Padding under an attention_mask [B, S] of ones and zeros, on the right and on the left.

    Real tokens must not see what the padding holds, nor be NaN beside a row that is all padding;
    padded on the left and with positions that count real tokens they must be as they are alone. It
    can miss masks of another form or name, padding in the middle, packed sequences, and encoders of
    sequence-to-sequence models.
    """
    mask_name = "decoder_attention_mask" if probed.encoder else "attention_mask"
    if not probed.has(mask_name) or probed.takes != "ids":
        return
    with mode(probed.module, training=False):
        yield from _defects(probed, mask_name)


def _defects(probed: Probed, mask_name: str) -> Iterator[Finding]:
    ids = probed.draw(2, probed.tokens, seed=10)
    other = probed.draw(2, probed.tokens, seed=11)
    full = torch.ones_like(ids)
    try:
        plain = probed.outputs(ids, **{mask_name: full})
    except Exception as error:
        yield found("not-checked", told(f"{mask_name} of ones [B, S]", error), where=mask_name)
        return
    scale = float(plain.abs().max().clamp_min(1e-30))
    padded = min(PADDED, probed.tokens // 3)
    for side in ("right", "left"):
        real = slice(0, -padded) if side == "right" else slice(padded, None)
        padding = slice(-padded, None) if side == "right" else slice(0, padded)
        mask, changed = full.clone(), ids.clone()
        mask[:, padding], changed[:, padding] = 0, other[:, padding]
        more = {mask_name: mask, **positions(probed, mask)}
        one, two = (probed.outputs(x, **more)[:, real] for x in (ids, changed))
        if not one.isfinite().all():
            yield found(
                "masked-row-nan",
                f"{padded} tokens of padding on the {side}: real tokens' outputs are NaN or inf",
                where=mask_name,
            )
            continue
        moved = float((one.double() - two.double()).abs().max()) / scale
        if moved > 10 * probed.tolerance:
            yield found(
                "padding-attends",
                f"other tokens in {padded} places of padding on the {side} move real outputs by "
                f"{moved:.2g} of the largest",
                where=mask_name,
                severity="medium" if recurrent(probed) else None,
            )
            continue
        if side == "left":
            yield from shifted(probed, ids[:, real], one, scale, mask_name)
    yield from empty_row(probed, ids, full, plain, mask_name)


def recurrent(probed: Probed) -> bool:
    """Whether a class of transformers has layers whose states take padding in."""
    if not type(probed.module).__module__.startswith("transformers."):
        return False
    _, attentions = watch(probed, probed.draw(1, probed.tokens))
    _, layers = stack_of(probed.module, least=1)
    return layers is not None and len(attentions) < len(layers)


def positions(probed: Probed, mask: Tensor) -> dict[str, Tensor]:
    """position_ids that count real tokens, where the module takes them."""
    if not probed.has("position_ids") or probed.encoder:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def shifted(
    probed: Probed, alone: Tensor, padded: Tensor, scale: float, mask_name: str
) -> Iterator[Finding]:
    """Padding on the left that moves real tokens, although what it holds does not."""
    if not probed.causal:
        return
    expected = probed.outputs(alone)
    moved = float((padded.double() - expected.double()).abs().max()) / scale
    if moved <= max(1e-4, 10 * probed.tolerance):
        return
    counted = probed.has("position_ids")
    yield found(
        "left-padding-positions",
        f"padding on the left moves real outputs by {moved:.2g} of the largest"
        + (", with position_ids that count real tokens" if counted else ""),
        where="position_ids" if counted else mask_name,
    )


def empty_row(
    probed: Probed, ids: Tensor, full: Tensor, plain: Tensor, mask_name: str
) -> Iterator[Finding]:
    """One sequence of a batch that is all padding."""
    mask = full.clone()
    mask[1] = 0
    out = probed.outputs(ids, **{mask_name: mask, **positions(probed, mask)})
    if not out[0].isfinite().all():
        yield found(
            "masked-row-nan",
            "a sequence of padding alone makes the other sequence of its batch NaN",
            where=mask_name,
            severity="critical",
        )
    elif not out[1].isfinite().all():
        yield found(
            "masked-row-nan",
            "a sequence of padding alone is NaN; others are not touched",
            where=mask_name,
            severity="medium",
        )
