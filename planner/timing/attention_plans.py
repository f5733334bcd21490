"""What eager PyTorch waits for when its process meets a length for the first time.

cuDNN's attention is planned for every shape anew and the plan is kept (aten/src/ATen/native/cudnn/
MHA.cpp: its key holds the lengths of queries and keys): tens of milliseconds of the host's, once in
a process for a batch and a length, be there one layer or eighty. A cache that grows by a token a
step meets a new length with every token, until another sequence has been there. Flash attention,
the memory-efficient kernel, attention behind a mask and graphs plan nothing.

Timed on Hopper, in a loop. Of Blackwell only a report is known, 0.44 s a shape on a B200
(github.com/modelscope/FunASR/issues/3704): not said there.
"""

from __future__ import annotations

import numpy as np

from planner.autograd.fused_attention import fused_kernel
from planner.dtypes import element_bytes
from planner.program import Dims, Program
from planner.runtimes.base import Setting
from planner.timing.attention_times import WIDEST_HEAD
from planner.timing.calibration import HostCost
from planner.timing.clock import Speed
from planner.timing.host_cost import ENGINES
from planner.timing.op_kinds import Attention, timed_ops

HOPPER = "9"
PLAN = "sdpa_new_length"
"""Among the host's op times: a call of attention at a length that no call had before."""


def new_length_seconds(
    program: Program, dims: Dims, runtime: str, setting: Setting, speed: Speed, host: HostCost
) -> float | None:
    """A plan for every kind of attention in a pass that cuDNN runs, 0 where it runs none; None
    where nobody timed one.
    """
    eager = setting.mode == "eager" and runtime in ENGINES
    size = element_bytes(speed.dtype)
    if not eager or not setting.attention.startswith("sdpa"):
        return 0.0
    if speed.gpu.is_cpu or fused_kernel("cuda", speed.gpu.compute_capability, size) != "cudnn":
        return 0.0
    planned = {
        (kind.heads, kind.kv_heads, kind.head_dim)
        for kind in (timed.kind for timed in timed_ops(program))
        if isinstance(kind, Attention) and _by_cudnn(kind, dims)
    }
    timed_here = (speed.gpu.compute_capability or "").split(".")[0] == HOPPER
    if planned and not (timed_here and PLAN in host.op_s):
        return None
    return len(planned) * host.op_s.get(PLAN, 0.0)


def _by_cudnn(kind: Attention, dims: Dims) -> bool:
    masked = np.all(kind.masked(dims))
    return not masked and kind.backend in ("", "cudnn") and kind.head_dim <= WIDEST_HEAD
