"""A point as the call that is timed: its inputs are cut here, before any clock runs.

`prepare(point, buffers)` returns a function that does the op once. Called again it returns the same
op over other inputs, which is how a timed sequence finds its data outside the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from profiles.microbench.buffers import Buffers
from profiles.microbench.byte_ops import BYTE_OPS
from profiles.microbench.composite_ops import COMPOSITE_OPS
from profiles.microbench.mixture_ops import MIXTURE_OPS
from profiles.microbench.point import OpPoint
from profiles.microbench.scan_ops import SCAN_OPS

Call = Callable[[], object]

MAKERS = {**BYTE_OPS, **SCAN_OPS, **MIXTURE_OPS, **COMPOSITE_OPS}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Preparer:
    """Makes calls out of points; what stays the same between a point's calls is kept here."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.ran: str | None = None  # the backend that torch picked, where it had a choice
        self._kept: tuple[str, Tensor] | None = None

    def prepare(self, point: OpPoint) -> Call:
        """The op once, over inputs of its own."""
        if point.family == "backward":
            return self._backward(point)
        match point.op:
            case "linear":
                return self._linear(point)
            case "linear_bias":
                return self._linear_bias(point)
            case "scaled_mm":
                return self._scaled_mm(point)
            case "grouped_mm":
                return self._grouped_mm(point)
            case "sdpa":
                return self._sdpa(point)
            case "sdpa_masked":
                return self._sdpa_masked(point)
            case "sdpa_latent":
                return self._sdpa_latent(point)
            case "adamw":
                return self._adamw(point)
        return MAKERS[point.op](point, self.buffers)

    def _activation(self, point: OpPoint) -> Tensor:
        """x of a product: one for all calls, as the op before leaves it in the cache."""
        if self._kept is None or self._kept[0] != point.key:
            x = self.buffers.take(point.dtype, point.shape["m"], point.shape["k"])
            self._kept = (point.key, x)
        return self._kept[1]

    def _linear(self, point: OpPoint) -> Call:
        x = self._activation(point)
        w = self.buffers.take(point.dtype, point.shape["n"], point.shape["k"])
        return lambda: nn.functional.linear(x, w)

    def _linear_bias(self, point: OpPoint) -> Call:
        x = self._activation(point)
        w = self.buffers.take(point.dtype, point.shape["n"], point.shape["k"])
        bias = self.buffers.take(point.dtype, point.shape["n"])
        return lambda: nn.functional.linear(x, w, bias)

    def _scaled_mm(self, point: OpPoint) -> Call:
        """fp8 with one scale a tensor; W is [n, k], seen as the column-major [k, n] it must be."""
        x = self._activation(point)
        w = self.buffers.take("fp8", point.shape["n"], point.shape["k"]).t()
        one = torch.ones((), dtype=torch.float32, device=self.buffers.device)
        return lambda: torch._scaled_mm(
            x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def _grouped_mm(self, point: OpPoint) -> Call:
        """Rows sorted by expert, as even as they go; weights [experts, n, k] seen transposed.

        Of `reached` experts, which lie as far apart as they go, each has a row at least.
        """
        s = point.shape
        x = self._activation(point)
        w = self.buffers.take(point.dtype, s["experts"], s["n"], s["k"]).transpose(-2, -1)
        ends = [(i + 1) * s["m"] // s["experts"] for i in range(s["experts"])]
        if "reached" in s:
            before = [-(-(i + 1) * s["reached"] // s["experts"]) for i in range(s["experts"])]
            ends = [reached * s["m"] // s["reached"] for reached in before]
        elif s["m"] < s["experts"]:  # the first m experts have one row each
            ends = [min(i + 1, s["m"]) for i in range(s["experts"])]
        offsets = torch.tensor(ends, dtype=torch.int32, device=self.buffers.device)
        return lambda: torch._grouped_mm(x, w, offs=offsets)

    def _sdpa(self, point: OpPoint) -> Call:
        q, k, v = self._qkv(point)
        causal = point.shape["tokens"] > 1
        grouped = point.shape["heads"] != point.shape["kv_heads"]

        def attend() -> Tensor:
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=grouped
            )

        if point.backend == "default":
            self.ran = _choice(q, k, v, causal, grouped)
            return attend
        backend = BACKENDS[point.backend]

        def attend_by_backend() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return attend_by_backend

    def _sdpa_masked(self, point: OpPoint) -> Call:
        """Behind a mask; without a backend's name torch picks what takes one."""
        q, k, v = self._qkv(point)
        mask = self._mask(point)

        def attend() -> Tensor:
            with _pinned(point.backend):
                return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return attend

    def _sdpa_latent(self, point: OpPoint) -> Call:
        """A query of every head over latents that all share: heads are queries of one head."""
        s = point.shape
        q = self.buffers.take(point.dtype, s["batch"], 1, s["heads"], s["width"])
        k = self.buffers.take(point.dtype, s["batch"], 1, s["context"], s["width"])
        v = k[..., : s["values"]]

        def attend() -> Tensor:
            with _pinned(point.backend):
                return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return attend

    def _mask(self, point: OpPoint) -> Tensor:
        """Bools [1, 1, T, S], as transformers makes them."""
        size = (point.shape["tokens"], point.shape["context"])
        return torch.ones(size, dtype=torch.bool, device=self.buffers.device).tril()[None, None]

    def _qkv(self, point: OpPoint) -> tuple[Tensor, Tensor, Tensor]:
        """q as a projection leaves it, [B, T, H, D] seen as [B, H, T, D]; k and v as a cache is."""
        s = point.shape
        B, T, S, D = s["batch"], s["tokens"], s["context"], s["head_dim"]
        q = self.buffers.take(point.dtype, B, T, s["heads"], D).transpose(1, 2)
        k = self.buffers.take(point.dtype, B, s["kv_heads"], S, D)
        v = self.buffers.take(point.dtype, B, s["kv_heads"], S, D)
        return q, k, v

    def _backward(self, point: OpPoint) -> Call:
        """Only the backward pass: the forward one ran when this returns, and its graph is kept."""
        if point.op == "linear":
            inputs = [self._activation(point)]
            inputs.append(self.buffers.take(point.dtype, point.shape["n"], point.shape["k"]))
        else:
            inputs = list(self._qkv(point))
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            out = self._forward(point, leaves)
        gradient = self.buffers.take(point.dtype, *out.shape)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    def _forward(self, point: OpPoint, leaves: list[Tensor]) -> Tensor:
        if point.op == "linear":
            return nn.functional.linear(leaves[0], leaves[1])
        q, k, v = leaves
        if point.op == "sdpa_masked":
            with _pinned(point.backend):
                return nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=self._mask(point)
                )
        grouped = point.shape["heads"] != point.shape["kv_heads"]
        if point.backend == "default":
            self.ran = _choice(q, k, v, True, grouped)
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )
        with sdpa_kernel(BACKENDS[point.backend]):
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )

    def _adamw(self, point: OpPoint) -> Call:
        """A step of torch's AdamW over parameters of its own: a step writes them."""
        count = point.shape["tensors"]
        each = point.shape["elements"] // count
        parameters = [self.buffers.take(point.dtype, each).clone() for _ in range(count)]
        for parameter in parameters:
            parameter.requires_grad_()
            parameter.grad = self.buffers.take(point.dtype, each)
        fused = point.backend == "fused"
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=fused, foreach=not fused)
        return optimizer.step


def _pinned(backend: str) -> AbstractContextManager[object]:
    """Only this kernel; "default": whichever torch picks."""
    return nullcontext() if backend == "default" else sdpa_kernel(BACKENDS[backend])


def _choice(q: Tensor, k: Tensor, v: Tensor, causal: bool, grouped: bool) -> str | None:
    """The backend torch takes for these inputs when it is free to choose."""
    try:
        number = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, enable_gqa=grouped)
    except RuntimeError:
        return None
    return next((name for name, backend in BACKENDS.items() if backend == SDPBackend(number)), None)
