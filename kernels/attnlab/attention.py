"""Grouped-query attention (arXiv:2305.13245): reference, fast call, and a block's module.

What moves through HBM, per layer and pass: q and the output, 2·B·H·T·D elements, and K and V,
2·B·G·S·D; in a decode step (T = 1) K and V are nearly all. `naive` also writes and reads B·H·T·S
float32 scores in each op on them; `sdpa` keeps them on chip where its kernel is flash or efficient.
A mask is made once a forward; `sdpa` converts it to q's dtype in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from attnlab.kv_cache import KVCache
from attnlab.linear import Linear
from attnlab.masks import Mask, causal
from attnlab.positions import rotate
from attnlab.supported import grouped_query
from planner.errors import ConfigError, check_choice
from planner.layers import GQA, Layer

# Shapes.  B batch · H query heads · G kv heads · T new tokens · S cached + new tokens · D head dim


def naive(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    logit_softcap: float | None = None,
) -> Tensor:
    """softmax(cap(scaling · q·kᵀ) + mask) · v, the obvious way, in float32: the specification."""
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    visible = mask.visible
    if mask.is_causal:
        visible = causal(mask.query_positions, mask.key_positions)
    cap = logit_softcap or 1.0
    q = (q_BHTD.float() * (scaling / cap)).reshape(B, G, H // G * T, D)  # K and V stay G heads
    scores = q @ k_BGSD.float().transpose(-2, -1)  # [B, G, H/G·T, S]
    del q
    if logit_softcap is not None:
        scores = torch.tanh(scores)
        scores = scores * cap
    if visible is not None:
        scores = torch.where(visible, scores.view(B, H, T, S), -torch.inf)
    scores = torch.softmax(scores.view(B, G, H // G * T, S), dim=-1)
    return (scores @ v_BGSD.float()).view(B, H, T, D).to(q_BHTD.dtype)


def sdpa(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    logit_softcap: float | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention; it picks the kernel (`sdpa_backend` says which)."""
    if logit_softcap is not None:
        raise ConfigError(f"attention=sdpa has no logit_softcap={logit_softcap}: use naive")
    return scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, mask.visible, 0.0, mask.is_causal, scale=scaling, enable_gqa=True
    )


def sdpa_backend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scaling: float, mask: Mask
) -> str:
    """What `sdpa` runs for these tensors: flash, flash_cpu, efficient, cudnn or math."""
    choice = torch._fused_sdp_choice(
        q_BHTD, k_BGSD, v_BGSD, mask.visible, 0.0, mask.is_causal, scale=scaling, enable_gqa=True
    )
    name = SDPBackend(choice).name.split("_")[0].lower()
    return f"{name}_cpu" if name == "flash" and q_BHTD.device.type == "cpu" else name


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive, "sdpa": sdpa}


def choose(name: str | None, layers: Iterable[Layer]) -> str:
    """The implementation's name: `name`; None: sdpa, or naive where a layer has a soft cap.

    Raises ConfigError for an unknown name and for sdpa with a soft cap.
    """
    caps = {grouped_query(layer.attention).logit_softcap for layer in layers} - {None}
    name = check_choice("attention", name or ("naive" if caps else "sdpa"), IMPLEMENTATIONS)
    if caps and name == "sdpa":
        raise ConfigError(f"attention=sdpa has no logit_softcap={caps.pop()}: use naive")
    return name


class Attention(nn.Module):
    """Projections, rotation, cache, attention, output projection of one block."""

    def __init__(
        self, gqa: GQA, hidden_size: int, dtype: torch.dtype, *, implementation: str
    ) -> None:
        super().__init__()
        self.gqa = gqa
        self.attend = partial(
            IMPLEMENTATIONS[implementation], scaling=gqa.scaling, logit_softcap=gqa.logit_softcap
        )
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        self.widths = [H * D, G * D, G * D]
        linear = partial(Linear, hidden_size, bias=gqa.qkv_bias, dtype=dtype)
        if gqa.fused_qkv:
            self.qkv_proj = linear(sum(self.widths))
        else:
            self.q_proj, self.k_proj, self.v_proj = (linear(width) for width in self.widths)
        self.o_proj = Linear(H * D, hidden_size, bias=gqa.o_bias, dtype=dtype)

    def forward(
        self,
        x_BTh: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | None,
        index: int,
    ) -> Tensor:
        """[B, T, h] → [B, T, h]; appends to layer `index` of the cache and attends to all of it."""
        if self.gqa.fused_qkv:
            q, k, v = self.qkv_proj(x_BTh).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x_BTh), self.k_proj(x_BTh), self.v_proj(x_BTh)
        heads = (-1, self.gqa.head_dim)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if rotation is not None:
            q = rotate(q, *rotation)
            k = rotate(k, *rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(index, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        out = self.attend(q, k, v, mask=mask)
        del q, k, v
        out = out.transpose(1, 2).flatten(2)  # [B, T, H·D]
        return self.o_proj(out)
