"""Finetuning with lit-gpt: which steps are planned, and their programs."""

from __future__ import annotations

from dataclasses import replace

from planner.autograd.fused_attention import kernel_note
from planner.errors import ConfigError
from planner.model import Model
from planner.program import Dims
from planner.quantization.bitsandbytes import FourBit
from planner.runtimes.base import Phase, Setting, check_step
from planner.runtimes.litgpt_training.regime import Regime, Step
from planner.runtimes.litgpt_training.step import CHUNK_TOKENS, step_program
from planner.trained.prefix_adapters import START_LAYER
from planner.workload import Training

METHODS = ("full", "lora", "adapter", "adapter-v2")


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    if work.method == "qlora":
        raise ConfigError(
            "method='qlora' makes fp32 of what is not quantised, as lit-gpt does not: "
            "method='lora' with weight_dtype='nf4' or 'nf4-double'"
        )
    check_step(
        "litgpt",
        work,
        method=METHODS,
        precision=("pure",),
        checkpointing=("none",),
        loss_chunk_tokens=(None, CHUNK_TOKENS),
    )
    if work.sequence_tokens < 2:
        raise ConfigError("sequence_tokens=1 leaves no token to predict: 2 or more")
    if work.method == "adapter" and len(model.layers) <= START_LAYER:
        raise ConfigError(
            f"method='adapter' of {len(model.layers)} layers trains nothing: prefixes begin with "
            f"layer {START_LAYER}"
        )
    if setting.device == "cuda" and setting.dtype == "fp32":
        raise ConfigError("dtype='fp32' on a GPU is not planned for runtime=litgpt: bf16, fp16")
    if work.method == "full" and model.quantization is not None:
        raise ConfigError(
            "method='full' trains weights, which 4-bit ones are not: weight_dtype=None"
        )
    if setting.device == "cpu" and model.quantization is not None:
        raise ConfigError(
            "bitsandbytes 0.41.1 quantises on a GPU alone: weight_dtype=None on a CPU"
        )
    if work.adapters is not None and work.adapters.dora:
        raise ConfigError("lora.dora=True is not what runtime=litgpt has: False, or transformers")
    tokens = work.sequence_tokens
    dims = Dims(batch=work.batch, tokens=tokens, context=tokens)
    step = Step(
        method=work.method,
        dtype=setting.dtype,
        device=setting.device,
        capability=setting.capability,
        multiprocessors=setting.multiprocessors,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
        lora=work.adapters,
        four_bit=_four_bit(model),
    )
    program = step_program(model, step, Regime.of(dims))
    note = kernel_note(setting.device, setting.capability, setting.dtype)
    return Phase(name="training step", program=program, dims=dims, note=note)


def _four_bit(model: Model) -> bool | None:
    match model.quantization:
        case None:
            return None
        case FourBit(double_quant=double_quant):
            return double_quant
    raise ConfigError(
        f"{model.quantization.method} weights are not planned for runtime=litgpt: plain ones with "
        "weight_dtype='nf4' or 'nf4-double'"
    )


def as_kept(work: Training, dtype: str, runtime: str = "litgpt") -> Training:
    """The workload with adapters in the model's dtype: they are made with the model.

    ConfigError for adapters in another one.
    """
    lora = work.adapters
    if lora is None:
        return work
    if lora.dtype not in (None, dtype):
        raise ConfigError(
            f"lora.dtype={lora.dtype!r} is not what runtime={runtime} has: {dtype!r}, the model's"
        )
    return replace(work, lora=replace(lora, dtype=dtype))
