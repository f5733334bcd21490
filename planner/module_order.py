"""The order in which a module makes its tensors: that of its weights, and of optimizer states."""

from __future__ import annotations

from collections.abc import Iterable

from planner.model import Model
from planner.tensors import Parameter

BEHIND = {
    "deepseek_v2": ("mlp.gate.", "mlp.experts.down_proj"),
    "deepseek_v3": ("mlp.gate.", "mlp.experts.down_proj"),
    "phi3": ("self_attn.qkv_proj.", "self_attn.o_proj."),
    "qwen3_moe": ("mlp.gate.", "mlp.experts.down_proj"),
}
"""Of transformers' classes: tensors that stand right behind another one, not where we list them.
Norms that stand first in a block are left behind it: they are small."""


def module_order(parameters: Iterable[Parameter], model: Model, *, runtime: str) -> list[Parameter]:
    """Embedding, layers, norm and head, as `named_parameters()` has them."""
    ordered = sorted(parameters, key=lambda p: p.place)
    if runtime != "transformers" or model.text_type not in BEHIND:
        return ordered
    late, anchor = BEHIND[model.text_type]
    made: list[Parameter] = []
    held: list[Parameter] = []
    for p in ordered:
        if late in p.name:
            held.append(p)
            continue
        made.append(p)
        if anchor in p.name:
            made += held
            held = []
    return made + held
