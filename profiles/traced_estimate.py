"""An estimate read off a class of transformers: its tensors, its cache, its peak. Marked traced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import ConfigError, Deployment, Inference
from planner.catalog.gpus import Gpu, gpu_named
from planner.errors import shown
from planner.format import gib
from planner.ledger import Component, Row, ledger_table, total_bytes
from planner.overhead import outside_torch_bytes, overhead_rows, workspace_bytes
from planner.report import write_csv
from planner.result import Memory, Unsegmented
from profiles.trace import TracedModel

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedEstimate:
    """Memory of one workload on one GPU. Times are not traced: fake tensors take none."""

    model: TracedModel
    work: Inference
    gpu: Gpu
    dtype: str
    memory: Memory
    rows: tuple[Row, ...]

    @property
    def headroom_bytes(self) -> int:
        """What is left of the GPU's memory; negative: what is missing."""
        return self.gpu.memory_bytes - self.memory.total_bytes

    @property
    def fits(self) -> bool:
        """Whether the total fits into the GPU's memory."""
        return self.headroom_bytes >= 0

    def table(self) -> pd.DataFrame:
        """The ledger, as that of a predicted estimate."""
        return ledger_table(self.rows)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, safe to open in a spreadsheet."""
        write_csv(self.table(), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "model": self.model.name,
            "basis": "traced",
            "class": self.model.class_name,
            "runtime": f"transformers {self.model.transformers}",
            "parameter_count": self.model.parameter_count,
            "workload": asdict(self.work),
            "gpu": self.gpu.name,
            "dtype": self.dtype,
            "memory": self.memory.to_dict(),
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fits": self.fits,
            "latency": None,
            "rows": [
                {**asdict(r), "values": dict(r.values), "substituted": r.substituted}
                for r in self.rows
            ],
        }

    def explain(self) -> str:
        """The estimate in words, one line a number."""
        m, room = self.memory, gib(abs(self.headroom_bytes))
        verdict = f"Fits: {room} of {self.gpu.label} stay free."
        if not self.fits:
            verdict = f"Does not fit: {self.gpu.label} lacks {room}."
        lines = [
            f"{self.model.name}, traced from {self.model.class_name} of transformers "
            f"{self.model.transformers}, on {self.gpu.label}: batch {self.work.batch}, "
            f"{self.work.prompt_tokens} prompt + {self.work.output_tokens} output tokens, "
            f"{self.dtype}, {self.work.logits} logits",
            verdict,
            f"  total        {gib(m.total_bytes):>12}  of {gib(self.gpu.memory_bytes)}",
        ]
        for row in self.rows:
            lines.append(f"  {row.item:<24} {gib(row.size_bytes):>12}  {row.note}")
        return "\n".join([*lines, "  times are not traced"])


def traced_estimate(model: TracedModel, work: Inference, deploy: Deployment) -> TracedEstimate:
    """Memory of a workload in transformers, from a run of the class on fake tensors.

    Raises ConfigError for another runtime, for settings that the trace does not have, and for a
    class whose forward needs values.
    """
    allowed = {
        "runtime": "transformers",
        "gpus": 1,
        "attention": None,
        "kv_dtype": None,
        "weight_dtype": None,
        "cache": None,
    }
    for field, only in allowed.items():
        value = getattr(deploy, field)
        if value != only:
            raise ConfigError(f"{field}={shown(value)} is not traced: only {only}")
    if work.encoder_tokens not in (None, work.prompt_tokens):
        raise ConfigError(
            f"encoder_tokens={work.encoder_tokens} is not traced: as many as prompt_tokens"
        )
    gpu, dtype = gpu_named(deploy.gpu), deploy.dtype or model.dtype
    kv = model.kv_cache_bytes(batch=work.batch, context_tokens=work.context_tokens, dtype=dtype)
    peak = model.peak_bytes(
        batch=work.batch,
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        logits=work.logits,
        dtype=dtype,
    )
    rows = tuple(_rows(model, gpu, dtype, kv_bytes=kv, peak_bytes=peak))
    weights, overhead = total_bytes(rows, "weights"), total_bytes(rows, "overhead")
    live = weights + peak
    memory = Memory(
        weights_bytes=weights,
        kv_cache_bytes=kv,
        activations_bytes=peak - kv,
        gradients_bytes=0,
        optimizer_bytes=0,
        overhead_bytes=overhead,
        peak_live_bytes=live,
        torch=Unsegmented(
            peak_allocated_bytes=live + 8 * work.batch * work.prompt_tokens + workspace_bytes(gpu)
        ),
        outside_torch_bytes=outside_torch_bytes(rows),
    )
    return TracedEstimate(model=model, work=work, gpu=gpu, dtype=dtype, memory=memory, rows=rows)


def _rows(
    model: TracedModel, gpu: Gpu, dtype: str, *, kv_bytes: int, peak_bytes: int
) -> Iterator[Row]:
    def row(component: Component, item: str, size: int, note: str) -> Row:
        return Row(
            component=component,
            item=item,
            count=1,
            formula="traced",
            values=(("traced", size),),
            size_bytes=size,
            note=note,
        )

    where = f"traced from {model.class_name}, transformers {model.transformers}"
    yield row("weights", "parameters and buffers", model.weights_bytes(dtype), where)
    yield row("kv_cache", "cache", kv_bytes, where)
    yield row(
        "activations",
        "peak beyond the cache",
        peak_bytes - kv_bytes,
        f"{where}; fake tensors, the kernels of a CPU",
    )
    yield from overhead_rows(gpu, attention="sdpa", dtype=dtype)
