"""The Estimate: what a workload needs in a deployment, every number opened down to its formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from planner.activations import Peak
from planner.allocator import AllocatorSettings
from planner.allocator.settings import DEFAULTS
from planner.catalog.gpus import Gpu
from planner.errors import ConfigError, check_choice
from planner.experts import ExpertsReached, experts_reached
from planner.format import gib, seconds
from planner.ledger import Row, ledger_table
from planner.model import Model
from planner.parallel import Share
from planner.program import Dims
from planner.report import write_csv
from planner.reserved import AllocatorPlan, Reserved, reserved
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Pool, Setting, clock_capacity
from planner.timeline import Moment, moments, timeline_table
from planner.timing.calibration_files import own_stamp
from planner.timing.latency import UNTIMED, Latency, latency, training_latency
from planner.timing.op_table import op_table
from planner.timing.passes import passes_of, prompt_passes
from planner.training import training_phase
from planner.workload import Deployment, Inference, Training

if TYPE_CHECKING:
    import pandas as pd


class TorchPeaks(Protocol):
    """The peaks of torch's allocator: an AllocatorPlan, AllocatorStats, or known numbers."""

    @property
    def peak_allocated_bytes(self) -> int:
        """Blocks in use."""

    @property
    def peak_reserved_bytes(self) -> int | None:
        """Segments held; None where they are not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsegmented:
    """Peaks where no allocator with segments is simulated: a CPU, vllm's pool, some caches."""

    peak_allocated_bytes: int
    peak_reserved_bytes: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one GPU. The five parts are what the total is made of.

    `activations_bytes` is what the peak adds to weights and the finished cache; `peak_live_bytes`
    weights plus storages the passes create. `torch` has the peaks of torch's allocator, simulated
    when they are first asked for. `outside_torch_bytes` of `overhead_bytes` are not
    the allocator's; `unused_pool_bytes` is what a pool holds beyond this workload.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    overhead_bytes: int
    peak_live_bytes: int
    torch: TorchPeaks = field(repr=False, compare=False)
    outside_torch_bytes: int
    unused_pool_bytes: int = 0

    @property
    def peak_allocated_bytes(self) -> int:
        """Blocks that torch has in use: live tensors, inputs and workspace, rounded as it does."""
        return self.torch.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int | None:
        """Segments that torch holds; None where it is not simulated (CPUs, vllm)."""
        return self.torch.peak_reserved_bytes

    @property
    def simulated(self) -> bool:
        """Whether the peaks of torch's allocator are there, at the cost of a simulation."""
        return isinstance(self.torch, AllocatorPlan)

    @property
    def device_used_bytes(self) -> int:
        """What the driver reports: the context and all that torch reserves, or the pool."""
        reserved = self.peak_reserved_bytes
        if reserved is None:
            return self.total_bytes + self.unused_pool_bytes
        return self.outside_torch_bytes + reserved

    @property
    def total_bytes(self) -> int:
        """Weights, cache, activations, gradients, optimizer and overhead."""
        return (
            self.weights_bytes
            + self.kv_cache_bytes
            + self.activations_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.overhead_bytes
        )

    def parts(self) -> dict[str, int]:
        """Every number that needs no simulation, by its name."""
        parts = [f.name for f in fields(self) if f.type == "int"]
        return {name: getattr(self, name) for name in (*parts, "total_bytes")}

    def to_dict(self) -> dict[str, int | None]:
        """Every number by its name."""
        peaks = ["peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes"]
        total = self.parts()
        held: dict[str, int | None] = {k: v for k, v in total.items() if k != "total_bytes"}
        return {**held, **{name: getattr(self, name) for name in (*peaks, "total_bytes")}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The answer for one model, workload and deployment: of the GPU with the least room.

    `share` is what that GPU holds of the model. `peak` is the moment of the highest live memory and
    `peak_phase` the pass it lies in; `pool` is vllm's, None elsewhere; `peak_note` says how far the
    peak can be trusted, if not to the byte.
    """

    model: Model
    share: Share
    work: Inference | Training
    deploy: Deployment
    setting: Setting
    gpu: Gpu
    memory: Memory
    peak: Peak
    peak_phase: str
    rows: tuple[Row, ...]
    pool: Pool | None
    peak_note: str

    @property
    def kv_pool_bytes(self) -> int | None:
        """Bytes of vllm's pool of KV blocks; None in runtimes without one."""
        return None if self.pool is None else self.pool.size_bytes

    @property
    def kv_pool_tokens(self) -> int | None:
        """Tokens of one long sequence that the pool holds; None in runtimes without one."""
        return None if self.pool is None else self.pool.tokens

    @property
    def max_concurrency(self) -> float | None:
        """Sequences of the longest length that vllm's pool holds at once; None without a pool.

        The longest is `max_model_tokens`, else the model's positions; vLLM prints it as "Maximum
        concurrency".
        """
        return None if self.pool is None else self.pool.concurrency

    @property
    def asks_beyond_bytes(self) -> int:
        """What memory_utilization asks for beyond what is free as vLLM starts; ≤ 0: nothing.

        request_memory (v1/worker/utils.py, 0.19.1) refuses to start then. 0 without a pool.
        """
        if self.pool is None:
            return 0
        early = ("device context", "NCCL, tensor parallel", "NCCL, pipeline")
        held = sum(row.size_bytes for row in self.rows if row.item in early)
        asked = int(self.gpu.memory_bytes * self.deploy.memory_utilization)
        return asked - (self.gpu.memory_bytes - held)

    @property
    def latency(self) -> Latency:
        """Times and throughput, computed when asked for."""
        stamp = own_stamp(self.gpu.name)
        if isinstance(self.work, Training):
            return training_latency(
                self.model, self.work, self.deploy, self.setting, self.gpu, stamp
            )
        runtime = self.deploy.runtime
        return latency(self.model, self.work, self.setting, runtime, self.gpu, stamp)

    def op_times(self, which: str = "decode") -> pd.DataFrame:
        """Where the time goes in "prefill" (of several passes, the mean one), in the last "decode"
        step, or in a training step.

        A row for each kind of op, the longest first: op, family, count, seconds, total_s, flops,
        moved_bytes, bound_by, basis, error (op_table.OpRow). Pipeline stages are added up. Of
        sharded training collectives are among them, though kernels hide most of their time.
        """
        if self.latency.basis == UNTIMED:
            raise ConfigError(
                f"data_parallel_shards={self.deploy.data_parallel_shards}: times {UNTIMED}"
            )
        passes = passes_of(self.model, self.setting, self.deploy.runtime, self.gpu)
        if isinstance(self.work, Training):
            phase = training_phase(self.model, self.work, self.deploy, self.setting)
            return op_table(passes, lambda _: phase.program, phase.dims)
        check_choice("which", which, ("prefill", "decode"))
        rules, work = runtime_named(self.deploy.runtime), self.work
        decodes = which == "decode"
        context = work.context_tokens if decodes else work.prompt_tokens
        dims = Dims(
            batch=work.batch,
            tokens=1 if decodes else work.prompt_tokens,
            context=context,
            capacity=clock_capacity(self.setting, work),
            encoder=self.model.encoder_length(work.encoder_tokens, work.prompt_tokens),
            routing=work.routing,
        )
        if rules.pooled and not decodes:
            _, dims = prompt_passes(dims, self.setting.max_batched_tokens)
        make = rules.decode if decodes else rules.prefill
        return op_table(passes, lambda stage: make(stage, work, self.setting), dims)

    @property
    def experts(self) -> tuple[ExpertsReached, ...]:
        """What passes reach of a mixture's experts; of several prefills, the mean one."""
        work = self.work
        if isinstance(work, Training):
            tokens = work.batch * work.sequence_tokens
            return experts_reached(self.model, work.routing, step_tokens=tokens)
        several = 1.0
        if runtime_named(self.deploy.runtime).pooled:
            dims = Dims(batch=work.batch, tokens=work.prompt_tokens, context=work.prompt_tokens)
            several = float(prompt_passes(dims, self.setting.max_batched_tokens)[0])
        return experts_reached(
            self.model,
            work.routing,
            prefill_tokens=work.batch * work.prompt_tokens / several,
            decode_tokens=work.batch if work.output_tokens > 1 else None,
        )

    @property
    def headroom_bytes(self) -> int:
        """What is left of the GPU's memory; of the pool's, in vllm. Negative: what is missing."""
        if self.pool is None:
            return self.gpu.memory_bytes - self.memory.total_bytes
        left = self.pool.size_bytes or self.pool.available_bytes  # negative without any block
        return left - self.memory.kv_cache_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits: the total into memory; in vllm, the blocks of all sequences into the
        pool, and no more sequences than it runs at once.
        """
        return self.headroom_bytes >= 0 and not self._waits

    @property
    def _waits(self) -> bool:
        """Whether some sequences would have to wait for others to end."""
        return self.pool is not None and self.work.batch > self.setting.max_sequences

    def allocator(self, settings: AllocatorSettings = DEFAULTS) -> Reserved | None:
        """The workload played through torch's allocator; None on CPUs and in vllm."""
        plan = self.memory.torch
        return reserved(plan, settings=settings) if isinstance(plan, AllocatorPlan) else None

    @property
    def reserved_note(self) -> str:
        """How far peak_reserved_bytes can be trusted; empty where there is none."""
        played = self.allocator()
        return "" if played is None else played.note

    def table(self) -> pd.DataFrame:
        """The ledger: component, item, count, formula, substituted, bytes, note; parts sum up."""
        return ledger_table(self.rows)

    def moments(self) -> list[Moment]:
        """What lives at every op of the pass in which the peak lies."""
        phases = self._phases()
        return list(moments(next((p for p in phases if p.name == self.peak_phase), phases[0])))

    def timeline(self) -> pd.DataFrame:
        """A row for every op of the passes among which the peak lies (timeline.timeline_table)."""
        held = self.memory.weights_bytes + self.memory.optimizer_bytes
        return timeline_table(self._phases(), weights_bytes=held)

    def _phases(self) -> list[Phase]:
        if isinstance(self.work, Training):
            return [training_phase(self.model, self.work, self.deploy, self.setting)]
        runtime = runtime_named(self.deploy.runtime)
        return runtime.memory_phases(self.share.model, self.work, self.setting)

    @property
    def verdict(self) -> str:
        """Fits or not, and by how much, in one sentence."""
        return verdict(self)

    def explain(self) -> str:
        """The estimate in words, one line a number."""
        return explain(self)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, safe to open in a spreadsheet."""
        write_csv(self.table(), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "model": self.model.name,
            "parameter_count": self.model.parameter_count,
            "workload": asdict(self.work),
            "gpu": self.gpu.name,
            "runtime": f"{self.deploy.runtime} {runtime_named(self.deploy.runtime).version}",
            "attention": self.setting.attention,
            "dtype": self.setting.dtype,
            "kv_dtype": self.setting.kv_dtype,
            "cache": None if self.deploy.cache is None else asdict(self.deploy.cache),
            "memory": {**self.memory.to_dict(), "peak_reserved_note": self.reserved_note},
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fits": self.fits,
            "kv_pool_bytes": self.kv_pool_bytes,
            "kv_pool_tokens": self.kv_pool_tokens,
            "kv_pool_blocks": None if self.pool is None else self.pool.blocks,
            "max_concurrency": self.max_concurrency,
            "tensor_parallel": self.deploy.tensor_parallel,
            "pipeline_parallel": self.deploy.pipeline_parallel,
            "data_parallel_shards": self.deploy.data_parallel_shards,
            "stage": self.share.stage,
            "latency": asdict(self.latency),
            "experts": [asdict(kind) for kind in self.experts],
            "peak": {
                "note": self.peak_note,
                "phase": self.peak_phase,
                "op": self.peak.op,
                "layer": self.peak.layer,
                "live": [
                    {"name": name, "count": count, "bytes": size}
                    for name, count, size in self.peak.buffers
                ],
            },
            "defaults_taken": list(self.model.defaults),
            "rows": [
                {**asdict(r), "values": dict(r.values), "substituted": r.substituted}
                for r in self.rows
            ],
        }


def speed(latency: Latency) -> str:
    """What is known of the times, in one line: how far they may be off, what they come from."""
    if latency.basis == UNTIMED:
        return f"times: {UNTIMED}"
    known = [
        f"{name} {seconds(time_s)}{off_by(time_s, interval)}"
        for name, time_s, interval in (
            ("TTFT", latency.ttft_s, latency.ttft_interval_s),
            ("TPOT", latency.tpot_s, latency.tpot_interval_s),
            ("step", latency.step_s, latency.step_interval_s),
        )
        if time_s is not None or (name == "TPOT" and latency.step_s is None)
    ]
    for what, per_s in (
        ("output", latency.output_tokens_per_s),
        ("trained", latency.trained_tokens_per_s),
    ):
        if per_s is not None:
            known.append(f"{per_s:,.0f} {what} tokens/s")
    told = f"{', '.join(known)} ({'; '.join((latency.basis, *binding(latency)))})"
    return f"{told}; {note}" if (note := new_lengths(latency)) else told


def new_lengths(latency: Latency) -> str:
    """What a process waits for that has not met a length before, in words; nothing where it does
    not.
    """
    if not latency.new_length_s:
        return ""
    return (
        f"a length that the process has not met, a prompt's or a growing cache's, takes a pass "
        f"{seconds(latency.new_length_s)} more: cuDNN plans its attention anew"
    )


def off_by(time_s: float | None, interval: tuple[float, float] | None) -> str:
    """Half of an interval as a share of the time, " ±9 %"; empty where there is none."""
    if time_s is None or interval is None or not time_s:
        return ""
    return f" ±{50 * (interval[1] - interval[0]) / time_s:.0f} %"


def binding(latency: Latency) -> list[str]:
    """How sure the times are, and what takes most of each pass."""
    told = [] if latency.confidence == "uncalibrated" else [latency.confidence]
    if latency.basis == UNTIMED:
        return []
    if latency.step_s is not None:
        return [*told, f"bound by {latency.prefill_bound_by}"]
    bound = f"prefill bound by {latency.prefill_bound_by}"
    return [*told, f"{bound}, decode by {latency.decode_bound_by}" if latency.tpot_s else bound]


def verdict(estimate: Estimate) -> str:
    """Fits or not, and by how much, in one sentence."""
    where = estimate.gpu.label if estimate.pool is None else "the KV pool"
    room = gib(abs(estimate.headroom_bytes))
    if estimate.fits:
        return f"Fits: {room} of {where} stay free."
    if estimate.headroom_bytes >= 0:
        return (
            f"Does not fit: {estimate.work.batch:,} sequences, and vllm runs "
            f"max_sequences={estimate.setting.max_sequences:,} at once."
        )
    return f"Does not fit: {where} lacks {room}."


def explain(estimate: Estimate) -> str:
    """The parts, each with its largest items and what causes the peak."""
    e, m, n = estimate, estimate.memory, estimate.deploy.world_size
    lines = [
        f"{e.model.name} in {e.deploy.runtime} on {f'{n} × ' if n > 1 else ''}{e.gpu.label}: "
        f"{e.work.in_words}, "
        f"{e.setting.dtype}, {e.setting.attention} attention"
        + (f", {e.work.logits} logits" if isinstance(e.work, Inference) else ""),
        verdict(e),
        *([f"  counted is the fullest of {n} GPUs: {e.share.in_words}"] if n > 1 else []),
        f"  total        {gib(m.total_bytes):>12}  of {gib(e.gpu.memory_bytes)}",
    ]
    for component, size in (
        ("weights", m.weights_bytes),
        *((("kv_cache", m.kv_cache_bytes),) if isinstance(e.work, Inference) else ()),
        *((("gradients", m.gradients_bytes),) if isinstance(e.work, Training) else ()),
        *((("optimizer", m.optimizer_bytes),) if m.optimizer_bytes else ()),
        ("activations", m.activations_bytes),
        ("overhead", m.overhead_bytes),
    ):
        lines.append(f"  {component:<12} {gib(size):>12}")
        rows = [r for r in e.rows if r.component == component and r.size_bytes]
        for row in sorted(rows, key=lambda r: -abs(r.size_bytes))[:4]:
            times = f"{row.count} × " if row.count > 1 else ""
            lines.append(f"    {row.item}: {gib(row.size_bytes)} = {times}{row.substituted}")
    layer = "" if e.peak.layer is None else f" of layer {e.peak.layer}"
    note = f" ({e.peak_note})" if e.peak_note else ""
    lines.append(f"  peak: {e.peak.op}{layer}, {e.peak_phase}{note}")
    if m.peak_reserved_bytes is not None:
        lines.append(
            f"  torch reserves {gib(m.peak_reserved_bytes)} for {gib(m.peak_allocated_bytes)} "
            f"({e.reserved_note})"
        )
    if e.pool is not None:
        lines.append(
            f"  KV pool: {gib(e.pool.size_bytes)}, {e.pool.blocks:,} blocks, {e.pool.tokens:,} "
            f"tokens; {e.pool.concurrency:.2f} sequences of {e.pool.longest_tokens:,} at once"
        )
        if e.asks_beyond_bytes > 0:
            lines.append(
                f"  vLLM may refuse to start: it asks for {gib(e.asks_beyond_bytes)} more than "
                "context and NCCL leave free"
            )
    lines.append(f"  {speed(e.latency)}")
    for kind in e.experts:
        how = f"experts of {kind.layers} layers, {e.work.routing.in_words}"
        lines.append(f"  {how}: {kind.in_words}")
    if e.model.defaults:
        lines.append(f"  taken by default: {', '.join(e.model.defaults)}")
    return "\n".join(lines)
