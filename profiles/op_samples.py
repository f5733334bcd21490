"""Measured ops by family, from our own records: `profiles/microbench`.

An op that runs several kernels in a row (a rotation) counts as so many equal ones, each with its
part of the bytes, since programs list kernels; where they are of several kinds (a norm written
out), as what the known ones leave of it (composites.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from planner.timing.attention_times import whole_waves
from planner.timing.fresh_pages import MAPPED_FROM_BYTES, SMALLEST_BYTES
from planner.timing.op_families import (
    ACROSS,
    CUMSUM_DOWN,
    ELEMENT_BYTES,
    ELEMENTWISE_TANH,
    FAR,
    FEW_ROWS,
    GEMM_FEW,
    JOINED,
    LATENT_BLOCKS,
    MASKED,
    NORM_RMS,
    OFFSETS,
    OFFSETS_CAST,
    STRIDED,
    WIDE_QUERIES,
    gemm_family,
    triangle,
)
from profiles.fitting import Samples
from profiles.microbench.op_record import OpRecord, merged

Row: TypeAlias = tuple[str, list[float], int]
"""The name of a fit, the sizes, how many kernels share the time."""
PRODUCTS = ("linear", "scaled_mm")
COMPUTING = ("gemm", "prefill", "decode", "backward", "moe")
HALF = "fp16"
"""A GPU runs it as it runs bf16, but for a share that it takes longer (calibrate.py: _half)."""
SMALLEST_ROWS = 64
"""Reductions of fewer rows than this leave most of a GPU idle and are not streams of bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """How a measured op stands in a program: its kind, kernels, and bytes of one element of it."""

    kind: str
    kernels: int
    element_bytes: float
    smallest_rows: int = 1


BYTE_OPS: Mapping[str, Written] = {
    "copy": Written(kind="elementwise", kernels=1, element_bytes=4),
    "add": Written(kind="elementwise", kernels=1, element_bytes=6),
    "silu_mul": Written(kind="elementwise", kernels=2, element_bytes=10),
    "gelu_tanh": Written(kind=ELEMENTWISE_TANH, kernels=1, element_bytes=4),
    "rms_norm": Written(kind="norm", kernels=1, element_bytes=4),
    "layer_norm": Written(kind="norm", kernels=1, element_bytes=4),
    "cross_entropy": Written(
        kind="reduction", kernels=1, element_bytes=8, smallest_rows=SMALLEST_ROWS
    ),
    "upcast": Written(kind="cast", kernels=1, element_bytes=6),
    "rope": Written(kind=STRIDED, kernels=10, element_bytes=4.5 * ELEMENT_BYTES),
    "cat": Written(kind="cat", kernels=1, element_bytes=4),
    "gelu": Written(kind=ELEMENTWISE_TANH, kernels=1, element_bytes=4),
    "embedding": Written(kind="gather", kernels=1, element_bytes=4),
}
"""A rotation, x · cos + turned(x) · sin of queries and keys: two products, a sum, the halves joined
and one of them negated, 4½ times as many elements as x has, by ten kernels."""
WALKED: Mapping[str, str] = {
    "mul_row": OFFSETS,
    "silu_half": OFFSETS,
    "silu_cut": OFFSETS,
    "mul_column": OFFSETS,
    "mul_decays": OFFSETS,
    "mul_pairs": OFFSETS,
    "clone_heads": OFFSETS,
    "repeat_matrices": OFFSETS,
    "mul_mixed": OFFSETS_CAST,
    "mul_heads": OFFSETS_CAST,
    "clone_turned": ACROSS,
    "clone_t": ACROSS,
    "mul_steps": ACROSS,
    "repeat_heads": ACROSS,
    "repeat_matrices_t": ACROSS,
    "clone_across": FAR,
    "add_turned": FAR,
}
"""Kernels that work out offsets, by how they read (planner/autograd/layouts.py: reach). bf16 by a
column of float32, `mul_mixed`: a conversion beside it (CUDALoops.cuh: gpu_kernel_impl)."""
SUMS: Mapping[str, str] = {
    "cumsum_pairs": CUMSUM_DOWN,
    "cumsum_tokens": "cumsum",
    "cumsum_counts": "cumsum",
    "conv1d": "convolution",
}


UNKNOWN_TO_CPUS = (*WALKED, *SUMS, "cat_heads", "bmm")
"""Ops whose kernels are a GPU's own."""
BY_INDEX = ("gather_picks", "scatter_places", "put_places")
"""A few numbers read or written by an index: a mixture's places and weights."""
CPU_KINDS: Mapping[str, str] = {
    "rms_norm": NORM_RMS,
    "rope": "elementwise",
    "cat": "elementwise",
}
"""What a CPU runs as other kinds than a GPU does (timing/byte_times.py: CPU_PLAIN, TANH)."""
SEVERAL_OUTPUTS: Mapping[str, int] = {"silu_mul": 2, "rms_norm": 2, "rmsnorm": 2, "rope": 3}
"""Tensors as large as the first that live at once in an op of several kernels."""


def samples_of_records(
    records: Iterable[OpRecord], *, cpu: bool = False, multiprocessors: int | None = None
) -> dict[str, Samples]:
    """Samples by the name of their fit: "gemm:bf16", "prefill:bf16:cudnn", "elementwise".

    "…:warm": over what the op before has left in the cache. Of a `cpu` those rows are left out
    whose outputs malloc gives back to the system between the calls (planner/timing/fresh_pages.py).
    """
    rows: dict[str, list[tuple[list[float], float, bool]]] = {}
    good = [r for r in merged(records).values() if r.status == "ok" and r.samples_s]
    for record in good:
        if cpu and is_given_anew(record):
            continue
        if cpu and record.op in UNKNOWN_TO_CPUS:
            continue
        found = _sample(record, multiprocessors)
        if cpu and found is not None:
            found = _on_cpu(record, *found)
        elif (record.family, record.op) == ("bandwidth", "rope"):
            found = _rotation(record)
        elif found is not None and record.family in COMPUTING and record.dtype == HALF:
            found = _as_bf16(record, *found)
        if found is not None and record.median_s is not None:
            name, sizes, kernels = found
            name = f"{name}:warm" if record.cache == "warm" else name
            row = (sizes, record.median_s / kernels, record.split == "held-out")
            rows.setdefault(name, []).append(row)
    return {name: as_samples(found) for name, found in rows.items()}


def is_given_anew(record: OpRecord) -> bool:
    """Whether a CPU's outputs may go back to the system after each call: together with the rest
    that malloc keeps at its end they are twice the largest of the sweep, 16 MiB.
    """
    if record.family != "bandwidth" or record.op not in SEVERAL_OUTPUTS:
        return False
    s = record.shape
    elements = s["tokens"] * s["heads"] * s["head_dim"] if "tokens" in s else s["rows"] * s["width"]
    return SEVERAL_OUTPUTS[record.op] * 4 * elements >= MAPPED_FROM_BYTES - SMALLEST_BYTES


def _on_cpu(record: OpRecord, name: str, sizes: list[float], kernels: int) -> Row:
    if record.family == "gemm" and sizes[0] < FEW_ROWS:
        name = name.replace("gemm", GEMM_FEW.name)
    if record.family == "bandwidth":
        plain = name == STRIDED  # whose elements are counted as of two bytes
        name = CPU_KINDS.get(record.op, name)
        sizes = [2.0 * size for size in sizes] if plain and record.dtype == "fp32" else sizes
    return name, sizes, kernels


def _as_bf16(record: OpRecord, name: str, sizes: list[float], kernels: int) -> Row | None:
    """Attention in fp16, which takes as long: more shapes of the same kernels."""
    if record.op != "sdpa":
        return None
    return name.replace(f":{HALF}", ":bf16"), sizes, kernels


def _rotation(record: OpRecord) -> Row:
    """Ten kernels: elements that they write and bytes that they move, a kernel."""
    s = record.shape
    elements = s["tokens"] * (s["heads"] + s["kv_heads"]) * s["head_dim"]
    size = 4 if record.dtype == "fp32" else 2
    kernels = BYTE_OPS["rope"].kernels
    return OFFSETS, [4.5 * elements / kernels, 10.0 * size * elements / kernels], kernels


def as_samples(rows: list[tuple[list[float], float, bool]]) -> Samples:
    """Rows of sizes, seconds, held out."""
    return Samples(
        sizes=np.array([row[0] for row in rows], dtype=np.float64),
        seconds=np.array([row[1] for row in rows], dtype=np.float64),
        held_out=np.array([row[2] for row in rows], dtype=bool),
    )


def joined(samples: Samples | None, rows: list[tuple[list[float], float, bool]]) -> Samples | None:
    """Samples with some more rows; None of nothing."""
    if not rows:
        return samples
    more = as_samples(rows)
    if samples is None:
        return more
    return Samples(
        sizes=np.concatenate((samples.sizes, more.sizes)),
        seconds=np.concatenate((samples.seconds, more.seconds)),
        held_out=np.concatenate((samples.held_out, more.held_out)),
    )


def _sample(record: OpRecord, multiprocessors: int | None) -> Row | None:
    s, dtype = record.shape, record.dtype
    match record.family:
        case "gemm" if record.op in PRODUCTS:
            kind = gemm_family(dtype, s["n"], s["k"])
            return f"{kind}:{dtype}", [s["m"], s["n"], s["k"]], 1
        case "moe":
            reached = s.get("reached", min(s["experts"], s["m"]))
            return f"grouped:{dtype}", [s["m"], reached, s["n"], s["k"]], 1
        case "decode" | "prefill" | "backward" if record.op == "sdpa":
            tokens = s["context"] if record.family == "decode" else s["tokens"]
            heads = [s["heads"], s["kv_heads"], s["head_dim"]]
            name = "attention_backward" if record.family == "backward" else record.family
            backend = record.ran or record.backend
            return f"{name}:{dtype}:{backend}", [s["batch"], tokens, *heads], 1
        case "decode" if record.op == "sdpa_latent":
            blocks = s["batch"] * -(-s["heads"] // WIDE_QUERIES)
            sizes = [float(whole_waves(blocks, multiprocessors)), s["context"], s["width"]]
            return f"{LATENT_BLOCKS.name}:{dtype}", sizes, 1
        case "prefill" | "backward" if record.op == "sdpa_masked":
            heads = [s["heads"], s["kv_heads"], s["head_dim"]]
            side = triangle(s["tokens"] * s["context"])
            name = "attention_backward" if record.family == "backward" else record.family
            masked = MASKED if record.backend == "default" else f"{MASKED}-{record.backend}"
            return f"{name}:{dtype}:{masked}", [s["batch"], side, *heads], 1
        case "optimizer" if record.backend == "fused":
            return "optimizer", [float(record.bytes)], 1
        case "bandwidth" if record.op in ("sort", "topk"):
            return record.op, [float(record.bytes)], 1
        case "gemm" if record.op == "bmm" and dtype == "fp32":
            return f"bmm:{dtype}", [s[name] for name in ("batch", "m", "n", "k")], 1
        case "bandwidth" if record.op in WALKED:
            return WALKED[record.op], [_elements(record), float(record.bytes)], 1
        case "bandwidth" if record.op == "cat_heads":
            each = ELEMENT_BYTES * s["batch"] * s["tokens"] * s["heads"]
            parts = (s["first"], s["second"])
            return JOINED, [each * sum(parts), each * max(parts)], 1
        case "bandwidth" if record.op == "cumsum_pairs":
            return CUMSUM_DOWN, [float(record.bytes), s["chunk"]], 1
        case "bandwidth" if record.op in SUMS:
            return SUMS[record.op], [float(record.bytes)], 1
        case "bandwidth" if record.op in BY_INDEX:
            return "gather", [float(record.bytes)], 1
        case "bandwidth" if record.op == "index_rows":  # read again for each pick, and written
            return "gather", [4.0 * s["rows"] * s["top_k"] * s["width"]], 1
        case "bandwidth" if record.op in BYTE_OPS:
            return _byte_sample(record)
    return None


def _elements(record: OpRecord) -> float:
    """What a kernel that works out offsets writes."""
    s = record.shape
    if "rows" in s and "batch" not in s:
        return float(s["rows"] * s["width"])
    if "channels" in s:
        return float(s["batch"] * s["tokens"] * s["channels"])
    if "rows" in s:
        return float(s["batch"] * s.get("heads", 1) * s["rows"] * s["width"])
    each = s["batch"] * s["chunks"] * s["chunk"] * s["heads"]
    return float(each * s.get("head_dim", s["chunk"]))


def _byte_sample(record: OpRecord) -> Row | None:
    written, s = BYTE_OPS[record.op], record.shape
    if record.op == "rope":
        elements = s["tokens"] * (s["heads"] + s["kv_heads"]) * s["head_dim"]
    elif record.op == "cat":
        elements = s["batch"] * s["kv_heads"] * (s["context"] + 1) * s["head_dim"]
    else:
        elements = s["rows"] * s["width"]
        if s["rows"] < written.smallest_rows:
            return None
    by_element = written.kind == STRIDED
    as_it_is = record.op in ("cross_entropy", "upcast") or by_element
    wider = 2 if record.dtype == "fp32" and not as_it_is else 1
    moved = wider * written.element_bytes * elements / written.kernels
    return written.kind, [moved], written.kernels
