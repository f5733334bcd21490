"""Attention itself, softmax(cap(scaling · q·kᵀ) + mask) · v, in three implementations by name.

What moves through HBM, per layer and pass: q and the output, 2·B·H·T·D elements, and K and V,
2·B·G·S·D; in a decode step (T = 1) K and V are nearly all. `naive` also writes and reads B·H·T·S
float32 scores in each op on them; `sdpa` keeps them on chip where its kernel is flash or efficient,
`flex` always. A mask is made once a forward; `sdpa` converts it to q's dtype in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnlab.masks import Keys, Mask, visibility
from planner.errors import ConfigError, check_choice
from planner.layers import GQA, Layer

# Shapes.  B batch · H query heads · G kv heads · T new tokens · S keys · D head dim


def naive(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    logit_softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The obvious way, in float32: the specification. `sinks` [H]: a logit beside the keys'.

    Values may be of another width than keys (MLA).
    """
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    visible = mask.visible
    if mask.is_causal:
        visible = visibility(mask.query_positions, Keys(mask.key_positions, in_order=True))
    cap = logit_softcap or 1.0
    q = (q_BHTD.float() * (scaling / cap)).reshape(B, G, H // G * T, D)  # K and V stay G heads
    scores = q @ k_BGSD.float().transpose(-2, -1)  # [B, G, H/G·T, S]
    del q
    if logit_softcap is not None:
        scores = torch.tanh(scores)
        scores = scores * cap
    if mask.bias is not None:
        scores = scores.view(B, H, T, S) + mask.bias
    if visible is not None:
        scores = torch.where(visible, scores.view(B, H, T, S), -torch.inf)
    if sinks is not None:
        beside = sinks.float()[:, None, None].expand(B, H, T, 1)
        scores = torch.cat((scores.view(B, H, T, S), beside), dim=-1)
        scores = torch.softmax(scores, dim=-1)[..., :S].reshape(B, G, H // G * T, S)
    else:
        scores = torch.softmax(scores.view(B, G, H // G * T, S), dim=-1)
    return (scores @ v_BGSD.float()).view(B, H, T, v_BGSD.shape[-1]).to(q_BHTD.dtype)


def sdpa(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    backend: SDPBackend | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention; it picks the kernel (`sdpa_backend` says which).

    `backend` pins it; one that cannot run these tensors is a ConfigError, never replaced.
    """
    added = mask.visible if mask.bias is None else mask.bias
    call = partial(
        scaled_dot_product_attention,
        q_BHTD, k_BGSD, v_BGSD, added, 0.0, mask.is_causal, scale=scaling, enable_gqa=True,
    )  # fmt: skip
    if backend is None:
        return call()
    try:
        with sdpa_kernel(backend):
            return call()
    except RuntimeError as error:  # what torch raises where no allowed kernel takes the tensors
        if "kernel" not in str(error):
            raise
        raise ConfigError(
            f"attention=sdpa:{_name(backend)} does not run here: {q_BHTD.dtype}, head_dim="
            f"{q_BHTD.shape[-1]}, {'no mask' if added is None else 'a mask'} on "
            f"{q_BHTD.device.type}"
        ) from None


def sdpa_backend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, scaling: float, mask: Mask
) -> str:
    """What `sdpa` runs for these tensors: flash, flash_cpu, efficient, cudnn or math."""
    added = mask.visible if mask.bias is None else mask.bias
    choice = torch._fused_sdp_choice(
        q_BHTD, k_BGSD, v_BGSD, added, 0.0, mask.is_causal, scale=scaling, enable_gqa=True
    )
    name = _name(SDPBackend(choice))
    return f"{name}_cpu" if name == "flash" and q_BHTD.device.type == "cpu" else name


def _name(backend: SDPBackend) -> str:
    return backend.name.split("_")[0].lower()


SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def flex(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    logit_softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """FlexAttention, compiled: cap, bias and mask inside one kernel that skips hidden blocks.

    The blocks of a mask are found once for each mask. CUDA alone: elsewhere a ConfigError.
    """
    if q_BHTD.device.type != "cuda":
        raise ConfigError(f"attention=flex does not run on device={q_BHTD.device.type}: cuda")
    return flex_with(
        _compiled_flex(),
        q_BHTD,
        k_BGSD,
        v_BGSD,
        scaling=scaling,
        mask=mask,
        logit_softcap=logit_softcap,
        sinks=sinks,
    )


def flex_with(
    call: Callable[..., tuple[Tensor, Tensor]],
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    scaling: float,
    mask: Mask,
    logit_softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What `flex` asks of FlexAttention, through any `call` of its signature."""
    from torch.nn.attention.flex_attention import AuxRequest

    bias = None if mask.bias is None else mask.bias.expand(q_BHTD.shape[0], -1, -1, -1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if logit_softcap is not None:
            score = logit_softcap * torch.tanh(score / logit_softcap)
        if bias is not None:
            score = score + bias[b, h, i, j]
        return score

    out, auxiliary = call(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        score_mod=score_mod,
        block_mask=_block_mask(mask, q_BHTD.shape[0]),
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return out
    kept = torch.sigmoid(auxiliary.lse - sinks.float()[:, None])  # Σ over keys ÷ (Σ + e^sink)
    return (out * kept[..., None]).to(out.dtype)


def _block_mask(mask: Mask, B: int) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    visible = mask.visible
    if mask.is_causal:
        visible = visibility(mask.query_positions, Keys(mask.key_positions, in_order=True))
    if visible is None:
        return None
    T, S = visible.shape[-2:]
    if visible.dim() == 2:
        return create_block_mask(
            lambda b, h, i, j: visible[i, j], None, None, T, S, device=visible.device
        )
    return create_block_mask(
        lambda b, h, i, j: visible[b, 0, i, j], B, None, T, S, device=visible.device
    )


@cache
def _compiled_flex() -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"naive": naive, "sdpa": sdpa, "flex": flex}


def choose(name: str | None, layers: Iterable[Layer]) -> str:
    """The implementation's name: `name`; None: sdpa, or naive where a layer has what sdpa lacks.

    "sdpa:flash", ":efficient", ":cudnn" and ":math" pin its kernel. Raises ConfigError for an
    unknown name and for sdpa with a soft cap or sinks.
    """
    attentions = {layer.attention for layer in layers if isinstance(layer.attention, GQA)}
    caps = {gqa.logit_softcap for gqa in attentions} - {None}
    lacking = [f"logit_softcap={cap}" for cap in caps]
    lacking += ["sinks"] * any(gqa.sinks for gqa in attentions)
    pinned = tuple(f"sdpa:{backend}" for backend in SDPA_BACKENDS)
    name = name or ("naive" if lacking else "sdpa")
    check_choice("attention", name, (*IMPLEMENTATIONS, *pinned))
    if lacking and name.startswith("sdpa"):
        raise ConfigError(f"attention={name} has no {lacking[0]}: use naive")
    return name


def implementation(name: str) -> Callable[..., Tensor]:
    """The function of that name, with its kernel pinned where the name says so."""
    kind, _, backend = name.partition(":")
    if not backend:
        return IMPLEMENTATIONS[kind]
    return partial(sdpa, backend=SDPA_BACKENDS[backend])
