"""Frozen weights of 4 bits beside which adapters are trained (QLoRA, arXiv:2305.14314).

bitsandbytes 0.50 in transformers 5.23 with peft 0.21. Method "lora" trains adapters beside the
layers as they are loaded; "qlora" after peft's prepare_model_for_kbit_training, which makes fp32 of
every other parameter. What a layer computes in (bnb_4bit_compute_dtype) and was quantised from is
the deployment's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.errors import ConfigError
from planner.ledger import Row
from planner.model import Model
from planner.quantization.base import Stored
from planner.quantization.bitsandbytes import FourBit
from planner.quantization.packed_products import MAX_ROWS
from planner.runtimes.base import Runtime, Setting
from planner.tensors import Parameter
from planner.trained.lora import adapted, module_of
from planner.weights import stored_rows
from planner.workload import Deployment, LoRA, Training


def check_frozen(model: Model, work: Training, deploy: Deployment, setting: Setting) -> None:
    """ConfigError for quantised weights that are not planned in training."""
    frozen, lora = model.quantization, work.adapters
    if frozen is None:
        if work.method == "qlora" and deploy.runtime == "transformers":
            raise ConfigError(
                "method='qlora' is of weights of 4 bits: weight_dtype='nf4' or 'nf4-double'"
            )
        return
    if lora is None or deploy.runtime != "transformers" or not isinstance(frozen, FourBit):
        raise ConfigError(
            f"training of {frozen.method} weights is not planned yet: plain ones, or adapters "
            "beside bitsandbytes' of 4 bits in transformers"
        )
    refused = {
        f"dtype={setting.dtype!r}: 'bf16'": setting.dtype != "bf16",
        f"lora.dtype={lora.dtype!r}: None or 'bf16'": lora.dtype not in (None, "fp32", "bf16"),
        f"lora.dtype={lora.dtype!r} beside layers that are not quantised, whose adapters would be "
        "in float32: None": lora.dtype == "bf16"
        and work.method == "qlora"
        and _adapts_plain(model, lora),
        f"bnb_4bit_quant_storage={frozen.storage}: uint8": frozen.storage != "uint8",
        "llm_int8_skip_modules that does not name the head": _quantises_head(model),
        f"batch · sequence_tokens={work.batch * work.sequence_tokens} on {deploy.gpu}: above "
        f"{MAX_ROWS}, or a GPU of NVIDIA's whose multiprocessors are known": (
            setting.device == "cuda"
            and work.batch * work.sequence_tokens <= MAX_ROWS
            and not (setting.multiprocessors and (setting.capability or "")[:1].isdigit())
        ),
        "an odd number of columns on a CPU: even": setting.device == "cpu" and _has_odd(model),
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"training beside 4-bit weights is not planned yet with {what}")


def _has_odd(model: Model) -> bool:
    """Rows of an odd number of elements, which the CPU's kernel leaves to Python."""
    return any(p.shape[1] % 2 for p, _ in quantised_layers(model))


def _quantises_head(model: Model) -> bool:
    """Whether the head would be of 4 bits, too, one that is tied included."""
    frozen, head = model.quantization, model.checkpoint_name("lm_head.weight")
    assert isinstance(frozen, FourBit)
    weight = Parameter(name=head, group="head", layer=None, shape=(1, 1), linear=True)
    return model.lm_head and frozen.replaces(weight)


def _adapts_plain(model: Model, lora: LoRA) -> bool:
    """Whether some adapters stand beside layers that bitsandbytes leaves alone."""
    modules, quantised = adapted(model, lora), {p.name for p, _ in quantised_layers(model)}
    return any(
        p.linear and module_of(p) in modules and p.name not in quantised for p in model.parameters()
    )


def quantised_layers(model: Model) -> Iterator[tuple[Parameter, Parameter]]:
    """Weights that bitsandbytes has quantised, by their name here and as they are saved."""
    if not isinstance(model.quantization, FourBit):
        return
    saved = list(model.checkpoint_parameters())
    method = model.quantization.of(saved, model.model_type)
    yield from (
        (ours, theirs)
        for ours, theirs in zip(model.parameters(), saved, strict=True)
        if method.replaces(theirs)
    )


def kbit_rows(model: Model, runtime: Runtime, held_dtype: str, computed: str) -> list[Row]:
    """Rows of 4-bit weights as they lie on the device, and of all that is not quantised."""
    assert model.quantization is not None
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    for p, tensor in held_tensors(model, held_dtype, computed):
        key = (p.group, tensor.role, tensor.dtype)
        tensors, size = sizes.get(key, (0, 0))
        sizes[key] = (tensors + 1, size + tensor.size_bytes)
    return [
        *stored_rows(sizes, model.quantization.method),
        *runtime.buffer_rows(model, dtype=computed),
    ]


def held_tensors(
    model: Model, held_dtype: str, computed: str
) -> Iterator[tuple[Parameter, Stored]]:
    """What is held of what is stored (functional.py, QuantState), with the parameter it stands for.

    The JSON of a file is Python's, the offset of nested scales in it a tensor. Biases of quantised
    layers are cast in place to what the layer computes in when it first runs (nn/modules.py,
    Linear4bit.forward).
    """
    nested = isinstance(model.quantization, FourBit) and model.quantization.double_quant
    stored = [(p, s) for p, s in model.stored_tensors(held_dtype) if s.copies == 1]
    scales = ".weight.absmax"
    layers = {s.name.removesuffix(scales) for _, s in stored if s.name.endswith(scales)}
    for p, s in stored:
        if ".quant_state." in s.name:
            if nested:
                yield p, replace(s, dtype="fp32", shape=(1,), role="scale")
        elif s.name.removesuffix(".bias") in layers:
            yield p, replace(s, dtype=computed)
        else:
            yield p, s
