"""LLaMA-Adapter (arXiv:2303.16199) and its second version (arXiv:2304.15010), as lit-gpt has them.

lit_gpt/adapter.py: from the third block on a prefix of 10 embeddings and a gate for each head. Its
keys and values are made once and kept (`adapter_kv_cache`); the validation before the first step
makes them without a gradient, so that the prefix is among what is trained but never changes.
lit_gpt/adapter_v2.py: also a bias and a scale of every linear layer, and all norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.layers import GQA
from planner.ledger import Row
from planner.model import Model
from planner.parameters import layer_parameters
from planner.tensors import Parameter, tensor

METHODS = ("adapter", "adapter-v2")
PREFIX = "adapter_wte.weight"
PROMPT_TOKENS, START_LAYER = 10, 2
"""`adapter_prompt_length` and `adapter_start_layer`."""


def prefix_adapters(model: Model, method: str) -> list[Parameter]:
    """What stands beside the model's own parameters, in the order of the module's."""
    found = []
    if method == "adapter-v2":
        found += [*_scaled("lm_head", model.vocab_size)]
    for index, layer in enumerate(model.layers):
        gqa = layer.attention
        assert isinstance(gqa, GQA)
        found += [
            replace(p, name=f"layers.{index}.{p.name}", layer=index)
            for p in of_layer(model, gqa, index, method)
        ]
    return found


def of_layer(model: Model, gqa: GQA, index: int, method: str) -> Iterator[Parameter]:
    """Those of one block, named relative to it."""
    if index >= START_LAYER:
        yield tensor(f"self_attn.{PREFIX}", PROMPT_TOKENS, model.hidden_size)
        yield tensor("self_attn.gating_factor", 1, 1, gqa.num_attention_heads, 1)
    if method == "adapter-v2":
        outs: dict[str, int] = {}
        for p in layer_parameters(model.layers[index], model.hidden_size):
            if p.linear:
                module = p.name.removesuffix(".weight")
                fused = "self_attn.qkv_proj"
                module = fused if module.endswith(("q_proj", "k_proj", "v_proj")) else module
                outs[module] = outs.get(module, 0) + p.shape[0]
        for module, out in outs.items():
            yield from _scaled(module, out)


def trained_beside(model: Model, method: str) -> list[Parameter]:
    """All that gets a gradient: in the second version the norms of the model, too."""
    beside = (p for p in prefix_adapters(model, method) if not p.name.endswith(PREFIX))
    return [*beside, *(p for p in model.parameters() if is_trained(p, method))]


def is_trained(p: Parameter, method: str) -> bool:
    """Whether one of the model's own parameters is."""
    return method == "adapter-v2" and p.group == "norm"


def kept_rows(model: Model, b: int) -> list[Row]:
    """The prefix's keys and values in each block that has one."""
    rows = []
    for layer in model.layer_kinds():
        count = sum(other == layer for other in model.layers[START_LAYER:])
        gqa = layer.attention
        assert isinstance(gqa, GQA)
        width = kept_width(gqa)
        if count:
            values = (("A", PROMPT_TOKENS), ("width", width), ("b", b))
            rows.append(
                Row(
                    component="weights",
                    item="keys and values of the prefix, kept",
                    count=count,
                    formula="A · width · b",
                    values=values,
                    size_bytes=count * PROMPT_TOKENS * width * b,
                )
            )
    return rows


def kept_width(gqa: GQA) -> int:
    """Repeated for every head; of one group both are views of the projection, queries and all."""
    H, D = gqa.num_attention_heads, gqa.head_dim
    return (H + 2) * D if gqa.num_key_value_heads == 1 else 2 * H * D


def _scaled(module: str, out: int) -> Iterable[Parameter]:
    return (tensor(f"{module}.adapter_{what}", out) for what in ("bias", "scale"))
