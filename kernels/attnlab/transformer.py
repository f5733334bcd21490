"""A decoder-only transformer built from a `planner.Model`: its layers, names, shapes and order.

Token ids → embedding (+ positions) → blocks → norm → head. Every op allocates its output, and a
name goes as soon as it is not needed, so that live memory can be followed op by op. A module's
input lives until the module returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from attnlab import alibi
from attnlab.block import Block
from attnlab.cache import Cache, check_real_tokens
from attnlab.checkpointing import Checkpointing, check_checkpointing, run
from attnlab.cross_attention import Encoded
from attnlab.implementations import choose
from attnlab.latent import Latent
from attnlab.linear import Embedding, Linear
from attnlab.masks import Keys, Mask, Pattern, make_mask
from attnlab.mixture import choose_experts
from attnlab.norms import build_norm
from attnlab.positions import BY_LENGTH, RotaryTables, sinusoids
from attnlab.relative import add_tables
from attnlab.supported import check_model
from planner.errors import ConfigError, check_choice, check_size
from planner.layers import GQA, ALiBi, LearnedPositions, RelativeBias, RoPE, Sinusoidal
from planner.model import Model

# Shapes.  B batch · T new tokens · S cached + new tokens · h hidden size · V vocabulary

Rotation = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """The model on `device` in `dtype` with random weights; no parameter is made elsewhere first.

    Parameters are named and shaped as in `model.parameters()`. `attention` is naive, sdpa (also
    with its kernel pinned, "sdpa:flash") or flex; None: sdpa, or naive where a layer has what sdpa
    lacks. `experts` is loop or grouped (mixture.py); None: grouped, or loop where torch has no such
    product. `latent`: how MLA attends (latent.py), "expanded" or "absorbed"; None: absorbed for a
    single token. Raises ConfigError for what attnlab does not run, first of it named.
    """

    reads_encoder = False
    """Whether it is the decoder beside an encoder (seq2seq.py)."""

    def __init__(
        self,
        model: Model,
        *,
        attention: str | None = None,
        experts: str | None = None,
        latent: Latent | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        if latent is not None:
            check_choice("latent", latent, get_args(Latent))
        if not model.is_decoder:
            raise ConfigError(f"model_type={model.model_type} is an encoder: EncoderModel runs it")
        if not model.lm_head:
            raise ConfigError("lm_head=False does not run in attnlab: a causal language model")
        check_model(model)
        if model.is_seq2seq is not self.reads_encoder:
            runs, what = ("Transformer", "no") if self.reads_encoder else ("EncoderDecoder", "an")
            raise ConfigError(f"model_type={model.model_type} has {what} encoder: {runs} runs it")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} is not allowed: a floating-point dtype")
        self.model, self.dtype, self.device = model, dtype, torch.device(device)
        self.attention, self.latent = choose(attention, model.layers), latent
        self.experts = choose_experts(experts, model, dtype)
        if self.attention == "flex" and self.device.type not in ("cuda", "meta"):
            raise ConfigError(f"attention=flex does not run on device={self.device.type}: cuda")
        self.embedding_scale = model.embedding_scale
        if model.embedding_scale is not None:  # rounded to the weights' dtype, as in transformers
            scale = torch.tensor(model.embedding_scale, dtype=dtype, device="cpu")
            self.embedding_scale = scale.item()
        with self.device:
            self._build_ends()
            positions = model.positions
            self.layers = nn.ModuleList(
                Block(
                    layer,
                    model.hidden_size,
                    dtype,
                    attention=self.attention,
                    experts=self.experts,
                    interleaved=isinstance(positions, RoPE) and positions.interleaved,
                    latent=latent,
                )
                for layer in model.layers
            )
            if isinstance(positions, RelativeBias):
                add_tables(self.layers, model.layers, positions, dtype, causal=True)

    def _build_ends(self) -> None:
        """Embedding and positions before the blocks, norm and head behind them."""
        model, dtype = self.model, self.dtype
        h, V, width = model.hidden_size, model.vocab_size, model.embedding_size
        self.embed_tokens = Embedding(V, width or h, dtype=dtype)
        if model.embedding_norm is not None:
            normed = h if model.embedding_norm_last else width or h
            self.embed_norm = build_norm(model.embedding_norm, normed, dtype)
        if width is not None:
            self.project_in = Linear(width, h, bias=False, dtype=dtype)
            self.project_out = Linear(h, width, bias=False, dtype=dtype)
        trained = model.max_position_embeddings or 0
        match model.positions:
            case LearnedPositions(offset=offset):
                self.embed_positions = Embedding(trained + offset, h, dtype=dtype)
            case RoPE() as rope:
                self.rotary = RotaryTables(rope, trained, self.device)
                if model.local_positions is not None:
                    self.rotary_local = RotaryTables(model.local_positions, trained, self.device)
        if model.final_norm is not None:
            self.norm = build_norm(model.final_norm, h, dtype)
        if not model.tie_word_embeddings:
            self.lm_head = Linear(width or h, V, bias=model.lm_head_bias, dtype=dtype)
        elif model.lm_head_bias:
            self.lm_head = nn.Module()
            self.lm_head.bias = nn.Parameter(torch.zeros(V, dtype=dtype))
        if model.final_logits_bias:
            self.final_logits_bias = nn.Buffer(torch.zeros(1, V, dtype=dtype))

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        logits: Literal["all", "last", "none"] = "all",
        tokens: Sequence[int] | None = None,
        prefix_tokens: int = 0,
        checkpointing: Checkpointing = "none",
        checkpoint_every: int = 1,
        encoded: Encoded | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]; with "last" those of the last token, [B, 1, V].

        With "none" what the head would be given, [B, T, h].
        With a cache the ids follow the tokens in it and are appended. `tokens`: how many of the T
        are real in each sequence, from the left; the logits behind them mean nothing. The first
        `prefix_tokens` positions see one another in both directions (prefix-LM). `checkpointing`
        and `checkpoint_every`: which blocks run again on the way back. `encoded`: what
        cross-attention sees. Raises ConfigError when ids do not fit the cache or a learned table of
        positions; nothing is changed then.
        """
        check_choice("logits", logits, ("all", "last", "none"))
        check_checkpointing(checkpointing, checkpoint_every)
        if checkpointing != "none" and cache is not None:
            raise ConfigError(f"checkpointing={checkpointing} is not allowed with a cache: none")
        check_size("prefix_tokens", prefix_tokens, minimum=0)
        if prefix_tokens and any(block.recurs for block in self.layers):
            raise ConfigError(f"prefix_tokens={prefix_tokens} is not allowed: 0, layers recur")
        B, T = check_ids(ids)
        real = check_real_tokens(tokens, T=T, batch=B)
        held = [0] * B if cache is None else cache.lengths
        S = max(n + new for n, new in zip(held, real, strict=False))  # begin compares the batches
        if isinstance(self.model.positions, LearnedPositions):
            self.model.check_positions(S)
        if cache is not None and cache.fixed_shapes and by_length(self.model):
            raise ConfigError("rope_type dynamic or longrope is not allowed with fixed shapes")
        if cache is not None:
            positions = cache.begin(T, batch=B, tokens=tokens)
        else:
            positions = torch.arange(T, device=ids.device)
        x, rotations = self._embed(ids, positions, S)
        if self.model.embedding_norm is not None and self.model.embedding_norm_last:
            x = self.embed_norm(x)
        if self.model.residual_in_fp32:
            x = x.float()
        masks = self._masks(positions, cache, prefix_tokens)
        del positions
        biased = None
        for index, block in enumerate(self.layers):
            rotation = rotations[block.slides] if block.rope else None
            mask = masks.get(block.pattern)
            if block.bias_table is not None:
                biased = block.bias_table(mask)
            mask = mask if biased is None else biased
            call = run(checkpointing, checkpoint_every, index + self.encoder_blocks)
            x = call(block, x, rotation, mask, cache, index, encoded)
            del rotation, mask
        del rotations, masks, biased
        if cache is not None:
            cache.advance()
        if logits == "last":
            x = x[:, -1:] if all(n == T for n in real) else _last(x, real)
        if self.model.residual_in_fp32:
            x = x.to(self.dtype)
        if self.model.final_norm is not None:
            x = self.norm(x)
        if self.model.embedding_size is not None:
            x = self.project_out(x)
        if logits == "none":
            return x
        if self.model.tie_word_embeddings:
            out = nn.functional.linear(x, *self.head)
        else:
            out = self.lm_head(x)
        del x
        if self.model.logit_scale is not None:
            out = out * self.model.logit_scale
        cap = self.model.final_logit_softcapping
        if cap is not None:
            out = out / cap
            out = torch.tanh(out)
            out = out * cap
        if self.model.final_logits_bias:
            out = out + self.final_logits_bias
        return out

    @property
    def head(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight [V, h] and bias [V] of the head, perhaps those of the embedding."""
        bias = self.lm_head.bias if self.model.lm_head_bias else None
        tied = self.model.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight, bias

    @property
    def encoder_blocks(self) -> int:
        """Blocks that come before those of the decoder."""
        return sum(len(tower.layers) for tower in self.model.towers) if self.reads_encoder else 0

    def _masks(
        self, positions: Tensor, cache: Cache | None, prefix_tokens: int
    ) -> dict[Pattern, Mask]:
        """A mask for each pattern of layers."""
        slopes = None
        if isinstance(self.model.positions, ALiBi):
            gqa = self.model.layers[0].attention
            assert isinstance(gqa, GQA), "no other attention takes a bias"
            scale = gqa.scaling if self.model.positions.scaled else 1.0
            dtype = torch.float32 if self.attention == "naive" else self.dtype
            slopes = alibi.slope_tensor(gqa.num_attention_heads, dtype, self.device, scale=scale)
        masks = {}
        patterns = [block.pattern for block in self.layers if block.pattern is not None]
        for pattern in dict.fromkeys(patterns):
            keys = Keys(positions, in_order=True) if cache is None else cache.keys(pattern)
            masks[pattern] = make_mask(
                positions, keys, pattern, prefix_tokens=prefix_tokens, slopes=slopes
            )
        return masks

    def _embed(
        self, ids: Tensor, positions: Tensor, tokens: int
    ) -> tuple[Tensor, tuple[Rotation | None, Rotation | None]]:
        """Hidden states [B, T, h]; the rotations of full and of sliding layers."""
        model = self.model
        x = self.embed_tokens(ids)
        if model.embedding_norm is not None and not model.embedding_norm_last:
            x = self.embed_norm(x)
        if model.embedding_size is not None:
            x = self.project_in(x)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        match model.positions:
            case LearnedPositions(offset=offset):
                rows = positions + offset if offset else positions
                return x + self.embed_positions(rows), (None, None)
            case Sinusoidal():
                return x + sinusoids(positions, model.hidden_size, x.dtype), (None, None)
            case RoPE():
                rotation = self.rotary(positions, tokens, self.dtype)
                local = rotation
                if model.local_positions is not None:
                    local = self.rotary_local(positions, tokens, self.dtype)
                return x, (rotation, local)
        return x, (None, None)


def _last(x_BTh: Tensor, real: Sequence[int]) -> Tensor:
    """The last real token of each sequence, [B, 1, h]."""
    rows = torch.arange(len(real), device=x_BTh.device)
    places = torch.tensor([max(n - 1, 0) for n in real], device=x_BTh.device)
    return x_BTh[rows, places][:, None]


def check_ids(ids: Tensor) -> tuple[int, int]:
    """(B, T) of token ids [B, T]; ConfigError for another rank or dtype, or none at all."""
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"ids {list(ids.shape)} of {ids.dtype} are not allowed: whole numbers [batch, tokens]"
        )
    return ids.shape[0], ids.shape[1]


def by_length(model: Model) -> bool:
    """Whether rotary frequencies change with the length of the sequence."""
    return any(
        isinstance(positions, RoPE) and positions.rope_type in BY_LENGTH
        for positions in (model.positions, model.local_positions)
    )
