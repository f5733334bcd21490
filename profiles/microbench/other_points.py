"""Ceilings, backward passes, ops that only move bytes, optimizers, host, graph and allocator."""

from __future__ import annotations

from collections.abc import Iterator

from profiles.microbench import attention_points, gemm_points
from profiles.microbench.attention_points import HELD_OUT, LLAMA, Heads
from profiles.microbench.point import OpPoint, Split

KIB, MIB = 2**10, 2**20
WIDTH, HELD_OUT_WIDTHS = 4096, (3584, 768)

MAIN_OPS = ("copy", "add", "rmsnorm", "silu_mul")
"""Those whose size is swept finely; the others follow at every second size."""
ROW_OPS = ("rms_norm", "layer_norm", "gelu_tanh", "rope", "softmax", "embedding", "cat")
SWEEP_BYTES = tuple(4 * KIB * 4**i for i in range(10))  # 4 KiB … 1 GiB of one tensor
WARM_BYTES = (256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB)
VOCABULARY, HELD_OUT_VOCABULARY = 128256, 50257
ROW_WIDTH = 2048
ROUTED_EXPERTS, HELD_OUT_EXPERTS = 64, (128,)
ROPE_HEADS: Heads = LLAMA

HOST_OPS = (
    "add",
    "linear",
    "linear_module",
    "identity_module",
    "sdpa",
    "rmsnorm",
    "rms_norm",
    "silu",
    "cat",
    "embedding",
    "transpose_reshape",
    "rope",
    "empty",
    "linear_backward",
    "adamw_foreach",
    "adamw_fused",
    "launch_and_wait",
    "grouped_mm",
    "sort",
    "topk",
    "histc",
    "cumsum",
    "index",
    "softmax",
    "cast",
)
MORE_HOST_OPS = (
    "gather",
    "scatter",
    "index_put",
    "arange",
    "searchsorted",
    "floor_divide",
    "sum",
    "masked_fill",
    "bmm",
    "conv1d",
    "linear_bias",
    "half_silu_mul",
    "sdpa_new_length",
    "sdpa_new_prompt",
)
"""What mixtures and scans call beside them."""
CPU_HOST_OPS = HOST_OPS[: HOST_OPS.index("adamw_foreach")]
JOINED_HEADS = ((8, 0, 128), (32, 0, 64), (16, 64, 64), (8, 32, 32), (40, 16, 64))
HELD_OUT_JOINED_HEADS = ((32, 0, 80), (32, 16, 16), (32, 32, 48), (16, 0, 256))
"""(heads, first part, second): phi-2's caches and rotations, and gemma-2-9b's caches."""
JOINED_TOKENS = ((4, 1), (64, 1), (1, 512), (2, 2048), (8, 1024))
GRAPH_KERNELS = (1, 10, 100, 1000)
GRAPH_WIDTHS = (64, 4096)
GRAPH_KINDS = ("add", "mean", "cat", "silu", "mul", "linear")
SEGMENT_BYTES = (2 * MIB, 20 * MIB, 256 * MIB, 1024 * MIB)


def ceiling_points() -> Iterator[OpPoint]:
    """What the device reaches at its best: a large product and a large copy."""
    square = {"m": 8192, "n": 8192, "k": 8192}
    yield OpPoint(family="ceiling", op="linear", shape=square)
    yield OpPoint(family="ceiling", op="copy", shape=_rows(2048 * MIB, WIDTH, 2))
    yield OpPoint(family="ceiling", op="scaled_mm", shape=square, dtype="fp8")
    yield OpPoint(family="ceiling", op="sum", shape=_rows(2048 * MIB, WIDTH, 2))


def cpu_ceiling_points() -> Iterator[OpPoint]:
    """The same at a CPU's size."""
    square = {"m": 512, "n": 512, "k": 512}
    yield OpPoint(family="ceiling", op="linear", shape=square, dtype="fp32")
    yield OpPoint(family="ceiling", op="copy", shape=_rows(64 * MIB, 1024, 4), dtype="fp32")


def sustained_points() -> Iterator[OpPoint]:
    """More than a second of one op each: joules per FLOP and per byte, and what idling takes."""
    square = {"m": 8192, "n": 8192, "k": 8192}
    decode = attention_points.shape_of(LLAMA, 32, 1, 8192)
    yield OpPoint(family="sustained", op="linear", shape=square)
    yield OpPoint(family="sustained", op="copy", shape=_rows(2048 * MIB, WIDTH, 2))
    yield OpPoint(family="sustained", op="sdpa", shape=decode, backend="flash")
    yield OpPoint(family="sustained", op="linear", shape={"m": 1, "n": 128256, "k": 4096})
    yield OpPoint(family="sustained", op="idle", shape={})


def bandwidth_points() -> Iterator[OpPoint]:
    """Ops that compute next to nothing, over the size of their (first) tensor."""
    for i, size in enumerate(SWEEP_BYTES):
        for op in MAIN_OPS:
            yield _bandwidth(op, size, WIDTH)
        for j, op in enumerate(ROW_OPS):
            if (i + j) % 2 == 0:
                yield _bandwidth(op, size, WIDTH)
        if i % 2:
            for width in HELD_OUT_WIDTHS:
                yield _bandwidth(("rmsnorm", "silu_mul", "add", "softmax")[i // 2 % 4], size, width)
    for size in WARM_BYTES:
        for op in MAIN_OPS:
            yield _bandwidth(op, size, WIDTH, cache="warm")
    for vocabulary in (VOCABULARY, HELD_OUT_VOCABULARY):
        split: Split = "calibration" if vocabulary == VOCABULARY else "held-out"
        for op, dtype in (("cross_entropy", "fp32"), ("upcast", "bf16"), ("argmax", "bf16")):
            for rows in (1, 64, 512, 2048):
                shape = {"rows": rows, "width": vocabulary}
                yield OpPoint(family="bandwidth", op=op, shape=shape, dtype=dtype, split=split)


def routing_points() -> Iterator[OpPoint]:
    """What sorts tokens by expert: top-k of `width` scores a token, sort and count of the picks."""
    for width in (ROUTED_EXPERTS, *HELD_OUT_EXPERTS):
        split: Split = "calibration" if width == ROUTED_EXPERTS else "held-out"
        for op in ("topk", "sort", "histc"):
            for rows in (4, 64, 1024, 4096):
                shape = {"rows": rows, "width": width, "top_k": 8}
                yield OpPoint(family="bandwidth", op=op, shape=shape, dtype="fp32", split=split)


def strided_points() -> Iterator[OpPoint]:
    """Ops that torch's kernels cannot load by vectors: rows for all, mixed dtypes, halves."""
    for rows, width, top_k in ((64, 2048, 8), (4096, 2048, 8), (32768, 2048, 8), (4096, 1408, 6)):
        split: Split = "calibration" if width == ROW_WIDTH else "held-out"
        for op in ("mul_row", "mul_mixed", "silu_half", "sum_picks"):
            shape = {"rows": rows, "width": width}
            if op == "sum_picks":
                shape = {"rows": rows // top_k, "width": width, "top_k": top_k}
            yield OpPoint(family="bandwidth", op=op, shape=shape, split=split)


def cpu_bandwidth_points() -> Iterator[OpPoint]:
    """fp32 up to 16 MiB."""
    for width in (512, 384):
        for op in (*MAIN_OPS, *ROW_OPS):
            for size in (4 * KIB, 64 * KIB, 1 * MIB, 16 * MIB):
                if size >= 4 * width:
                    yield _bandwidth(op, size, width, dtype="fp32")
    for rows in (1, 64):
        shape = {"rows": rows, "width": 32000}
        yield OpPoint(family="bandwidth", op="cross_entropy", shape=shape, dtype="fp32")


def backward_points() -> Iterator[OpPoint]:
    """The backward pass of a linear layer (both gradients) and of causal attention."""
    for m in (512, 2048, 8192):
        for n, k in ((4096, 4096), (14336, 4096), (3584, 3584), (4096, 14336)):
            shape = {"m": m, "n": n, "k": k}
            split = gemm_points.split_of(n, k)
            yield OpPoint(family="backward", op="linear", shape=shape, split=split)
    for heads in (LLAMA, HELD_OUT[0], (16, 16, 64)):
        for batch, tokens in ((1, 512), (1, 2048), (1, 8192), (4, 2048)):
            shape = {**attention_points.shape_of(heads, batch, tokens, tokens)}
            split = attention_points.split_of(heads)
            for backend in ("flash", "default")[: 2 if tokens == 2048 else 1]:
                yield OpPoint(
                    family="backward", op="sdpa", shape=shape, backend=backend, split=split
                )


def cpu_backward_points() -> Iterator[OpPoint]:
    """A few in fp32."""
    for m, n, k in ((128, 512, 512), (128, 2048, 512), (128, 384, 384)):
        shape = {"m": m, "n": n, "k": k}
        split = gemm_points.split_of(n, k)
        yield OpPoint(family="backward", op="linear", shape=shape, dtype="fp32", split=split)
    shape = {**attention_points.shape_of((8, 8, 64), 1, 128, 128)}
    yield OpPoint(family="backward", op="sdpa", shape=shape, dtype="fp32")


def cat_points() -> Iterator[OpPoint]:
    """Heads as a rotation joins them, and as a cache that is still empty takes them."""
    for heads, first, second in (*JOINED_HEADS, *HELD_OUT_JOINED_HEADS):
        held_out = (heads, first, second) in HELD_OUT_JOINED_HEADS
        for batch, tokens in JOINED_TOKENS:
            shape = {"batch": batch, "tokens": tokens, "heads": heads}
            shape |= {"first": first, "second": second}
            split: Split = "held-out" if held_out else "calibration"
            yield OpPoint(family="bandwidth", op="cat_heads", shape=shape, split=split)


def optimizer_points(largest: int = 2**28, dtype: str = "bf16") -> Iterator[OpPoint]:
    """AdamW steps over `elements` in eight tensors, gradients and state in the same dtype."""
    for elements in (2**16, 2**20, 2**24, 2**28):
        for backend in ("foreach", "fused"):
            if elements <= largest:
                shape = {"tensors": 8, "elements": elements}
                yield OpPoint(
                    family="optimizer", op="adamw", shape=shape, dtype=dtype, backend=backend
                )


def host_points(
    ops: tuple[str, ...] = (*HOST_OPS, *MORE_HOST_OPS), dtype: str = "bf16"
) -> Iterator[OpPoint]:
    """What the host pays to issue an op whose work is nothing."""
    for op in ops:
        yield OpPoint(family="host", op=op, shape={}, dtype=dtype)


def graph_points() -> Iterator[OpPoint]:
    """Replays of a graph of so many tiny kernels: a floor per replay and one per kernel."""
    for kernels in GRAPH_KERNELS:
        yield OpPoint(family="graph", op="replay", shape={"kernels": kernels})
        yield OpPoint(family="graph", op="launch", shape={"kernels": kernels})


def unlike_graph_points() -> Iterator[OpPoint]:
    """Graphs of kernels of several kinds in turn, and of each kind alone."""
    for width in GRAPH_WIDTHS:
        for op in ("unlike", "unlike_products"):
            for kernels in GRAPH_KERNELS[1:] if width == GRAPH_WIDTHS[0] else GRAPH_KERNELS[-1:]:
                yield OpPoint(family="graph", op=op, shape={"kernels": kernels, "width": width})
        for kind in GRAPH_KINDS:
            shape = {"kernels": GRAPH_KERNELS[-1], "width": width}
            yield OpPoint(family="graph", op=f"alike_{kind}", shape=shape)


def allocator_points() -> Iterator[OpPoint]:
    """A new segment from the driver, the same given back, and a block the allocator had cached."""
    for op in ("segment_malloc", "segment_free", "cached"):
        for size in SEGMENT_BYTES:
            yield OpPoint(family="allocator", op=op, shape={"bytes": size}, dtype="uint8")


def _bandwidth(op: str, size: int, width: int, cache: str = "cold", dtype: str = "bf16") -> OpPoint:
    itemsize = {"bf16": 2, "fp32": 4}[dtype]
    rows = _rows(size, width, itemsize)["rows"]
    shape = {"rows": rows, "width": width}
    H, G, D = ROPE_HEADS if dtype == "bf16" else (width // 64, width // 64, 64)
    if op == "rope":  # the size is that of the queries
        shape = {"tokens": max(1, size // (H * D * itemsize)), "heads": H, "kv_heads": G}
        shape["head_dim"] = D
    elif op == "cat":  # a DynamicCache's keys, one token more
        shape = {"batch": 1, "kv_heads": G, "context": max(1, size // (G * D * itemsize))}
        shape["head_dim"] = D
    held_out = width in HELD_OUT_WIDTHS or width == 384
    return OpPoint(
        family="bandwidth",
        op=op,
        shape=shape,
        dtype=dtype,
        cache="warm" if cache == "warm" else "cold",
        split="held-out" if held_out else "calibration",
    )


def _rows(size: int, width: int, itemsize: int) -> dict[str, int]:
    return {"rows": max(1, size // (width * itemsize)), "width": width}
