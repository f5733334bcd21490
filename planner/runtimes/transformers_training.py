"""Training steps of transformers 5.23: which are planned, and their programs."""

from __future__ import annotations

from dataclasses import replace

from planner.autograd.fused_attention import kernel_note
from planner.errors import ConfigError
from planner.kbit import quantised_layers
from planner.layers import GQA, Layer
from planner.model import Model
from planner.parameters import layer_parameters
from planner.program import Dims
from planner.quantization.bitsandbytes import FourBit
from planner.quantization.packed_products import multiplies_packed
from planner.runtimes.base import Phase, Setting, check_step
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.forward import WRITERS, is_held, pass_program
from planner.runtimes.transformers_code.regime import FourBitWeights, Pass, Regime
from planner.trained.frozen import check_frozen_parts, frozen_parts
from planner.trained.lora import module_of
from planner.workload import PRECISIONS, Training


def training_phase(model: Model, work: Training, setting: Setting) -> Phase:
    """One step's program and sizes; ConfigError for what is not planned."""
    check_step(
        "transformers",
        work,
        method=("full", "lora", "qlora"),
        precision=PRECISIONS,
    )
    if work.loss_chunk_tokens is not None:
        raise ConfigError(
            f"loss_chunk_tokens={work.loss_chunk_tokens} is not what the classes of "
            "runtime=transformers have: None, or attnlab, torchtune, litgpt"
        )
    if not is_held(model) or not model.lm_head:
        raise ConfigError(
            f"training of model_type={model.model_type} is not planned for runtime=transformers "
            f"yet, or not of its class: with a head for words, {', '.join(sorted(HELD))}"
        )
    if work.precision == "autocast":
        _check_autocast(model, work, setting)
    if work.precision == "master":
        _check_master(work, setting)
    if work.method == "qlora" and model.text_type in WRITERS:
        raise ConfigError(
            f"method={work.method!r} of model_type={model.model_type} is not planned for "
            "runtime=transformers yet: full, lora"
        )
    if work.freezes:
        _check_frozen(model, work)
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
    model, four_bit = _four_bit(model, setting, work.batch * tokens)
    dims = Dims(
        batch=work.batch, tokens=tokens, context=tokens, encoder=encoder, routing=work.routing
    )
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
        four_bit=four_bit,
        scales=work.scales_loss(setting.dtype),
        copies=work.precision == "master",
        sharding=setting.sharding,
        frozen=frozen_parts(work),
    )
    program = pass_program(model, what, Regime.of(model, dims))
    note = kernel_note(setting.device, setting.capability, setting.dtype)
    return Phase(name="training step", program=program, dims=dims, note=note)


def _check_frozen(model: Model, work: Training) -> None:
    """ConfigError for parts that are no names of this model's, or all of them."""
    unplanned = {
        "t5": "causal language models and bert",
        "bert": "'embeddings' and layers" if "head" in work.frozen else "",
    }.get(model.text_type)
    if unplanned:
        raise ConfigError(
            f"frozen={work.frozen!r} with frozen_layers={work.frozen_layers} of model_type="
            f"{model.model_type} is not planned for runtime=transformers yet: {unplanned}"
        )
    check_frozen_parts(model, work)


def _four_bit(model: Model, setting: Setting, rows: int) -> tuple[Model, FourBitWeights | None]:
    """Frozen linear layers that are bitsandbytes', and blocks that say which of them are not."""
    quantised = {(p.layer, module_of(p)) for p, _ in quantised_layers(model)}
    if not quantised or not isinstance(model.quantization, FourBit):
        return model, None
    modules = frozenset(module for _, module in quantised)

    def marked(index: int, layer: Layer) -> Layer:
        words = {module_of(p) for p in layer_parameters(layer, model.hidden_size) if p.linear}
        alone = {word for word in words & modules if (index, word) not in quantised}
        return replace(layer, left_alone=frozenset(alone))

    layers = tuple(marked(i, x) for i, x in enumerate(model.layers, model.first_layer))
    device = setting.capability, setting.multiprocessors
    sizes: set[tuple[int, ...]] = set()
    if setting.device == "cuda":
        sizes = {p.shape for p, _ in quantised_layers(model)}
    weights = FourBitWeights(
        dtype=setting.dtype,
        double_quant=model.quantization.double_quant,
        modules=modules,
        packed=frozenset(s for s in sizes if multiplies_packed(rows, s[0], s[1], *device)),
    )
    return replace(model, layers=layers), weights


def _check_sharded(model: Model, work: Training, setting: Setting) -> None:
    """ConfigError for what is not planned of sharded training; torch shards no fused SGD."""
    assert setting.sharding is not None
    refused = {
        f"method={work.method!r}: full": work.method != "full",
        f"frozen={work.frozen!r}, frozen_layers={work.frozen_layers}: none": work.freezes,
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


def _check_master(work: Training, setting: Setting) -> None:
    """ConfigError where there is nothing of 16 bits to copy, or it is not planned."""
    if work.method == "qlora":
        raise ConfigError("precision='master' of method='qlora' is not planned: full, lora")
    if setting.dtype == "fp32":
        raise ConfigError(
            "precision='master' in dtype='fp32' is not allowed: bf16 or fp16 (fp32 needs no copies)"
        )
    if work.adapters is not None and work.adapters.dtype != setting.dtype:
        raise ConfigError(
            f"lora.dtype={work.adapters.dtype!r} with precision='master' is not planned: "
            f"{setting.dtype} (adapters in fp32 need no copies)"
        )


def _check_autocast(model: Model, work: Training, setting: Setting) -> None:
    """ConfigError where a region of autocast is not planned."""
    if setting.dtype == "fp32":
        raise ConfigError(
            "precision='autocast' in dtype='fp32' is not planned: bf16 or fp16 (fp32 needs no "
            "region)"
        )
    kept = None if work.adapters is None else work.adapters.dtype
    if kept not in (None, "fp32") and (setting.dtype == "fp16" or kept == "fp16"):
        raise ConfigError(
            f"lora.dtype={kept!r} inside autocast to {setting.dtype} is not planned: None or fp32 "
            "(a GradScaler takes no gradients in fp16)"
        )
    casts_itself = model.text_type == "nemotron" and setting.device == "cuda"  # its LayerNorm
    if casts_itself:
        raise ConfigError(
            f"precision='autocast' of model_type={model.model_type} on a GPU is not planned yet: "
            "pure"
        )
