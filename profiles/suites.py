"""The named suites: lists of points, the most valuable first, each with its side of the split.

The split is fixed here, before anything is measured: what a constant may be fitted on is
calibration, a few shapes of two models; every other model and every other shape is held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from planner import CacheSpec, ConfigError, LoRA, Training
from planner.errors import check_choice
from profiles.points import Logits, Point, SuitePoint, TrainingPoint

CALIBRATION = frozenset(
    (
        ("llama-3.1-8b", "prefill 1 × 1024"),
        ("llama-3.1-8b", "generation 8 × 1024 + 16"),
        ("gpt2", "training 8 × 512 adamw foreach, checkpointing none"),
        ("llama-3.1-8b", "decode 1 × 128 + 5, a CUDA graph"),
        ("llama-3.1-8b", "decode 8 × 1024 + 5, a CUDA graph"),
    )
)
"""(model, sizes) of the points that constants may be fitted on, in every runtime and dtype, over
the runtime's own cache."""


LORA = LoRA(rank=16)


def suite_points(name: str) -> tuple[SuitePoint, ...]:
    """The points of a suite in the order in which they are run; ConfigError for another name."""
    points = tuple(SUITES[check_choice("suite", name, SUITES)]())
    names = [point.name for point in points]
    if len(set(names)) != len(names):  # a bug of ours
        raise ConfigError(f"suite={name}: two points have one name")
    return points


def _point(
    model: str,
    run: Point | TrainingPoint,
    *,
    runtime: str = "transformers",
    attention: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    cache: CacheSpec | None = None,
    series: bool = False,
    history: bool = False,
    times_only: bool = False,
) -> SuitePoint:
    plain = kv_dtype is None and cache is None
    split: Literal["calibration", "held-out"]
    split = "calibration" if plain and (model, run.sizes) in CALIBRATION else "held-out"
    return SuitePoint(
        model=model,
        run=run,
        split=split,
        runtime=runtime,
        attention=attention,
        dtype=dtype,
        kv_dtype=kv_dtype,
        cache=cache,
        series=series,
        history=history,
        times_only=times_only,
    )


def _prefill(batch: int, tokens: int, *, logits: Logits = "last", repeats: int = 5) -> Point:
    return Point(phase="prefill", batch=batch, prompt_tokens=tokens, logits=logits, repeats=repeats)


def _generation(batch: int, prompt: int, output: int, *, repeats: int = 3) -> Point:
    return Point(
        phase="generation",
        batch=batch,
        prompt_tokens=prompt,
        output_tokens=output,
        repeats=repeats,
        warmup=1,
    )


def _replayed(batch: int, prompt: int, *, repeats: int = 12) -> Point:
    return Point(
        phase="decode",
        batch=batch,
        prompt_tokens=prompt,
        output_tokens=5,
        repeats=repeats,
        warmup=1,
        mode="graph",
    )


def _step(batch: int, tokens: int, **how: Any) -> TrainingPoint:
    return TrainingPoint(work=Training(batch=batch, sequence_tokens=tokens, **how), repeats=3)


def _smoke() -> Iterator[SuitePoint]:
    """Every kind of point once, on any machine, in less than a minute."""
    short = {"repeats": 2, "warmup": 1}
    generation = Point(
        phase="generation",
        batch=2,
        prompt_tokens=64,
        output_tokens=4,
        **short,  # type: ignore[arg-type]
    )
    step = TrainingPoint(
        work=Training(batch=2, sequence_tokens=64),
        **short,  # type: ignore[arg-type]
    )
    for runtime in ("attnlab", "transformers"):
        yield _point("llama-50m", generation, runtime=runtime)
        yield _point("llama-50m", step, runtime=runtime)


LARGE = ("llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b", "mistral-7b-v0.1")
OTHERS = ("gpt2", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "olmo2-7b", "phi-2", "pythia-6.9b")


def _inference() -> Iterator[SuitePoint]:
    """Real shapes in transformers and in our own transformer, widely spread from the first on."""
    yield _point("llama-3.1-8b", _prefill(1, 1024), series=True)
    yield _point("llama-3.1-8b", _generation(8, 1024, 16), series=True)
    for model in (*LARGE[1:], *OTHERS):
        yield _point(model, _generation(4, 512, 16), series=model == LARGE[1])
    for model in LARGE:
        yield _point(model, _prefill(1, 4096))
    yield _point("bamba-9b", _generation(4, 512, 8, repeats=2))
    for model in ("llama-3.1-8b", "gpt2", "qwen2.5-7b", "mistral-7b-v0.1"):
        yield _point(model, _generation(8, 512, 32), runtime="attnlab")
    for model in ("qwen1.5-moe-a2.7b", "deepseek-v2-lite"):
        yield _point(model, _generation(4, 512, 16), runtime="attnlab")
    yield _point("bamba-9b", _generation(4, 512, 16), runtime="attnlab")
    for model in OTHERS:
        yield _point(model, _prefill(2, 1024 if model == "gpt2" else 2048))
    yield _point("llama-3.1-8b", _generation(1, 128, 64))
    yield _point("llama-3.1-8b", _generation(64, 256, 16))
    yield _point("llama-3.1-8b", _prefill(1, 32768, repeats=2))
    yield _point("mistral-7b-v0.1", _generation(1, 8192, 8))
    yield _point("gemma-2-9b", _generation(2, 6000, 8))
    yield _point("qwen2.5-7b", _prefill(8, 2048, logits="all"))
    yield _point("llama-3.1-8b", _prefill(1, 4096), attention="eager")
    yield _point("llama-3.1-8b", _prefill(1, 4096), runtime="attnlab")
    yield _point("qwen2.5-7b", _generation(128, 128, 16))
    yield _point("qwen1.5-moe-a2.7b", _generation(32, 256, 16))
    yield _point("deepseek-v2-lite", _generation(16, 1024, 8))
    yield _point("olmo2-7b", _generation(32, 512, 8))
    yield _point("phi-2", _generation(32, 256, 16))
    yield _point("pythia-6.9b", _generation(16, 512, 16))
    yield _point("gpt2", _generation(128, 256, 64))
    yield _point("gpt2", _prefill(16, 1024, logits="all"), dtype="bf16")
    yield _point("qwen3-4b", _generation(8, 1024, 16))
    yield _point("starcoder2-3b", _generation(8, 1024, 16))
    yield _point("gemma-3-1b", _generation(8, 2048, 16))
    yield _point("qwen2.5-0.5b", _generation(64, 1024, 16))
    yield _point("llama-3.2-1b", _prefill(32, 1024))
    yield _point("bamba-9b", _prefill(1, 2048, repeats=2))
    yield _point("qwen2.5-14b", _generation(8, 1024, 16))
    yield _point("qwen3-30b-a3b", _generation(4, 512, 8))


PEERS_SIZES = (
    (1, 128),
    (8, 1024),
    (1, 16384),
    (8, 4096),
    (1, 1024),
    (32, 1024),
    (1, 4096),
    (32, 4096),
)
"""Batch and prompt tokens at which other tools were asked about Llama-3.1-8B (peers.py)."""


def _latency() -> Iterator[SuitePoint]:
    """Passes that the device bounds: decode steps that a CUDA graph replays, large prefills."""
    for batch, prompt in PEERS_SIZES:
        replayed = _replayed(batch, prompt, repeats=4 if batch * prompt > 65536 else 12)
        yield _point("llama-3.1-8b", replayed, runtime="attnlab")
    for model, batch, prompt in (
        ("qwen2.5-7b", 16, 2048),
        ("deepseek-v2-lite", 8, 1024),
        ("qwen1.5-moe-a2.7b", 4, 512),
        ("mistral-7b-v0.1", 4, 8192),
        ("gpt2", 8, 512),
        ("llama-3.2-1b", 32, 2048),
        ("olmo2-7b", 16, 1024),
        ("qwen3-4b", 64, 512),
        ("qwen2.5-14b", 8, 1024),
        ("phi-2", 16, 512),
        ("qwen1.5-moe-a2.7b", 32, 512),
        ("gemma-2-9b", 4, 2048),
    ):
        yield _point(model, _replayed(batch, prompt), runtime="attnlab")
    for model, batch, prompt in (("llama-3.1-8b", 8, 1024), ("qwen2.5-7b", 16, 512)):
        yield _point(model, _replayed(batch, prompt))
    yield _point("qwen3-0.6b", _replayed(4, 1024))
    for batch, prompt in PEERS_SIZES:
        if batch * prompt > 8192:
            yield _point("llama-3.1-8b", _prefill(batch, prompt, repeats=2))


def _training() -> Iterator[SuitePoint]:
    """Full steps, checkpointed ones, other optimizers and dtypes; LoRA."""
    yield _point("llama-3.2-1b", _step(2, 2048), series=True)
    yield _point("gpt2", _step(8, 512))
    yield _point("qwen2.5-1.5b", _step(2, 2048, checkpointing="full"))
    yield _point("llama-3.1-8b", _step(1, 4096, checkpointing="full"))
    yield _point("llama-3.2-1b", _step(2, 1024), runtime="attnlab")
    yield _point("llama-3.1-8b", _step(1, 2048, checkpointing="full", method="lora", lora=LORA))
    yield _point("gemma-2-2b", _step(1, 2048))
    yield _point("pythia-1.4b", _step(4, 1024, optimizer_impl="fused"))
    yield _point("llama-3.1-8b", _step(1, 4096))
    yield _point("gpt2", _step(16, 1024), dtype="bf16")
    yield _point("gpt2", _step(16, 1024, checkpointing="full"))
    yield _point("qwen3-0.6b", _step(4, 2048))
    yield _point("llama-3.2-1b", _step(4, 2048, precision="autocast"), dtype="fp32")
    yield _point("qwen2.5-7b", _step(2, 1024, checkpointing="full", method="lora", lora=LORA))
    yield _point("llama-3.2-3b", _step(1, 2048, optimizer="sgd"))
    yield _point("phi-2", _step(2, 1024, optimizer=None))
    yield _point("olmo2-7b", _step(1, 2048, checkpointing="full", optimizer_impl="for-loop"))
    yield _point("mistral-7b-v0.1", _step(1, 4096, checkpointing="full"))
    yield _point("llama-3.2-1b", _step(2, 1024), attention="eager")
    yield _point("llama-50m", _step(8, 1024, checkpointing="full"), runtime="attnlab")


def _method(
    model: str,
    batch: int,
    tokens: int,
    *,
    runtime: str = "transformers",
    dtype: str | None = None,
    weight_dtype: str | None = None,
    **how: Any,
) -> SuitePoint:
    work = Training(batch=batch, sequence_tokens=tokens, **how)
    run = TrainingPoint(work=work, repeats=3, warmup=1, weight_dtype=weight_dtype)
    return _point(model, run, runtime=runtime, dtype=dtype)


def _methods() -> Iterator[SuitePoint]:
    """Each way of training once, then each of another model or shape: nothing is fitted on them."""
    lora: dict[str, Any] = {"method": "lora", "lora": LORA}
    dora: dict[str, Any] = {"method": "lora", "lora": LoRA(rank=16, dora=True)}
    qlora: dict[str, Any] = {"method": "qlora", "lora": LORA}
    cast: dict[str, Any] = {"precision": "autocast"}
    master: dict[str, Any] = {"precision": "master"}
    full: dict[str, Any] = {"checkpointing": "full"}
    half: dict[str, Any] = {"checkpointing": "selective"}
    chunks: dict[str, Any] = {"runtime": "attnlab", "loss_chunk_tokens": 1024}
    yield _method("llama-3.1-8b", 1, 2048, weight_dtype="nf4", **qlora, **cast, **full)
    yield _method("llama-3.2-3b", 1, 2048, **master)
    yield _method("llama-3.2-3b", 2, 1024, dtype="fp16", **cast)
    yield _method("llama-3.1-8b", 1, 2048, frozen=("embeddings",), frozen_layers=24)
    yield _method("qwen2.5-3b", 2, 1024, **dora)
    yield _method("llama-3.2-1b", 4, 2048, **chunks)
    yield _method("llama-3.2-3b", 1, 2048, optimizer="adamw-8bit")
    yield _method("llama-3.2-3b", 1, 2048, optimizer="muon")
    yield _method("qwen2.5-3b", 2, 1024, accumulation_steps=3)
    yield _method("llama-3.2-3b", 2, 2048, **half)
    yield _method("flan-t5-xl", 4, 256, dtype="bf16", encoder_tokens=1024)
    yield _method("bert-large", 16, 512)
    yield _method("mistral-7b-v0.1", 1, 2048, weight_dtype="nf4-double", **qlora, **cast, **full)
    yield _method("llama-3.2-3b", 1, 2048, runtime="attnlab", **half)
    yield _method("llama-3.2-3b", 2, 2048, optimizer="adafactor")
    yield _method("llama-3.2-3b", 1, 1024, weight_dtype="nf4-double", **qlora)
    yield _method("gemma-2-2b", 1, 2048, dtype="fp16", **master)
    yield _method("qwen2.5-1.5b", 2, 2048, dtype="fp16", optimizer_impl="fused", **cast, **full)
    yield _method("mistral-7b-v0.1", 1, 2048, frozen=("head",), frozen_layers=16)
    yield _method("llama-3.2-3b", 2, 1024, **dora, **full)
    yield _method("qwen2.5-7b", 1, 2048, **chunks, **full)
    yield _method("llama-3.1-8b", 1, 1024, weight_dtype="nf4", **lora)
    yield _method("qwen2.5-3b", 1, 2048, optimizer_impl="fused", **master, **full)
    yield _method("llama-3.1-8b", 1, 2048, dtype="fp16", **lora, **cast, **full)
    yield _method("qwen2.5-7b", 1, 2048, frozen_layers=14, **full)
    yield _method("mistral-7b-v0.1", 1, 2048, optimizer="adafactor", **full)
    yield _method("qwen2.5-1.5b", 2, 2048, optimizer="muon", **full)
    yield _method("llama-3.1-8b", 1, 2048, optimizer="adamw-8bit", **full)
    yield _method("llama-3.1-8b", 1, 2048, accumulation_steps=2, **full)
    yield _method("qwen2.5-7b", 1, 2048, **half)
    yield _method("llama-3.2-3b", 2, 2048, optimizer="sgd-momentum")
    yield _method("flan-t5-xl", 4, 512, dtype="bf16", **full)
    yield _method("bert-large", 16, 512, dtype="bf16", **cast)
    yield _method("llama-3.1-8b", 1, 2048, keep_every=2, **half)


def _host() -> Iterator[SuitePoint]:
    """Passes that wait for their host, of the suites that have their memory: times alone."""
    yield _point("llama-3.1-8b", _generation(8, 1024, 16), runtime="attnlab", times_only=True)
    decoding = [p for p in _inference() if p.run.sizes.startswith("generation")]
    for point in (*decoding, *_training()):
        yield replace(point, times_only=True, series=False)


def _allocator() -> Iterator[SuitePoint]:
    """Whole histories of the caching allocator, for the simulator to be held against."""
    runs: tuple[tuple[str, Point | TrainingPoint], ...] = (
        ("llama-3.2-1b", _generation(4, 512, 16, repeats=1)),
        ("llama-3.2-1b", _step(2, 1024)),
        ("gemma-3-1b", _generation(2, 1024, 12, repeats=1)),
        ("llama-3.1-8b", _step(1, 4096)),
        ("pythia-6.9b", _generation(4, 512, 8, repeats=1)),
        ("gpt2", _step(8, 512)),
        ("deepseek-v2-lite", _generation(2, 256, 4, repeats=1)),
        ("gpt2", _step(8, 512, checkpointing="full")),
        ("olmo2-7b", _generation(4, 512, 8, repeats=1)),
        ("phi-2", _generation(4, 512, 8, repeats=1)),
        ("qwen1.5-moe-a2.7b", _generation(2, 256, 6, repeats=1)),
        ("mistral-7b-v0.1", _prefill(1, 4096, repeats=1)),
        ("gemma-2-2b", _step(1, 1024)),
        ("llama-3.2-1b", _step(1, 1024, method="lora", lora=LORA, checkpointing="full")),
        ("llama-3.2-1b", _step(1, 1024, checkpointing="full")),
    )
    for model, run in runs:
        yield _point(model, run, history=True)
    attnlab = _generation(4, 512, 16, repeats=1)
    yield _point("llama-3.2-1b", attnlab, runtime="attnlab", history=True)


def _short(batch: int, prompt: int, *, padded: bool = False) -> Point:
    return replace(_generation(batch, prompt, 10, repeats=2), padded=padded)


def _caches() -> Iterator[SuitePoint]:
    """Every other cache that is planned, and padding: memory, and steps that read more or less.

    The window of mistral is shorter than its prompt, and so is gemma-3's. KIVI's prompt ends ahead
    of a whole group of keys: some step quantises.
    """
    attnlab: dict[str, Any] = {"runtime": "attnlab"}
    static, ring, paged, grown, kivi = (
        CacheSpec(kind=kind) for kind in ("static", "ring", "paged", "dynamic", "quantised")
    )
    scaled = CacheSpec(kind="static", scales="token-head")
    roomy = CacheSpec(kind="static", capacity_tokens=8192)
    replayed = CacheSpec(kind="static", capacity_tokens=2560)
    yield _point("llama-3.1-8b", _short(8, 2048), cache=static)
    yield _point("llama-3.1-8b", _short(8, 2048), kv_dtype="int8", **attnlab)
    yield _point("qwen2.5-7b", _short(8, 1024, padded=True))
    yield _point("llama-3.1-8b", _short(8, 2040), kv_dtype="int4", cache=kivi, **attnlab)
    yield _point("mistral-7b-v0.1", _short(2, 6000), cache=ring, **attnlab)
    yield _point("llama-3.1-8b", _short(8, 2048), kv_dtype="fp8")
    yield _point("gemma-3-1b", _short(16, 2048), cache=static)
    yield _point("qwen2.5-14b", _short(8, 1024), kv_dtype="int4", **attnlab)
    yield _point("llama-3.2-3b", _short(16, 1024), cache=paged, **attnlab)
    yield _point("qwen3-4b", _short(16, 1024), kv_dtype="fp8", cache=scaled, **attnlab)
    yield _point("gemma-2-9b", _short(4, 1024, padded=True))
    yield _point("llama-3.1-8b", _replayed(16, 2048, repeats=8), kv_dtype="int8", **attnlab)
    yield _point("mistral-7b-v0.1", _short(4, 1024), cache=roomy)
    yield _point("gemma-3-1b", _short(16, 2048), kv_dtype="int8", cache=ring, **attnlab)
    yield _point("llama-3.2-1b", _short(32, 1024), cache=grown, **attnlab)
    yield _point("llama-3.1-8b", _replayed(8, 2048, repeats=8), cache=replayed)
    yield _point("qwen2.5-7b", _replayed(32, 1024, repeats=8), kv_dtype="fp8", **attnlab)
    yield _point("qwen3-4b", _short(16, 1024), kv_dtype="fp8")
    yield _point("qwen2.5-0.5b", _short(32, 1020), kv_dtype="int2", cache=kivi, **attnlab)
    yield _point("gemma-3-1b", _short(16, 1024, padded=True))


def _cpu() -> Iterator[SuitePoint]:
    """What a CPU without a GPU runs in a few minutes, in fp32, whose ops are timed there."""
    for runtime in ("attnlab", "transformers"):
        for batch, prompt in ((1, 384), (4, 224)):
            yield _point("llama-50m", _generation(batch, prompt, 16), runtime=runtime)
        yield _point("llama-50m", _prefill(2, 448, logits="all", repeats=4), runtime=runtime)
        yield _point("llama-50m", _step(2, 160), runtime=runtime)
        yield _point("gpt2", _generation(2, 288, 12), runtime=runtime, dtype="fp32")
        yield _point("qwen2.5-0.5b", _generation(1, 160, 6), runtime=runtime, dtype="fp32")
    yield _point("llama-50m", _step(1, 352, checkpointing="full"))
    yield _point("gpt2", _step(1, 192, optimizer="sgd"), dtype="fp32")


SUITES = {
    "smoke": _smoke,
    "cpu": _cpu,
    "inference": _inference,
    "training": _training,
    "methods": _methods,
    "latency": _latency,
    "host": _host,
    "caches": _caches,
    "allocator": _allocator,
}
