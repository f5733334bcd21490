"""Why a printed figure is not the planned one: the setting that would give it, or what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.engine_logs.explanation import Line, close, off_by
from planner.engine_logs.planning import planned
from planner.engine_logs.read import EngineLog
from planner.engine_logs.setup import is_v0, version_of
from planner.format import gib
from planner.result import Estimate
from planner.workload import Deployment

TRIED_TENSOR = (1, 2, 4, 8)
TRIED_SEQUENCES = (16, 32, 64, 128, 256, 512, 1024)
TRIED_TOKENS = (512, 2048, 4096, 8192, 16384, 32768)
KERNEL_SINCE = (0, 17)
"""Top-k and top-p in a kernel: vllm-project/vllm#33538, not in 0.16.0's wheel, in 0.17.0's."""
CONTEXT_COUNTED = (0, 6)
"""Until 0.6 non_torch_memory had the CUDA context in it (#10511 changed what is subtracted)."""


def reason(line: Line, log: EngineLog, e: Estimate | None) -> str:
    """Why theirs is not ours; empty where one of them is missing."""
    theirs, ours = line.theirs, line.ours
    if theirs is None or ours is None or e is None:
        return ""
    least = 0.02 * 2**30 if line.unit == "bytes" else 0.005 if theirs % 1 else 1.0
    if close(theirs, ours, least=least):
        return "agrees"
    match line.item:
        case "GPU memory":
            return "another driver reserves more or less; or another GPU"
        case "budget, utilisation × memory":
            return f"{off_by(theirs, ours)}: another utilisation or memory"
        case "weights":
            return _weights(theirs, e)
        case "profile-run peak":
            return _peak(theirs, log, e)
        case "outside torch":
            return _outside(theirs, log, e)
        case "CUDA graphs":
            return "the plan is fitted to 0.3 GiB; the pool pays for them since 0.21 only"
        case "KV blocks" | "KV tokens" | "sequences at once":
            return f"{off_by(theirs, ours)}, as the pool" if ours else "the plan has no room at all"
        case "one longest sequence":
            return "other layers, heads or KV dtype than planned"
    return off_by(theirs, ours)


def pool_reason(lines: dict[str, Line]) -> str:
    """The pool is what the others leave: by how much each of them moves it."""
    pool = lines["KV pool"]
    if pool.theirs is None or pool.ours is None:
        return ""
    if close(pool.theirs, pool.ours):
        return "agrees"
    parts = []
    for item, sign in (
        ("budget, utilisation × memory", 1),
        ("weights", -1),
        ("profile-run peak", -1),
        ("outside torch", -1),
    ):
        difference = lines[item].difference if item in lines else None
        if difference is not None and abs(difference) > 0.02 * 2**30:
            moved = sign * difference
            parts.append(f"{item.split(',')[0]} {'+' if moved > 0 else '−'}{gib(abs(moved))}")
    return ", ".join(parts) or "from what is not printed"


def _weights(theirs: float, e: Estimate) -> str:
    for said, deploy in _other_weights(e):
        other = planned(e.model, deploy, 2)
        if other is not None and close(theirs, other.memory.weights_bytes):
            return f"as with {said}"
    ours = e.memory.weights_bytes
    if e.model.quantization is not None:
        return f"{off_by(theirs, ours)}: quantised otherwise than assumed"
    return f"{off_by(theirs, ours)}: another model, quantisation, draft model or adapters"


def _other_weights(e: Estimate) -> Iterator[tuple[str, Deployment]]:
    for gpus in TRIED_TENSOR:
        if gpus != e.deploy.tensor_parallel:
            yield f"tensor_parallel_size={gpus}", replace(e.deploy, tensor_parallel=gpus, gpus=1)
    if e.model.quantization is None and e.deploy.weight_dtype is None:
        yield "--quantization fp8", replace(e.deploy, weight_dtype="fp8")
    for dtype in ("fp32", "bf16"):
        if dtype != e.setting.dtype and e.setting.dtype != "fp16":
            yield f"dtype {dtype}", replace(e.deploy, dtype=dtype)


def _peak(theirs: float, log: EngineLog, e: Estimate) -> str:
    """The limits of a pass that would give this peak, if there are any."""
    ours, version = e.memory.activations_bytes, version_of(log)
    if theirs > ours and (is_v0(log) or (version is not None and version < KERNEL_SINCE)):
        sorts = "until 0.16 the sampler sorted the logits, some 10 bytes × rows × vocabulary more"
        return f"{off_by(theirs, ours)}: {sorts}"
    for sequences in (e.setting.max_sequences, *TRIED_SEQUENCES):
        for tokens in (e.setting.max_batched_tokens, *TRIED_TOKENS):
            if tokens < sequences:
                continue
            deploy = replace(e.deploy, max_sequences=sequences, max_batched_tokens=tokens)
            other = planned(e.model, deploy, 2)
            if other is not None and close(theirs, other.memory.activations_bytes):
                return f"as with max_num_seqs={sequences}, max_num_batched_tokens={tokens}"
    if is_v0(log):
        return f"{off_by(theirs, ours)}: V0 passes whole prompts"
    if e.model.towers:
        return f"{off_by(theirs, ours)}: its encoders are profiled too"
    return f"{off_by(theirs, ours)}: other limits of a pass, or kernels with buffers of their own"


def _outside(theirs: float, log: EngineLog, e: Estimate) -> str:
    version = version_of(log)
    if is_v0(log) and (version is None or version <= CONTEXT_COUNTED):
        return "until 0.6 the CUDA context and all of NCCL are in it"
    if e.deploy.world_size > 1:
        return "NCCL's buffers: by links, version and number of GPUs"
    return "code that CUDA loads: by kernels used and driver"
