"""Scales that vLLM keeps wider than the checkpoint has them."""

from __future__ import annotations

from functools import lru_cache

from planner.ledger import Row
from planner.model import Model
from planner.quantization.base import STORED_BYTES
from planner.quantization.compressed import CompressedTensors

WIDENED = ("int-quantized", "float-quantized", "naive-quantized")


@lru_cache(maxsize=128)
def widened_scales(model: Model, dtype: str) -> tuple[Row, ...]:
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
