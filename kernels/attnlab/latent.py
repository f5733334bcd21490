"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434): one small latent a token.

What is cached of a token is a latent of d_c elements, from which every head's key and value are
rebuilt, and one rotary key of d_r for all heads: d_c + d_r in place of 2·H·D. Two ways to attend,
equal but for rounding:

expanded   rebuild keys and values of all S tokens, S·d_c·H·(d_n + d_v) products, then H heads of
           d_n + d_r: right for a prefill, whose S tokens are its own
absorbed   fold the matrix that rebuilds keys into the queries and the one of values into the
           output: q·(W c) = (Wᵀq)·c. What is left is one kv head of d_c + d_r whose value is the
           first d_c of its key: right for decoding, which reads the cache once and rebuilds nothing
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from attnlab.cache import Cache
from attnlab.implementations import implementation
from attnlab.linear import Linear
from attnlab.masks import Keys, Mask, visibility
from attnlab.norms import build_norm
from attnlab.positions import rotate
from planner.layers import MLA, Norm

# Shapes.  B batch · T new tokens · S keys · H heads · h hidden size
#          n, r, v widths of a head: without positions, rotary, value · c width of the latent

Latent = Literal["expanded", "absorbed"]


class LatentAttention(nn.Module):
    """Projections, latent cache, attention, output projection of one block.

    `latent`: which way; None: absorbed for a single token, expanded for several.
    """

    def __init__(
        self,
        mla: MLA,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        attention: str,
        interleaved: bool,
        latent: Latent | None = None,
    ) -> None:
        super().__init__()
        self.mla, self.latent = mla, latent
        self.attend = partial(implementation(attention), scaling=mla.scaling)
        self.rotate = partial(rotate, interleaved=interleaved)
        self.pairs_apart = mla.rope_interleave and not interleaved
        H, c, r = mla.num_attention_heads, mla.kv_lora_rank, mla.qk_rope_head_dim
        norm, linear = Norm(kind="rmsnorm", eps=1e-6), partial(Linear, dtype=dtype)
        if mla.q_lora_rank is None:
            self.q_proj = linear(hidden_size, H * mla.qk_head_dim, bias=False)
        else:
            self.q_a_proj = linear(hidden_size, mla.q_lora_rank, bias=mla.bias)
            self.q_a_layernorm = build_norm(norm, mla.q_lora_rank, dtype)
            self.q_b_proj = linear(mla.q_lora_rank, H * mla.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = linear(hidden_size, c + r, bias=mla.bias)
        self.kv_a_layernorm = build_norm(norm, c, dtype)
        self.kv_b_proj = linear(c, H * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False)
        self.o_proj = linear(H * mla.v_head_dim, hidden_size, bias=mla.bias)

    def forward(
        self,
        x_BTh: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        """[B, T, h] → [B, T, h]; appends to layer `index` of the cache and attends to all of it."""
        q_n, q_r = self._queries(x_BTh, rotation)
        kv = self._latents(x_BTh, rotation)
        if cache is not None:
            (kv,) = cache.append(index, kv)
            kv = kv.to(q_n.dtype)
        one = q_n.shape[2] == 1
        absorbed = one if self.latent is None else self.latent == "absorbed"
        attend = self._absorbed if absorbed else self._expanded
        out = attend(q_n, q_r, kv, mask)
        del q_n, q_r, kv
        out = out.transpose(1, 2).flatten(2)  # [B, T, H·v]
        return self.o_proj(out)

    def _queries(
        self, x_BTh: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """[B, H, T, n] and, rotated, [B, H, T, r]."""
        if self.mla.q_lora_rank is None:
            q = self.q_proj(x_BTh)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTh)))
        q = q.unflatten(-1, (-1, self.mla.qk_head_dim))
        q_n, q_r = q.split([self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], dim=-1)
        return q_n.transpose(1, 2), self._turned(q_r, rotation).transpose(1, 2)

    def _latents(self, x_BTh: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """What is cached, [B, 1, T, c + r]: the normed latent, the rotated key behind it."""
        both = self.kv_a_proj_with_mqa(x_BTh)
        c, k_r = both.split([self.mla.kv_lora_rank, self.mla.qk_rope_head_dim], dim=-1)
        k_r = self._turned(k_r[:, :, None], rotation)
        return torch.cat((self.kv_a_layernorm(c)[:, :, None], k_r), dim=-1).transpose(1, 2)

    def _turned(self, x_BTHr: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotated; where pairs are neighbours and the tables are not, taken apart first.

        Queries and keys alike, so that no score changes.
        """
        if rotation is None:
            return x_BTHr
        if self.pairs_apart:
            x_BTHr = torch.cat((x_BTHr[..., ::2], x_BTHr[..., 1::2]), dim=-1)
        return self.rotate(x_BTHr, *rotation)

    def _expanded(self, q_n: Tensor, q_r: Tensor, kv_B1Sc: Tensor, mask: Mask) -> Tensor:
        """[B, H, T, v] with every head's keys and values rebuilt."""
        mla = self.mla
        c, k_r = kv_B1Sc.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        heads = self.kv_b_proj(c).squeeze(1).unflatten(-1, (mla.num_attention_heads, -1))
        k_n, v = heads.transpose(1, 2).split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        k = torch.cat((k_n, k_r.expand(*k_n.shape[:3], -1)), dim=-1)
        del c, k_r, heads, k_n
        return self.attend(torch.cat((q_n, q_r), dim=-1), k, v, mask=mask)

    def _absorbed(self, q_n: Tensor, q_r: Tensor, kv_B1Sc: Tensor, mask: Mask) -> Tensor:
        """[B, H, T, v] over the latents as they lie."""
        mla = self.mla
        H, T = q_n.shape[1:3]
        rebuild = self.kv_b_proj.matrix().unflatten(0, (H, -1))  # [H, n + v, c]
        w_k, w_v = rebuild.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
        q = torch.cat((q_n @ w_k, q_r), dim=-1).flatten(1, 2)[:, None]  # [B, 1, H·T, c + r]
        out = self.attend(q, kv_B1Sc, kv_B1Sc[..., : mla.kv_lora_rank], mask=one_head(mask, H))
        return out.squeeze(1).unflatten(1, (H, T)) @ w_v.transpose(1, 2)


def one_head(mask: Mask, heads: int) -> Mask:
    """The mask of H · T queries in one head: H times that of T.

    Heads that share keys are queries that share them; no kernel has to repeat the keys for it.
    """
    if mask.visible is None and not mask.is_causal:
        return mask  # all is seen: a single token
    visible = mask.visible
    if visible is None:
        visible = visibility(mask.query_positions, Keys(mask.key_positions, in_order=True))
    return mask._replace(visible=torch.cat([visible] * heads, dim=-2), is_causal=False)
