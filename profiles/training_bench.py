"""Training steps on a device: the same passes as a Bench makes, of forward, backward, optimizer."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planner import ConfigError, LoRA, Training
from profiles.bench import Bench, attempt, random_ids
from profiles.meters import LiveTensorMeter, Stopwatch, module_bytes, storage_bytes
from profiles.points import TrainingPoint
from profiles.workloads import AttnlabWorkload, Workload, attention_name


class TrainingRun:
    """A model in train mode and its optimizer: `step` is what a training loop repeats."""

    def __init__(self, workload: Workload, work: Training, ids: Tensor) -> None:
        self.work, self.workload = work, workload
        self.ids, self.labels = ids, ids.clone()
        live: Any = workload.module.train()
        self.module = live
        _without_dropout(self.module)
        ours = isinstance(workload, AttnlabWorkload)
        self._forward = self._attnlab if ours else self._hub
        if work.method == "lora" and ours:
            from attnlab.lora import add_adapters

            add_adapters(live, work.adapters or LoRA())
        elif work.method == "lora":
            self.module = _with_lora(self.module, work.adapters or LoRA())
        elif work.method != "full":
            raise ConfigError(f"method={work.method!r} is not measured: full, lora")
        if work.checkpointing == "selective" and not ours:
            raise ConfigError("checkpointing='selective' is not measured: none, full, or attnlab")
        if work.loss_chunk_tokens is not None and not ours:
            raise ConfigError(
                f"loss_chunk_tokens={work.loss_chunk_tokens} is not measured: None, or attnlab"
            )
        if work.checkpointing == "full" and not ours:
            hub: Any = workload.module
            hub.activation_checkpointing_enable(every_n_layers=work.checkpoint_every)
            if work.method == "lora":
                hub.enable_input_require_grads()
        if work.precision == "master":
            raise ConfigError("precision='master' is not measured: pure, autocast")
        halves = any(p.dtype == torch.float16 for p in self.module.parameters())
        if work.precision == "autocast" and halves:
            raise ConfigError("precision='autocast' in fp16 is not measured: bf16")
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = _optimizer(work, trained)

    def step(self, on_gradients: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, optimizer; of the output only the loss is kept."""
        with torch.autocast(
            self.ids.device.type, torch.bfloat16, enabled=self.work.precision == "autocast"
        ):
            loss = self._forward()
        loss.backward()  # type: ignore[no-untyped-call]
        on_gradients()
        if self.optimizer is not None:
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)

    def gradients_bytes(self) -> int:
        """What the live gradients hold."""
        return storage_bytes(p.grad for p in self.module.parameters() if p.grad is not None)

    def optimizer_bytes(self) -> int:
        """The optimizer's states on the device."""
        if self.optimizer is None:
            return 0
        states = (t for state in self.optimizer.state.values() for t in state.values())
        where = self.ids.device.type
        return storage_bytes(t for t in states if isinstance(t, Tensor) and t.device.type == where)

    def _hub(self) -> Tensor:
        loss: Tensor = self.module(self.ids, labels=self.labels, use_cache=False).loss
        return loss

    def _attnlab(self) -> Tensor:
        from attnlab.training import loss_of

        return loss_of(
            self.module,
            self.ids,
            self.labels,
            checkpointing=self.work.checkpointing,
            checkpoint_every=self.work.checkpoint_every,
            loss_chunk_tokens=self.work.loss_chunk_tokens,
        )


class TrainingBench(Bench):
    """A Bench for training points; `train` is what `measure` is to them."""

    def train(
        self,
        workload: Workload,
        point: TrainingPoint,
        values: dict[str, Any],
        *,
        times_only: bool = False,
    ) -> str:
        """Memory, then time, added to `values` as far as they came; how it ended."""
        run, status = attempt(lambda: TrainingRun(workload, point.work, self.ids(workload, point)))
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

    def ids(self, workload: Workload, point: TrainingPoint) -> Tensor:
        """Token ids [batch, sequence_tokens] on the device."""
        work = point.work
        return random_ids(workload.vocab_size, work.batch, work.sequence_tokens).to(self.device)

    def step_peaks(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Peaks over the first step, which makes the optimizer's states, and the second."""
        with self.peaks() as seen:
            for index in range(2 if run.optimizer is not None else 1):
                self.mark(f"step {index + 1}")
                run.step()
            seen.take()
            self.mark("end")
        return seen.values

    def step_memory(self, run: TrainingRun, point: TrainingPoint) -> dict[str, Any]:
        """Live tensors of a step of the steady state."""
        if run.optimizer is not None and not run.optimizer.state:
            run.step()
        found: dict[str, Any] = {}

        def note() -> None:
            found["gradients_bytes"] = run.gradients_bytes()

        gc.collect()
        with LiveTensorMeter(device=self.device) as meter:
            run.step(note)
        weights, states = module_bytes(run.module), run.optimizer_bytes()
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


def _without_dropout(module: torch.nn.Module) -> None:
    """Every probability 0: modules', and those that attention functions are given."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _optimizer(work: Training, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    ways: dict[str, Any] = {
        "foreach": work.optimizer_impl == "foreach",
        "fused": work.optimizer_impl == "fused",
    }
    if work.optimizer is None:
        return None
    match work.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, **ways)
        case "sgd" | "sgd-momentum":
            momentum = 0.9 if work.optimizer == "sgd-momentum" else 0.0
            return torch.optim.SGD(trained, momentum=momentum, **ways)
        case "adafactor":
            return torch.optim.Adafactor(trained, foreach=ways["foreach"])
        case _:
            raise ConfigError(f"optimizer={work.optimizer!r} is not measured: adamw, sgd, …")


def _with_lora(module: torch.nn.Module, lora: LoRA) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError:
        raise ConfigError("method='lora' is measured with peft, which is not installed") from None
    targets = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets
    config: Any = peft.LoraConfig(r=lora.rank, target_modules=targets)
    wrapped: torch.nn.Module = peft.get_peft_model(
        module, config, autocast_adapter_dtype=lora.dtype is None
    )
    return wrapped
