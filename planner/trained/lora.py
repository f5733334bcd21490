"""Low-rank adapters, as peft 0.21 puts them into a model: W · x + (α / r) · B · A · x, W frozen.

arXiv:2106.09685. A is [r, in], B is [out, r]; they stand beside every linear layer whose name is
among the targets (peft/tuners/lora/layer.py), in float32 whatever the model's dtype
(peft/tuners/tuners_utils.py, cast_adapter_dtype). DoRA (arXiv:2402.09353) has a magnitude
[out] with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from planner.dtypes import element_bytes
from planner.errors import ConfigError, shown
from planner.layers import MoE
from planner.model import Model
from planner.parameters import layer_parameters
from planner.tensors import Parameter, tensor
from planner.workload import ALL_LINEAR, LoRA

HEAD = "lm_head"


def adapter_bytes(lora: LoRA) -> int:
    """Bytes of an element of the adapters."""
    return element_bytes(lora.dtype or "fp32")


@lru_cache(maxsize=256)
def adapted(model: Model, lora: LoRA) -> frozenset[str]:
    """The linear layers that get adapters, by the last word of their names in the llama family.

    Targets may be words of either family's names, as peft compares them with the live module's.
    """
    known = {
        (module_of(p), model.checkpoint_name(p.name).removesuffix(".weight").rpartition(".")[2])
        for p in _linears(model)
    }
    if lora.targets == ALL_LINEAR:
        if has_experts(model):
            raise ConfigError(
                f"lora.targets={ALL_LINEAR!r} of {model.model_type} is not planned yet: names of "
                "linear layers of its attention (peft adapts its experts, too)"
            )
        return frozenset(module for module, _ in known)
    names = {name for pair in known for name in pair}
    for target in lora.targets:
        if target not in names:
            raise ConfigError(
                f"lora.targets: {shown(target)} is no linear layer of {model.model_type} that is "
                f"adapted: {ALL_LINEAR}, or some of {', '.join(sorted(names))}"
            )
    return frozenset(m for m, own in known if {m, own} & set(lora.targets))


def module_of(p: Parameter) -> str:
    """The last word of a linear layer's name."""
    return p.name.split(".")[-2]


def adapters_beside(
    parameters: Iterable[Parameter], lora: LoRA, modules: frozenset[str]
) -> Iterator[Parameter]:
    """A, B and DoRA's magnitude of every one of these that is a linear layer with adapters."""
    for p in parameters:
        if p.linear and module_of(p) in modules:
            (out, into), name = p.shape, p.name.removesuffix(".weight")
            for side, shape in (("A", (lora.rank, into)), ("B", (out, lora.rank))):
                yield replace(tensor(f"{name}.lora_{side}.weight", *shape), layer=p.layer)
            if lora.dora:
                made = tensor(f"{name}.lora_magnitude_vector.weight", out)
                yield replace(made, layer=p.layer)


def adapters(model: Model, lora: LoRA) -> list[Parameter]:
    """All that is trained."""
    return list(adapters_beside(model.parameters(), lora, adapted(model, lora)))


def has_experts(model: Model) -> bool:
    """Whether some layer is a mixture."""
    return any(isinstance(layer.feed_forward, MoE) for layer in model.layer_kinds())


def _linears(model: Model) -> Iterator[Parameter]:
    """Those that may be adapted; the words of a mixture's feed-forward mean its experts to peft."""
    beside_experts = has_experts(model)
    for layer in model.layer_kinds():
        for p in layer_parameters(layer, model.hidden_size):
            if p.linear and (p.group == "attention" or not beside_experts):
                yield p
    yield from (p for p in model.outer_parameters() if p.linear and module_of(p) != HEAD)
