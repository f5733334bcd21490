"""torch's OutOfMemoryError: who holds the memory, and what of it is only fragments."""

from __future__ import annotations

from dataclasses import replace

from planner.engine_logs.explanation import Line, Remedy
from planner.engine_logs.planning import planned
from planner.engine_logs.read import EngineLog
from planner.format import gib
from planner.result import Estimate

FRAGMENTS = 0.05  # of the capacity: unallocated segments worth a word


def memory_lines(log: EngineLog, e: Estimate | None) -> list[Line]:
    """What the message says, in the order in which it fills the device."""
    if log.get("tried") is None:
        return []
    ours = _planned(e)
    said = {
        "unallocated": _fragments(log),
        "tried": _missing(log),
        **{name: why for name, (_, why) in ours.items()},
    }
    lines = [
        Line(
            item=item,
            unit="bytes",
            theirs=figure.value,
            ours=ours[name][0] if name in ours else None,
            why=said.get(name, ""),
            quoted=figure.line,
        )
        for item, name in (
            ("capacity of the GPU", "capacity"),
            ("held by this process", "process"),
            ("allocated by torch", "allocated"),
            ("of it in graphs' private pools", "private"),
            ("reserved, not allocated", "unallocated"),
            ("free", "free"),
            ("asked for", "tried"),
        )
        if (figure := log.figures.get(name)) is not None
    ]
    others = other_processes(log)
    if others is not None and others > 0.05 * 2**30:
        why = "capacity − free − this process: other processes, or another rank's context"
        lines.append(Line(item="held by others", unit="bytes", theirs=others, ours=None, why=why))
    return lines


def _planned(e: Estimate | None) -> dict[str, tuple[int, str]]:
    """What the plan has in place of a figure, and what it counts."""
    if e is None:
        return {}
    m = e.memory
    if e.pool is None:  # what was run is not said: the weights are sure
        return {
            "capacity": (e.gpu.memory_bytes, ""),
            "process": (m.total_bytes, "planned: one sequence of one token"),
            "allocated": (m.weights_bytes, "planned: the weights"),
        }
    inside = m.weights_bytes + m.activations_bytes + e.pool.size_bytes
    return {
        "capacity": (e.gpu.memory_bytes, ""),
        "process": (m.device_used_bytes, "planned: with the whole pool and its highest peak"),
        "allocated": (inside, "planned: weights, pool and the highest peak"),
    }


def other_processes(log: EngineLog) -> float | None:
    """Capacity less what is free and what this process holds; None where it is not said."""
    capacity, free, process = log.get("capacity"), log.get("free"), log.get("process")
    if capacity is None or free is None or process is None:
        return None
    return capacity - free - process


def unallocated(log: EngineLog) -> float | None:
    """Reserved by torch and not in use, also from the older message's two numbers."""
    said, reserved, allocated = log.get("unallocated"), log.get("reserved"), log.get("allocated")
    if said is None and reserved is not None and allocated is not None:
        return reserved - allocated
    return said


def _fragments(log: EngineLog) -> str:
    loose, tried = unallocated(log), log.get("tried")
    if loose is None or tried is None:
        return ""
    return "enough for what was asked, but in pieces" if loose >= tried else "too little to help"


def _missing(log: EngineLog) -> str:
    tried, free = log.get("tried"), log.get("free")
    if tried is None or free is None:
        return ""
    return f"{gib(tried - free)} more than is free" if tried > free else "less than is free"


def memory_remedies(log: EngineLog) -> list[Remedy]:
    """What the message itself asks for."""
    tried, free = log.get("tried"), log.get("free")
    if tried is None or free is None:
        return []
    found = []
    loose, capacity = unallocated(log), log.get("capacity")
    if loose is not None and (loose >= tried or (capacity and loose > FRAGMENTS * capacity)):
        found.append(
            Remedy(
                change="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
                effect=f"torch holds {gib(loose)} in pieces; segments that grow keep fewer",
                fits=loose >= tried,
            )
        )
    others = other_processes(log)
    if others is not None and others >= tried - free > 0:
        found.append(
            Remedy(
                change="end the other processes on the GPU",
                effect=f"they hold {gib(others)}, {gib(tried - free)} are missing",
                fits=True,
            )
        )
    utilization = log.arguments.gpu_memory_utilization or log.get("utilization")
    if log.is_vllm and capacity and utilization and tried > free:
        lower = int((utilization - (tried - free) / capacity) * 100) / 100
        if lower > 0:
            found.append(
                Remedy(
                    change=f"--gpu-memory-utilization {lower:g}",
                    effect=f"leaves the missing {gib(tried - free)} outside the pool",
                    fits=True,
                )
            )
    return found


def lighter_weights(log: EngineLog, e: Estimate | None) -> list[Remedy]:
    """Weights quantised on loading by transformers, where the message is torch's alone."""
    capacity = log.get("capacity")
    if e is None or e.pool is not None or e.model.quantization is not None or capacity is None:
        return []
    found = []
    for dtype in ("int8", "nf4"):
        other = planned(e.model, replace(e.deploy, weight_dtype=dtype), 2)
        if other is not None and other.memory.weights_bytes < e.memory.weights_bytes:
            found.append(
                Remedy(
                    change=f"weights in {dtype}",
                    effect=f"{gib(e.memory.weights_bytes)} become "
                    f"{gib(other.memory.weights_bytes)} of {gib(capacity)}",
                    fits=other.memory.total_bytes <= capacity,
                )
            )
    return found
