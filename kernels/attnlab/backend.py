"""Which kernels a transformer really runs: attention, asked of torch, and those of its experts."""

from __future__ import annotations

import torch

from attnlab.cache import attention_of
from attnlab.implementations import sdpa_backend
from attnlab.latent import one_head
from attnlab.masks import Keys, make_mask, pattern_of
from attnlab.transformer import Transformer
from planner.errors import ConfigError
from planner.layers import GQA, ALiBi

# Shapes.  B batch · H query heads · G kv heads · T new tokens · S keys · D head dim


def backend_name(
    transformer: Transformer, *, batch: int = 1, tokens: int = 1, context_tokens: int = 1
) -> str:
    """What runs a pass of `tokens` new of `context_tokens` tokens: "naive", "sdpa:flash", ...

    Layers that differ are joined: "sdpa:flash+math"; "none": no layer attends. The defaults ask for
    a decode step. It makes one layer's q, k, v and mask on the device and lets torch choose.
    """
    B, T, S, device = batch, tokens, max(tokens, context_tokens), transformer.device
    if transformer.attention != "sdpa":
        return transformer.attention
    if device.type == "meta":
        raise ConfigError("device=meta runs no attention: a device that computes")
    absorbed = T == 1 if transformer.latent is None else transformer.latent == "absorbed"
    queries, keys = (torch.arange(n, S, device=device) for n in (S - T, 0))
    names = set()
    for attention in dict.fromkeys(map(attention_of, transformer.model.layers)):
        if attention is None:
            continue
        slopes = None
        H = G = attention.num_attention_heads
        if isinstance(transformer.model.positions, ALiBi):
            slopes = torch.ones(H, dtype=transformer.dtype, device=device)
        mask = make_mask(queries, Keys(keys, in_order=True), pattern_of(attention), slopes=slopes)
        if (table := transformer.layers[0].bias_table) is not None:
            mask = table(mask)
        q_shape = B, T, H
        if isinstance(attention, GQA):
            G, D, D_v = attention.num_key_value_heads, attention.head_dim, attention.head_dim
        elif absorbed:
            D_v = attention.kv_lora_rank
            q_shape, G, D, mask = (
                (B, H * T, 1),
                1,
                D_v + attention.qk_rope_head_dim,
                one_head(mask, H),
            )
        else:
            D, D_v = attention.qk_head_dim, attention.v_head_dim
        q = torch.empty(*q_shape, D, dtype=transformer.dtype, device=device).transpose(1, 2)
        k = torch.empty(B, G, S, D, dtype=transformer.dtype, device=device)
        names.add(sdpa_backend(q, k, k[..., :D_v], scaling=attention.scaling, mask=mask))
    return "sdpa:" + "+".join(sorted(names)) if names else "none"


def experts_name(transformer: Transformer) -> str | None:
    """What multiplies the experts: "loop", "grouped:cutlass" or "grouped:loop"; None: no experts.

    torch's grouped_mm is one kernel in bfloat16 on compute capability 9 and 10 alone; elsewhere it
    reads the rows' ends on the host and loops itself (torch 2.10 to 2.13, cuda/GroupedBlas.cpp).
    """
    device = transformer.device
    if transformer.experts != "grouped":
        return transformer.experts
    if device.type != "cuda" or transformer.dtype != torch.bfloat16:
        return "grouped:loop"
    major, _ = torch.cuda.get_device_capability(device)
    return "grouped:cutlass" if major in (9, 10) else "grouped:loop"
