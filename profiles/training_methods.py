"""What a training step is asked to do, done to a live module: each as the libraries' users do it.

The order is that of a script: layers are quantised while they are loaded, parts frozen,
checkpointing turned on, adapters put in. Nothing is downloaded: random weights are quantised.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from planner import ConfigError, LoRA, Training
from planner.errors import check_choice
from profiles.meters import LiveTensorMeter, module_bytes, storage_bytes

FOUR_BIT = ("nf4", "nf4-double")
BEFORE_LAYERS = ("wpe", "embed_positions", "word_embeddings_layernorm", "project_in")
"""What stands with a table before the first layer, by the last words of its modules' names."""


def check_measured(work: Training, dtype: str, weight_dtype: str | None, *, attnlab: bool) -> None:
    """ConfigError in one line for what the bench does not run."""
    check_choice("method", work.method, ("full", "lora", "qlora"))
    lora = work.adapters
    whole = "not measured in attnlab"
    refused = {
        "padded=True is not measured: False": work.padded,
        f"precision='master' is {whole}": attnlab and work.precision == "master",
        f"precision={work.precision!r} in fp16 is {whole}": attnlab and work.scales_loss(dtype),
        f"accumulation_steps={work.accumulation_steps} is {whole}: 1": attnlab
        and work.accumulation_steps > 1,
        f"frozen={work.frozen!r}, frozen_layers={work.frozen_layers} is {whole}": attnlab
        and work.freezes,
        f"lora.dora=True is {whole}": attnlab and lora is not None and lora.dora,
        f"weight_dtype={weight_dtype!r} is {whole}": attnlab and weight_dtype is not None,
        f"keep_every={work.keep_every} is {whole}: 1": attnlab and work.keep_every > 1,
        f"loss_chunk_tokens={work.loss_chunk_tokens} is measured in attnlab alone": not attnlab
        and work.loss_chunk_tokens is not None,
        "method='qlora' is measured with weight_dtype nf4, nf4-double": work.method == "qlora"
        and weight_dtype is None,
        f"weight_dtype={weight_dtype!r} is measured beside adapters alone": weight_dtype is not None
        and lora is None,
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ConfigError(what)


def prepared(module: Module, work: Training, *, dtype: str, weight_dtype: str | None) -> Module:
    """A class of transformers as the work wants it; `dtype`: what 4-bit layers compute in."""
    if weight_dtype is not None:
        check_choice("weight_dtype", weight_dtype, FOUR_BIT)
        check_choice("dtype (4-bit weights)", dtype, ("bf16",))
        _quantise(module, double_quant=weight_dtype == "nf4-double")
        if work.method == "qlora":
            _peft().prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    if work.freezes:
        _freeze(module, work.frozen, work.frozen_layers)
    if work.checkpointing != "none":
        _checkpoint(module, work)
    return module if work.adapters is None else _with_adapters(module, work.adapters)


def without_dropout(module: Module) -> None:
    """Every probability 0: modules', and those that attention functions are given."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def weights_bytes(module: Module) -> int:
    """Parameters (tied once) and buffers, and the scales and codes of quantised ones."""
    return module_bytes(module) + storage_bytes(_beside(module))


def _beside(module: Module) -> Iterator[Tensor]:
    """What bitsandbytes holds beside 4-bit weights, scales of scales included."""
    for p in module.parameters():
        state = getattr(p, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
            state = state.state2


class InsideMeter(LiveTensorMeter):  # type: ignore[no-untyped-call]
    """A meter that looks into bitsandbytes' products, which are Python down to their kernels.

    Its optimizers work in place: one op as any other.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run what the op is made of inside the meter."""
        name = func.name()
        if not name.startswith("bitsandbytes::") or "optimizer" in name:
            return super().__torch_dispatch__(func, types, args, kwargs)
        backend = (self.device_type or "cpu").upper()
        own = torch._C._dispatch_has_kernel_for_dispatch_key(name, backend)
        key = getattr(torch._C.DispatchKey, backend if own else "CompositeExplicitAutograd")
        with self:
            return func._op_dk(key, *args, **(kwargs or {}))


def _quantise(module: Module, *, double_quant: bool) -> None:
    """In place, layer by layer, what from_pretrained does with load_in_4bit and a bf16 dtype.

    The weights that were made in bf16 go first: others as random are quantised in their place.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise ConfigError(
                "weights of 4 bits are measured with bitsandbytes, which is not installed"
            ) from None
        from transformers import BitsAndBytesConfig
        from transformers.integrations import bitsandbytes as integration
        from transformers.quantizers.base import HfQuantizer
    hub: Any = integration
    live: Any = module
    device = next(module.parameters()).device
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    find: Any = HfQuantizer.get_modules_to_not_convert
    skipped = find(live, None, live._keep_in_fp32_modules)
    held = dict(live.named_parameters())
    whole = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        hub.replace_with_bnb_linear(live, skipped, config)
    finally:
        torch.set_default_dtype(whole)
    names = [name for name, part in live.named_modules() if hasattr(part, "source_cls")]
    shapes = {name: held.pop(f"{name}.weight").shape for name in names}
    quantise = hub.Bnb4bitQuantize(None)
    for name in names:  # one by one: no segment of the allocator's keeps a hole
        if device.type == "cuda":
            torch.cuda.empty_cache()
        part, weight = live.get_submodule(name), f"{name}.weight"
        value = torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(std=0.02)
        part.weight = quantise.convert({weight: value}, model=live)[weight]
        del value
        if part.bias is not None:
            part.bias = held[f"{name}.bias"]
    live.is_loaded_in_4bit = live.is_quantized = True
    live.quantization_method = "bitsandbytes"


def _freeze(module: Module, parts: tuple[str, ...], layers: int) -> None:
    """As one does by hand: requires_grad_(False) on modules of a decoder."""
    live: Any = module
    inside = getattr(live.base_model, "decoder", live.base_model)
    found = [m for m in inside.children() if isinstance(m, torch.nn.ModuleList)]
    if not found or live.config.is_encoder_decoder:
        raise ConfigError(f"frozen parts of {type(live).__name__} are not measured: a decoder")
    if "embeddings" in parts:
        live.get_input_embeddings().requires_grad_(False)
        for name, part in live.named_modules():
            if name.endswith(BEFORE_LAYERS):
                part.requires_grad_(False)
    if "head" in parts:
        live.get_output_embeddings().requires_grad_(False)
    for layer in found[0][:layers]:
        layer.requires_grad_(False)


def _checkpoint(module: Module, work: Training) -> None:
    """Turn it on in the class; selective by torch's contexts, which transformers passes on."""
    kwargs = None
    if work.checkpointing == "selective":
        from attnlab.checkpointing import KEPT

        contexts: Any = partial(create_selective_checkpoint_contexts, KEPT)
        if work.keep_every > 1:
            contexts = partial(_kept_in_several, KEPT, work.keep_every)
        kwargs = {"use_reentrant": False, "context_fn": contexts}
    live: Any = module
    live.activation_checkpointing_enable(kwargs, every_n_layers=work.checkpoint_every)


def _kept_in_several(kept: list[Any], every: int) -> Any:
    """Contexts that keep one matrix product in so many, as torchtitan's "op"."""
    seen = {True: 0, False: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = op in kept
        if op == torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            keeps = seen[context.is_recompute] % every == 1
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _with_adapters(module: Module, lora: LoRA) -> Module:
    targets = list(lora.targets) if isinstance(lora.targets, tuple) else lora.targets
    peft = _peft()
    config = peft.LoraConfig(r=lora.rank, target_modules=targets, use_dora=lora.dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft calls in transformers
        wrapped: Module = peft.get_peft_model(
            module, config, autocast_adapter_dtype=lora.dtype is None
        )
    return wrapped.train()


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError:
        raise ConfigError("adapters are measured with peft, which is not installed") from None
    return peft
