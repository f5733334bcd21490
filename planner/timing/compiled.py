"""Kernels that torch's compiler makes: products of one row are reductions that stream weights."""

from __future__ import annotations

import numpy as np

from planner.program import Number
from planner.timing.clock import NO_KERNEL_BYTES, Speed, covering
from planner.timing.op_times import Fit

LARGE_PRODUCT = (1.0, 32768.0, 8192.0)
ROUNDING = 1e-9
"""Of an expectation that is a whole number."""
UNPACKING = 3
"""Vector instructions for a quantised weight in a product of one row: convert, multiply, add."""


def streamed(fit: Fit, moved: Number, unpacked: Number, speed: Speed) -> Number:
    """A compiler makes a reduction of a product of one row, which streams the weights.

    At the rate that a product over 537 MB of weights reaches, without the small ones' penalties
    (torch/_inductor/decomposition.py: mm of one row is a product and a sum). Weights that are
    unpacked on the way keep the vector units busy, at half their FLOP/s (an instruction is no
    multiply-add); both overlap as the fit's computing and moving do.
    """
    _, large = fit.family.work(*LARGE_PRODUCT, fit.dtype)
    known = None if speed.calibration is None else speed.calibration.fit("elementwise")
    launch_s = fit.roof.floor_s if known is None else known.seconds((NO_KERNEL_BYTES,))
    streaming = moved * fit.seconds(LARGE_PRODUCT) / large
    if np.all(np.asarray(unpacked) == 0):
        return launch_s + streaming
    issuing = UNPACKING * unpacked / (speed.gpu.flops_per_s("fp32") / 2.0)
    p = fit.roof.power
    return launch_s + (streaming**p + issuing**p) ** (1.0 / p)


def one_row_each(
    rows: Number,
    sizes: tuple[Number, ...],
    seconds: Number,
    flops: Number,
    moved: Number,
    speed: Speed,
) -> Number:
    """Experts that are reached by a row each are streamed as one product of a row is."""
    reached = sizes[1]
    fit = covering(speed, "gemm", speed.product_dtype, LARGE_PRODUCT)
    if fit is None:
        return seconds
    one = streamed(fit, moved, 0.0 if speed.expert_ratio == 1.0 else flops / 2.0, speed)
    return np.where(np.asarray(rows) <= reached * (1.0 + ROUNDING), one, seconds)


def three_reductions(moved: Number, speed: Speed) -> Number:
    """Attention of one query, where a compiler writes it: scores, softmax, weighted values.

    Each is a kernel that streams (torch/_inductor/decomposition.py: bmm of one row is a product and
    a sum). gpt-fast turns the fused kernels off while it decodes, as that is faster
    (generate.py, decode_n_tokens).
    """
    known, product = (
        None if speed.calibration is None else speed.calibration.fit(*name)
        for name in (("elementwise",), ("gemm", speed.dtype))
    )
    if known is None or product is None:
        return np.inf
    launch_s = known.seconds((NO_KERNEL_BYTES,))
    return 2 * launch_s + streamed(product, moved, 0.0, speed)
