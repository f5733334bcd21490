"""What the host needs to issue a pass one kernel at a time: eager PyTorch is often bound by it.

    host = scale · (Σ cost(op) + views · cost(view) + calls · cost(call)) + Σ cost(op of backward)

`cost` is measured by ops that compute nothing (profiles/microbench/host_ops.py), one call after the
other in a loop; an op that nobody timed costs as much as an addition. `views` (calls of torch that
run no kernel) and `calls` (of Python functions) are counted in the classes themselves
(host_calls.py). An op of the backward pass costs what autograd takes for a linear layer's.

`scale`, one number an engine, is what a whole model's code takes beyond the same calls in a loop,
which finds everything in the processor's caches. No pass ends before its host has issued it, so
every measured pass bounds the factor from above; it is the least of the bounds that the calibration
rows set, and no other row is seen. It stands for a host that nobody else disturbs. Who shares his
processor waits longer, in spells: `HostCost.spread` is how much longer the same rows have it.
"""

from __future__ import annotations

from functools import lru_cache

from planner.calibration import HostCost
from planner.host_calls import counted
from planner.op_kinds import Attention, Batched, Bytes, Grouped, Product, Timed, is_there, timed_ops
from planner.program import Program, Segment

OTHER = "add"
ENGINES = ("transformers", "attnlab")
VIEWS_TIMED = 2
"""A view and a transpose are timed together: transpose_reshape."""
MODULE_CALLS = 3
"""Python functions that calling a module runs: __call__, _call_impl, forward."""


def host_seconds(
    program: Program, host: HostCost, engine: str, *, model_type: str = "", attention: str = ""
) -> float:
    """Time to issue all ops of a pass."""
    scale = host.scale.get(engine) or host.scale.get(ENGINES[0], 1.0)
    forward, backward = _issued(program, host)
    between = between_seconds(program, host, engine, model_type, attention)
    return scale * (forward + between) + _backward_scale(host) * backward


def unscaled_seconds(
    program: Program, host: HostCost, engine: str, *, model_type: str = "", attention: str = ""
) -> float:
    """Of a forward pass: every call as it was timed alone."""
    between = between_seconds(program, host, engine, model_type, attention)
    return sum(_issued(program, host)) + between


def between_seconds(
    program: Program, host: HostCost, engine: str, model_type: str, attention: str
) -> float:
    """Views and Python functions between the kernels, of every layer that runs forward."""
    found = counted(engine, model_type, attention)
    if found is None:
        return 0.0
    layer, whole = found
    layers, passes = _runs(program)
    view_s = host.op_s.get("transpose_reshape", 0.0) / VIEWS_TIMED
    call_s = host.op_s.get("identity_module", 0.0) / MODULE_CALLS
    return (layers * layer.views + passes * whole.views) * view_s + (
        layers * layer.calls + passes * whole.calls
    ) * call_s


@lru_cache(maxsize=256)
def _runs(program: Program) -> tuple[int, int]:
    """How many layers run forward (again where they were checkpointed), and how many passes."""
    layers = sum(s.count for s in program.segments if s.first_layer is not None and _forward(s))
    return layers, int(any(s.first_layer is None and _forward(s) for s in program.segments))


def _forward(segment: Segment) -> bool:
    """Whether a product runs here that is none of the backward pass."""
    return not is_there(segment) and any(
        op.flops is not None and not op.name.endswith("backward") for op in segment.ops
    )


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
        case Product() | Grouped() | Batched():
            return "linear"
        case Attention():
            return "sdpa"
        case Bytes(kind="gather") if kernel.startswith("embedding"):
            return "embedding"
        case Bytes(kind="norm"):
            return "rms_norm"
        case Bytes() if kernel == "cat":
            return "cat"
        case Bytes() if kernel in ("silu", "gelu", "relu", "sigmoid"):
            return "silu"
    return OTHER


def _cost(timed: Timed, host: HostCost) -> float:
    return host.op_s.get(_name(timed), host.op_s[OTHER])
