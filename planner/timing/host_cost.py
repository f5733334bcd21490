"""What the host needs to issue a pass one kernel at a time: eager PyTorch is often bound by it.

    host = scale · (Σ cost(op) + views · cost(view) + calls · cost(call)) + Σ cost(op of backward)

`cost` is measured by ops that compute nothing (profiles/microbench/host_ops.py), one call after the
other in a loop; an op that nobody timed costs as much as an addition. `views` (calls of torch that
run no kernel) and `calls` (of Python functions) are counted in the classes themselves
(host_calls.py), as are kernels that a program lists as one. An op of the backward pass costs what
autograd takes for a linear layer's, a call that checkpointing makes `HOOKED` others.

`scale`, one number an engine, is what a whole model's code takes beyond the same calls in a loop,
which finds everything in the processor's caches: the median over the calibration rows that wait for
their host, each at the speed its host had then; no other row is seen. Who shares a processor waits
longer, in spells: `HostCost.spread` is how far single steps are from their median.

A pass that begins when its GPU has nothing left to do waits for what is issued before the first
layer (`head_seconds`); a host that is slower than its kernels takes all of its time.

On a CPU what is measured of an op holds what issuing it costs, and nothing is computed meanwhile:
only what lies between the ops is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from planner.program import ADDED, BACKWARD, OPTIMIZER_STEP, Program, Segment
from planner.timing.calibration import HostCost
from planner.timing.host_calls import counted, trained
from planner.timing.op_kinds import (
    Attention,
    Batched,
    Bytes,
    Grouped,
    Product,
    Timed,
    converts,
    is_there,
    timed_ops,
)
from planner.trained.optimizer_loops import NORM
from planner.trained.optimizers import UPDATE_8BIT, UPDATE_32BIT

OTHER = "add"
ENGINES = ("transformers", "attnlab")
VIEWS_TIMED = 2
"""A view and a transpose are timed together: transpose_reshape."""
MODULE_CALLS = 3
"""Python functions that calling a module runs: __call__, _call_impl, forward."""
HOOKED = 3.6
"""What a call of checkpointing's takes beside a module's: it makes contexts, weak references and
detached tensors. Timed in small decoders on a CPU by tools/checkpoint_cost.py: 3.1 to 3.9 of llama
and mistral where next to nothing else ran, more on a busy one; no record is fitted."""
SELECTED = 2.8
"""The same of selective checkpointing's, whose modes show every op to Python
(TorchDispatchMode): 2.5 to 3.2 of llama and mistral, there and back, by the same tool with torch
2.13."""
UNPACKED = {"dequantize_4bit": 40.0, "dequantize_blockwise": 17.0}
"""Calls of a module that does nothing which bitsandbytes 0.50 takes to make a weight of its codes,
beyond an op of torch's own: Python down to the kernel, through the dispatcher. Its CUDA backend
timed on a CPU over kernels that return at once (tools/bitsandbytes_cost.py): 40 to 43 forward, 42
to 45 on the way back, less an addition; of nested scales 11 to 13 and 24 to 28 on top."""
BLOCKWISE = 36.0
"""The same of a step of AdamW8bit for one parameter: 34 to 37."""
UPDATES = (UPDATE_8BIT, UPDATE_32BIT)
"""Kernels that the host waits for before it goes on: bitsandbytes synchronises after each
parameter (optim/optimizer.py, step), torch's Adafactor reads each NORM as a number."""
MATH_PRODUCTS, MATH_OTHERS = 2, 5
"""at::_scaled_dot_product_attention_math over grouped heads: scores and their values; queries and
keys scaled, keys and values copied to every head, softmax."""
BY_KERNEL = {
    "arange": "arange",
    "bmm": "bmm",
    "cat": "cat",
    "conv1d": "conv1d",
    "convolution": "conv1d",
    "cumsum": "cumsum",
    "embedding": "embedding",
    "floor_divide": "floor_divide",
    "gather": "gather",
    "gelu": "silu",
    "grouped_mm": "grouped_mm",
    "histc": "histc",
    "index": "index",
    "index_put": "index_put",
    "masked_fill": "masked_fill",
    "mean": "sum",
    "relu": "silu",
    "scatter": "scatter",
    "searchsorted": "searchsorted",
    "sigmoid": "silu",
    "silu": "silu",
    "softmax": "softmax",
    "sort": "sort",
    "sum": "sum",
    "topk": "topk",
}
"""Kernels → the op that was timed and takes the same way through torch: activations are unary ops,
means and sums reductions. Others cost an addition, or what their kind does."""
BIASED = ("addmm",)
FOLDING_VIEWS = 2
"""A product of [B, T, h] by a matrix folds to rows and unfolds again, where rows alone were timed
(aten/src/ATen/native/Linear.cpp: _flatten_nd_linear; LinearAlgebra.cpp: _matmul_impl)."""
ADAPTERS = ", adapters"
ADAPTER_PRODUCTS = 2
"""How LoRA's products are named, and how many a linear layer has."""
DORA = ", DoRA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Whose code issues the ops: the runtime, the model's type, attention's name, the cache's;
    `selective`: what its checkpointed layers keep is picked op by op.
    """

    runtime: str
    model_type: str = ""
    attention: str = ""
    cache: str = ""
    selective: bool = False


def host_seconds(
    program: Program, host: HostCost, engine: Engine, *, checkpointed: int = 0
) -> float:
    """Time to issue all ops of a pass, or of a phase of one in which layers are checkpointed."""
    scale = _scale(host, engine)
    forward, backward = _issued(program, host)
    between = between_seconds(program, host, engine, checkpointed=checkpointed, scale=scale)
    return scale * forward + between + _backward_scale(host) * backward


def unscaled_seconds(program: Program, host: HostCost, engine: Engine) -> float:
    """Of a forward pass: every call as it was timed alone."""
    return sum(_issued(program, host)) + between_seconds(program, host, engine)


def unscaled_ops_seconds(program: Program, host: HostCost) -> float:
    """Of the ops alone, of both directions, as they were timed."""
    forward, backward = _issued(program, host)
    return forward + _backward_scale(host) * backward


def between_seconds(
    program: Program,
    host: HostCost,
    engine: Engine,
    *,
    checkpointed: int = 0,
    scale: float = 1.0,
) -> float:
    """What is issued and called between the listed ops, for every layer that runs forward.

    Of `checkpointed` layers every tensor that autograd saves goes through Python, there and back:
    calls that take `HOOKED` of others, in a whole model, so that no `scale` comes on top;
    selective, every op does, at `SELECTED`.
    """
    found = counted(engine.runtime, engine.model_type, engine.attention, engine.cache)
    if found is None:
        return 0.0
    layer, whole = found
    runs = forward_runs(program)
    asked = layer.times(runs.layers).plus(whole.times(runs.passes))
    more = trained(engine.model_type, selective=engine.selective, dora=runs.dora)
    calls, hooked = asked.calls, 0.0
    calls += runs.adapted * more.adapted
    if checkpointed and runs.passes:
        hooked = checkpointed * more.forward
        hooked += runs.adapted * (more.adapted_forward - more.adapted)
    elif checkpointed and runs.layers:
        hooked = checkpointed * (more.backward - layer.calls)
        hooked += runs.adapted * (more.adapted_backward - more.adapted)
    view_s = _view_s(host)
    call_s = _call_s(host)
    unlisted_s = max(0.0, asked.kernels - runs.listed) * host.op_s[OTHER]
    calls += MODULE_CALLS * python_ops(program)
    usual_s = unlisted_s + asked.views * view_s + calls * call_s
    return scale * usual_s + (SELECTED if engine.selective else HOOKED) * hooked * call_s


def waiting_seconds(program: Program, host: HostCost, engine: Engine) -> float:
    """How long a GPU has nothing to do because the host waits for it: from the end of each such
    kernel until the next one is there. A number that Python reads is copied first.
    """
    scale = _scale(host, engine)
    wait_s = host.op_s.get("launch_and_wait", host.op_s[OTHER])
    seconds = 0.0
    for timed in timed_ops(program):
        if timed.op.kernel in UPDATES:
            between_s = BLOCKWISE * host.op_s.get("identity_module", 0.0)
        elif timed.op.kernel == NORM:
            between_s = host.op_s[OTHER]
        else:
            continue
        seconds += timed.count * (wait_s + scale * between_s)
    return seconds


@lru_cache(maxsize=256)
def python_ops(program: Program) -> float:
    """Modules that do nothing which a program's ops take, where Python runs inside them."""
    found = 0.0
    for timed in timed_ops(program):
        blockwise = BLOCKWISE if timed.op.kernel in UPDATES else 0.0
        found += timed.count * (UNPACKED.get(timed.op.kernel, 0.0) + blockwise)
    return found


def head_seconds(program: Program, host: HostCost, engine: Engine) -> float:
    """What the host needs until a pass's first layer begins: positions, masks, tables.

    A GPU that has nothing left to do waits for it, and is behind the host from then on. The calls
    of the pass around its layers are taken to come before them: after them only a norm and a
    product are left.
    """
    scale = _scale(host, engine)
    issued_s = sum(_issued(_head(program), host))
    found = counted(engine.runtime, engine.model_type, engine.attention, engine.cache)
    if found is None:
        return scale * issued_s
    _, whole = found
    view_s = _view_s(host)
    call_s = _call_s(host)
    called_s = max(0.0, whole.views) * view_s + max(0.0, whole.calls) * call_s
    return scale * (issued_s + called_s)


@lru_cache(maxsize=256)
def _head(program: Program) -> Program:
    """What stands before the first layer."""
    before = tuple(takewhile(lambda s: s.first_layer is None or is_there(s), program.segments))
    return Program(name=f"{program.name}, head", segments=before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """What runs forward: layers (those that are run again, too), the pass around them, adapted
    linear layers (LoRA; `dora`), and the ops that a program lists of all that.
    """

    layers: int
    passes: int
    adapted: int
    listed: int
    dora: bool = False


@lru_cache(maxsize=256)
def forward_runs(program: Program) -> Runs:
    """Counted in the segments of a program."""
    layers = [s for s in program.segments if s.first_layer is not None and _forward(s)]
    passes = any(s.first_layer is None and _forward(s) for s in program.segments)
    adapters = sum(
        s.count * sum(op.flops is not None and op.name.endswith(ADAPTERS) for op in s.ops)
        for s in layers
    )
    return Runs(
        layers=sum(s.count for s in layers),
        passes=int(passes),
        adapted=adapters // ADAPTER_PRODUCTS,
        dora=any(op.name.endswith(DORA) for s in layers for op in s.ops),
        listed=sum(
            t.count
            for t in timed_ops(program)
            if not (t.op.name.endswith("backward") or t.op.sometimes)
        ),
    )


def _scale(host: HostCost, engine: Engine) -> float:
    """What calls take in a whole model of what they take alone."""
    return host.scale.get(engine.runtime) or host.scale.get(ENGINES[0], 1.0)


def _view_s(host: HostCost) -> float:
    return host.op_s.get("transpose_reshape", 0.0) / VIEWS_TIMED


def _call_s(host: HostCost) -> float:
    """A Python function's call."""
    return host.op_s.get("identity_module", 0.0) / MODULE_CALLS


def _forward(segment: Segment) -> bool:
    """Whether a product runs here that is none of the backward pass; on the way back a norm will
    do: where selective checkpointing has kept all products, norms are run again.
    """
    if is_there(segment) or segment.phase == OPTIMIZER_STEP:
        return False
    again = segment.phase == BACKWARD
    return any(
        not op.name.endswith("backward") and (op.flops is not None or (again and "norm" in op.name))
        for op in segment.ops
    )


def _issued(program: Program, host: HostCost) -> tuple[float, float]:
    """Seconds of the ops that Python calls, and of those that autograd's thread does."""
    parts = [0.0, 0.0]
    folding_s = FOLDING_VIEWS * _view_s(host)
    for timed in timed_ops(program):
        if timed.op.sometimes:  # those that do run are among what was counted
            continue
        backward = timed.op.name.endswith("backward")
        folds = isinstance(timed.kind, Product) and not backward
        cost_s = _cost(timed, host) + folds * folding_s
        if timed.op.name.endswith(ADDED):  # by the engine itself: no node, no Python
            cost_s /= _backward_scale(host)
        parts[backward] += timed.count * cost_s
    return parts[0], parts[1]


def _backward_scale(host: HostCost) -> float:
    """What autograd adds: a linear layer's backward over its two products, both timed alone."""
    if "linear_backward" not in host.op_s:
        return 1.0
    return host.op_s["linear_backward"] / (2.0 * host.op_s["linear"])


@lru_cache(maxsize=4096)
def _name(timed: Timed) -> str:
    kernel = timed.op.kernel.split(".")[0].strip("_")
    match timed.kind:
        case Grouped():
            return "grouped_mm"
        case Product():
            return "linear_bias" if kernel in BIASED else "linear"
        case Batched():
            return BY_KERNEL.get(kernel, "linear")
        case Attention():
            return "sdpa"
        case Bytes(kind="norm"):
            return "rms_norm"
        case Bytes() if converts(timed.op):
            return "cast"
    return BY_KERNEL.get(kernel, OTHER)


def _written_out(timed: Timed) -> bool:
    """Whether torch has no fused kernel for this attention: fp32 wants as many heads of keys.

    Programs that list the ops of it do not come here.
    """
    match timed.kind:
        case Attention(kv_bytes=4, heads=H, kv_heads=G, backward=False):
            return H != G and not timed.op.kernel
    return False


def _cost(timed: Timed, host: HostCost) -> float:
    if _written_out(timed):
        product_s = host.op_s.get("linear", host.op_s[OTHER])
        return MATH_PRODUCTS * product_s + MATH_OTHERS * host.op_s[OTHER]
    return host.op_s.get(_name(timed), host.op_s[OTHER])
