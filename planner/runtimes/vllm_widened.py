"""What vLLM keeps wider than the checkpoint has it: scales, and the up-projection of latents."""

from __future__ import annotations

from functools import lru_cache

from planner.dtypes import element_bytes
from planner.layers import MLA
from planner.ledger import Row
from planner.model import Model
from planner.quantization.base import STORED_BYTES
from planner.quantization.compressed import CompressedTensors

WIDENED = ("int-quantized", "float-quantized", "naive-quantized")


def widened_rows(model: Model, dtype: str) -> list[Row]:
    """Both, where there are any."""
    if model.quantization is None:
        return []
    return [*_scales(model, dtype), *_latents(model, dtype)]


@lru_cache(maxsize=128)
def _scales(model: Model, dtype: str) -> tuple[Row, ...]:
    """Scales of 8-bit weights of compressed-tensors, float32 in place of the checkpoint's dtype.

    create_weights of CompressedTensorsW8A8Int8 and create_fp8_scale_parameter (0.19.1). Packed
    4-bit weights keep theirs in the model's dtype.
    """
    quantization = model.quantization
    if not isinstance(quantization, CompressedTensors):
        return ()
    if not all(scheme.format in WIDENED for scheme in quantization.config_groups):
        return ()
    scales = sum(
        stored.size_bytes // STORED_BYTES[stored.dtype]
        for _, stored in model.stored_tensors(dtype)
        if stored.role == "scale" and STORED_BYTES[stored.dtype] == 2
    )
    if not scales:
        return ()
    return (
        Row(
            component="weights",
            item="scales, widened to float32",
            count=1,
            formula="scales · 2",
            values=(("scales", scales),),
            size_bytes=2 * scales,
            note="vLLM 0.19 keeps scales of 8-bit weights in float32",
        ),
    )


@lru_cache(maxsize=128)
def _latents(model: Model, dtype: str) -> tuple[Row, ...]:
    """W_UK and W_UV in the model's dtype beside a quantised kv_b_proj.

    MLAAttention.process_weights_after_loading (layers/attention/mla_attention.py, 0.19.1): the
    products with them have no quantised kernel. Of plain weights they are views.
    """
    wanted = {
        f"{model.checkpoint_name(f'layers.{index}.self_attn.kv_b_proj.weight')}"
        for index, layer in enumerate(model.layers, model.first_layer)
        if isinstance(layer.attention, MLA)
    }
    if not wanted:
        return ()
    quantised = {
        p.name: p.count
        for p, stored in model.stored_tensors(dtype)
        if p.name in wanted and stored.role == "weight" and stored.dtype != dtype
    }
    elements, b = sum(quantised.values()), element_bytes(dtype)
    if not elements:
        return ()
    return (
        Row(
            component="weights",
            item="up-projections of latents, dequantised",
            count=1,
            formula="elements · b",
            values=(("elements", elements), ("b", b)),
            size_bytes=elements * b,
            note="W_UK and W_UV beside kv_b_proj (vLLM 0.19)",
        ),
    )
