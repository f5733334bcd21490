"""Training steps of transformers 5.23: which are planned, and their programs."""

from __future__ import annotations

from planner.autograd.fused_attention import kernel_note
from planner.errors import ConfigError
from planner.layers import GQA
from planner.model import Model
from planner.program import Dims
from planner.quantization.bitsandbytes import FourBit
from planner.runtimes.base import Phase, Setting, check_step
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.forward import WRITERS, is_held, pass_program
from planner.runtimes.transformers_code.regime import FourBitWeights, Pass, Regime
from planner.workload import Training


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    check_step(
        "transformers",
        work,
        method=("full", "lora", "qlora"),
        precision=("pure", "autocast"),
        loss_chunk_tokens=(None,),
    )
    if not is_held(model) or not model.lm_head:
        raise ConfigError(
            f"training of model_type={model.model_type} is not planned for runtime=transformers "
            f"yet, or not of its class: with a head for words, {', '.join(sorted(HELD))}"
        )
    if work.precision == "autocast":
        _check_autocast(model, setting)
    if work.adapters is not None and model.text_type in WRITERS:
        raise ConfigError(
            f"method={work.method!r} of model_type={model.model_type} is not planned for "
            "runtime=transformers yet: full"
        )
    _check_grouped(model, work, setting)
    if setting.sharding is not None:
        _check_sharded(model, work, setting)
    if work.checkpointing == "selective" and any(
        isinstance(layer.attention, GQA) and layer.attention.clip_qkv is not None
        for layer in model.layer_kinds()
    ):
        raise ConfigError(
            "checkpointing='selective' does not run with clip_qkv: torch refuses what is kept and "
            "clipped in place"
        )
    tokens, encoder = work.sequence_tokens, None
    if model.is_seq2seq or work.encoder_tokens is not None:
        encoder = model.encoder_length(work.encoder_tokens, tokens)
    dims = Dims(batch=work.batch, tokens=tokens, context=tokens, encoder=encoder)
    what = Pass(
        kind="training",
        attention=setting.attention,  # type: ignore[arg-type]
        dtype="fp32" if work.method == "qlora" else setting.dtype,
        autocast=setting.dtype if work.precision == "autocast" else None,
        device=setting.device,
        capability=setting.capability,
        multiprocessors=setting.multiprocessors,
        optimizer=work.optimizer,
        optimizer_impl=work.optimizer_impl,
        checkpointed=0 if work.checkpointing == "none" else work.checkpoint_every,
        selective=work.checkpointing == "selective",
        keeps_every=work.keep_every,
        lora=work.adapters,
        padded=work.padded,
        accumulates=work.accumulation_steps > 1,
        four_bit=_four_bit(model, setting),
        sharding=setting.sharding,
    )
    program = pass_program(model, what, Regime.of(model, dims))
    note = kernel_note(setting.device, setting.capability, setting.dtype)
    return Phase(name="training step", program=program, dims=dims, note=note)


def _check_grouped(model: Model, work: Training, setting: Setting) -> None:
    """ConfigError for float32 on a GPU, where the one fused kernel wants as many heads of keys."""
    wide = "fp32" in (setting.dtype, work.held_dtype(setting.dtype)) and work.precision == "pure"
    if not wide or setting.device != "cuda" or setting.attention != "sdpa":
        return
    for layer in model.layer_kinds():
        gqa = layer.attention
        if isinstance(gqa, GQA) and gqa.num_key_value_heads != gqa.num_attention_heads:
            raise ConfigError(
                "attention='sdpa' of grouped heads in fp32 on a GPU is not planned in training yet:"
                " eager, or precision='autocast'"
            )


def _check_sharded(model: Model, work: Training, setting: Setting) -> None:
    """ConfigError for what is not planned of sharded training; torch shards no fused SGD."""
    assert setting.sharding is not None
    refused = {
        f"method={work.method!r}: full": work.method != "full",
        f"precision={work.precision!r}: pure, with weight_dtype='fp32'": work.precision != "pure",
        f"dtype={setting.dtype!r}: bf16 or fp32": setting.dtype == "fp16",
        f"optimizer={work.optimizer!r}: adamw, sgd or sgd-momentum": (
            work.optimizer not in (None, "adamw", "sgd", "sgd-momentum")
        ),
        f"optimizer_impl='fused' of optimizer={work.optimizer!r}: foreach or for-loop": (
            work.optimizer_impl == "fused" and work.optimizer not in (None, "adamw")
        ),
        f"model_type={model.model_type}: causal language models": model.text_type in WRITERS,
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ConfigError(
                f"data_parallel_shards={setting.sharding.shards} is not planned with {what}"
            )


def _four_bit(model: Model, setting: Setting) -> FourBitWeights | None:
    """What frozen linear layers are of, where they are bitsandbytes'."""
    match model.quantization:
        case FourBit(double_quant=double_quant):
            return FourBitWeights(dtype=setting.dtype, double_quant=double_quant)
        case _:
            return None


def _check_autocast(model: Model, setting: Setting) -> None:
    """ConfigError where a region of autocast is not planned."""
    if setting.dtype != "bf16":
        raise ConfigError(
            f"precision='autocast' in dtype={setting.dtype!r} is not planned: bf16 (fp16 needs a "
            "GradScaler, fp32 no region)"
        )
    casts_itself = model.text_type == "nemotron" and setting.device == "cuda"  # its LayerNorm
    if model.text_type in WRITERS or casts_itself:
        where = " on a GPU" if casts_itself else ""
        raise ConfigError(
            f"precision='autocast' of model_type={model.model_type}{where} is not planned yet: pure"
        )
