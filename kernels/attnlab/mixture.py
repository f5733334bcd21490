"""Mixture of experts: a router sends each token to k of E feed-forwards and adds what they make.

What moves through HBM: N tokens reach at most min(E, k · N) experts, and of those alone the weights
are read: few in a decode step, nearly all in a prefill, which does k/E of their FLOPs. Each pair
of token and expert is a row, sorted by expert: R = k · N rows whatever the router picks. None is
dropped and none is padding; only where an expert's rows end depends on the router.

`loop` is a product for each expert, whose sizes the host waits for: the specification. `grouped` is
torch's grouped matmul, which reads them on the device: one kernel in bfloat16 on an H100 or a B200;
torch itself loops over the experts elsewhere (backend.experts_name says which).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, sigmoid

from attnlab.feed_forward import ACTIVATIONS, FeedForward
from attnlab.linear import Linear
from attnlab.routers import Gate
from planner.errors import ConfigError, check_choice
from planner.layers import MoE
from planner.model import Model

# Shapes.  B batch · T new tokens · N = B · T · h hidden size · E experts · k experts per token
#          R = k · N rows · i intermediate size


def loop(x_Ri: Tensor, weight_Eio: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, one after the other: the specification."""
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    pairs = zip(x_Ri.split(sizes), weight_Eio.unbind(), strict=True)
    return torch.cat([rows @ weight for rows, weight in pairs])


def grouped(x_Ri: Tensor, weight_Eio: Tensor, ends_E: Tensor) -> Tensor:
    """All of them in one op, which autocast does not know: float32 weights stay so."""
    return grouped_mm(x_Ri.to(weight_Eio.dtype), weight_Eio, offs=ends_E)


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"loop": loop, "grouped": grouped}
GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPED_BYTES = 16
"""What a row of grouped_mm's matrices has to be a multiple of."""


def choose_experts(name: str | None, model: Model, dtype: torch.dtype) -> str | None:
    """How experts are multiplied: `name`; None: grouped, or loop where torch's grouped has no way.

    None for a model without experts. Raises ConfigError for an unknown name, for experts where
    there are none, and for "grouped" in a dtype or with a width that it does not take.
    """
    if name is not None:
        check_choice("experts", name, tuple(PRODUCTS))
    mixtures = {x.feed_forward for x in model.layers if isinstance(x.feed_forward, MoE)}
    if not mixtures:
        if name is not None:
            raise ConfigError(f"experts={name} is not allowed: {model.name} has no mixture")
        return None
    widths = {moe.moe_intermediate_size for moe in mixtures}
    widths |= {moe.latent_size or model.hidden_size for moe in mixtures}
    odd = [width for width in sorted(widths) if width * dtype.itemsize % GROUPED_BYTES]
    lacking = [f"width {width} in {dtype}" for width in odd]
    if dtype not in GROUPED_DTYPES:
        lacking = [f"{dtype}"]
    if lacking and name == "grouped":
        raise ConfigError(f"experts=grouped has no {lacking[0]}: use loop")
    return name or ("loop" if lacking else "grouped")


class Experts(nn.Module):
    """E feed-forwards of width i, in the layout that the family's checkpoints have."""

    def __init__(self, moe: MoE, width: int, dtype: torch.dtype, *, experts: str) -> None:
        super().__init__()
        self.moe, self.product, self.act = moe, PRODUCTS[experts], ACTIVATIONS[moe.activation]
        E, i = moe.num_experts, moe.moe_intermediate_size

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.normal_(torch.empty(*shape, dtype=dtype), std=0.02))

        self.up = "gate_up_proj" if moe.gated else "up_proj"
        if moe.layout == "flat":
            self.gate_proj, self.up_proj = drawn(E * i, width), drawn(E * i, width)
            self.down_proj = drawn(E * i, width)
            return
        sizes = ((self.up, 2 * i if moe.gated else i, width), ("down_proj", width, i))
        for name, out, into in sizes:
            shape = (into, out) if moe.layout == "transposed" else (out, into)
            setattr(self, name, drawn(E, *shape))
            if moe.bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(E, out, dtype=dtype)))

    def forward(self, x_Nh: Tensor, weights_Nk: Tensor, picks_Nk: Tensor) -> Tensor:
        """[N, h] → [N, h]: the weighted sum of what each token's experts make of it."""
        E, (N, k) = self.moe.num_experts, picks_Nk.shape
        of_row, order = picks_Nk.flatten().sort(stable=True)  # [R]
        experts = torch.arange(E, device=order.device)
        ends = torch.searchsorted(of_row, experts, right=True, out_int32=True)  # [E]
        del experts
        x = x_Nh[order // k]  # [R, h]
        if self.moe.router == "sigmoid":  # llama4 weighs what goes in
            x = x * weights_Nk.flatten()[order, None]
        if self.moe.layout == "flat":
            gate = self.act(self._linear(x, "gate_proj", of_row, ends))
            x = gate * self._linear(x, "up_proj", of_row, ends)
            del gate
        else:
            x = self._linear(x, self.up, of_row, ends)  # [R, 2i]
            x = self._activate(x)  # [R, i]
        x = self._linear(x, "down_proj", of_row, ends)  # [R, h]
        del of_row, ends
        place = torch.arange(N * k, device=order.device)
        x = x[torch.empty_like(order).scatter_(0, order, place)]  # back to the tokens' order
        del order, place
        x = x.view(N, k, -1)
        if self.moe.router != "sigmoid":
            x = x * weights_Nk[..., None]
        return x.sum(dim=1)

    def _activate(self, x: Tensor) -> Tensor:
        """Gate and up, [R, 2i], to act(gate) · up; or up alone, [R, i], to act(up)."""
        moe = self.moe
        if not moe.gated:
            return self.act(x)
        alpha, limit = moe.swiglu_alpha, moe.swiglu_limit
        gate, up = x.chunk(2, dim=-1) if alpha is None else (x[..., ::2], x[..., 1::2])
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha is not None:  # gpt-oss: neighbours are gate and up, and up counts from −1
            return gate * sigmoid(alpha * gate) * (up + 1)
        return self.act(gate) * up

    def _linear(self, x_Ri: Tensor, name: str, of_row: Tensor, ends: Tensor) -> Tensor:
        """Each row times the matrix of its expert, [R, in] → [R, out]."""
        weight = getattr(self, name)
        if self.moe.layout == "flat":
            weight = weight.unflatten(0, (self.moe.num_experts, -1))  # down_proj lies [E, in, out]
        if self.moe.layout == "grouped" or (self.moe.layout == "flat" and name != "down_proj"):
            weight = weight.transpose(1, 2)
        out = self.product(x_Ri, weight, ends)
        return out + getattr(self, f"{name}_bias")[of_row] if self.moe.bias else out


class Mixture(nn.Module):
    """The feed-forward of a block: router, experts, and what is shared by all tokens."""

    def __init__(self, moe: MoE, hidden_size: int, dtype: torch.dtype, *, experts: str) -> None:
        super().__init__()
        self.moe, h = moe, hidden_size
        self.gate = Gate(moe, h, dtype)
        width = moe.latent_size or h
        self.experts = Experts(moe, width, dtype, experts=experts)
        if moe.latent_size is not None:
            self.fc1_latent_proj = Linear(h, width, bias=moe.latent_bias, dtype=dtype)
            self.fc2_latent_proj = Linear(width, h, bias=moe.latent_bias, dtype=dtype)
        if moe.shared is not None:
            self.shared_experts = FeedForward(moe.shared, h, dtype)
        if moe.shared_gate:
            self.shared_expert_gate = Linear(h, 1, bias=False, dtype=dtype)

    def forward(self, x_BTh: Tensor) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        x = x_BTh.flatten(0, 1)
        weights, picks = self.gate(x)
        if self.moe.latent_size is None:
            out = self.experts(x, weights, picks)
        else:
            out = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x), weights, picks))
        del weights, picks
        if self.moe.shared is not None:
            shared = self.shared_experts(x)
            if self.moe.shared_gate:
                shared = shared * sigmoid(self.shared_expert_gate(x))
            out = out + shared
        return out.view_as(x_BTh)
