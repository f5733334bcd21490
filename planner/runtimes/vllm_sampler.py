"""The profile run of vLLM 0.19, and the logits and sampler at the end of a pass, served or so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.program import B, Extent, Shape
from planner.runtimes.writer import FLOAT32, INT64, Writer

if TYPE_CHECKING:
    from planner.program import Buffer

KERNEL_ROWS = 8  # apply_top_k_top_p: fewer rows are sorted by torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRun:
    """What GPUModelRunner.profile_run (v1/worker/gpu_model_runner.py) adds to a pass.

    Logits of `rows` sequences; `sorters` rows of top-k, one for each program of its kernel. torch
    allocates `workspace_bytes` for cuBLAS; compiled, `flush_bytes` each time a kernel is tuned, to
    empty the L2 cache. Experts' kernels keep `experts_elements` for each token. `gpus` share the
    layers and gather the logits. `later_stage`: the hidden states come from another stage, into
    buffers that stay. `kept`: what else stays, by name and bytes.
    """

    rows: int
    sorters: int
    workspace_bytes: int
    flush_bytes: int
    compiled: bool
    experts_elements: int
    gpus: int
    later_stage: bool
    kept: tuple[tuple[str, int], ...] = ()


def write_sampler(writer: Writer, hidden: Buffer, profiled: ProfileRun | None) -> None:
    """Logits, float32 copy, probabilities and noise: rows · V · (b + 12).

    Profiled: GPUModelRunner._dummy_sampler_run on random hidden states with top-k and top-p.
    Logits of a share are gathered to all of the padded vocabulary and copied once
    (DeviceCommunicatorBase.all_gather). `logits.to(float32)`, `softmax` and `empty_like` are
    Sampler.forward, TopKTopPSampler.forward_native and random_sample (v1/sample/). Logs of a
    float32 model show a copy where the dtype is float32 already.
    """
    tape, b, model = writer.tape, writer.b, writer.model
    h, V, own = model.hidden_size, model.vocab_size, model.embedding_rows or model.vocab_size
    rows: Extent = B if profiled is None else profiled.rows
    gpus = 1 if profiled is None else profiled.gpus
    picked = []
    if profiled is not None:
        for name in ("sampled hidden states", "random hidden states"):
            picked.append(tape.new(name, (rows, h), b, reads=(hidden,)))
    weight_bytes, flops = own * h * b, (2, rows, h, own)
    logits = tape.new(
        "logits", (rows, own), b, flops=flops, reads=(hidden,), weight_bytes=weight_bytes
    )
    if gpus > 1:
        gathered = tape.new("gathered logits", (rows, own * gpus), b, reads=(logits,))
        whole = tape.new("logits of all GPUs", (rows, own * gpus), b, reads=(gathered,))
        tape.free(logits, gathered)
        logits = whole
    shape: Shape = (rows, V)
    held = [logits, tape.new("float32 logits", shape, FLOAT32, reads=(logits,))]
    if profiled is not None:
        _top_k(writer, held, profiled, shape)
    for name in ("probabilities", "sampling noise"):
        held.append(tape.new(name, shape, FLOAT32, reads=(held[-1],)))
    tape.free(*held, *picked)


def _top_k(writer: Writer, held: list[Buffer], profiled: ProfileRun, shape: Shape) -> None:
    """A Triton kernel with a row for each of its programs; for few rows, sorting with torch.

    apply_top_k_top_p_triton and apply_top_k_top_p_pytorch (v1/sample/ops/).
    """
    tape = writer.tape
    if profiled.rows >= KERNEL_ROWS:
        held.append(tape.new("top-k rows", (profiled.sorters, shape[-1]), FLOAT32))
        return
    ordered = tape.new("sorted logits", shape, FLOAT32, reads=(held[-1],))
    order = tape.new("their order", shape, INT64)
    summed = tape.new("summed probabilities", shape, FLOAT32, scratch=((shape, 1), (shape, 1)))
    tape.free(ordered, order, summed)
