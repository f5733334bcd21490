"""Blocks that look both ways: all T tokens at once, T² scores a head and layer, nothing cached.

A window stands around the query, `window // 2` positions on each side (modernbert). Padding behind
the real tokens is hidden from them; its own outputs mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnlab.checkpointing import Checkpointing, run
from attnlab.cross_attention import mask_of
from attnlab.masks import Keys, Mask, Pattern, visibility
from attnlab.transformer import Rotation

# Shapes.  B batch · T tokens · h hidden size


def both_ways(real_BT: Tensor | None, T: int, window: int | None, device: torch.device) -> Mask:
    """What T tokens see of one another: the real ones (None: all are), in a window where it is."""
    if window is None or window // 2 >= T - 1:
        return mask_of(real_BT, T, T, device)
    places = torch.arange(T, device=device)
    around = Pattern(window=window // 2 + 1, causal=False)
    visible = visibility(places, Keys(places, in_order=True), around)
    if real_BT is not None:  # padding sees padding: a query that saw nothing would make NaN
        visible = visible & (real_BT[:, None, None, :] | ~real_BT[:, None, :, None])
    return Mask(visible, False, places, places)


def run_both_ways(
    blocks: Iterable[nn.Module],
    x: Tensor,
    real_BT: Tensor | None,
    *,
    rotations: tuple[Rotation | None, Rotation | None] = (None, None),
    checkpointing: Checkpointing = "none",
    checkpoint_every: int = 1,
) -> Tensor:
    """[B, T, h] → [B, T, h] through all blocks.

    `rotations`: of blocks without and with a window. `checkpointing` as in Transformer.forward.
    """
    masks: dict[Pattern, Mask] = {}
    biased = None
    for index, block in enumerate(blocks):
        rotation = rotations[block.slides] if block.rope else None
        if block.pattern not in masks:
            masks[block.pattern] = both_ways(real_BT, x.shape[1], block.pattern.window, x.device)
        mask = masks[block.pattern]
        if block.bias_table is not None:
            biased = block.bias_table(mask)
        mask = mask if biased is None else biased
        x = run(checkpointing, checkpoint_every, index)(block, x, rotation, mask, None, index)
    return x
