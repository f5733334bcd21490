"""A step of torchtune's recipes in plain torch, for where torchtune itself is not installed.

The same ops on the same tensors, with the same names alive, as torchtune/modules at 1814feb17 and
recipes/full_finetune_single_device.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from profiles.meters import LiveTensorMeter


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
        return normed * self.scale


class Linear(nn.Module):
    """nn.Linear, or LoRALinear without dropout."""

    def __init__(self, into: int, out: int, rank: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, into))
        self.rank = rank
        if rank is not None:
            self.lora_a = nn.Parameter(torch.zeros(rank, into))
            self.lora_b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.weight)
        if self.rank is None:
            return out
        low = functional.linear(x, self.lora_a)
        low = 2.0 * functional.linear(low, self.lora_b)
        return out + low


def roped(x: Tensor, cache: Tensor) -> Tensor:
    """Llama3ScaledRoPE.forward."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = cache[: x.size(1)].view(-1, pairs.size(1), 1, pairs.size(3), 2)
    out = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        -1,
    )
    out = out.flatten(3)
    return out.type_as(x)


class Layer(nn.Module):
    """TransformerSelfAttentionLayer with its attention and feed-forward."""

    def __init__(self, heads: tuple[int, int, int], inner: int, rank: int | None) -> None:
        super().__init__()
        self.heads = heads
        H, G, D = heads
        h = H * D
        self.sa_norm, self.mlp_norm = RMSNorm(h), RMSNorm(h)
        self.q, self.k, self.v, self.o = (
            Linear(into, out, rank) for into, out in ((h, h), (h, G * D), (h, G * D), (h, h))
        )
        self.w1, self.w3, self.w2 = (
            Linear(into, out, rank) for into, out in ((h, inner), (h, inner), (inner, h))
        )

    def attention(self, x: Tensor, cache: Tensor) -> Tensor:
        (H, G, D), (b, s, _) = self.heads, x.shape
        q = self.q(x)
        q = q.view(b, s, H, D)
        q = roped(q, cache)
        q = q.transpose(1, 2)
        k = self.k(x)
        v = self.v(x)
        k = k.view(b, s, -1, D)
        v = v.view(b, s, -1, D)
        k = roped(k, cache)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if H != G:
            wide = (b, G, H // G, -1, D)
            k = k.unsqueeze(2).expand(wide).flatten(1, 2)
            v = v.unsqueeze(2).expand(wide).flatten(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).contiguous().view(b, s, -1)
        return self.o(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = functional.silu(self.w1(x))
        h = h * self.w3(x)
        return self.w2(h)

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        h = self.sa_norm(x)
        attended = self.attention(h, cache)
        h = attended + x
        fed = self.feed_forward(self.mlp_norm(h))
        out = h + fed
        del attended
        return out


class Decoder(nn.Module):
    """TiedEmbeddingTransformerDecoder; `chunks` of 0: all logits at once."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        *,
        inner: int,
        layers: int,
        vocab: int,
        tokens: int,
        rank: int | None,
        tied: bool,
        chunks: int,
        checkpointed: bool,
    ) -> None:
        super().__init__()
        h = heads[0] * heads[2]
        self.tok_embeddings = nn.Embedding(vocab, h)
        self.layers = nn.ModuleList(Layer(heads, inner, rank) for _ in range(layers))
        self.norm = RMSNorm(h)
        self.output = self.tok_embeddings if tied else nn.Linear(h, vocab, bias=False)
        self.chunks, self.checkpointed = chunks, checkpointed
        cache = torch.zeros(tokens, heads[2] // 2, 2, dtype=torch.float32)
        self.register_buffer("cache", cache)
        if rank is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad = "lora" in name

    def forward(self, ids: Tensor) -> Any:
        h = self.tok_embeddings(ids)
        for layer in self.layers:
            if self.checkpointed:
                h = checkpoint(layer, h, self.cache, use_reentrant=False)
            else:
                h = layer(h, self.cache)
        h = self.norm(h)
        head = self.output.weight
        if self.chunks:
            return [functional.linear(part, head) for part in h.chunk(self.chunks, dim=1)]
        return functional.linear(h, head).float()


def loss_of(logits: Any, labels: Tensor, chunks: int) -> Tensor:
    """CEWithChunkedOutputLoss, or nn.CrossEntropyLoss."""
    if not chunks:
        labels = labels.reshape(-1)
        logits = logits.reshape(-1, logits.size(-1))
        return functional.cross_entropy(logits, labels)
    counted = (labels != -100).sum()
    parts = [part.reshape(-1) for part in labels.chunk(chunks, dim=1)]
    logits = [part.reshape(-1, part.size(-1)) for part in logits]
    total: Any = 0.0
    for rows, part in zip(logits, parts, strict=True):
        total += functional.cross_entropy(rows.float(), part, reduction="sum")
    return total / counted


def loss_step(model: Decoder, ids: Tensor, labels: Tensor, ignored: Tensor) -> Tensor:
    """The recipe's _loss_step."""
    logits = model(ids)
    labels = torch.hstack((labels[..., 1:], ignored))
    loss = loss_of(logits, labels, model.chunks)
    del logits
    return loss


def watched_step(model: Decoder, vocab: int, batch: int, tokens: int) -> Any:
    """The meter after forward and backward."""
    ids, labels = torch.randint(vocab, (2, batch, tokens)).unbind()
    ignored = torch.full((batch, 1), -100)
    with LiveTensorMeter(log=True) as meter:
        counted = (labels != -100).sum()
        loss = loss_step(model, ids, labels, ignored) * counted
        loss.backward()
        del loss
    return meter
