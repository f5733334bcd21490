"""Training steps on a device: the same passes as a Bench makes, of forward, backward, optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner import Training
from profiles.bench import Bench, attempt, random_ids
from profiles.meters import Stopwatch
from profiles.points import TrainingPoint
from profiles.training_methods import (
    InsideMeter,
    check_measured,
    prepared,
    weights_bytes,
    without_dropout,
)
from profiles.training_updates import Updates
from profiles.workloads import TORCH_DTYPES, AttnlabWorkload, Workload, attention_name


class TrainingRun:
    """A model in train mode and its optimizer: `step` is what a training loop repeats.

    `dtype`: what autocast and 4-bit layers compute in; `weight_dtype`: what the frozen weights are
    quantised to.
    """

    def __init__(
        self,
        workload: Workload,
        work: Training,
        ids: Tensor,
        *,
        dtype: str = "bf16",
        weight_dtype: str | None = None,
    ) -> None:
        self.work, self.workload, self.dtype = work, workload, dtype
        self.ids = ids
        self.labels = _labels(workload, work, ids)
        ours = isinstance(workload, AttnlabWorkload)
        check_measured(work, dtype, weight_dtype, attnlab=ours)
        live: Any = workload.module.train()
        without_dropout(live)
        self.module: torch.nn.Module = live
        if not ours:
            self.module = prepared(live, work, dtype=dtype, weight_dtype=weight_dtype)
        elif work.adapters is not None:
            from attnlab.lora import add_adapters

            add_adapters(live, work.adapters)
        self._forward = self._attnlab if ours else self._hub
        self.updates = Updates(work, self.module, dtype=dtype, device=ids.device)

    def step(self, on_gradients: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, optimizer; of the output only the loss is kept."""
        for last in range(self.work.accumulation_steps - 1, -1, -1):
            with torch.autocast(
                self.ids.device.type,
                TORCH_DTYPES[self.dtype],
                enabled=self.work.precision == "autocast",
            ):
                loss = self._forward()
            self.updates.backward(loss)
            if last:
                del loss
        self.updates.step(on_gradients)
        self.module.zero_grad(set_to_none=True)

    @property
    def has_optimizer(self) -> bool:
        """Whether a step ends with one."""
        return self.work.optimizer is not None

    def _hub(self) -> Tensor:
        live: Any = self.workload
        loss: Tensor = self.module(self.ids, labels=self.labels, **live.loss_arguments).loss
        return loss

    def _attnlab(self) -> Tensor:
        from attnlab.training import loss_of

        live: Any = self.module
        return loss_of(
            live,
            self.ids,
            self.labels,
            checkpointing=self.work.checkpointing,
            checkpoint_every=self.work.checkpoint_every,
            loss_chunk_tokens=self.work.loss_chunk_tokens,
        )


def _labels(workload: Workload, work: Training, ids: Tensor) -> Tensor:
    """The ids that are read; words of their own where an encoder reads as many as it likes."""
    if work.encoder_tokens is None:
        return ids.clone()
    drawn = random_ids(workload.vocab_size, work.batch, work.sequence_tokens)
    return drawn.to(ids.device)


class TrainingBench(Bench):
    """A Bench for training points; `train` is what `measure` is to them."""

    def train(
        self,
        workload: Workload,
        point: TrainingPoint,
        values: dict[str, Any],
        *,
        dtype: str,
        times_only: bool = False,
    ) -> str:
        """Memory, then time, added to `values` as far as they came; how it ended."""
        run, status = attempt(lambda: self.run(workload, point, dtype=dtype))
        if run is None:
            return status
        steps = [self.step_memory, self.step_time]
        if times_only:
            steps = [self.step_kernels, self.step_time]
        elif self.on_cuda:
            steps.insert(0, self.step_peaks)
        for measurement in steps:
            found, status = attempt(partial(measurement, run, point))
            values |= found or {}
            run.module.zero_grad(set_to_none=True)
            if self.on_cuda:
                torch.cuda.empty_cache()
            if status != "ok":
                break
        return status

    def run(self, workload: Workload, point: TrainingPoint, *, dtype: str) -> TrainingRun:
        """The point's step, to be repeated; `dtype`: what it computes in."""
        ids = self.ids(workload, point)
        return TrainingRun(workload, point.work, ids, dtype=dtype, weight_dtype=point.weight_dtype)

    def ids(self, workload: Workload, point: TrainingPoint) -> Tensor:
        """Token ids on the device: [batch, sequence_tokens], or as many as an encoder reads."""
        tokens = point.work.encoder_tokens or point.work.sequence_tokens
        return random_ids(workload.vocab_size, point.work.batch, tokens).to(self.device)

    def step_peaks(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Peaks over the first step, which makes the optimizer's states, and the second."""
        with self.peaks() as seen:
            for index in range(2 if run.has_optimizer else 1):
                self.mark(f"step {index + 1}")
                run.step()
            seen.take()
            self.mark("end")
        return seen.values

    def step_memory(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Live tensors of a step of the steady state."""
        if run.has_optimizer and not run.updates.has_states:
            run.step()
        found: dict[str, Any] = {}

        def note() -> None:
            found["gradients_bytes"] = run.updates.gradients_bytes()

        gc.collect()
        with InsideMeter(device=self.device) as meter:
            run.step(note)
        run.updates.check_stepped()
        weights, states = weights_bytes(run.module), run.updates.states_bytes()
        return found | {
            "weights_bytes": weights,
            "optimizer_bytes": states,
            "attention": attention_name(run.workload.attention, [meter.take_ops()]),
            "experts": run.workload.experts,
            "peak_live_bytes": weights + states + meter.peak_bytes,
            "peak_op": meter.peak_op,
        }

    def step_kernels(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Which attention and experts ran, of `step_memory`."""
        seen = self.step_memory(run, point)
        return {name: seen[name] for name in ("attention", "experts")}

    def step_time(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Every timed step, and the energy of them together."""
        watch = Stopwatch(device=self.device)
        for _ in range(point.warmup):
            run.step()

        def steps() -> None:
            for _ in range(point.repeats):
                with watch.step():
                    run.step()

        values = self.powered(steps)
        return values | {
            "step_s": tuple(watch.samples_s),
            "host_add_s": tuple(watch.host_add_s),
            "warmup_steps": point.warmup,
        }
