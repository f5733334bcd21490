"""An encoder–decoder: a bidirectional stack reads the input, the Transformer writes the output.

The encoder runs once, over all S tokens in both directions, S² scores a head and layer. What stays
of it is its output, [B, S, h], or, once a cache is there, the keys and values of every decoder
block's cross-attention (cross_attention.py); from then on a step costs what a decoder's does and
S keys more in each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attnlab.bidirectional import run_both_ways
from attnlab.block import Block
from attnlab.cache import Cache
from attnlab.checkpointing import Checkpointing, check_checkpointing
from attnlab.cross_attention import Encoded, mask_of, real_places
from attnlab.linear import Embedding
from attnlab.norms import build_norm
from attnlab.relative import add_tables
from attnlab.transformer import Transformer, check_ids
from planner.errors import ConfigError
from planner.layers import LearnedPositions, RelativeBias
from planner.model import Model, Tower

# Shapes.  B batch · T new tokens · S encoder tokens · h hidden size · V vocabulary
#          C channels of features · F their frames


class Encoder(nn.Module):
    """The blocks of a Tower, what stands before them and its last norm."""

    def __init__(self, tower: Tower, dtype: torch.dtype, *, attention: str) -> None:
        super().__init__()
        self.tower, h = tower, tower.hidden_size
        shapes = {p.name: p.shape for p in tower.outer}
        self.convolutions = [f"conv{n}" for n, _ in enumerate(tower.strides, 1)]
        for name, stride in zip(self.convolutions, tower.strides, strict=True):
            out, into, wide = shapes[f"{name}.weight"]
            conv = nn.Conv1d(into, out, wide, stride=stride, padding=wide // 2, dtype=dtype)
            setattr(self, name, conv)
        if isinstance(tower.positions, LearnedPositions):
            self.embed_positions = Embedding(*shapes["embed_positions.weight"], dtype=dtype)
        if tower.embedding_norm is not None:
            self.embed_norm = build_norm(tower.embedding_norm, h, dtype)
        self.layers = nn.ModuleList(
            Block(layer, h, dtype, attention=attention, interleaved=False) for layer in tower.layers
        )
        if isinstance(tower.positions, RelativeBias):
            add_tables(self.layers, tower.layers, tower.positions, dtype, causal=False)
        if tower.final_norm is not None:
            self.norm = build_norm(tower.final_norm, h, dtype)

    def forward(
        self,
        x: Tensor,
        real_BS: Tensor | None,
        *,
        checkpointing: Checkpointing = "none",
        checkpoint_every: int = 1,
    ) -> Tensor:
        """Embedded tokens [B, S, h], or features [B, C, F] before convolutions → [B, S, h]."""
        for name in self.convolutions:
            x = gelu(getattr(self, name)(x))
        x = x.transpose(1, 2) if self.convolutions else x
        S = x.shape[1]
        if isinstance(self.tower.positions, LearnedPositions):
            places = torch.arange(S, device=x.device) + self.tower.positions.offset
            x = x + self.embed_positions(places)
        if self.tower.embedding_norm is not None:
            x = self.embed_norm(x)
        x = run_both_ways(
            self.layers,
            x,
            real_BS,
            checkpointing=checkpointing,
            checkpoint_every=checkpoint_every,
        )
        return x if self.tower.final_norm is None else self.norm(x)


class EncoderDecoder(Transformer):
    """The model on `device` in `dtype` with random weights: a Transformer that has an `encoder`.

    The decoder's parameters are named as a Transformer's, the encoder's stand behind `encoder.`.
    `attention` is that of both. Raises ConfigError for what attnlab does not run.
    """

    reads_encoder = True

    def __init__(
        self,
        model: Model,
        *,
        attention: str | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(model, attention=attention, dtype=dtype, device=device)
        with self.device:
            self.encoder = Encoder(model.towers[0], dtype, attention=self.attention)

    def encode(
        self,
        inputs: Tensor,
        *,
        tokens: Sequence[int] | None = None,
        checkpointing: Checkpointing = "none",
        checkpoint_every: int = 1,
    ) -> Tensor:
        """The encoder's output [B, S, h] of token ids [B, S], or of features [B, C, F] (whisper).

        `tokens`: how many of the S are real in each sequence, from the left; nothing sees the rest.
        """
        strides, length = self.encoder.tower.strides, self.model.encoder_tokens
        how = dict(checkpointing=checkpointing, checkpoint_every=checkpoint_every)
        if not strides:
            B, S = check_ids(inputs)
            if isinstance(self.encoder.tower.positions, LearnedPositions):
                self.model.check_positions(S)
            real = real_places(tokens, batch=B, S=S, device=inputs.device)
            x = self.embed_tokens(inputs)
            if self.embedding_scale is not None:
                x = x * self.embedding_scale
            return self.encoder(x, real, **how)
        C, F = self.encoder.conv1.in_channels, prod(strides) * (length or 0)
        if inputs.dim() != 3 or inputs.shape[1:] != (C, F):
            raise ConfigError(f"features {list(inputs.shape)} are not allowed: [batch, {C}, {F}]")
        if tokens is not None:
            raise ConfigError("encoder_tokens are not allowed with features: None (all are seen)")
        return self.encoder(inputs.to(self.dtype), None, **how)

    def read(self, inputs: Tensor, cache: Cache, *, tokens: Sequence[int] | None = None) -> None:
        """Encode, and leave all that the decoder needs of it in an empty cache."""
        self._check_cache(cache, given=True)
        encoded = self.encode(inputs, tokens=tokens)
        real = self._real(encoded, tokens, cache.batch)
        for index, block in enumerate(self.layers):
            block.cross_attn.remember(encoded, cache, index)
        cache.cross_real = real

    def forward(
        self,
        ids: Tensor,
        *,
        encoder_inputs: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_tokens: Sequence[int] | None = None,
        cache: Cache | None = None,
        logits: Literal["all", "last", "none"] = "all",
        tokens: Sequence[int] | None = None,
        checkpointing: Checkpointing = "none",
        checkpoint_every: int = 1,
    ) -> Tensor:
        """Logits [B, T, V] of the decoder's ids [B, T], as Transformer.forward.

        The input is given as `encode` takes it or as it returns it; `encoder_tokens`: how many of
        its tokens are real. Over a cache the first pass has it, or `read` before; no other.
        """
        if encoder_inputs is not None and encoder_states is not None:
            raise ConfigError("encoder_inputs and encoder_states are not allowed together: one")
        check_checkpointing(checkpointing, checkpoint_every)
        how = dict(checkpointing=checkpointing, checkpoint_every=checkpoint_every)
        given = encoder_inputs is not None or encoder_states is not None
        self._check_cache(cache, given=given)
        B, T = check_ids(ids)
        if encoder_inputs is not None:
            encoder_states = self.encode(encoder_inputs, tokens=encoder_tokens, **how)
        if encoder_states is not None:
            real = self._real(encoder_states, encoder_tokens, B)
            S = encoder_states.shape[1]
        else:
            assert cache is not None
            assert cache.cross[0] is not None
            real, S = cache.cross_real, cache.cross[0][0].shape[2]
        mask = mask_of(real, T, S, ids.device)
        out = super().forward(
            ids,
            cache=cache,
            logits=logits,
            tokens=tokens,
            **how,
            encoded=Encoded(encoder_states, mask),
        )
        if cache is not None:
            cache.cross_real = real
        return out

    def _check_cache(self, cache: Cache | None, *, given: bool) -> None:
        """ConfigError where the encoder's part is missing, or there already."""
        held = cache is not None and cache.cross[0] is not None
        if held and given:
            raise ConfigError("the cache holds an encoder's keys and values: reset it before")
        if not held and not given:
            raise ConfigError(
                "encoder_inputs=None, encoder_states=None are not allowed without a cache that has "
                "read: one of them"
            )

    def _real(self, states: Tensor, tokens: Sequence[int] | None, batch: int) -> Tensor | None:
        """Which of the encoder's tokens are real; ConfigError for states of another shape."""
        h = self.model.hidden_size
        if states.dim() != 3 or states.shape[0] != batch or states.shape[2] != h:
            raise ConfigError(
                f"encoder_states {list(states.shape)} are not allowed: [{batch}, tokens, {h}]"
            )
        return real_places(tokens, batch=batch, S=states.shape[1], device=states.device)
