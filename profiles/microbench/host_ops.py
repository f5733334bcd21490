"""What a call costs the host: over tiny tensors, by the clock of the thread that issues the ops.

The device finishes each before the next arrives, so that nothing waits for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import DTYPES
from profiles.microbench.byte_ops import apply_rope, llama_rms_norm
from profiles.microbench.ops import Call
from profiles.microbench.point import OpPoint
from profiles.microbench.timing import HOST_CALLS, Timing, synchronize, time_on_host

WIDTH = 64
PARAMETERS = 8
NEW_EVERY_TIME, NEW_CALLS = ("sdpa_new_length", "sdpa_new_prompt"), 3
"""No call has the sizes of one before; cuDNN takes tens of milliseconds to plan for each."""


def host_time(point: OpPoint, device: torch.device) -> Timing:
    """What a call of this op costs the host."""
    tiny = _Tiny(device, DTYPES[point.dtype])
    grad = point.op == "linear_backward"
    with torch.enable_grad() if grad else torch.no_grad():
        call = tiny.call(point.op)
        if point.op in NEW_EVERY_TIME:
            return time_on_host(call, device, calls=NEW_CALLS, warmup=1)
        return time_on_host(call, device, calls=50 if point.op.startswith("adamw") else HOST_CALLS)


class _Tiny:
    """Calls over tensors of 64 elements or so."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def call(self, op: str) -> Call:
        calls: dict[str, Callable[[], Call]] = {
            "add": self._add,
            "linear": self._linear,
            "linear_module": lambda: self._module(nn.Linear(WIDTH, WIDTH, bias=False)),
            "identity_module": lambda: self._module(nn.Identity()),
            "sdpa": self._sdpa,
            "sdpa_new_length": lambda: self._sdpa_of_new_lengths(prompt=False),
            "sdpa_new_prompt": lambda: self._sdpa_of_new_lengths(prompt=True),
            "rmsnorm": self._rmsnorm,
            "rms_norm": self._fused_rms_norm,
            "silu": self._silu,
            "cat": self._cat,
            "embedding": self._embedding,
            "transpose_reshape": self._transpose_reshape,
            "rope": self._rope,
            "empty": self._empty,
            "linear_backward": self._linear_backward,
            "adamw_foreach": lambda: self._adamw(fused=False),
            "adamw_fused": lambda: self._adamw(fused=True),
            "launch_and_wait": self._launch_and_wait,
            "grouped_mm": self._grouped_mm,
            "sort": lambda: self._of_picks(torch.sort),
            "topk": self._topk,
            "histc": lambda: self._of_picks(lambda x: torch.histc(x, bins=8, min=0, max=7)),
            "cumsum": lambda: self._of_picks(lambda x: torch.cumsum(x, 0, dtype=torch.int32)),
            "index": self._index,
            "softmax": self._softmax,
            "cast": self._cast,
            "gather": self._gather,
            "scatter": self._scatter,
            "index_put": self._index_put,
            "arange": lambda: lambda: torch.arange(8, device=self.device),
            "searchsorted": self._searchsorted,
            "floor_divide": lambda: self._of_picks(lambda x: x // 2),
            "sum": self._sum,
            "masked_fill": self._masked_fill,
            "bmm": self._bmm,
            "conv1d": self._conv1d,
            "linear_bias": self._linear_bias,
            "half_silu_mul": self._half_silu_mul,
        }
        return calls[op]()

    def _add(self) -> Call:
        x, y = self.randn(1, WIDTH), self.randn(1, WIDTH)
        return lambda: x + y

    def _linear(self) -> Call:
        x, w = self.randn(1, WIDTH), self.randn(WIDTH, WIDTH)
        return lambda: nn.functional.linear(x, w)

    def _module(self, module: nn.Module) -> Call:
        x = self.randn(1, WIDTH)
        module = module.to(device=self.device, dtype=self.dtype)
        return lambda: module(x)

    def _sdpa(self) -> Call:
        q, k, v = (self.randn(1, 1, 8, WIDTH) for _ in range(3))
        return lambda: nn.functional.scaled_dot_product_attention(q, k, v)

    def _sdpa_of_new_lengths(self, *, prompt: bool) -> Call:
        """One query over a cache that grows by a token a call, or a prompt that does."""
        lengths = itertools.count(64)

        def call() -> Tensor:
            T = next(lengths)
            q = self.randn(1, 8, T if prompt else 1, WIDTH)
            k, v = self.randn(1, 8, T, WIDTH), self.randn(1, 8, T, WIDTH)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=prompt)

        return call

    def _rmsnorm(self) -> Call:
        x, weight = self.randn(1, WIDTH), self.randn(WIDTH)
        return lambda: llama_rms_norm(x, weight)

    def _fused_rms_norm(self) -> Call:
        x, weight = self.randn(1, WIDTH), self.randn(WIDTH)
        return lambda: nn.functional.rms_norm(x, (WIDTH,), weight, 1e-5)

    def _silu(self) -> Call:
        x = self.randn(1, WIDTH)
        return lambda: nn.functional.silu(x)

    def _cat(self) -> Call:
        x, y = self.randn(1, 1, 8, WIDTH), self.randn(1, 1, 1, WIDTH)
        return lambda: torch.cat((x, y), dim=-2)

    def _embedding(self) -> Call:
        table = self.randn(WIDTH, WIDTH)
        ids = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        return lambda: nn.functional.embedding(ids, table)

    def _transpose_reshape(self) -> Call:
        """[B, T, H·D] → [B, H, T, D]: no kernel runs."""
        x = self.randn(1, 1, WIDTH)
        return lambda: x.view(1, 1, 4, -1).transpose(1, 2)

    def _rope(self) -> Call:
        q, k = self.randn(1, 4, 1, WIDTH), self.randn(1, 2, 1, WIDTH)
        cos, sin = self.randn(1, 1, WIDTH), self.randn(1, 1, WIDTH)
        return lambda: apply_rope(q, k, cos, sin)

    def _empty(self) -> Call:
        """A block that the allocator has at hand."""
        return lambda: torch.empty(WIDTH, device=self.device, dtype=self.dtype)

    def _linear_backward(self) -> Call:
        x, w = self.randn(1, WIDTH).requires_grad_(), self.randn(WIDTH, WIDTH).requires_grad_()
        y, gradient = nn.functional.linear(x, w), self.randn(1, WIDTH)
        return lambda: torch.autograd.grad(y, (x, w), gradient, retain_graph=True)

    def _adamw(self, *, fused: bool) -> Call:
        parameters = [self.randn(WIDTH).requires_grad_() for _ in range(PARAMETERS)]
        for parameter in parameters:
            parameter.grad = self.randn(WIDTH)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=fused, foreach=not fused)
        return optimizer.step

    def _grouped_mm(self) -> Call:
        x, w = self.randn(8, WIDTH), self.randn(8, WIDTH, WIDTH)
        ends = torch.arange(1, 9, dtype=torch.int32, device=self.device)
        return lambda: nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=ends)

    def _of_picks(self, op: Callable[[Tensor], object]) -> Call:
        picks = torch.arange(8, dtype=torch.int32, device=self.device)
        return lambda: op(picks)

    def _topk(self) -> Call:
        scores = self.randn(1, WIDTH)
        return lambda: torch.topk(scores, 8, dim=-1)

    def _index(self) -> Call:
        x, picks = self.randn(8, WIDTH), torch.arange(8, device=self.device)
        return lambda: x[picks]

    def _softmax(self) -> Call:
        x = self.randn(1, WIDTH)
        return lambda: nn.functional.softmax(x, dim=-1, dtype=torch.float32)

    def _cast(self) -> Call:
        x = self.randn(1, WIDTH)
        return lambda: x.float()

    def _gather(self) -> Call:
        scores, picks = (
            self.randn(1, WIDTH),
            torch.zeros(1, 8, dtype=torch.long, device=self.device),
        )
        return lambda: scores.gather(-1, picks)

    def _scatter(self) -> Call:
        order = torch.arange(8, device=self.device)
        return lambda: torch.empty_like(order).scatter_(0, order, order)

    def _index_put(self) -> Call:
        order = torch.arange(8, device=self.device)

        def call() -> None:
            torch.empty_like(order)[order] = order

        return call

    def _searchsorted(self) -> Call:
        order = torch.arange(8, device=self.device)
        return lambda: torch.searchsorted(order, order, right=True, out_int32=True)

    def _sum(self) -> Call:
        x = self.randn(1, 8, WIDTH)
        return lambda: x.sum(dim=1)

    def _masked_fill(self) -> Call:
        x, hidden = self.randn(1, WIDTH), torch.ones(WIDTH, dtype=torch.bool, device=self.device)
        return lambda: x.masked_fill(hidden, 0.0)

    def _bmm(self) -> Call:
        x, w = self.randn(2, 1, WIDTH), self.randn(2, WIDTH, WIDTH)
        return lambda: torch.bmm(x, w)

    def _conv1d(self) -> Call:
        x, weight = self.randn(1, WIDTH, 8), self.randn(WIDTH, 1, 4)
        return lambda: nn.functional.conv1d(x, weight, padding=3, groups=WIDTH)

    def _linear_bias(self) -> Call:
        x, w, bias = self.randn(1, WIDTH), self.randn(WIDTH, WIDTH), self.randn(WIDTH)
        return lambda: nn.functional.linear(x, w, bias)

    def _half_silu_mul(self) -> Call:
        """An expert's gate: two views, two kernels."""
        both = self.randn(1, 2 * WIDTH)

        def call() -> Tensor:
            gate, up = both.chunk(2, dim=-1)
            return nn.functional.silu(gate) * up

        return call

    def _launch_and_wait(self) -> Call:
        x, y = self.randn(1, WIDTH), self.randn(1, WIDTH)

        def call() -> None:
            torch.add(x, y)
            synchronize(self.device)

        return call
