"""A decoder-only transformer built from a `planner.Model`: its layers, names, shapes and order.

Every op allocates its output, and a name goes as soon as it is not needed, so that live memory can
be followed op by op. A module's input lives until the module returns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attnlab.attention import Attention, choose, sdpa_backend
from attnlab.feed_forward import FeedForward
from attnlab.kv_cache import KVCache
from attnlab.linear import Embedding, Linear
from attnlab.masks import Mask, make_mask
from attnlab.norms import build_norm
from attnlab.positions import RotaryTables
from attnlab.supported import check_model, grouped_query
from planner.errors import ConfigError, check_choice
from planner.layers import Layer, LearnedPositions
from planner.model import Model

# Shapes.  B batch · T new tokens · S cached + new tokens · h hidden size · V vocabulary


class Block(nn.Module):
    """Attention, then feed-forward: each x + f(norm(x)), or (sandwich) x + norm(f(norm(x)))."""

    def __init__(self, layer: Layer, h: int, dtype: torch.dtype, *, implementation: str) -> None:
        super().__init__()
        gqa = grouped_query(layer.attention)
        self.window = gqa.sliding_window
        self.self_attn = Attention(gqa, h, dtype, implementation=implementation)
        self.mlp = FeedForward(layer.feed_forward, h, dtype)
        self.input_layernorm = build_norm(layer.norm, h, dtype)
        self.post_attention_layernorm = build_norm(layer.norm, h, dtype)
        self.sandwich = layer.placement == "sandwich"
        if self.sandwich:
            self.pre_feedforward_layernorm = build_norm(layer.norm, h, dtype)
            self.post_feedforward_layernorm = build_norm(layer.norm, h, dtype)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | None,
        index: int,
    ) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        seen = (rotation, mask, cache, index)
        if self.sandwich:
            x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *seen))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + self.self_attn(self.input_layernorm(x), *seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The model on `device` in `dtype` with random weights; no parameter is made elsewhere first.

    Parameters are named and shaped as in `model.parameters()`. `attention` is naive or sdpa; None:
    sdpa, or naive where a layer has a soft cap. Raises ConfigError for what attnlab does not run:
    MLA, mixtures of experts, no language-model head, other rope types, sdpa with a soft cap.
    """

    def __init__(
        self,
        model: Model,
        *,
        attention: str | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        if not model.lm_head:
            raise ConfigError("lm_head=False does not run in attnlab: a causal language model")
        check_model(model)
        self.model, self.dtype, self.device = model, dtype, torch.device(device)
        self.attention = choose(attention, model.layers)
        self.embedding_scale = model.embedding_scale
        if model.embedding_scale is not None:  # rounded to the weights' dtype, as in transformers
            scale = torch.tensor(model.embedding_scale, dtype=dtype, device="cpu")
            self.embedding_scale = scale.item()
        h, V = model.hidden_size, model.vocab_size
        with self.device:
            self.embed_tokens = Embedding(V, h, dtype=dtype)
            if isinstance(model.positions, LearnedPositions):
                self.embed_positions = Embedding(model.max_position_embeddings or 0, h, dtype=dtype)
            else:
                self.rotary = RotaryTables(model.positions, self.device)
            self.layers = nn.ModuleList(
                Block(layer, h, dtype, implementation=self.attention) for layer in model.layers
            )
            self.norm = build_norm(model.final_norm, h, dtype)
            if not model.tie_word_embeddings:
                self.lm_head = Linear(h, V, bias=False, dtype=dtype)

    def forward(
        self,
        ids: Tensor,
        *,
        cache: KVCache | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]; with "last" those of the last token, [B, 1, V].

        With a cache the ids follow the tokens in it and are appended. Raises ConfigError when they
        do not fit the cache or a learned table of positions.
        """
        check_choice("logits", logits, ("all", "last"))
        (B, T), past = check_ids(ids), 0
        if cache is not None:
            cache.check_room(T, batch=B)
            past = cache.length
        S = past + T
        if isinstance(self.model.positions, LearnedPositions):
            self.model.check_positions(S)
        positions, keys = (torch.arange(n, S, device=ids.device) for n in (past, 0))
        x, rotation = self._embed(ids, positions)
        windows = {block.window for block in self.layers}
        masks = {window: make_mask(positions, keys, window=window) for window in windows}
        del positions, keys
        for index, block in enumerate(self.layers):
            x = block(x, rotation, masks[block.window], cache, index)
        del rotation, masks
        if cache is not None:
            cache.advance(T)
        x = self.norm(x[:, -1:] if logits == "last" else x)
        head = self.embed_tokens if self.model.tie_word_embeddings else self.lm_head
        out = nn.functional.linear(x, head.weight)
        del x
        cap = self.model.final_logit_softcapping
        if cap is not None:
            out = out / cap
            out = torch.tanh(out)
            out = out * cap
        return out

    def _embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x = self.embed_tokens(ids)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if isinstance(self.model.positions, LearnedPositions):
            return x + self.embed_positions(positions), None
        return x, self.rotary(positions, self.dtype)


def check_ids(ids: Tensor) -> tuple[int, int]:
    """(B, T) of token ids [B, T]; ConfigError for another rank or dtype, or none at all."""
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"ids {list(ids.shape)} of {ids.dtype} are not allowed: whole numbers [batch, tokens]"
        )
    return ids.shape[0], ids.shape[1]


def backend_name(
    transformer: Transformer, *, batch: int = 1, tokens: int = 1, context_tokens: int = 1
) -> str:
    """What runs a pass of `tokens` new of `context_tokens` tokens: "naive", "sdpa:flash", ...

    Layers that differ are joined: "sdpa:flash+math". The defaults ask for a decode step. It makes
    one layer's q, k, v and mask on the device and lets torch choose.
    """
    T, S, device = tokens, max(tokens, context_tokens), transformer.device
    if transformer.attention != "sdpa":
        return transformer.attention
    if device.type == "meta":
        raise ConfigError("device=meta runs no attention: a device that computes")
    names, positions = set(), torch.arange(S, device=device)
    for gqa in {grouped_query(layer.attention) for layer in transformer.model.layers}:
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        q = torch.empty(batch, T, H, D, dtype=transformer.dtype, device=device).transpose(1, 2)
        k = torch.empty(batch, G, S, D, dtype=transformer.dtype, device=device)
        mask = make_mask(positions[S - T :], positions, window=gqa.sliding_window)
        names.add(sdpa_backend(q, k, k, scaling=gqa.scaling, mask=mask))
    return "sdpa:" + "+".join(sorted(names))
