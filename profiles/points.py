"""What is measured: one phase of one workload, how often it is run, in which suite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planner import ConfigError, Inference, Training
from planner.errors import check_choice, check_size
from profiles.records import PHASES

GENERATIVE = tuple(phase for phase in PHASES if phase != "training")

CONFIGS = Path(__file__).parent / "configs"
"""Models that are trained and do not generate: encoders, encoder–decoders."""

DecodePhase = Literal["prefill", "decode", "generation"]
Logits = Literal["last", "all"]
Mode = Literal["eager", "graph"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One phase of inference to measure. `mode`: how decode steps are launched; a graph replays
    those of a "decode" alone.
    """

    phase: DecodePhase
    batch: int
    prompt_tokens: int
    output_tokens: int = 1
    logits: Logits = "last"
    repeats: int = 5
    warmup: int = 2
    mode: Mode = "eager"

    def __post_init__(self) -> None:
        if check_choice("mode", self.mode, ("eager", "graph")) == "graph":
            check_choice("phase (mode=graph)", self.phase, ("decode",))

    @property
    def work(self) -> Inference:
        """The workload, as the planner is asked for it."""
        return Inference(
            batch=self.batch,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            logits=self.logits,
        )

    @property
    def context_tokens(self) -> int:
        """KV length at the end: the last token is put out and never cached."""
        return self.work.context_tokens

    @property
    def passes(self) -> int:
        """Timed passes. A decode pass has many steps: as many passes as `repeats` steps need."""
        if self.phase == "decode":
            return math.ceil(self.repeats / (self.output_tokens - 1))
        return self.repeats

    @property
    def sizes(self) -> str:
        """For people: "prefill 1 × 4096", "generation 8 × 512 + 32"."""
        output = f" + {self.output_tokens}" if self.output_tokens > 1 else ""
        logits = " all logits" if self.logits == "all" else ""
        graph = ", a CUDA graph" if self.mode == "graph" else ""
        return f"{self.phase} {self.batch} × {self.prompt_tokens}{output}{logits}{graph}"


def planned_dtype(work: Inference | Training, dtype: str | None) -> str | None:
    """The dtype that the planner is asked for, of a run in `dtype`.

    It names what autocast computes in where all of fp32 weights are trained: fp16 where that was
    asked for, else bf16.
    """
    return "bf16" if _trains_float32(work) and dtype == "fp32" else dtype


def built_dtype(work: Inference | Training, dtype: str) -> str:
    """What the weights of a run in `dtype` are made in, before any are quantised."""
    return "fp32" if _trains_float32(work) else dtype


def _trains_float32(work: Inference | Training) -> bool:
    return isinstance(work, Training) and work.precision == "autocast" and work.adapters is None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPoint:
    """A training step to measure: the first `warmup` steps are not timed, at least one of them.

    `weight_dtype`: what frozen weights are quantised to on loading.
    """

    work: Training
    repeats: int = 5
    warmup: int = 2
    weight_dtype: str | None = None

    @property
    def sizes(self) -> str:
        """For people: "training 4 × 1024 adamw foreach, checkpointing full"."""
        work = self.work
        optimizer = "no optimizer"
        if work.optimizer is not None:
            optimizer = f"{work.optimizer} {work.optimizer_impl}"
        method = "" if work.method == "full" else f" {work.method}"
        precision = "" if work.precision == "pure" else f" {work.precision}"
        return (
            f"training {work.batch} × {work.sequence_tokens}{method} {optimizer}{precision}, "
            f"checkpointing {work.checkpointing}{self._more}"
        )

    @property
    def _more(self) -> str:
        """What few points have, each with its comma."""
        work, lora = self.work, self.work.adapters
        told = {
            f"every {work.checkpoint_every} layers": work.checkpoint_every > 1,
            f"keeping 1 product in {work.keep_every}": work.keep_every > 1,
            f"{self.weight_dtype} weights": self.weight_dtype is not None,
            "dora": lora is not None and lora.dora,
            f"{work.accumulation_steps} batches a step": work.accumulation_steps > 1,
            f"loss in chunks of {work.loss_chunk_tokens}": work.loss_chunk_tokens is not None,
            f"frozen {' and '.join(work.frozen)}": bool(work.frozen),
            f"frozen layers {work.frozen_layers}": work.frozen_layers > 0,
            f"{work.encoder_tokens} read": work.encoder_tokens is not None,
        }
        return "".join(f", {what}" for what, is_so in told.items() if is_so)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuitePoint:
    """A point of a suite: the model it is run on, in what, and on which side of the split."""

    model: str
    run: Point | TrainingPoint
    split: Literal["calibration", "held-out"]
    runtime: str = "transformers"
    attention: str | None = None
    dtype: str | None = None
    series: bool = False  # keep NVML's time series of one pass
    history: bool = False  # keep the allocator's history
    times_only: bool = False  # no passes for memory: another suite has them

    @property
    def source(self) -> str:
        """Where the planner finds the model: one of the catalogue, or what lies in configs/."""
        path = CONFIGS / f"{self.model}.json"
        return str(path) if path.is_file() else self.model

    @property
    def name(self) -> str:
        """Unique in its suite, the same in every run of it."""
        how = " ".join(part for part in (self.runtime, self.attention, self.dtype) if part)
        return f"{self.model} {how} {self.run.sizes}"


def inference_points(
    phases: Iterable[str],
    *,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    logits: Logits,
    repeats: int,
    warmup: int,
) -> list[Point]:
    """A point for each phase; with one output token there is nothing to decode."""
    sizes = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": repeats,
    }
    for name, value in sizes.items():
        check_size(name, value)
    check_size("warmup", warmup, minimum=0)
    check_choice("logits", logits, ("last", "all"))
    asked = [check_choice("phases", phase, GENERATIVE) for phase in phases]
    if output_tokens == 1:
        asked = [phase for phase in asked if phase != "decode"]
    if not asked:
        raise ConfigError("phases has nothing to measure: decode needs output_tokens of 2 or more")
    return [
        Point(
            phase=phase,  # type: ignore[arg-type]
            batch=batch,
            prompt_tokens=prompt_tokens,
            output_tokens=1 if phase == "prefill" else output_tokens,
            logits=logits,
            repeats=repeats,
            warmup=warmup,
        )
        for phase in asked
    ]
