"""Cross-entropy without the logits: some tokens at a time, gradients made on the way forward.

The plain loss holds N · V logits of N = B · T tokens, in their dtype and several times in float32;
at V = 128 256 and N = 8 192 the latter are 4.2 GB each. Here C tokens at a time go through the
head, and while their logits are there, so is all that their gradient needs: softmax − one-hot. What
is left is the gradient of the hidden states and of the head, which the way back only scales (as in
Liger-Kernel, arXiv:2410.10989). Above the hidden states themselves, with e bytes an element,

    N·h·e  +  V·h·e_w  +  V·e_b  +  C·V·(e + 4)

bytes are alive at most: both gradients (of what is trained, in their own dtypes; a head without a
bias has no V·e_b) and a chunk's logits beside their float32 copy, which float32 logits without a
soft cap are themselves: C·V·4. A few numbers for each of the C tokens, and a [C, h] part of the
gradient, are left out. Where the head computes in another dtype than it is kept in (autocast)
its copy, V·h·e, comes on top, and after the float32 logits, if it is more than they are, what a
chunk adds to its gradient, V·h·e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planner.errors import check_size
from planner.model import Model

# Shapes.  N = B · T tokens · C tokens of a chunk · h hidden size · V vocabulary

IGNORED = -100
"""The label of a position that counts for nothing, as in cross_entropy and transformers."""


def chunked_loss(
    hidden_BTh: Tensor,
    weight_Vh: Tensor,
    bias_V: Tensor | None,
    labels_BT: Tensor,
    *,
    chunk_tokens: int,
    model: Model,
    logits_bias: Tensor | None = None,
) -> Tensor:
    """Mean negative log-likelihood of the real labels, in float32; back through it once only.

    Head, scale and soft cap are those of Transformer.forward, `logits_bias` what it adds last.
    """
    check_size("loss_chunk_tokens", chunk_tokens)
    rest = (labels_BT.flatten(), chunk_tokens, model, logits_bias)
    return _ChunkedLoss.apply(hidden_BTh.flatten(0, 1), weight_Vh, bias_V, *rest)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of hidden states, head and its bias, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Nh: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels_N: Tensor,
        chunk_tokens: int,
        model: Model,
        logits_bias: Tensor | None,
    ) -> Tensor:
        """The loss; gradients lie in ctx."""
        kind, dtype = x_Nh.device.type, x_Nh.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        real = labels_N != IGNORED
        count = real.sum()
        share = real / count.clamp(min=1)  # of each token in the mean; float32
        given = zip((x_Nh, weight, bias), ctx.needs_input_grad, strict=False)
        dx, dw, db = (
            torch.zeros_like(part) if part is not None and wanted else None
            for part, wanted in given
        )
        total = torch.zeros((), device=x_Nh.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(labels_N), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                x = x_Nh[rows].to(dtype)
                logits = torch.nn.functional.linear(x, w, b)
                total += _differentiate(logits, labels_N[rows], share[rows], model, logits_bias)
                if dx is not None:
                    dx[rows] = logits @ w
                if dw is not None:
                    _add_product(dw, logits.T, x)
                if db is not None:
                    db += logits.sum(0)
                del x, logits
        ctx.gradients = dx, dw, db
        return torch.where(count > 0, total, torch.nan)  # the mean of nothing, as cross_entropy's

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scaled where they lie: they are gone then."""
        if ctx.gradients is None:
            raise RuntimeError("back through chunked_loss a second time: its gradients are used up")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(scale) for g in gradients), None, None, None, None


def _differentiate(
    logits_CV: Tensor,
    labels_C: Tensor,
    share_C: Tensor,
    model: Model,
    logits_bias: Tensor | None,
) -> Tensor:
    """A chunk's part of the loss; the head's outputs become their gradients where they lie."""
    scale, cap = model.logit_scale, model.final_logit_softcapping
    if scale is not None:
        logits_CV *= scale
    if cap is not None:
        logits_CV.div_(cap).tanh_()
    p = logits_CV.to(torch.float32, copy=cap is not None)
    if cap is not None:
        p *= cap
    if logits_bias is not None:
        p += logits_bias.view(-1)
    p -= p.amax(-1, keepdim=True)
    places = labels_C.clamp(min=0)[:, None]  # of ignored ones any: their share is 0
    picked = p.gather(-1, places)[:, 0]
    sums = p.exp_().sum(-1)
    part = ((sums.log() - picked) * share_C).sum()
    p *= (share_C / sums)[:, None]  # share · softmax
    p.scatter_add_(-1, places, -share_C[:, None])
    if cap is not None:
        p *= logits_CV.square_().neg_().add_(1)  # tanh' = 1 − tanh²
    if scale is not None:
        p *= scale
    logits_CV.copy_(p)
    return part


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, without a place for the product where the dtypes are one."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b
