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

Kept = tuple[tuple[Tensor, ...], Tensor | None]
"""Codes, scales and zero points; the newest tokens [B, G, r, D]."""


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
        self.kept: list[list[Kept]] = [[((), None)] * 2 for _ in self.attentions]

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
        out, kept = [], self.kept[index]
        for which, (new, form) in enumerate(zip(new_BGTD, self.forms, strict=True)):
            read, kept[which] = self._grow(kept[which], new.detach().to(self.dtype), form)
            out.append(read)
        self.layers[index] = [
            t for stored, residual in kept for t in (*stored, residual) if t is not None
        ]
        return tuple(out)

    def _grow(self, kept: Kept, x_BGTD: Tensor, form: TensorFormat) -> tuple[Tensor, Kept]:
        """All tokens [B, G, S, D], and what is kept of them."""
        assert form.scales is not None
        assert form.residual is not None
        stored, residual = kept
        newest = x_BGTD if residual is None else torch.cat((residual, x_BGTD), dim=2)
        read = newest
        if stored:
            old = decode(stored, form, width=x_BGTD.shape[-1], dtype=self.dtype)
            read = torch.cat((old, newest), dim=2)
            del old
        quantised = newest.shape[2] - form.residual.of(self.length + self.T)
        if quantised:
            coded = encode(newest[:, :, :quantised], form)
            if stored:
                tokens = 3 if form.scales.per == "channel" else 2
                coded = tuple(torch.cat(x, dim=tokens) for x in zip(stored, coded, strict=True))
            stored = coded
        if quantised or residual is None:  # nothing else is kept alive
            newest = newest[:, :, quantised:].clone(memory_format=torch.contiguous_format)
        return read, (stored, newest)

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self._keys = None
