"""What a process does first on a device, one step at a time: see overheads.py.

Order is part of the measurement: what a step loads stays loaded, so a step shows what it adds to
those before it. The backward comes before other threads, which would leave it a cuBLAS handle with
its workspace. A step returns what has to live until it was looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

Step = Callable[[torch.device], Any]

SIDE = 1024  # of the matrices: 2 MiB in 16 bits
HEADS, TOKENS, HEAD_DIM = 16, 1024, 128

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
GRAPH_KERNELS = (10, 100, 1000)


def init(device: torch.device) -> None:
    """torch's CUDA start-up; the context comes with the first use."""
    torch.cuda.init()  # type: ignore[no-untyped-call]


def tiny_tensor(device: torch.device) -> None:
    """The context, and a first segment of 2 MiB."""
    torch.zeros(1, device=device)


def elementwise(device: torch.device) -> None:
    """Ordinary kernels of torch's own, a random generator among them."""
    x = torch.randn(SIDE, device=device)
    (x * 2 + 1).sum().item()


def matmul(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> None:
    """One product; the first of a process makes cuBLAS's handle and workspace."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
        a @ a
    finally:
        torch.set_float32_matmul_precision(before)


def linear_with_bias(device: torch.device) -> None:
    """A product with an epilogue: cuBLASLt, whose workspace may be another one."""
    x, w = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    functional.linear(x, w, torch.zeros(SIDE, device=device, dtype=torch.bfloat16))


def scaled_matmul_fp8(device: torch.device) -> None:
    """A product of float8 matrices, the second one column-major as cuBLASLt wants it."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def attention(device: torch.device, backend: SDPBackend, *, backward: bool = False) -> None:
    """Causal attention by one backend alone."""
    q, k, v = (
        torch.randn(
            1,
            HEADS,
            TOKENS,
            HEAD_DIM,
            device=device,
            dtype=torch.bfloat16,
            requires_grad=backward,
        )
        for _ in range(3)
    )
    with sdpa_kernel([backend]):
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if backward:
        _backward(out)


def backward_of_matmul(device: torch.device) -> None:
    """Products on the thread that autograd has for the device: a handle of its own?"""
    w = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16, requires_grad=True)
    _backward(w @ w)


def triton_kernel(device: torch.device) -> None:
    """A kernel compiled by Triton."""
    from profiles import triton_probe

    triton_probe.add_one_(torch.zeros(SIDE, device=device))


def fused_adamw(device: torch.device) -> None:
    """One step of torch's fused AdamW."""
    p = torch.zeros(SIDE, SIDE, device=device, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=1e-3, fused=True).step()


def matmul_on_another_thread(device: torch.device) -> None:
    """The same product from a second thread of the host."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            matmul(device, torch.bfloat16)
            torch.cuda.synchronize(device)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def matmul_on_another_stream(device: torch.device) -> None:
    """The same product on a second stream of this thread."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        matmul(device, torch.bfloat16)
    stream.synchronize()


def graph_of_kernels(device: torch.device, kernels: int) -> Any:
    """A CUDA graph of small kernels, replayed once; alive until it was looked at.

    Capturing empties torch's cache first: what is reserved falls.
    """
    x = torch.zeros(SIDE, device=device)
    return _captured(lambda: [x.add_(1) for _ in range(kernels)])


def graph_of_matmuls(device: torch.device) -> Any:
    """A graph that needs a cuBLAS workspace: on the stream of the capture, in the graph's pool."""
    a = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    return _captured(lambda: a @ a)


def _backward(out: torch.Tensor) -> None:
    """With a real gradient: that of a sum has strides of 0, which not every kernel takes."""
    out.backward(torch.randn_like(out))  # type: ignore[no-untyped-call]


def _captured(work: Callable[[], Any]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    graph.replay()
    return graph, kept


def nothing(device: torch.device) -> None:
    """What the steps before held is gone; torch's cache is not given back."""


def empty_cache(device: torch.device) -> None:
    """Cached segments given back."""
    torch.cuda.empty_cache()


def clear_workspaces(device: torch.device) -> None:
    """cuBLAS workspaces and cached segments given back: what is left is not torch's."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


STEPS: dict[str, Step] = {
    "torch.cuda.init": init,
    "tiny tensor": tiny_tensor,
    "elementwise kernels": elementwise,
    "matmul bf16": partial(matmul, dtype=torch.bfloat16),
    "matmul bf16 again": partial(matmul, dtype=torch.bfloat16),
    "linear with bias bf16": linear_with_bias,
    "matmul fp16": partial(matmul, dtype=torch.float16),
    "matmul fp32": partial(matmul, dtype=torch.float32),
    "matmul tf32": partial(matmul, dtype=torch.float32, tf32=True),
    "scaled_mm fp8": scaled_matmul_fp8,
    **{f"sdpa {name}": partial(attention, backend=b) for name, b in BACKENDS.items()},
    "backward of a matmul": backward_of_matmul,
    "backward of a matmul again": backward_of_matmul,
    **{
        f"sdpa {name} with backward": partial(attention, backend=b, backward=True)
        for name, b in BACKENDS.items()
    },
    "triton kernel": triton_kernel,
    "fused AdamW": fused_adamw,
    "matmul on another thread": matmul_on_another_thread,
    "matmul on another stream": matmul_on_another_stream,
    "empty_cache before graphs": empty_cache,
    **{f"graph of {n} kernels": partial(graph_of_kernels, kernels=n) for n in GRAPH_KERNELS},
    "graph of a matmul": graph_of_matmuls,
    "graphs dropped": nothing,
    "empty_cache": empty_cache,
    "cuBLAS workspaces cleared": clear_workspaces,
}
"""In the order in which they run."""
