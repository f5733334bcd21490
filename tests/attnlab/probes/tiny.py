"""A small decoder that can be broken in one place at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import batch_norm, pad, scaled_dot_product_attention

from attnlab import alibi

V, D, H, LAYERS, LONGEST = 61, 32, 4, 2, 64


class SequenceNorm(nn.Module):
    """A norm over the sequence, not over features."""

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


class Router(nn.Module):
    """Experts choose their tokens over the whole sequence."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x):
        S = x.shape[1]
        scores = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            weight, at = scores[..., e].topk(S // 2, dim=1)
            chosen = x.gather(1, at[..., None].expand(-1, -1, D))
            out.scatter_add_(1, at[..., None].expand(-1, -1, D), expert(chosen) * weight[..., None])
        return out


class TokenRouter(Router):
    """Tokens choose their expert, each by itself."""

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        made = torch.stack([expert(x) for expert in self.experts], -1)
        return (made * scores[..., None, :]).sum(-1)


class CentredConv(nn.Module):
    """A convolution that is padded on both sides; `causal`: on the left alone."""

    def __init__(self, causal):
        super().__init__()
        self.conv, self.causal = nn.Conv1d(D, D, 3), causal

    def forward(self, x):
        around = (2, 0) if self.causal else (1, 1)
        return self.conv(pad(x.transpose(1, 2), around)).transpose(1, 2)


def rotate(x, positions):
    d = x.shape[-1]
    angle = positions[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, faults, window, heads=H, width=D):
        super().__init__()
        self.faults, self.window, self.heads = faults, window, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if "sharp" in faults:
            nn.init.normal_(self.qkv.weight, std=1.0)

    def mask(self, T, S):
        faults = self.faults
        distance = torch.arange(S - T, S)[:, None] - torch.arange(S)[None, :]
        hidden = distance < (-1 if "mask one off" in faults else 0)
        if "no mask" in faults:
            hidden = torch.zeros_like(hidden)
        if "trained unmasked" in faults and self.training:
            hidden = torch.zeros_like(hidden)
        if "blind to itself" in faults:
            hidden = (distance <= 0) & (distance.shape[1] > 1) & (torch.arange(S)[None] > 0)
        if "empty row" in faults:
            hidden = distance <= 0
        if self.window is not None:
            hidden = hidden | (distance >= self.window + ("wide window" in faults))
        return hidden, distance

    def forward(self, x, past=None, attention_mask=None):
        faults = self.faults
        B, T, width = x.shape
        parts = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        held = 0 if past is None else past[0].shape[2]
        start = held + ("offset" in faults and held > 0)
        if "rope" in faults:
            at = torch.arange(start, start + T)
            q, k = rotate(q, at), rotate(k, at)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        if "dead head" in faults:
            v = torch.cat((torch.zeros_like(v[:, :1]), v[:, 1:]), 1)
        d = q.shape[-1]
        scale = {"unscaled": 1.0, "scaled twice": 1 / d, "scaled by width": width**-0.5}.get(
            next((f for f in faults if "scaled" in f), ""), 1 / math.sqrt(d)
        )
        hidden, distance = self.mask(T, k.shape[2])
        if attention_mask is not None and "ignores padding" not in faults:
            hidden = hidden | (attention_mask[:, None, None, :] == 0)
        if "sdpa" in faults:
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
            y = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        else:
            scores = q @ k.transpose(-2, -1) * scale
            if "alibi" in faults or "alibi rises" in faults:
                slopes = torch.tensor(alibi.slopes(self.heads))[:, None, None]
                sign = 1 if "alibi rises" in faults else -1
                scores = scores + sign * slopes * distance
            fill = -torch.inf if "-inf" in faults else torch.finfo(scores.dtype).min
            y = scores.masked_fill(hidden, fill).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, width)), (k, v)


class Block(nn.Module):
    def __init__(self, faults, window, heads, width):
        super().__init__()
        self.faults = faults
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(faults, window, heads, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        extra = {
            "sequence norm": SequenceNorm, "expert choice": Router, "token choice": TokenRouter,
            "conv": lambda: CentredConv(False), "causal conv": lambda: CentredConv(True),
            "batch norm": lambda: BatchNorm(width),
        }  # fmt: skip
        self.extra = next((make() for name, make in extra.items() if name in faults), nn.Identity())

    def forward(self, x, past, attention_mask):
        if "post-norm" in self.faults:
            made, kept = self.attention(x, past, attention_mask)
            x = self.norm1(x + made)
            return self.norm2(x + self.mlp(x)), kept
        made, kept = self.attention(self.extra(self.norm1(x)), past, attention_mask)
        x = x + made * (3.0 if "growing" in self.faults else 1.0)
        if "growing" in self.faults:
            return 2.0 * x + self.mlp(self.norm2(x)), kept
        return x + self.mlp(self.norm2(x)), kept


class BatchNorm(nn.Module):
    """Normalises over batch and sequence, also in eval."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)


class Tiny(nn.Module):
    """Ids [B, S] → logits; past_key_values as transformers has them."""

    def __init__(self, *faults, window=None, layers=LAYERS, heads=H, width=D, **config):
        super().__init__()
        torch.manual_seed(0)
        self.faults = faults
        self.config = SimpleNamespace(vocab_size=V, sliding_window=window, **config)
        self.embed = nn.Embedding(V, width)
        if "learned" in faults or "clipped" in faults:
            self.positions = nn.Embedding(LONGEST, width)
        self.layers = nn.ModuleList(Block(faults, window, heads, width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, V)

    def forward(self, input_ids, past_key_values=None, use_cache=False, attention_mask=None):
        x = self.embed(input_ids)
        held = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if hasattr(self, "positions"):
            at = torch.arange(held, held + input_ids.shape[1])
            x = x + self.positions(at.clamp_max(LONGEST - 1) if "clipped" in self.faults else at)
        caches = []
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            x, kept = layer(x, past, attention_mask)
            if "stale cache" in self.faults and past is not None and i == 1:
                kept = past
            caches.append(kept)
        if "loud" in self.faults:
            x = x * 1e5
        return SimpleNamespace(
            logits=self.head(self.norm(x)), past_key_values=tuple(caches) if use_cache else None
        )
