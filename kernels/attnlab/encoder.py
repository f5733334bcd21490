"""An encoder by itself: words in both directions (bert, modernbert), or an image's patches (vit).

It runs once over all of its input, as a prefill does, and keeps nothing: there is no next token to
be quick for. A class token or the mean of all stands for the whole where a head classifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attnlab.bidirectional import run_both_ways
from attnlab.block import Block
from attnlab.cross_attention import real_places
from attnlab.feed_forward import ACTIVATIONS
from attnlab.implementations import choose
from attnlab.linear import Embedding, Linear
from attnlab.norms import build_norm
from attnlab.positions import RotaryTables
from attnlab.supported import check_model
from attnlab.transformer import Rotation, check_ids
from planner.ends import Ends, Patches, Step
from planner.errors import ConfigError, check_choice
from planner.layers import LearnedPositions, RoPE
from planner.model import Model

# Shapes.  B batch · T tokens, or patches and the class token · h hidden size · V vocabulary
#          C channels of an image · Y its height, X its width

TURNS: dict[str | None, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "tanh": torch.tanh}


class EncoderModel(nn.Module):
    """The model on `device` in `dtype` with random weights, from a description with `ends`.

    Parameters are named and shaped as in `model.parameters()`. `attention`: naive, sdpa or flex, as
    in Transformer. Raises ConfigError for what attnlab does not run, first of it named.
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
        if model.is_decoder:
            raise ConfigError(f"model_type={model.model_type} is a decoder: Transformer runs it")
        check_model(model)
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} is not allowed: a floating-point dtype")
        assert model.ends is not None, "check_model asks for it"
        self.model, self.ends = model, model.ends
        self.dtype, self.device = dtype, torch.device(device)
        self.attention = choose(attention, model.layers)
        if self.attention == "flex" and self.device.type not in ("cuda", "meta"):
            raise ConfigError(f"attention=flex does not run on device={self.device.type}: cuda")
        self._shapes = {p.name: p.shape for p in model.parameters()}
        with self.device:
            self._build_front(model, self.ends)
            self.layers = nn.ModuleList(
                Block(layer, model.hidden_size, dtype, attention=self.attention, interleaved=False)
                for layer in model.layers
            )
            self._build_back(model, self.ends)

    def _build_front(self, model: Model, ends: Ends) -> None:
        """What stands before the blocks."""
        h, dtype, shapes = model.hidden_size, self.dtype, self._shapes
        if ends.patches is not None:
            patches = ends.patches
            out, into, *size = shapes[f"{patches.projection}.weight"]
            conv = nn.Conv2d(into, out, tuple(size), stride=tuple(size), dtype=dtype)
            self._put(patches.projection, conv)
            for name in (patches.class_token, patches.positions):
                self._put(name, nn.Parameter(0.02 * torch.randn(shapes[name], dtype=dtype)))
            return
        self.embed_tokens = Embedding(model.vocab_size, h, dtype=dtype)
        trained = model.max_position_embeddings or 0
        match model.positions:
            case LearnedPositions():
                self.embed_positions = Embedding(*shapes["embed_positions.weight"], dtype=dtype)
            case RoPE() as rope:
                self.rotary = RotaryTables(rope, trained, self.device)
                if model.local_positions is not None:
                    self.rotary_local = RotaryTables(model.local_positions, trained, self.device)
        if ends.token_types is not None:
            rows = shapes[f"{ends.token_types}.weight"][0]
            self._put(ends.token_types, Embedding(rows, h, dtype=dtype))
        if ends.embedding_norm is not None:
            name, norm = ends.embedding_norm
            self._put(name, build_norm(norm, h, dtype))

    def _build_back(self, model: Model, ends: Ends) -> None:
        """What stands behind the blocks."""
        h, dtype, V = model.hidden_size, self.dtype, model.vocab_size
        if model.lm_head and not model.tie_word_embeddings:
            self.lm_head = Linear(h, V, bias=model.lm_head_bias, dtype=dtype)
        elif model.lm_head_bias:
            self._put("lm_head.bias", nn.Parameter(torch.zeros(V, dtype=dtype)))
        if model.final_norm is not None:
            self.norm = build_norm(model.final_norm, h, dtype)
        if ends.final_norm is not None:
            self._put(ends.final_norm[0], build_norm(ends.final_norm[1], h, dtype))
        for step in (*ends.steps, *((ends.pooler,) if ends.pooler else ())):
            out, into = self._shapes[f"{step.name}.weight"]
            bias = f"{step.name}.bias" in self._shapes
            self._put(step.name, Linear(into, out, bias=bias, dtype=dtype))
            if step.norm is not None:
                self._put(step.norm_name, build_norm(step.norm, out, dtype))

    def _put(self, path: str, part: nn.Module | nn.Parameter) -> None:
        """Give it its dotted name, in modules that are made where they are not there."""
        at: nn.Module = self
        *above, name = path.split(".")
        for step in above:
            if not hasattr(at, step):
                setattr(at, step, nn.Module())
            at = getattr(at, step)
        setattr(at, name, part)

    def forward(
        self,
        inputs: Tensor,
        *,
        tokens: Sequence[int] | None = None,
        token_types: Tensor | None = None,
        checkpointing: Literal["none", "full"] = "none",
    ) -> Tensor:
        """What the class of the config makes of token ids [B, T], or of pixels [B, C, Y, X].

        Logits [B, T, V] of a masked language model, [B, labels] or [B, T, labels] of a classifier,
        else the last hidden states, [B, T, h]. `tokens`, `token_types`, `checkpointing` as in
        `states`.
        """
        x = self.states(inputs, tokens=tokens, token_types=token_types, checkpointing=checkpointing)
        match self.ends.reads:
            case "first":
                x = x[:, 0]
            case "mean":
                real = real_places(tokens, batch=x.shape[0], S=x.shape[1], device=x.device)
                x = _mean(x, real)
            case "pooled":
                x = self.pooled(x)
        for step in self.ends.steps:
            x = self._step(step, x)
        if not self.model.lm_head:
            return x
        if not self.model.tie_word_embeddings:
            return self.lm_head(x)
        bias = self.lm_head.bias if self.model.lm_head_bias else None
        return nn.functional.linear(x, self.embed_tokens.weight, bias)

    def states(
        self,
        inputs: Tensor,
        *,
        tokens: Sequence[int] | None = None,
        token_types: Tensor | None = None,
        checkpointing: Literal["none", "full"] = "none",
    ) -> Tensor:
        """The last hidden states [B, T, h], of an image's class token and then its patches.

        `tokens`: how many of the T are real in each sequence, from the left; no other sees the
        rest, and what comes of it means nothing. `token_types` [B, T]: rows of that table, None:
        row 0. `checkpointing` as in Transformer.forward. Raises ConfigError for what cannot be.
        """
        check_choice("checkpointing", checkpointing, ("none", "full"))
        real, rotations = None, (None, None)
        if self.ends.patches is not None:
            for name, given in (("tokens", tokens), ("token_types", token_types)):
                if given is not None:
                    raise ConfigError(f"{name} are not allowed with pixels: None (all are seen)")
            x = self._embed_patches(inputs, self.ends.patches)
        else:
            B, T = check_ids(inputs)
            real = real_places(tokens, batch=B, S=T, device=inputs.device, name="tokens")
            x = self._embed(inputs, token_types)
            rotations = self._rotations(T, inputs.device)
        x = run_both_ways(self.layers, x, real, rotations=rotations, checkpointing=checkpointing)
        if self.model.final_norm is not None:
            x = self.norm(x)
        if self.ends.final_norm is not None:
            x = self.get_submodule(self.ends.final_norm[0])(x)
        return x

    def pooled(self, states_BTh: Tensor) -> Tensor:
        """What the pooler makes of the first token's last hidden state: [B, its width]."""
        if self.ends.pooler is None:
            raise ConfigError(f"the {self.model.model_type} of this class has no pooler")
        return self._step(self.ends.pooler, states_BTh[:, 0])

    def _step(self, step: Step, x: Tensor) -> Tensor:
        """A linear layer, an activation and a norm, as far as they are there."""
        x = self.get_submodule(step.name)(x)
        if step.activation is not None:
            x = TURNS[step.activation](x)
        return x if step.norm is None else self.get_submodule(step.norm_name)(x)

    def _embed(self, ids: Tensor, token_types: Tensor | None) -> Tensor:
        """Words, types and positions, summed and normed: [B, T, h]."""
        x = self.embed_tokens(ids)
        if self.ends.token_types is not None:
            if token_types is None:
                token_types = torch.zeros_like(ids)
            if token_types.shape != ids.shape or token_types.is_floating_point():
                raise ConfigError(
                    f"token_types {list(token_types.shape)} of {token_types.dtype} are not "
                    f"allowed: whole numbers {list(ids.shape)}"
                )
            x = x + self.get_submodule(self.ends.token_types)(token_types)
        elif token_types is not None:
            raise ConfigError(
                f"token_types are not allowed: None, {self.model.model_type} has none"
            )
        if isinstance(self.model.positions, LearnedPositions):
            x = x + self.embed_positions(self._rows(ids, self.model.positions.offset))
        if self.ends.embedding_norm is not None:
            x = self.get_submodule(self.ends.embedding_norm[0])(x)
        return x

    def _rows(self, ids: Tensor, offset: int) -> Tensor:
        """Rows of the positions' table, [T] or [B, T]: padding takes no position (roberta)."""
        T = ids.shape[1]
        self.model.check_positions(T)
        if self.ends.padding is None:
            return torch.arange(T, device=ids.device) + offset
        counted = ids != self.ends.padding
        return counted.cumsum(1) * counted + (offset - 1)

    def _rotations(self, T: int, device: torch.device) -> tuple[Rotation | None, Rotation | None]:
        """Of blocks without and with a window."""
        if not isinstance(self.model.positions, RoPE):
            return None, None
        places = torch.arange(T, device=device)
        rotation = local = self.rotary(places, T, self.dtype)
        if self.model.local_positions is not None:
            local = self.rotary_local(places, T, self.dtype)
        return rotation, local

    def _embed_patches(self, pixels: Tensor, patches: Patches) -> Tensor:
        """A class token and a token for each patch, positions added: [B, 1 + patches, h]."""
        projection = self.get_submodule(patches.projection)
        wanted = (projection.in_channels, *patches.image_size)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != wanted or not len(pixels):
            sizes = ", ".join(map(str, wanted))
            raise ConfigError(f"pixels {list(pixels.shape)} are not allowed: [batch, {sizes}]")
        x = projection(pixels.to(self.dtype)).flatten(2).transpose(1, 2)
        first = self.get_parameter(patches.class_token).expand(len(x), -1, -1)
        return torch.cat((first, x), dim=1) + self.get_parameter(patches.positions)


def _mean(x_BTh: Tensor, real_BT: Tensor | None) -> Tensor:
    """Of the real tokens: [B, h]."""
    if real_BT is None:
        return x_BTh.sum(dim=1) / x_BTh.shape[1]
    return (x_BTh * real_BT[..., None]).sum(dim=1) / real_BT.sum(dim=1, keepdim=True)
