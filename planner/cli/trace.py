"""`planner trace`: the memory of any module or model, on fake tensors. Reaches for profiles."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.allocator import AllocatorSettings
from planner.catalog.gpus import Gpu, gpu_named
from planner.errors import check_choice, check_size
from planner.format import gib
from planner.overhead import outside_torch_bytes, overhead_rows, workspace_bytes
from planner.report import write_csv

if TYPE_CHECKING:
    from profiles.module_trace import ModuleTrace  # noqa: TID251


def trace_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="pkg.mod:factory (run when named; returns a module, or (module, inputs) or "
            "(module, inputs, loss)), or a MODEL as elsewhere.",
        ),
    ],
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of each sequence.")] = 1024,
    train: Annotated[bool, typer.Option("--train", help="Two training steps.")] = False,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adamw or sgd; else none: gradients alone.")
    ] = None,
    optimizer_impl: Annotated[
        str, typer.Option("--optimizer-impl", help="foreach, fused or for-loop.")
    ] = "foreach",
    autocast: Annotated[bool, typer.Option("--autocast", help="bf16 autocast.")] = False,
    logits: Annotated[str, typer.Option("--logits", help="all or last, of a MODEL.")] = "all",
    runtime: Annotated[
        str, typer.Option("--runtime", help="transformers or attnlab, of a MODEL.")
    ] = "transformers",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, bf16 or fp16, of a MODEL.")
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Short name; decides workspace and fit.")] = (
        "h200"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write what lives at the peak.")
    ] = None,
) -> None:
    """Memory of a forward or a training step, op by op, without a GPU. Exit 1 if it does not fit.

    The module runs on fake tensors; its storages go through torch's caching allocator, simulated.
    """
    from profiles.targets import trace_target  # noqa: TID251

    check_size("batch", batch)
    check_size("tokens", tokens)
    check_choice("logits", logits, ("all", "last"))
    device = gpu_named(gpu)
    traced = trace_target(
        target,
        batch=batch,
        tokens=tokens,
        runtime=runtime,
        dtype=dtype,
        logits=logits,
        train=train,
        optimizer=optimizer,
        optimizer_impl=optimizer_impl,
        autocast=autocast,
    )
    answer = summary(traced, device)
    if csv is not None:
        write_csv(traced.at_peak(), csv)
    print(json.dumps(answer, indent=1) if as_json else explain(traced, device, answer))
    if not answer["fits"]:
        raise typer.Exit(1)


def summary(traced: ModuleTrace, gpu: Gpu) -> dict[str, Any]:
    """The trace as plain JSON types."""
    workspace = workspace_bytes(gpu)
    plain = traced.allocator(workspace_bytes=workspace)
    expandable = traced.allocator(
        workspace_bytes=workspace, settings=AllocatorSettings(expandable_segments=True)
    )
    ops = {made.op for made in traced.made}
    loaded = overhead_rows(
        gpu,
        attention="sdpa" if any("scaled_dot_product" in op for op in ops) else "eager",
        trains=any("backward" in made.phase for made in traced.made),
    )
    device_used = plain.peak_reserved_bytes + outside_torch_bytes(loaded)
    return {
        "target": traced.name,
        "traced": True,
        "gpu": gpu.name,
        "peak_live_bytes": traced.peak_live_bytes,
        "peak_allocated_bytes": plain.peak_allocated_bytes,
        "peak_reserved_bytes": plain.peak_reserved_bytes,
        "peak_reserved_expandable_bytes": expandable.peak_reserved_bytes,
        "device_used_bytes": device_used,
        "gpu_memory_bytes": gpu.memory_bytes,
        "fits": device_used <= gpu.memory_bytes,
        "split_bytes": traced.split(),
        "peak": asdict(traced.peak_allocation),
        "seconds": traced.seconds,
    }


def explain(traced: ModuleTrace, gpu: Gpu, answer: dict[str, Any]) -> str:
    """The same in words, with the largest things that live at the peak."""
    peak = traced.peak_allocation
    where = f" in {peak.module}" if peak.module else ""
    lines = [
        f"{traced.name}: {len(traced.made):,} storages traced in {traced.seconds:.1f} s on fake "
        f"tensors, played on {gpu.label} (simulated)",
        f"  peak live      {gib(answer['peak_live_bytes']):>12}  at {peak.op}{where}, {peak.phase}",
        f"  torch allocates{gib(answer['peak_allocated_bytes']):>12}",
        f"  torch reserves {gib(answer['peak_reserved_bytes']):>12}  "
        f"({gib(answer['peak_reserved_expandable_bytes'])} with expandable segments)",
        f"  device         {gib(answer['device_used_bytes']):>12}  of {gib(gpu.memory_bytes)}: "
        + ("fits" if answer["fits"] else "does not fit"),
        "  at the peak: "
        + ", ".join(f"{kind} {gib(size)}" for kind, size in answer["split_bytes"].items()),
    ]
    for row in traced.at_peak().head(8).to_dict("records"):
        module = f" in {row['module']}" if row["module"] else ""
        times = f"{row['count']} × " if row["count"] > 1 else ""
        lines.append(f"    {gib(row['bytes']):>12}  {row['kind']}: {times}{row['op']}{module}")
    return "\n".join(lines)
