"""One block: attention or a recurrence, a feed-forward, and where the norms stand around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnlab.attention import Attention
from attnlab.cache import Cache, attention_of
from attnlab.cross_attention import CrossAttention, Encoded
from attnlab.feed_forward import FeedForward
from attnlab.latent import Latent, LatentAttention
from attnlab.masks import Mask, pattern_of
from attnlab.mixers import build_mixer
from attnlab.mixture import Mixture
from attnlab.norms import build_norm
from attnlab.relative import RelativeAttentionBias
from planner.layers import GQA, MLA, Layer, MoE
from planner.mixers import Mixer
from planner.parameters import NORMS


class Block(nn.Module):
    """x is the residual stream; each part reads it through a norm, or its sum is normed.

    pre          x + f(norm(x))                  stable at any depth: the stream is never normed
    post         x + norm(f(x))                  olmo2
    post-sum     norm(x + f(x))                  the first transformer; diverges with depth
    sandwich     x + norm(f(norm(x)))            gemma2
    parallel     x + attention(n) + mlp(n), n = norm(x); parallel-two: a norm for each

    A block of one part alone is x + f(norm(x)); where the stream is float32, f is not (mamba).
    A decoder's block has cross-attention between the two, with a norm where the others have theirs.
    """

    def __init__(
        self,
        layer: Layer,
        h: int,
        dtype: torch.dtype,
        *,
        attention: str,
        experts: str | None = None,
        interleaved: bool,
        latent: Latent | None = None,
    ) -> None:
        super().__init__()
        attends = attention_of(layer)
        self.pattern = None if attends is None else pattern_of(attends)
        self.slides = isinstance(attends, GQA) and attends.sliding_window is not None
        self.placement, self.multiplier = layer.placement, layer.residual_multiplier
        self.dtype, self.rope, self.mixes = dtype, False, "self_attn"
        how = dict(attention=attention, interleaved=interleaved)
        match layer.attention:
            case GQA() as gqa:
                self.rope = gqa.rope
                self.self_attn = Attention(gqa, h, dtype, **how)
            case MLA() as mla:
                self.rope = mla.qk_rope_head_dim > 0
                self.self_attn = LatentAttention(mla, h, dtype, **how, latent=latent)
            case Mixer() as mixer:
                self.mixes, module = build_mixer(mixer, h, layer.norm, dtype)
                setattr(self, self.mixes, module)
        self.crosses = layer.cross_attention is not None
        if layer.cross_attention is not None:
            self.cross_attn = CrossAttention(layer.cross_attention, h, dtype, attention=attention)
            self.cross_attention_layernorm = build_norm(layer.norm, h, dtype)
        self.recurs = isinstance(layer.attention, Mixer)
        self.alone = layer.attention is None or layer.feed_forward is None
        if isinstance(layer.feed_forward, MoE):
            self.mlp = Mixture(layer.feed_forward, h, dtype, experts=experts)
        elif layer.feed_forward is not None:
            self.mlp = FeedForward(layer.feed_forward, h, dtype)
        norms = NORMS[layer.placement] if layer.norms is None else layer.norms
        for name in norms if self.alone else NORMS[layer.placement]:
            there = name in norms  # modernbert's first block reads what is normed already
            setattr(self, name, build_norm(layer.norm, h, dtype) if there else nn.Identity())

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask | None,
        cache: Cache | None,
        index: int,
        encoded: Encoded | None = None,
    ) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        seen = (rotation, mask, cache, index)
        if self.alone:
            normed = self.input_layernorm(x.to(self.dtype))
            mixes = hasattr(self, self.mixes)
            return x + self._scaled(self._mix(normed, *seen) if mixes else self.mlp(normed))
        match self.placement:
            case "pre":
                x = x + self._scaled(self._mix(self.input_layernorm(x), *seen))
                if self.crosses:
                    normed = self.cross_attention_layernorm(x)
                    x = x + self._scaled(self.cross_attn(normed, encoded, cache, index))
                    del normed
                return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))
            case "post":
                x = x + self._scaled(self.post_attention_layernorm(self._mix(x, *seen)))
                return x + self._scaled(self.post_feedforward_layernorm(self.mlp(x)))
            case "post-sum":
                x = self.post_attention_layernorm(x + self._scaled(self._mix(x, *seen)))
                if self.crosses:
                    crossed = self._scaled(self.cross_attn(x, encoded, cache, index))
                    x = self.cross_attention_layernorm(x + crossed)
                    del crossed
                return self.post_feedforward_layernorm(x + self._scaled(self.mlp(x)))
            case "sandwich":
                attended = self.post_attention_layernorm(self._mix(self.input_layernorm(x), *seen))
                x = x + self._scaled(attended)
                del attended
                fed = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
                return x + self._scaled(fed)
            case "parallel":
                normed = self.input_layernorm(x)
                out = x + self._scaled(self._mix(normed, *seen))
                return out + self._scaled(self.mlp(normed))
            case _:  # parallel-two
                out = x + self._scaled(self._mix(self.input_layernorm(x), *seen))
                return out + self._scaled(self.mlp(self.post_attention_layernorm(x)))

    @property
    def bias_table(self) -> RelativeAttentionBias | None:
        """Of relative positions: in T5's first block, in all of umt5's."""
        attention = getattr(self, "self_attn", None)
        return getattr(attention, "relative_attention_bias", None)

    def _mix(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask | None,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        """Attention, or the recurrence in its place, which keeps states and sees padding itself."""
        part = getattr(self, self.mixes)
        if not self.recurs:
            return part(x, rotation, mask, cache, index)
        return part(x, None, None) if cache is None else part(x, cache.states[index], cache.real)

    def _scaled(self, part: Tensor) -> Tensor:
        """What a part adds to the stream (granite scales it)."""
        return part if self.multiplier is None else part * self.multiplier
