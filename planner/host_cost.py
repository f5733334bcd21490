"""What the host needs to issue a pass one kernel at a time: eager PyTorch is often bound by it.

    host = scale · Σ cost(op)

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
    return scale * unscaled_seconds(program, host)


def unscaled_seconds(program: Program, host: HostCost) -> float:
    """The sum over the ops, as they were timed alone."""
    return sum(timed.count * _cost(timed, host) for timed in timed_ops(program))


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
