"""A finetuning step of lit-gpt in plain torch, for where lit_gpt itself is not installed.

The same ops on the same tensors, with the same names alive, as lit_gpt/{model,lora,adapter,
adapter_v2}.py and finetune/lora.py of commit 0f021f3a; a test holds it against them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from profiles.meters import LiveTensorMeter


@dataclass(frozen=True, kw_only=True)
class Lit:
    """lit-gpt's Config, by its names."""

    n_layer: int
    n_head: int
    n_query_groups: int
    head_size: int
    intermediate_size: int
    padded_vocab_size: int
    rope_n_elem: int
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    bias: bool = True
    lm_head_bias: bool = False
    norm: str = "LayerNorm"
    mlp: str = "GptNeoxMLP"
    method: str = "lora"
    r: int = 4
    adapted: tuple[str, ...] = ()  # query, key, value, projection, mlp

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size

    @property
    def names(self) -> dict[str, Any]:
        """What lit_gpt's own Config is made of."""
        own = {
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_query_groups": self.n_query_groups,
            "n_embd": self.n_embd,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.padded_vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
            "rotary_percentage": self.rope_n_elem / self.head_size,
            "parallel_residual": self.parallel_residual,
            "shared_attention_norm": self.shared_attention_norm,
            "bias": self.bias,
            "lm_head_bias": self.lm_head_bias,
            "_norm_class": self.norm,
            "_mlp_class": self.mlp,
        }
        if self.method == "lora":
            own |= {"r": self.r, "dropout": 0.05}
            own |= {f"to_{part}": True for part in self.adapted}
        return own


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        mean = torch.mean(x * x, dim=-1, keepdim=True)
        normed = x * torch.rsqrt(mean + 1e-5)
        return (self.weight * normed).to(dtype=dtype)


def norm_of(config: Lit) -> nn.Module:
    return RMSNorm(config.n_embd) if config.norm == "RMSNorm" else nn.LayerNorm(config.n_embd)


class Linear(nn.Module):
    """LoRALinear, AdapterV2Linear or neither."""

    def __init__(self, config: Lit, into: int, out: int, part: str, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(into, out, bias=bias)
        self.adapted, self.scaled = part in config.adapted, config.method == "adapter-v2"
        if self.adapted:
            self.lora_A = nn.Parameter(torch.zeros(config.r, into))
            self.lora_B = nn.Parameter(torch.zeros(out, config.r))
        if self.scaled:
            self.adapter_bias = nn.Parameter(torch.zeros(out))
            self.adapter_scale = nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.scaled:
            return self.adapter_scale * (self.linear(x) + self.adapter_bias)
        pretrained = self.linear(x)
        if not self.adapted:
            return pretrained
        dropped = functional.dropout(x, 0.05)
        return (
            pretrained + (dropped @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * 4
        )


class QKV(Linear):
    """LoRAQKVLinear."""

    def __init__(self, config: Lit) -> None:
        width = (config.n_head + 2 * config.n_query_groups) * config.head_size
        super().__init__(config, config.n_embd, width, "qkv", bias=config.bias)
        self.config = config
        heads = {"query": config.n_head, "key": config.n_query_groups}
        heads["value"] = config.n_query_groups
        rows, self.places, self.widths = 0, list[int](), list[int]()
        for part, count in heads.items():
            size = count * config.head_size
            if part in config.adapted:
                self.places += range(rows, rows + size)
                self.widths.append(size)
            rows += size
        if self.widths:
            self.lora_A = nn.Parameter(torch.zeros(config.r * len(self.widths), config.n_embd))
            self.lora_B = nn.Parameter(torch.zeros(sum(self.widths), config.r))

    def zero_pad(self, x: Tensor) -> Tensor:
        if len(self.widths) == 3:
            return x
        out = self.linear.out_features
        x = x.transpose(0, 1)
        result = x.new_zeros((*x.shape[:-1], out)).view(-1, out)
        places = torch.tensor(self.places)
        result = result.index_copy(1, places, x.reshape(-1, sum(self.widths)))
        return result.view((*x.shape[:-1], out)).transpose(0, 1)

    def conv1d(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.config.n_head == self.config.n_query_groups:
            return functional.conv1d(x, weight, groups=len(self.widths))
        parts = zip(x.chunk(len(self.widths), dim=1), weight.split(self.widths), strict=True)
        return torch.cat([functional.conv1d(a, b) for a, b in parts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.widths:
            return super().forward(x)
        pretrained = self.linear(x)
        after_a = functional.linear(functional.dropout(x, 0.05), self.lora_A)
        after_b = self.conv1d(after_a.transpose(-2, -1), self.lora_B.unsqueeze(-1))
        after_b = after_b.transpose(-2, -1)
        lora = self.zero_pad(after_b) * 4
        return pretrained + lora


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    x1, x2 = x[..., :half], x[..., half:]
    rotated = torch.cat((-x2, x1), dim=-1)
    roped = (x * cos) + (rotated * sin)
    return roped.type_as(x)


class Attention(nn.Module):
    def __init__(self, config: Lit, index: int) -> None:
        super().__init__()
        self.config, h = config, config.n_embd
        self.attn = QKV(config)
        self.proj = Linear(config, h, h, "projection", bias=config.bias)
        self.prefixed = config.method.startswith("adapter") and index >= 2
        if self.prefixed:
            self.adapter_wte = nn.Embedding(10, h)
            self.gating_factor = nn.Parameter(torch.zeros(1, 1, config.n_head, 1))
            self.kept: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2)

    def with_prefix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.attend(q, k, v)
        if not self.prefixed:
            return y
        if self.kept is None:
            c, G, D = self.config, self.config.n_query_groups, self.config.head_size
            rows = self.attn(self.adapter_wte.weight.reshape(1, 10, c.n_embd))
            shared = c.n_head // G
            rows = rows.view(1, 10, G, shared + 2, D).permute(0, 2, 3, 1, 4)
            _, ak, av = rows.split((shared, 1, 1), dim=2)
            if G != 1:
                ak, av = (part.repeat_interleave(shared, dim=2) for part in (ak, av))
            self.kept = (ak.view(1, -1, 10, D), av.view(1, -1, 10, D))
        mask = torch.ones(q.size(2), 10, dtype=torch.bool)
        prefixed = self.attend(q, *self.kept, mask)
        return y + self.gating_factor * prefixed

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (B, T, _) = self.config, x.size()
        G, D, n = c.n_query_groups, c.head_size, c.rope_n_elem
        shared = c.n_head // G
        qkv = self.attn(x)
        qkv = qkv.view(B, T, G, shared + 2, D).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((shared, 1, 1), dim=2)
        if c.n_head != G:
            k = k.expand(B, G, shared, T, D)
            v = v.expand(B, G, shared, T, D)
        q = q.reshape(B, -1, T, D)
        k = k.reshape(B, -1, T, D)
        v = v.reshape(B, -1, T, D)
        q_roped = rope(q[..., :n], cos, sin)
        k_roped = rope(k[..., :n], cos, sin)
        q = torch.cat((q_roped, q[..., n:]), dim=-1)
        k = torch.cat((k_roped, k[..., n:]), dim=-1)
        y = self.with_prefix(q, k, v)
        y = y.reshape(B, T, c.n_embd)
        return self.proj(y)


class MLP(nn.Module):
    """GptNeoxMLP, LLaMAMLP."""

    def __init__(self, config: Lit) -> None:
        super().__init__()
        h, i, bias = config.n_embd, config.intermediate_size, config.bias
        self.gated = config.mlp == "LLaMAMLP"
        self.fc_1 = Linear(config, h, i, "mlp", bias=bias)
        if self.gated:
            self.fc_2 = Linear(config, h, i, "mlp", bias=bias)
        self.proj = Linear(config, i, h, "mlp", bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            x = self.fc_1(x)
            x = functional.gelu(x)
            return self.proj(x)
        gate = self.fc_1(x)
        up = self.fc_2(x)
        x = functional.silu(gate) * up
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, config: Lit, index: int) -> None:
        super().__init__()
        self.config = config
        self.norm_1 = norm_of(config)
        self.attn = Attention(config, index)
        self.norm_2 = None if config.shared_attention_norm else norm_of(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_1 = self.norm_1(x)
        h = self.attn(n_1, cos, sin)
        if self.config.parallel_residual:
            n_2 = n_1 if self.norm_2 is None else self.norm_2(x)
            return self.mlp(n_2) + h + x
        assert self.norm_2 is not None
        x = h + x
        return self.mlp(self.norm_2(x)) + x


class GPT(nn.Module):
    def __init__(self, config: Lit, tokens: int) -> None:
        super().__init__()
        h, V = config.n_embd, config.padded_vocab_size
        self.whole = config.method == "full"
        self.lm_head = Linear(config, h, V, "head", bias=config.lm_head_bias)
        self.wte = nn.Embedding(V, h)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = norm_of(config)
        for name in ("cos", "sin"):
            table = torch.zeros(tokens, config.rope_n_elem, dtype=torch.float32)
            self.register_buffer(name, table)

    def forward(self, ids: Tensor) -> Any:
        cos, sin = self.cos[: ids.size(1)], self.sin[: ids.size(1)]
        x = self.wte(ids)
        for block in self.h:
            x = block(x, cos, sin)
        x = self.ln_f(x)
        if self.whole:
            return self.lm_head(x)
        return [self.lm_head(part) for part in x.split(128, dim=1)]


TRAINED = {
    "full": ("",),
    "lora": ("lora_",),
    "adapter": ("adapter_wte", "gating_factor"),
    "adapter-v2": ("adapter_", "gating_factor", "norm_1", "norm_2", "ln_f"),
}


def built(config: Lit, tokens: int, dtype: torch.dtype) -> GPT:
    """The model as a script has it when its loop begins: validated, in train mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = GPT(config, tokens)
    torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in TRAINED[config.method])
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    return model


def chunked_cross_entropy(logits: Any, targets: Tensor, chunk_size: int = 128) -> Tensor:
    """lit_gpt/utils.py."""
    if chunk_size == 0:
        logits = logits.reshape(-1, logits.size(-1))
        targets = targets.reshape(-1)
        return functional.cross_entropy(logits, targets, ignore_index=-1)
    chunks = [chunk.reshape(-1, chunk.size(-1)) for chunk in logits]
    labels = [part.reshape(-1) for part in targets.split(logits[0].size(1), dim=1)]
    losses = [
        functional.cross_entropy(chunk, label, ignore_index=-1, reduction="none")
        for chunk, label in zip(chunks, labels, strict=False)
    ]
    counted = (targets != -1).sum()
    return torch.cat(losses).sum() / max(1, counted)


def watched_step(forward: Any, vocab: int, batch: int, tokens: int, loss_of: Any) -> Any:
    """The meter after forward and backward, as the scripts' loop runs them.

    `loss_of` a list of chunks, or with a `chunk_size` of 0 of all logits.
    """
    ids, targets = torch.randint(vocab, (2, batch, tokens)).unbind()
    with LiveTensorMeter(log=True) as meter:
        logits = forward(ids)
        if isinstance(logits, Tensor):
            logits = logits.float()
            loss = loss_of(logits[..., :-1, :], targets[..., 1:], chunk_size=0)
        else:
            logits = [chunk.float() for chunk in logits]  # Fabric's convert_output
            logits[-1] = logits[-1][..., :-1, :]
            loss = loss_of(logits, targets[..., 1:])
        (loss / 4).backward()
        del loss, logits
    return meter
