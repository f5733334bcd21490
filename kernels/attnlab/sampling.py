"""The next token from logits: the likeliest, or drawn from a distribution that is cut first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planner.errors import ConfigError, check_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Draw from softmax(logits / temperature), cut to the `top_k` likeliest, then to `top_p`.

    `top_p`: the fewest likeliest tokens whose probabilities reach it (arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} is not allowed: above 0")
        if self.top_k is not None:
            check_size("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p!r} is not allowed: above 0, at most 1")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] that is drawn from, float32."""
    scaled = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares  # what the likelier ones reach without this token
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        scaled = scaled.masked_fill(cut, -torch.inf)
    return scaled.softmax(-1)


def choose_tokens(
    logits_BV: Tensor, sampling: Sampling | None, generator: torch.Generator | None = None
) -> Tensor:
    """The next token [B, 1] of each sequence: the likeliest without `sampling`."""
    if sampling is None:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator)
