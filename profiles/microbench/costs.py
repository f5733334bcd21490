"""What a point must compute and move at the least: from its shape, without torch.

FLOPs: a multiply and an add are two; only what a matrix unit does is counted, so that an op that
adds or normalises has 0. Causal attention counts the pairs that the mask lets through, not the
square. Bytes: each input read once and each output written once, whatever an implementation that
goes over its data several times really moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from profiles.microbench.point import OpPoint

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "uint8": 1, "int64": 8}
INDEX_BYTES = 8  # torch's int64

Shape = Mapping[str, int]

BACKWARD_PRODUCTS = {"linear": (2, 1), "sdpa": (5, 2), "sdpa_masked": (5, 2)}
"""Matrix products of a backward pass, and of the forward pass it belongs to (attention recomputes
its scores)."""

PRODUCTS = ("linear", "linear_bias", "scaled_mm", "grouped_mm")

TENSORS = {
    "copy": (1, 1),
    "sum": (1, 0),
    "add": (2, 1),
    "rmsnorm": (1, 1),
    "rms_norm": (1, 1),
    "layer_norm": (1, 1),
    "silu_mul": (2, 1),
    "gelu_tanh": (1, 1),
    "gelu": (1, 1),
    "gelu_new": (1, 1),
    "exp": (1, 1),
    "softmax": (1, 1),
}
"""Whole tensors [rows, width] that an op reads and writes."""

ROW_WEIGHTS = {"rmsnorm": 1, "rms_norm": 1, "layer_norm": 2}
"""Vectors [width] it reads beside them."""


def flops(point: OpPoint) -> int:
    """Operations of the matrix products in a point."""
    s = point.shape
    if point.op in PRODUCTS and "m" in s:
        forward = 2 * s["m"] * s["n"] * s["k"]
    elif point.op == "bmm" and s:
        forward = 2 * s["batch"] * s["m"] * s["n"] * s["k"]
    elif point.op == "sdpa_latent":
        forward = 2 * s["batch"] * s["heads"] * s["context"] * (s["width"] + s["values"])
    elif point.op == "chunk_scan":
        forward = _scan_flops(s)
    elif point.op == "experts":
        forward = 2 * s["rows"] * s["top_k"] * 3 * s["width"] * s["hidden"]
    elif point.op in ("sdpa", "sdpa_masked") and s:
        forward = 4 * s["batch"] * s["heads"] * s["head_dim"] * _pairs(s["tokens"], s["context"])
    else:
        return 0
    if point.family != "backward":
        return forward
    products, of = BACKWARD_PRODUCTS[point.op]
    return forward * products // of


def floor_bytes(point: OpPoint) -> int:
    """Bytes of the inputs, once, and of the outputs, once; 0 where only the host is timed."""
    if not point.shape or point.family in ("graph", "allocator"):
        return 0
    size = ITEMSIZE[point.dtype]
    if point.family == "backward":
        return _backward_bytes(point, size)
    if point.op in TENSORS:
        read, written = TENSORS[point.op]
        rows, width = point.shape["rows"], point.shape["width"]
        result = 4 if point.op == "sum" else 0
        weights = ROW_WEIGHTS.get(point.op, 0) * width
        return size * ((read + written) * rows * width + weights) + result
    return _BYTES[point.op](point.shape, size)


def rotated_bytes(point: OpPoint) -> int:
    """The part of them that is taken from another place at every call: a GEMM's x stays."""
    total = floor_bytes(point)
    if point.op in PRODUCTS and point.family != "backward":
        s = point.shape
        return ITEMSIZE[point.dtype] * s.get("experts", 1) * s["n"] * s["k"]
    return total


def _pairs(tokens: int, context: int) -> int:
    """Query–key pairs of a causal mask whose last query sees the whole context."""
    return tokens * (context - tokens) + tokens * (tokens + 1) // 2


def _scan_flops(s: Shape) -> int:
    """Scores and their values within chunks, states of chunks, what comes of them, and states
    that follow one another."""
    L, H, P, N = s["chunk"], s["heads"], s["head_dim"], s["state"]
    within = 2 * L * (L * N + L * P + 2 * P * N)
    between = 2 * (s["chunks"] + 1) ** 2 * P * N
    return s["batch"] * H * (s["chunks"] * within + between)


def _gemm(s: Shape, size: int) -> int:
    return size * (s["m"] * s["k"] + s["n"] * s["k"] + s["m"] * s["n"])


def _gemm_bias(s: Shape, size: int) -> int:
    return _gemm(s, size) + size * s["n"]


def _bmm(s: Shape, size: int) -> int:
    return s["batch"] * _gemm(s, size)


def _scaled_mm(s: Shape, size: int) -> int:
    """fp8 in, two fp32 scales, bf16 out."""
    return size * (s["m"] * s["k"] + s["n"] * s["k"]) + 2 * 4 + 2 * s["m"] * s["n"]


def _grouped_mm(s: Shape, size: int) -> int:
    """Only experts that have a row are read."""
    used = s.get("reached", min(s["experts"], s["m"]))
    weights = used * s["n"] * s["k"]
    return size * (s["m"] * s["k"] + weights + s["m"] * s["n"]) + 4 * s["experts"]


def _sdpa(s: Shape, size: int) -> int:
    query = s["heads"] * s["tokens"]
    cache = s["kv_heads"] * s["context"]
    return size * 2 * s["batch"] * s["head_dim"] * (query + cache)


def _sdpa_masked(s: Shape, size: int) -> int:
    """And the mask, a byte a pair."""
    return _sdpa(s, size) + s["tokens"] * s["context"]


def _sdpa_latent(s: Shape, size: int) -> int:
    """A query and an output of each head, all heads' latents once."""
    query = s["heads"] * (s["width"] + s["values"])
    return size * s["batch"] * (query + s["context"] * s["width"])


def _mul_row(s: Shape, size: int) -> int:
    return size * (2 * s["rows"] * s["width"] + s["width"])


def _mul_mixed(s: Shape, size: int) -> int:
    """A column of float32 beside it; the result is as wide."""
    return s["rows"] * (size * s["width"] + 4 + 4 * s["width"])


def _silu_half(s: Shape, size: int) -> int:
    return 2 * size * s["rows"] * s["width"]


def _sum_picks(s: Shape, size: int) -> int:
    return size * s["rows"] * s["width"] * (s["top_k"] + 1)


def _picked(s: Shape, size: int) -> int:
    """Experts' numbers in, sorted ones and their old places out, for each pick of each token."""
    return 3 * INDEX_BYTES * s["rows"] * s["top_k"]


def _topk(s: Shape, size: int) -> int:
    """All scores in, the best and their places out."""
    return s["rows"] * (size * s["width"] + (size + INDEX_BYTES) * s["top_k"])


def _histc(s: Shape, size: int) -> int:
    return 4 * (s["rows"] * s["top_k"] + s["width"])


def _heads(s: Shape) -> int:
    """Elements of [B, C, L, H, D], or without D."""
    return s["batch"] * s["chunks"] * s["chunk"] * s["heads"] * s.get("head_dim", 1)


def _pair_count(s: Shape) -> int:
    """Elements of [B, H, C, L, L]."""
    return _heads(s) * s["chunk"]


def _clone_heads(s: Shape, size: int) -> int:
    return 2 * size * _heads(s)


def _clone_t(s: Shape, size: int) -> int:
    return 2 * size * s["batch"] * s["rows"] * s["width"]


def _add_turned(s: Shape, size: int) -> int:
    return 3 * size * _heads(s)


def _mul_heads(s: Shape, size: int) -> int:
    """And two bytes a head."""
    return 2 * size * _heads(s) + 2 * s["heads"]


def _silu_cut(s: Shape, size: int) -> int:
    return 2 * size * s["batch"] * s["channels"] * s["tokens"]


def _repeat_heads(s: Shape, size: int) -> int:
    return size * (_heads(s) // s["heads"] + _heads(s))


def _pad_tokens(s: Shape, size: int) -> int:
    return size * s["batch"] * s["heads"] * s["head_dim"] * (2 * s["tokens"] + s["pad"])


def _mask_expanded(s: Shape, size: int) -> int:
    """A number of each token in, of each pair out, the mask of a byte a pair."""
    return size * (_heads(s) + _pair_count(s)) + s["chunk"] ** 2


def _mask_pairs(s: Shape, size: int) -> int:
    return 2 * size * _pair_count(s) + s["chunk"] ** 2


def _cumsum_pairs(s: Shape, size: int) -> int:
    return 2 * size * _pair_count(s)


def _mul_pairs(s: Shape, size: int) -> int:
    return 3 * size * _pair_count(s)


def _mul_decays(s: Shape, size: int) -> int:
    return size * (2 * _heads(s) + _heads(s) // s["head_dim"])


def _mul_column(s: Shape, size: int) -> int:
    return size * s["rows"] * (2 * s["width"] + 1)


def _conv1d(s: Shape, size: int) -> int:
    """And a kernel and a bias for each channel."""
    channels = s["channels"] * (2 * s["batch"] * s["tokens"] + s["kernel"] + 1)
    return size * channels


def _rope_partial(s: Shape, size: int) -> int:
    """q and k in and out; cosines and sines of what is rotated."""
    whole = s["batch"] * s["tokens"] * s["head_dim"] * (s["heads"] + s["kv_heads"])
    return size * 2 * (whole + s["tokens"] * s["rotary"])


def _chunk_scan(s: Shape, size: int) -> int:
    """x, dt, the heads' decays, B and C in; y and the last state out."""
    H, P, N = s["heads"], s["head_dim"], s["state"]
    tokens = s["batch"] * s["chunks"] * s["chunk"]
    inputs = size * (tokens * (H * P + H + 2 * N) + 2 * H) + 4 * H
    return inputs + 4 * (tokens * H * P + s["batch"] * H * P * N)


def _experts(s: Shape, size: int) -> int:
    """Scores of four bytes, tokens in and out, the weights of experts that are reached."""
    weights = s["reached"] * 3 * s["width"] * s["hidden"]
    tokens = s["rows"] * (2 * size * s["hidden"] + 4 * s["experts"])
    return size * weights + tokens


def _gather_picks(s: Shape, size: int) -> int:
    """Of each pick its number and its score in, the score out."""
    return s["rows"] * s["top_k"] * (INDEX_BYTES + 2 * size)


def _index_rows(s: Shape, size: int) -> int:
    """Each token once, a copy of it for each of its picks."""
    rows = s["rows"] * s["top_k"]
    return size * s["width"] * (s["rows"] + rows) + INDEX_BYTES * rows


def _searchsorted(s: Shape, size: int) -> int:
    """Rows' experts and the experts in, an end of four bytes each out."""
    return INDEX_BYTES * (s["rows"] * s["top_k"] + s["width"]) + 4 * s["width"]


def _floor_divide(s: Shape, size: int) -> int:
    return 2 * INDEX_BYTES * s["rows"] * s["top_k"]


def _cumsum_counts(s: Shape, size: int) -> int:
    """float32 in, int32 out."""
    return 8 * s["width"]


def _repeat_matrices(s: Shape, size: int) -> int:
    return size * s["heads"] * s["rows"] * s["width"] * (1 + s["batch"])


def _rope(s: Shape, size: int) -> int:
    """q and k in and out; cosines and sines."""
    rotated = s["tokens"] * s["head_dim"] * (s["heads"] + s["kv_heads"])
    return size * (2 * rotated + 2 * s["tokens"] * s["head_dim"])


def _cat(s: Shape, size: int) -> int:
    """The old cache and one token in, both out."""
    token = s["batch"] * s["kv_heads"] * s["head_dim"]
    return size * 2 * token * (s["context"] + 1)


def _cat_heads(s: Shape, size: int) -> int:
    return size * 2 * s["batch"] * s["tokens"] * s["heads"] * (s["first"] + s["second"])


def _embedding(s: Shape, size: int) -> int:
    return s["rows"] * (INDEX_BYTES + 2 * size * s["width"])


def _cross_entropy(s: Shape, size: int) -> int:
    return s["rows"] * (size * s["width"] + INDEX_BYTES) + size


def _upcast(s: Shape, size: int) -> int:
    return s["rows"] * s["width"] * (size + 4)


def _argmax(s: Shape, size: int) -> int:
    return s["rows"] * (s["width"] * size + INDEX_BYTES)


def _adamw(s: Shape, size: int) -> int:
    """Parameter, gradient and two moments in; all but the gradient out."""
    return 7 * size * s["elements"]


_BYTES: Mapping[str, Callable[[Shape, int], int]] = {
    "linear": _gemm,
    "linear_bias": _gemm_bias,
    "bmm": _bmm,
    "scaled_mm": _scaled_mm,
    "grouped_mm": _grouped_mm,
    "sdpa": _sdpa,
    "rope": _rope,
    "cat": _cat,
    "cat_heads": _cat_heads,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "upcast": _upcast,
    "argmax": _argmax,
    "adamw": _adamw,
    "sdpa_masked": _sdpa_masked,
    "mul_row": _mul_row,
    "mul_mixed": _mul_mixed,
    "silu_half": _silu_half,
    "sum_picks": _sum_picks,
    "sort": _picked,
    "topk": _topk,
    "histc": _histc,
    "sdpa_latent": _sdpa_latent,
    "rope_partial": _rope_partial,
    "clone_heads": _clone_heads,
    "clone_turned": _clone_heads,
    "clone_across": _clone_heads,
    "clone_t": _clone_t,
    "add_turned": _add_turned,
    "mul_steps": _mul_decays,
    "mul_heads": _mul_heads,
    "silu_cut": _silu_cut,
    "repeat_heads": _repeat_heads,
    "pad_tokens": _pad_tokens,
    "mask_expanded": _mask_expanded,
    "mask_pairs": _mask_pairs,
    "cumsum_pairs": _cumsum_pairs,
    "cumsum_tokens": _clone_heads,
    "mul_pairs": _mul_pairs,
    "mul_decays": _mul_decays,
    "mul_column": _mul_column,
    "conv1d": _conv1d,
    "chunk_scan": _chunk_scan,
    "experts": _experts,
    "gather_picks": _gather_picks,
    "floor_divide": _floor_divide,
    "index_rows": _index_rows,
    "searchsorted": _searchsorted,
    "scatter_places": _picked,
    "put_places": _picked,
    "cumsum_counts": _cumsum_counts,
    "repeat_matrices": _repeat_matrices,
    "repeat_matrices_t": _repeat_matrices,
}


def _backward_bytes(point: OpPoint, size: int) -> int:
    """Linear: x, W and dy in, dx and dW out. Attention: q, k, v, out, dout in; dq, dk, dv out."""
    s = point.shape
    if point.op == "linear":
        return size * (2 * (s["m"] * s["k"] + s["n"] * s["k"]) + s["m"] * s["n"])
    query = s["heads"] * s["tokens"]
    cache = s["kv_heads"] * s["context"]
    mask = s["tokens"] * s["context"] if point.op == "sdpa_masked" else 0
    return size * s["batch"] * s["head_dim"] * (4 * query + 4 * cache) + mask
