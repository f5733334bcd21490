"""What is measured: one phase of one workload, how often it is run, in which suite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from planner import CacheSpec, ConfigError, Inference, Training
from planner.errors import check_choice, check_size
from planner.runtimes.quantised_cache import DEFAULT_DTYPE
from profiles.records import PHASES, Record

GENERATIVE = tuple(phase for phase in PHASES if phase != "training")

CONFIGS = Path(__file__).parent / "configs"
"""Models that are trained and do not generate: encoders, encoder–decoders."""

DecodePhase = Literal["prefill", "decode", "generation"]
Logits = Literal["last", "all"]
Mode = Literal["eager", "graph"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One phase of inference to measure. `mode`: how decode steps are launched; a graph replays
    those of a "decode" alone. `padded`: prompts are of several lengths.
    """

    phase: DecodePhase
    batch: int
    prompt_tokens: int
    output_tokens: int = 1
    logits: Logits = "last"
    repeats: int = 5
    warmup: int = 2
    mode: Mode = "eager"
    padded: bool = False

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
            padded=self.padded,
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
        """For people: "prefill 1 × 4096", "generation 8 × 512 + 32, padded"."""
        output = f" + {self.output_tokens}" if self.output_tokens > 1 else ""
        logits = " all logits" if self.logits == "all" else ""
        padded = ", padded" if self.padded else ""
        graph = ", a CUDA graph" if self.mode == "graph" else ""
        return f"{self.phase} {self.batch} × {self.prompt_tokens}{output}{logits}{padded}{graph}"


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


def kept_dtype(dtype: str, kv_dtype: str | None, cache: CacheSpec | None) -> str:
    """What keys and values that are computed in `dtype` are kept in."""
    quantised = cache is not None and cache.kind == "quantised"
    return kv_dtype or (DEFAULT_DTYPE if quantised else dtype)


def cache_fields(cache: CacheSpec | None) -> dict[str, str | int] | None:
    """The fields of a CacheSpec that say something, as a record keeps them."""
    if cache is None:
        return None
    values = {field.name: getattr(cache, field.name) for field in fields(cache)}
    return {name: value for name, value in values.items() if value is not None}


def kept_words(record: Record) -> str:
    """For people, how a record kept its tokens: "int8 KV, ring cache"; nothing where plain."""
    kept = f"{record.kv_dtype} KV" if record.kv_dtype != record.dtype else ""
    padded = "padded" if record.padded else ""
    return ", ".join(filter(None, (kept, cache_words(record.cache), padded)))


def cache_of(record: Record) -> CacheSpec | None:
    """The cache that a record's run was given; None: the runtime's own."""
    if record.cache is None:
        return None
    known = {field.name for field in fields(CacheSpec)}
    if unknown := sorted(record.cache.keys() - known):
        raise ConfigError(f"cache.{unknown[0]} is not known: this planner has no such field")
    return CacheSpec(**record.cache)


def cache_words(cache: Mapping[str, object] | None) -> str:
    """For people: "ring cache", "quantised cache residual_tokens=64"; nothing without one."""
    if cache is None:
        return ""
    settings = (f"{name}={value}" for name, value in cache.items() if name != "kind")
    return " ".join((f"{cache.get('kind')} cache", *settings))


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
    """A point of a suite: the model it is run on, in what, and on which side of the split.

    `kv_dtype` and `cache` as of a Deployment. ConfigError for padding outside transformers, and for
    a static cache there whose room replayed steps would outgrow.
    """

    model: str
    run: Point | TrainingPoint
    split: Literal["calibration", "held-out"]
    runtime: str = "transformers"
    attention: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    cache: CacheSpec | None = None
    series: bool = False  # keep NVML's time series of one pass
    history: bool = False  # keep the allocator's history
    times_only: bool = False  # no passes for memory: another suite has them

    def __post_init__(self) -> None:
        if isinstance(self.run, Point) and self.run.padded and self.runtime != "transformers":
            raise ConfigError(
                f"padded=True is not measured in runtime={self.runtime}: transformers"
            )
        if isinstance(self.run, Point) and self.run.mode == "graph":
            self._check_room(self.run)

    def _check_room(self, run: Point) -> None:
        """A StaticCache counts on the device: each step is replayed twice and counted as two."""
        if self.runtime != "transformers" or self.cache is None or self.cache.kind != "static":
            return
        needed = run.prompt_tokens + 2 * (run.output_tokens - 1)
        if (self.cache.capacity_tokens or 0) < needed:
            raise ConfigError(
                f"cache.capacity_tokens={self.cache.capacity_tokens} is not allowed with "
                f"mode=graph: {needed} or more"
            )

    @property
    def source(self) -> str:
        """Where the planner finds the model: one of the catalogue, or what lies in configs/."""
        path = CONFIGS / f"{self.model}.json"
        return str(path) if path.is_file() else self.model

    @property
    def name(self) -> str:
        """Unique in its suite, the same in every run of it."""
        kept = f"{self.kv_dtype} KV" if self.kv_dtype else ""
        parts = (
            self.runtime,
            self.attention,
            self.dtype,
            kept,
            cache_words(cache_fields(self.cache)),
        )
        how = " ".join(part for part in parts if part)
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
