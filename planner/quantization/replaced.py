"""Which linear layers of transformers' classes bitsandbytes leaves alone.

transformers 5.23, quantizers/base.py, get_keys_to_not_convert: output embeddings, tied tensors, and
what the last parameter of all belongs to; integrations/bitsandbytes.py, replace_with_bnb_linear:
nn.Linear and Conv1D themselves, no subclass; and what a class keeps in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.quantization.skip import OUTPUT
from planner.tensors import Parameter

HEADS = (*OUTPUT, "embed_out", "output_projection")
"""Output embeddings by the names that most classes give them."""
OWN_HEADS = {"rwkv": "head", "whisper": "proj_out"}
"""Output embeddings of other names, by model type."""
KEPT_IN_FP32 = (
    "DenseReluDense.wo",  # T5
    "indexer.weights_proj",  # sparse latents
    "indexer.scorer.weights_proj",  # deepseek_v4, with what follows
    "self_attn.compressor.gate_proj",
    "self_attn.compressor.kv_proj",
    "self_attn.compressor.indexer.gate_proj",
    "self_attn.compressor.indexer.kv_proj",
)
"""Layers that classes of transformers keep wide (_keep_in_fp32_modules)."""
OWN_CLASSES = (
    "feed_forward.router",  # Llama4Router
    "mlp.router",  # PhimoeTopKRouter
    "self_attn.o_a_proj",  # DeepseekV4GroupedLinear
    "head.attention.out_proj",  # of nn.MultiheadAttention in Siglip's pooling head
)
"""Linear layers whose classes are not nn.Linear itself."""
OWN_CLASSES_ALONE = ("falcon",)
"""Model types all of whose linear layers are of a class of their own (FalconLinear)."""
LAST = {
    "clip": "text_projection",
    "gemma3n_text": "model.altup_unembed_projections.",
    "gemma4": "model.embed_audio.",
    "gemma4_unified": "model.embed_audio.",
}
"""What stands last in a class without output embeddings of its own, the last of several."""


def left_alone(parameters: Sequence[Parameter], model_type: str) -> tuple[str, ...]:
    """Modules that are left alone besides HEADS where a config names none.

    `parameters` are those of a checkpoint, tied ones once.
    """
    linears = [p for p in parameters if p.linear]
    names = [p.name.removesuffix(".weight") for p in linears]
    alone = [name for p, name in zip(linears, names, strict=True) if p.shared]
    if model_type in OWN_HEADS:
        return (*alone, OWN_HEADS[model_type])
    if any(name.endswith(HEADS) for name in names):
        return tuple(alone)
    if model_type in LAST:
        found = [name for name in names if name.startswith(LAST[model_type])]
        return (*alone, *found[-1:])
    return (*alone, *_last_of_blocks(parameters))


def of_own_class(module: str, model_type: str) -> bool:
    """Whether a linear layer is of a subclass of nn.Linear."""
    return model_type in OWN_CLASSES_ALONE or module.endswith(OWN_CLASSES)


def _last_of_blocks(parameters: Sequence[Parameter]) -> list[str]:
    """The linear layer at the end of the blocks, where nothing stands behind them: no norm has a
    weight (olmo).
    """
    last = parameters[-1]
    behind = [p for p in parameters if p.layer is None and p.group not in ("embedding", "head")]
    normed = any(p.group == "norm" for p in parameters)
    if behind or normed or last.layer is None or not last.linear:
        return []
    return [last.name.removesuffix(".weight")]
