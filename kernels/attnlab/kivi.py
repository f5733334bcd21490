"""KIVI (arXiv:2402.02750): keys quantised channel by channel, values token by token.

Some channels of keys are large in every token, so that a scale for a channel loses less than one
for a token; it needs a group of tokens. So the newest stay as they were computed: of keys the
S mod R that make no whole R yet, of values the R newest. A pass attends to the codes that were
there before it, and to its own tokens as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlab.cache import Cache
from attnlab.masks import Keys, Pattern
from attnlab.quantize import check_format, decode, encode
from planner.errors import ConfigError
from planner.kv_formats import KvFormat, TensorFormat
from planner.model import Model
from planner.runtimes.attnlab_formats import check_quantisable

# Shapes.  B batch · G kv heads · T new tokens · S keys · D head dim


class Newest:
    """One stream: codes, scales and zero points, and behind them the newest tokens [B, G, r, D]."""

    def __init__(self, form: TensorFormat) -> None:
        assert form.scales is not None
        assert form.residual is not None
        self.form, self.residual_of = form, form.residual.of
        self.axis = 3 if form.scales.per == "channel" else 2
        self.stored: list[Tensor] = []
        self.residual: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return self.stored if self.residual is None else [*self.stored, self.residual]

    def append(self, x_BGTD: Tensor, tokens: int) -> Tensor:
        """All of now `tokens` tokens [B, G, S, D]; those that are old enough become codes."""
        newest = x_BGTD
        if self.residual is not None:
            newest = torch.cat((self.residual, x_BGTD), dim=2)
            self.residual = None
        read = newest
        if self.stored:
            width, dtype = x_BGTD.shape[-1], x_BGTD.dtype
            old = decode(tuple(self.stored), self.form, width=width, dtype=dtype)
            read = torch.cat((old, newest), dim=2)
            del old
        aged = newest.shape[2] - self.residual_of(tokens)
        if aged:
            coded = list(encode(newest[:, :, :aged], self.form))
            for place in range(len(self.stored)):
                coded[place] = torch.cat((self.stored[place], coded[place]), dim=self.axis)
                self.stored[place] = coded[place]
            self.stored = coded
        # a copy: nothing else is kept alive
        self.residual = newest[:, :, aged:].clone(memory_format=torch.contiguous_format)
        return read


class KiviCache(Cache):
    """A cache that grows, of sequences of one length: a group holds the same tokens of all."""

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        form: KvFormat,
        capacity_tokens: int | None = None,
    ) -> None:
        check_quantisable(form, model)
        super().__init__(
            model, batch=batch, capacity_tokens=capacity_tokens, dtype=dtype, device=device
        )
        self.forms = (form.keys, form.values)
        for kept in self.streams:
            for stream, tensor in zip(kept, self.forms, strict=False):
                check_format(tensor, width=stream.width)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        super().reset()
        self.layers = [[] for _ in self.attentions]
        self.newest = [[Newest(form) for form in self.forms] for _ in self.attentions]

    def begin(self, T: int, *, batch: int, tokens: Sequence[int] | None = None) -> Tensor:
        """As Cache.begin; ConfigError for sequences that differ in length."""
        if tokens is not None and any(n != T for n in tokens):
            raise ConfigError(
                f"tokens={list(tokens)} are not allowed in a quantised cache (KIVI): None, "
                "sequences of one length"
            )
        return super().begin(T, batch=batch, tokens=tokens)

    def _prepare(self) -> None:
        positions = torch.arange(self.length + self.T, device=self.device)
        self._keys: Keys | None = Keys(positions, in_order=True)

    def keys(self, pattern: Pattern) -> Keys:
        """In the order in which they came."""
        assert self._keys is not None, "begin comes first"
        return self._keys

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Read what is held, then quantise what has become old enough."""
        self.layers[index] = []  # what is replaced goes at once
        streams, tokens = self.newest[index], self.length + self.T
        read = tuple(
            stream.append(new.detach().to(self.dtype), tokens)
            for stream, new in zip(streams, new_BGTD, strict=True)
        )
        self.layers[index] = [t for stream in streams for t in stream.tensors]
        return read

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self._keys = None
