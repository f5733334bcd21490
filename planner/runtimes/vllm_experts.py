"""What the kernels of vLLM's routed experts ask for: room to work in, and padded weights.

Layers share one workspace that is kept (v1/worker/workspace.py, 0.19.1). By which kernel runs:
select_mxfp4_moe_backend (fused_moe/oracle/mxfp4.py), and Triton's for everything else that was held
against logs.
"""

from __future__ import annotations

from typing import Literal

from planner.layers import MoE
from planner.ledger import Row
from planner.model import Model
from planner.parameters import layer_parameters
from planner.quantization.mxfp4 import Mxfp4

Kernel = Literal["triton", "gpt-oss triton", "marlin"]

MARLIN_INNER, MARLIN_HIDDEN, TRITON_INNER = 128, 256, 64
"""Multiples that intermediate and hidden size of mxfp4 experts are padded to.

mxfp4_round_up_hidden_size_and_intermediate_size, the same file."""


def kernel(model: Model, capability: str | None) -> Kernel:
    """Triton's own mxfp4 kernels from Hopper to before sm_110, Marlin on other CUDA devices."""
    if not isinstance(model.quantization, Mxfp4):
        return "triton"
    try:
        number = float(capability or 0)
    except ValueError:  # AMD's gfx names
        return "gpt-oss triton"
    return "gpt-oss triton" if 9.0 <= number < 11.0 else "marlin"


def padded(sizes: tuple[int, int], kind: Kernel) -> tuple[int, int]:
    """(intermediate, hidden) size as the kernel has them."""
    i, h = sizes
    if kind == "marlin":
        return _up(i, MARLIN_INNER), _up(h, MARLIN_HIDDEN)
    return (_up(i, TRITON_INNER), h) if kind == "gpt-oss triton" else (i, h)


def workspace_elements(model: Model, capability: str | None) -> int:
    """Elements for each token of a pass, in the model's dtype, of the largest mixture.

    Triton, Marlin   k · (max(i, h) + max(N, h)), N = 2 · i where they are gated
    gpt-oss Triton   h + k · i
    workspace_shapes of TritonExperts, MarlinExperts and OAITritonExperts (layers/fused_moe/).
    """
    kind, largest = kernel(model, capability), 0
    for moe in mixtures(model):
        k = moe.num_experts_per_tok
        i, h = padded((moe.moe_intermediate_size, moe.latent_size or model.hidden_size), kind)
        first = 2 * i if moe.gated else i
        size = h + k * i if kind == "gpt-oss triton" else k * (max(i, h) + max(first, h))
        largest = max(largest, size)
    return largest


def padding_rows(model: Model, capability: str | None) -> list[Row]:
    """What padded mxfp4 experts take beyond their weights; nothing where they fit the kernel."""
    kind, quantization = kernel(model, capability), model.quantization
    if quantization is None:
        return []
    extra = 0
    for layer, count in model.layer_kinds().items():
        if not isinstance(layer.feed_forward, MoE):
            continue
        i, h = layer.feed_forward.moe_intermediate_size, model.hidden_size
        wide_i, wide_h = padded((i, h), kind)
        if (i, h) == (wide_i, wide_h):
            continue
        weights = sum(
            stored.size_bytes
            for p in layer_parameters(layer, h)
            if p.group == "experts" and len(p.shape) == 3
            for stored in quantization.stored(p, model.dtype)
        )
        extra += count * (weights * wide_i * wide_h // (i * h) - weights)
    if not extra:
        return []
    return [
        Row(
            component="weights",
            item="experts, padded for their kernel",
            count=1,
            formula="bytes",
            values=(("bytes", extra),),
            size_bytes=extra,
            note=f"{kind} pads intermediate and hidden size (vLLM 0.19)",
        )
    ]


def mixtures(model: Model) -> list[MoE]:
    """The kinds of routed experts."""
    kinds = model.layer_kinds()
    return [kind.feed_forward for kind in kinds if isinstance(kind.feed_forward, MoE)]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
