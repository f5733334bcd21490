"""Cross-attention of one block: a decoder's queries see what an encoder made of its input.

Keys and values are projected from the encoder's output, once a sequence, and do not grow: a cache
holds 2·G·S·D elements a layer, which every decode step reads and none writes. No position is added
here, and nothing is causal; padding behind an encoder's real tokens is hidden by a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.attention import Attention
from attnlab.cache import Cache, check_real_tokens, real_mask
from attnlab.masks import Mask
from planner.errors import ConfigError
from planner.layers import GQA

# Shapes.  B batch · T new tokens · S encoder tokens · H query heads · G kv heads · D head dim
#          h hidden size


class Encoded(NamedTuple):
    """What a pass of the decoder sees of an encoder: its output, or what a cache holds of it."""

    states: Tensor | None  # [B, S, h]
    mask: Mask


class CrossAttention(Attention):
    """Query, key, value and output projections, attention to what was encoded."""

    def __init__(self, gqa: GQA, hidden_size: int, dtype: torch.dtype, *, attention: str) -> None:
        super().__init__(gqa, hidden_size, dtype, attention=attention, interleaved=False)

    def keys_and_values(self, states_BSh: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, S, D] each, of the encoder's output [B, S, h]."""
        return self._heads(self.k_proj(states_BSh)), self._heads(self.v_proj(states_BSh))

    def remember(self, states_BSh: Tensor, cache: Cache, index: int) -> None:
        """Put keys and values into layer `index` of the cache, in its dtype."""
        k, v = self.keys_and_values(states_BSh)
        cache.cross[index] = _kept(k, cache.dtype), _kept(v, cache.dtype)

    def forward(self, x_BTh: Tensor, encoded: Encoded, cache: Cache | None, index: int) -> Tensor:
        """[B, T, h] → [B, T, h]; the first pass over a cache remembers for those that follow."""
        q = self._heads(self.q_proj(x_BTh))
        if cache is None:
            assert encoded.states is not None, "nothing to attend to"
            k, v = self.keys_and_values(encoded.states)
        else:
            if cache.cross[index] is None:
                assert encoded.states is not None, "nothing to attend to"
                self.remember(encoded.states, cache, index)
            k, v = (x.to(q.dtype) for x in cache.cross[index] or ())
        out = self.attend(q, k, v, mask=encoded.mask)
        del q, k, v
        out = out.transpose(1, 2).flatten(2)  # [B, T, H·D]
        return self.o_proj(out)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.gqa.head_dim)).transpose(1, 2)


def _kept(x_BGSD: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BGSD.detach().to(dtype).contiguous()


def real_places(
    tokens: Sequence[int] | None,
    *,
    batch: int,
    S: int,
    device: torch.device,
    name: str = "encoder_tokens",
) -> Tensor | None:
    """Which of S places hold a sequence's real tokens, bool [B, S]; None: all of them.

    ConfigError where a sequence has none: there would be nothing to see.
    """
    real = check_real_tokens(tokens, T=S, batch=batch)
    if not all(real):
        raise ConfigError(f"{name}={real} are not allowed: one at least of each")
    return real_mask(real, S, device)


def mask_of(real_BS: Tensor | None, T: int, S: int, device: torch.device) -> Mask:
    """T queries see the real ones of S places, whatever stands before or behind them."""
    visible = None
    if real_BS is not None:
        visible = real_BS[:, None, None].expand(-1, 1, T, -1)
    places = torch.arange(max(T, S), device=device)
    return Mask(visible, False, places[:T], places[:S])
