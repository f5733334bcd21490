"""The order in which a module makes its tensors: that of its weights, and of optimizer states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest

from planner.model import Model
from planner.tensors import Parameter

NORMS = ("input_layernorm.", "post_attention_layernorm.")
ROUTED = ("self_attn.", "mlp.experts.", "mlp.gate.", "mlp.")
GPT2 = ("input_layernorm.", "self_attn.", "post_attention_layernorm.", "mlp.")
BLOCKS = {
    "bloom": GPT2,
    "deepseek_v2": ROUTED,
    "deepseek_v3": ROUTED,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": (*NORMS, "self_attn.", "mlp."),
    "opt": (
        *(f"self_attn.{part}_proj." for part in "kvqo"),
        "input_layernorm.",
        "mlp.",
        "post_attention_layernorm.",
    ),
    "phi3": ("self_attn.o_proj.", "self_attn.qkv_proj.", "mlp."),
    "qwen3_moe": ROUTED,
}
"""How tensors of a block stand in transformers' classes, where it is not as they are listed here;
what none of these begins stands behind them."""


PARTS = ("q_proj", "k_proj", "v_proj")
OPT_POST = (
    *(f"self_attn.{part}_proj." for part in "kvqo"),
    "post_attention_layernorm.",
    "mlp.",
    "post_feedforward_layernorm.",
)
"""OPT-350m, whose norms come behind what they norm."""


ENDS = ("embed_tokens.", "embed_norm.", "project_", "embed_positions.", "norm.", "lm_head.")
"""What attnlab's Transformer makes before its layers (_build_ends), norm and head among it."""


def module_order(parameters: Iterable[Parameter], model: Model, *, runtime: str) -> list[Parameter]:
    """Embeddings, layers, norm and head, as in `named_parameters()`; in attnlab layers last."""
    theirs, ours = runtime == "transformers", runtime == "attnlab"
    norm_first = theirs and model.text_type == "opt"  # the decoder's last norm

    def place(p: Parameter) -> tuple[int, int, int]:
        if p.layer is not None:
            name = p.name.removeprefix(f"layers.{p.layer}.")
            return 2, p.layer, _rank(name, model) if theirs else 0
        if ours:
            return 0, next((i for i, end in enumerate(ENDS) if p.name.startswith(end)), 0), 0
        if theirs and p.name.startswith("project_"):  # OPTDecoder makes project_out first
            return 0, 1 + p.name.startswith("project_in"), 0
        if p.group == "embedding" or p.name.startswith("embed"):
            return 0, 0, 0
        return (1 if norm_first and p.name.startswith("norm.") else 3), 0, 0

    return sorted(parameters, key=place)


def block_order(parameters: Iterable[Parameter], model: Model) -> list[Parameter]:
    """Those of one block of transformers' classes, named relative to it."""
    return sorted(parameters, key=lambda p: _rank(p.name, model))


def _rank(name: str, model: Model) -> int:
    starts = BLOCKS.get(model.text_type, ())
    if model.text_type == "opt" and model.layers[0].placement == "post-sum":
        starts = OPT_POST
    return next((i for i, start in enumerate(starts) if name.startswith(start)), len(starts))


def one_matrix(sizes: Mapping[Parameter, list[int]]) -> dict[Parameter, list[int]]:
    """Bytes of each parameter's tensors, those of queries, keys and values in one.

    lit-gpt has them so: what is stored of k_proj and v_proj is stored behind that of q_proj.
    """
    joined: dict[Parameter, list[int]] = {}
    first: dict[tuple[int | None, str], Parameter] = {}
    for p, own in sizes.items():
        module, _, what = p.name.rpartition(".")
        if not module.endswith(PARTS):
            joined[p] = own
            continue
        q = first.setdefault((p.layer, what), p)
        joined[q] = [sum(pair) for pair in zip_longest(joined.get(q, ()), own, fillvalue=0)]
    return joined
