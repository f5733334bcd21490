"""What the host needs to issue a pass one kernel at a time: eager PyTorch is often bound by it.

    host = scale · Σ cost(op) + backward · Σ cost(op of the backward)

`cost` is measured by ops that compute nothing (profiles/microbench/host_ops.py); an op that nobody
timed costs as much as an addition. `scale`, one number an engine, stands for what Python does
between the ops (modules, views, the cache's classes); it comes from the calibration rows of the
end-to-end records, and no other row is seen. Host times vary from run to run far more than a GPU's
(`HostCost.spread`), and so does what is said of them here.
"""

from __future__ import annotations

from functools import lru_cache

from planner.calibration import HostCost
from planner.op_kinds import Attention, Bytes, Grouped, Product, Timed, timed_ops
from planner.program import Program

OTHER = "add"
ENGINES = ("transformers", "attnlab")


def host_seconds(program: Program, host: HostCost, engine: str) -> float:
    """Time to issue all ops of a pass."""
    scale = host.scale.get(engine) or host.scale.get(ENGINES[0], 1.0)
    forward, backward = _issued(program, host)
    return scale * forward + _backward_scale(host) * backward


def unscaled_seconds(program: Program, host: HostCost) -> float:
    """The sum over the ops, as they were timed alone."""
    return sum(_issued(program, host))


def _issued(program: Program, host: HostCost) -> tuple[float, float]:
    """Seconds of the ops that Python calls, and of those that autograd's thread does."""
    parts = [0.0, 0.0]
    for timed in timed_ops(program):
        parts[timed.op.name.endswith("backward")] += timed.count * _cost(timed, host)
    return parts[0], parts[1]


def _backward_scale(host: HostCost) -> float:
    """What autograd adds: a linear layer's backward over its two products, both timed alone."""
    if "linear_backward" not in host.op_s:
        return 1.0
    return host.op_s["linear_backward"] / (2.0 * host.op_s["linear"])


@lru_cache(maxsize=4096)
def _name(timed: Timed) -> str:
    kernel = timed.op.kernel
    match timed.kind:
        case Product():
            return "linear_module" if "backward" not in timed.op.name else "linear"
        case Attention():
            return "sdpa"
        case Grouped():
            return "linear"
        case Bytes(kind="gather") if kernel.startswith("embedding"):
            return "embedding"
        case Bytes(kind="norm"):
            return "rms_norm"
        case Bytes(kind="cat"):
            return "cat"
        case Bytes() if kernel in ("silu", "gelu", "relu", "sigmoid"):
            return "silu"
    return OTHER


def _cost(timed: Timed, host: HostCost) -> float:
    return host.op_s.get(_name(timed), host.op_s[OTHER])
